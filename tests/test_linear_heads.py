"""`hydra::linear_heads`: what it stands for, its gradients, its Triton kernels in the interpreter, and graphs with it."""

from __future__ import annotations

import os
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import hydrasurgery as hs
from hydrasurgery import ops
from hydrasurgery.dialect.linear_heads import GRADIENTS, Inputs
from hydrasurgery.ir.launches import fewer_launches
from hydrasurgery.ir.state import run_linear
from hydrasurgery.kernels.head_gates import reference as gates
from hydrasurgery.kernels.head_inputs import reference as head_inputs
from hydrasurgery.kernels.rotary import TURNS
from hydrasurgery.layers import FORGET, l2_norm, rotate_tokens, to_heads, to_tokens
from tests.families import FAMILIES, stir, tiny

LINEAR_HEADS = torch.ops.hydra.linear_heads
B, T, C, H = 2, 7, 5, 3
MASKS = {
    "none": None,
    "left": [[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]],
    "holes": [[1, 0, 1, 1, 0, 0, 1], [0, 1, 0, 1, 1, 1, 0]],
    "documents": [[1] * 7] * 2,
}
interpreter = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")


def case(
    mask: str = "none", turn: str | None = "half", *, past: bool = False, taps: int = 4, gated: bool = True,
    values: int = 6, full: int = 1, turned: int = 6,
) -> tuple[Inputs, dict[str, Any]]:  # fmt: skip
    """The operator's inputs in fp64, heads of 6 channels, and its options."""
    torch.manual_seed(0)
    new = lambda *shape: torch.randn(*shape, dtype=torch.float64, requires_grad=True)  # noqa: E731
    widths = (6, 6, values)
    heads = [new(B, T, H, width).transpose(1, 2) for width in widths]  # as projections leave them
    valid = reset = previous = None
    if MASKS[mask] is not None:
        valid, reset = torch.tensor(MASKS[mask]).bool(), torch.zeros(B, T, dtype=torch.bool)
        previous = ops.previous_tokens(valid, torch.ones(1, 1, T, T))
    if mask == "documents":
        reset[0, 2] = reset[1, 4] = True
    angles = torch.randn(1, 1, T, turned, dtype=torch.float64)
    inputs = Inputs(
        new(B, T, C), *heads, new(B, T, full, values) if full else None, new(H, C), new(H), new(H), new(H, C), new(H),
        new(H, C) if gated else None, new(H), *(new(H * width, taps) if taps else None for width in widths),
        *(new(B, H * width, taps - 1) if past and taps else None for width in widths),
        new(B, H, 6, values) if past else None, valid, reset, previous,
        *((angles.cos(), angles.sin()) if turn else (None, None)),
    )  # fmt: skip
    slots = [0, *range(2, H + 1)] if full else list(range(H))
    return inputs, {"slots": slots, "scale": 0.7, "turn": turn or "half"}


def apart(x: Inputs, slots: list[int], scale: float, turn: str) -> list[Tensor]:
    """The same by the operators that graphs are written in: results, the state and the convolutions' states."""
    valid = torch.ones(B, T, dtype=torch.bool) if x.valid is None else x.valid
    decay = -x.A_log.exp() * F.softplus(x.hidden @ x.decay_weight.mT + x.dt_bias)
    decay = decay.masked_fill(~valid[..., None], 0)
    decay = decay if x.reset is None else decay.masked_fill(x.reset[..., None], FORGET)
    beta = torch.sigmoid(x.hidden @ x.beta_weight.mT + x.beta_bias).masked_fill(~valid[..., None], 0)
    gate = None if x.gate_weight is None else 2 * torch.sigmoid(x.hidden @ x.gate_weight.mT)[..., None]
    found, tails = [], []
    pasts = (x.q_past, x.k_past, x.v_past)
    for place, head in enumerate((x.q, x.k, x.v)):
        tokens = to_tokens(head, valid)
        if x.convs:
            mixed, tail = ops.causal_conv(tokens, x.convs[place], pasts[place], x.reset, x.previous)
            tokens = tokens + mixed
            tails.append(tail)
        y = to_heads(tokens, H)
        if place < 2:
            y = l2_norm(y if x.cos is None else rotate_tokens(y, x.cos, x.sin, turn))
        found.append(y)
    o, state = ops.linear_attention(*found, decay, beta, x.state, scale=scale)
    return [ops.scale_norm_fusion(x.o_full, o, x.gamma, gate, linear_heads=slots), state, *tails]


def results(x: Inputs, options: dict[str, Any]) -> list[Tensor]:
    out, state, *tails = LINEAR_HEADS(*x, **options)
    return [out, state, *(tail for stack in tails if stack.dim() > 1 for tail in stack.unbind(0))]


def with_grads(found: list[Tensor], x: Inputs) -> list[Tensor | None]:
    wanted = [t for t in x[:GRADIENTS] if t is not None]
    loss = sum((y * (y + 1).cos()).sum() for y in found)
    return [*found, *torch.autograd.grad(loss, wanted, allow_unused=True)]


def same(have: list[Tensor | None], want: list[Tensor | None], rtol: float, atol: float) -> None:
    assert len(have) == len(want)
    for place, (a, b) in enumerate(zip(have, want, strict=True)):
        assert (a is None) == (b is None), place
        assert a is None or torch.allclose(a.double(), b.double(), rtol=rtol, atol=atol), place


CASES = [
    *({"mask": mask, "turn": turn, "past": past} for mask, turn, past in product(MASKS, ("half", None), (False, True))),
    *({"turn": turn, "turned": turned} for turn, turned in product(TURNS, (4, 6))),
    {"taps": 0}, {"taps": 0, "mask": "holes", "past": True}, {"taps": 2, "mask": "left"}, {"gated": False},
    {"values": 4}, {"values": 8, "mask": "holes", "past": True}, {"full": 0}, {"full": 2},
]  # fmt: skip


@pytest.mark.parametrize("given", CASES, ids=str)
def test_it_is_what_it_stands_for(given):
    if given.get("full") == 2:
        x, options = case()
        x = x._replace(o_full=torch.randn(B, T, 2, 6, dtype=torch.float64, requires_grad=True))
        options["slots"] = [1, 2, 4]
    else:
        x, options = case(**given)
    same(with_grads(results(x, options), x), with_grads(apart(x, **options), x), 1e-9, 1e-10)


@pytest.mark.parametrize("frozen", [("hidden",), ("q", "k", "v"), ("hidden", "q", "k", "v", "o_full"), ("q_conv",)])
def test_what_asks_for_no_gradient_gets_none(frozen):
    x, options = case("holes", past=True)
    y = x._replace(**{name: getattr(x, name).detach() for name in frozen})
    found = LINEAR_HEADS(*y, **options)
    found[0].square().sum().backward()
    for name, one, other in zip(Inputs._fields, x, y, strict=True):
        if name in frozen:
            assert other.grad is None
        elif one is not None and one.is_leaf and one.requires_grad:
            assert one.grad is not None, name


def test_an_unread_last_state_costs_no_gradient():
    x, options = case(past=True)
    out, *rest = results(x, options)
    used = with_grads([out], x)
    want = with_grads([apart(x, **options)[0]], x)
    same(used, want, 1e-9, 1e-10)


@pytest.mark.parametrize(
    "given", [{}, {"mask": "holes", "past": True, "values": 4}, {"taps": 0, "gated": False, "full": 0}]
)
def test_fake_results_are_like_real_ones(given):
    x, options = case(**given)
    torch.library.opcheck(LINEAR_HEADS.default, tuple(x), options, test_utils=("test_schema", "test_faketensor"))
    plain = tuple(t if t is None else t.detach() for t in x)
    training = torch.ops.hydra.linear_heads_forward.default
    torch.library.opcheck(training, plain, options, test_utils=("test_schema", "test_faketensor"))
    out, state, tails, value_tails, kept = training(*plain, **options)
    given_grads = (torch.ones_like(out), None, None, None, kept)
    for wanted in ([True] * 4, [False] * 4):
        torch.library.opcheck(
            torch.ops.hydra.linear_heads_backward.default,
            (*given_grads, *plain),
            {**options, "wanted": wanted},
            test_utils=("test_schema", "test_faketensor"),
        )


def test_autocast_lowers_what_heads_read():
    x, options = case()
    x = Inputs(*(t if t is None else t.detach().float() for t in x))
    with torch.autocast("cpu", torch.bfloat16):
        out, state, *_ = LINEAR_HEADS(*x, **options)
    assert (out.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    wanted = LINEAR_HEADS(*x, **options)[0]
    assert torch.allclose(out.float(), wanted, atol=0.05) and not torch.equal(out.float(), wanted)


# --- kernels ------------------------------------------------------------------------------------------------------------------


def single(x: Any) -> Any:
    if isinstance(x, (list, tuple)):
        return type(x)(map(single, x))
    return x.detach().float() if isinstance(x, Tensor) and x.is_floating_point() else x


@interpreter
@pytest.mark.parametrize("given", [given for given in CASES if given.get("full", 1) == 1], ids=str)
def test_the_kernels_of_inputs_compute_it(given):
    from hydrasurgery.kernels.head_inputs import triton as kernel

    x, options = case(**given)
    inputs = Inputs(*(t if t is None else t.detach() for t in x)).inputs
    turn = options["turn"]
    wanted, tails = head_inputs.forward(*inputs, turn=turn)
    found, ends = kernel.forward(*single(inputs), turn=turn)
    same([*found, *ends], [*wanted, *tails], 1e-4, 1e-5)
    grads = [torch.randn_like(y) for y in head_inputs.unstacked(wanted)]
    for given_tails in [None, *([[torch.randn_like(tail) for tail in tails]] if tails else [])]:
        want = head_inputs.backward(grads, given_tails, *inputs, turn=turn)
        have = kernel.backward(single(grads), single(given_tails), *single(inputs), turn=turn)
        same([t for part in have for t in part], [t for part in want for t in part], 1e-4, 1e-5)


@interpreter
@pytest.mark.parametrize(("length", "dim", "processors"), [(1, 16, 1), (2, 32, 1), (150, 64, 1), (150, 64, 64)])
def test_they_take_any_length_and_width(length, dim, processors, monkeypatch):
    from hydrasurgery.kernels.head_inputs import triton as kernel

    monkeypatch.setattr(kernel, "processors", lambda device: processors)  # how many shares of a gradient there are
    torch.manual_seed(0)
    heads = [torch.randn(1, 2, length, dim) for _ in range(3)]
    weights, states = [torch.randn(2 * dim, 4) for _ in range(3)], [torch.randn(1, 2 * dim, 3) for _ in range(3)]
    inputs = (heads, weights, states, None, None, None, None)
    (y,), (tail,) = kernel.forward(*inputs)
    (want,), (want_tail,) = head_inputs.forward(*inputs)
    same([y, tail], [want, want_tail], 1e-5, 1e-5)
    grads = [torch.randn_like(part) for part in want]
    have, wanted = (module.backward(grads, None, *inputs) for module in (kernel, head_inputs))
    same([t for part in have for t in part], [t for part in wanted for t in part], 1e-4, 1e-4)


@interpreter
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("heads", "columns"), [(3, 16), (3, 9), (1, 8), (8, 24)])
def test_the_kernels_of_gates_compute_it(mask, heads, columns):
    from hydrasurgery.kernels.head_gates import triton as kernel

    torch.manual_seed(0)
    gated = columns >= 3 * heads
    raw = torch.randn(B, T, columns, dtype=torch.float64)
    raw[0, 0, 0], raw[0, 1, 0] = 40, -40  # where softplus is a line, and nothing
    parameters = torch.randn(3, heads, dtype=torch.float64).unbind(0)
    x, _ = case(mask)
    wanted = gates.forward(raw, *parameters, x.valid, x.reset, gated=gated)
    found = kernel.forward(raw.float(), *single(parameters), x.valid, x.reset, gated=gated)
    same(list(found), list(wanted), 1e-5, 1e-6)
    grads = [None if y is None else torch.randn_like(y) for y in wanted]
    want = gates.backward(*grads, raw, *parameters, x.valid, x.reset)
    have = kernel.backward(*single(grads), raw.float(), *single(parameters), x.valid, x.reset)
    same(list(have), list(want), 1e-4, 1e-5)


# --- on a GPU -----------------------------------------------------------------------------------------------------------------


def held(x: Inputs, dtype: torch.dtype, device: str) -> Inputs:
    """The same in another dtype, states and rates in float32, and on a device."""
    wide = ("state", "A_log", "dt_bias")

    def one(name: str, t: Tensor | None) -> Tensor | None:
        if t is None or not t.is_floating_point():
            return None if t is None else t.to(device)
        kind = torch.float32 if name in wide and dtype != torch.float64 else dtype
        return t.detach().to(device, kind).requires_grad_(t.requires_grad)

    return Inputs(*map(one, Inputs._fields, x))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("given", [given for given in CASES if given.get("full", 1) == 1], ids=str)
def test_a_gpu_is_no_further_from_the_truth_than_a_cpu(given, dtype):
    """Rows whose norm is nearly 0 lose all digits in bf16, on any machine: so the CPU's own error in that dtype is the measure."""
    x, options = case(**given)
    low = held(x, dtype, "cpu")
    exact = held(low, torch.float64, "cpu")
    truth = with_grads(apart(exact, **options), exact)
    here, there = (with_grads(results(y, options), y) for y in (low, held(low, dtype, "cuda")))
    floor = 2e-5 if dtype == torch.float32 else 2e-2
    for place, (want, cpu, gpu) in enumerate(zip(truth, here, there, strict=True)):
        if want is not None:
            want = want.detach()
            size = want.norm().clamp(min=1e-9)
            errors = [float((y.detach().cpu().double() - want).norm() / size) for y in (cpu, gpu)]
            assert errors[1] < 2 * errors[0] + floor, (place, errors)


# --- graphs -------------------------------------------------------------------------------------------------------------------


def run_fast(hybrid: torch.nn.Module) -> None:
    """Let the graphs run that GPUs do."""
    for module in hs.region_modules(hybrid).values():
        vars(module)["_run"] = module._run_fast


@pytest.mark.parametrize("family", FAMILIES)
def test_graphs_with_it_say_the_same(family):
    teacher = tiny(family)
    hybrid = stir(hs.rewrite(teacher, hs.plan_heads(teacher, ratio="1:1", strategy="fixed")))
    modules = hs.region_modules(hybrid).values()
    ids = torch.randint(3, 60, (2, 12))
    mask = torch.ones_like(ids)
    mask[0, :3] = mask[1, 5] = 0

    def run(mask: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        out = hybrid(ids, attention_mask=mask, labels=ids)
        trained = [p for m in modules for p in m.parameters()]
        seen = out.logits if mask is None else out.logits[mask.bool()]
        return seen, list(torch.autograd.grad(out.loss, trained, allow_unused=True))

    wanted = [run(mask), run(None)]
    for module in modules:
        fast = fewer_launches(module, module.region.graph)
        assert [n.target for n in fast.nodes if n.target in (run_linear, to_tokens)] == [run_linear]
    run_fast(hybrid)
    for (logits, grads), given in zip(wanted, (mask, None), strict=True):
        fast, fast_grads = run(given)
        assert torch.allclose(fast, logits, rtol=1e-5, atol=1e-5)
        for one, other in zip(grads, fast_grads, strict=True):
            assert (one is None) == (other is None)
            assert one is None or torch.allclose(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("layer", ["hydrahead", "conv=native", "conv=none", "rule=delta", "conv=residual"])
def test_layers_of_other_options_say_the_same(layer):
    teacher = tiny("qwen3")
    hybrid = stir(hs.rewrite(teacher, hs.plan_heads(teacher, ratio="1:1", strategy="fixed"), layer=layer)).eval()
    ids = torch.randint(3, 60, (2, 12))
    with torch.no_grad():
        wanted = hybrid(ids).logits
        run_fast(hybrid)
        assert torch.allclose(hybrid(ids).logits, wanted, rtol=1e-5, atol=1e-5)


def test_what_is_put_on_a_gate_is_not_passed_by():
    from hydrasurgery.ir.launches import has_plain_gates

    teacher = tiny("qwen3")
    hybrid = hs.rewrite(teacher, hs.plan_heads(teacher, ratio="1:1", strategy="fixed"))
    hydra = next(iter(hs.region_modules(hybrid).values())).hydra
    assert has_plain_gates(hydra)
    handle = hydra.decay.a_proj.register_forward_hook(lambda *_: None)
    assert not has_plain_gates(hydra)
    handle.remove()
    assert has_plain_gates(hydra)
    hydra.beta.b_proj = torch.nn.Sequential(hydra.beta.b_proj)  # as an adapter wraps it
    assert not has_plain_gates(hydra)


def test_they_compile_to_one_graph():
    teacher = tiny("qwen3")
    hybrid = stir(hs.rewrite(teacher, hs.plan_heads(teacher, ratio="1:1", strategy="fixed")))
    run_fast(hybrid)
    ids = torch.randint(3, 60, (2, 12))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    compiled = torch.compile(hybrid, backend="aot_eager", fullgraph=True)
    for given in (None, mask):
        wanted, found = (model(ids, attention_mask=given, labels=ids, use_cache=False) for model in (hybrid, compiled))
        assert torch.allclose(found.loss, wanted.loss, rtol=1e-5)
        parameters = [p for m in hs.region_modules(hybrid).values() for p in m.hydra.parameters()]
        for one, other in zip(*(torch.autograd.grad(out.loss, parameters) for out in (wanted, found)), strict=True):
            assert torch.allclose(one, other, rtol=1e-4, atol=1e-7)


def test_gpus_run_them_unless_something_is_put_on_a_gate():
    """On tensors that say that they are on a GPU; what would run there is only named."""
    teacher = tiny("qwen3")
    hybrid = hs.rewrite(teacher, hs.plan_heads(teacher, ratio="1:1", strategy="fixed"))
    module = next(iter(hs.region_modules(hybrid).values()))
    vars(module).update(_run=lambda *_: "plain", _run_fast=lambda *_: "fast")
    with FakeTensorMode():
        there, here = (torch.empty(1, 4, 64, device=device) for device in ("cuda", "cpu"))
        assert (module(there), module(here)) == ("fast", "plain")
        handle = module.hydra.output_gate.register_forward_pre_hook(lambda *_: None)
        assert module(there) == "plain"
        handle.remove()
        assert module(there) == "fast"

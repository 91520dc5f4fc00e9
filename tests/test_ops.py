"""The operators as operators: schema, fakes, autograd, tracing, autocast, and the bits of transformers' attention."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as softcap_attention
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as sinks_attention

from hydrasurgery import ops
from hydrasurgery.kernels import registry
from hydrasurgery.kernels.linear_attention import reference
from hydrasurgery.layers import l2_norm, to_heads
from tests.families import same


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype).requires_grad_()


def strided(*shape: int) -> Tensor:
    """[.., a, b, ..] as projections leave it: the two middle dimensions swapped in memory."""
    batch, first, second, *rest = shape
    return torch.randn(batch, second, first, *rest).transpose(1, 2).requires_grad_()


def causal_mask(queries: int, keys: int, batch: int = 2) -> Tensor:
    """Bool, causal, the first sequence left-padded by two keys."""
    seen = torch.ones(batch, 1, queries, keys, dtype=torch.bool).tril(keys - queries)
    seen[0, :, :, :2] = False
    return seen


def additive(mask: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


# --- opcheck -----------------------------------------------------------------------------------------------------------------

ATTENTION_CASES = {
    "plain": (lambda: (normal(2, 4, 5, 8), normal(2, 4, 5, 8), normal(2, 4, 5, 6)), {}),
    "grouped, strided": (lambda: (strided(2, 4, 5, 8), strided(2, 2, 7, 8), strided(2, 2, 7, 8)), {"window": 3}),
    "one query": (lambda: (strided(2, 4, 1, 8), strided(2, 2, 7, 8), strided(2, 2, 7, 8)), {"scale": 0.5}),
    "bool mask": (lambda: (strided(2, 4, 5, 8), strided(2, 2, 7, 8), strided(2, 2, 7, 8), causal_mask(5, 7)), {}),
    "softcap, sinks": (
        lambda: (normal(2, 4, 5, 8), normal(2, 2, 5, 8), normal(2, 2, 5, 8), additive(causal_mask(5, 5)), normal(4)),
        {"softcap": 5.0},
    ),
    "one of all": (
        lambda: (normal(1, 1, 1, 1), normal(1, 1, 1, 1), normal(1, 1, 1, 1), None, normal(1)),
        {"causal": False},
    ),
}


@pytest.mark.parametrize("case", ATTENTION_CASES)
def test_attention_is_a_sound_operator(case):
    make, options = ATTENTION_CASES[case]
    opcheck(torch.ops.hydra.attention.default, make(), options)


def recurrence(rule: str, length: int = 5, channels: bool = False, state: bool = True) -> tuple[Tensor | None, ...]:
    decay = torch.rand(2, length, 3, *[8] * channels).neg().requires_grad_() if "gated" in rule else None
    beta = torch.rand(2, length, 3).requires_grad_() if "delta" in rule else None
    first = normal(2, 3, 8, 4) if state else None
    return strided(2, length, 3, 8), strided(2, length, 3, 8), strided(2, length, 3, 4), decay, beta, first


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        ("linear", {"state": False}),
        ("gated", {"channels": True}),
        ("delta", {"length": 1}),
        ("gated_delta", {}),
        ("gated_delta", {"channels": True, "state": False, "length": 33}),
    ],
)
def test_linear_attention_is_a_sound_operator(rule, options):
    inputs, constants = recurrence(rule, **options), {"rule": rule, "scale": 0.3}
    opcheck(torch.ops.hydra.linear_attention.default, inputs, constants)
    detached = [None if x is None else x.detach() for x in inputs]
    opcheck(torch.ops.hydra.linear_attention_forward.default, detached, constants)


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("length", [1, 6])
@pytest.mark.parametrize("carried", [False, True])
def test_causal_conv_is_a_sound_operator(width, length, carried):
    x = torch.randn(2, 3, length).mT.requires_grad_()
    state, reset = (normal(2, 3, width - 1), torch.rand(2, length) < 0.4) if carried else (None, None)
    previous = ops.previous_tokens(torch.rand(2, length) < 0.6, x) if carried else None
    opcheck(torch.ops.hydra.causal_conv.default, (x, normal(3, width), state, reset, previous))


FUSION_CASES = {
    "both": (lambda: (strided(2, 5, 2, 6), strided(2, 5, 3, 6), normal(3), None), [0, 2, 3], False),
    "both, normalised, gated": (
        lambda: (strided(2, 5, 2, 6), strided(2, 5, 3, 6), normal(5), normal(2, 5, 3, 6)),
        [0, 2, 3],
        True,
    ),
    "linear only": (lambda: (None, strided(2, 1, 3, 6), normal(3), normal(2, 1, 3, 1)), [0, 1, 2], False),
    "full only": (lambda: (strided(2, 5, 2, 6), None, normal(0), None), [], False),
}


@pytest.mark.parametrize("case", FUSION_CASES)
def test_scale_norm_fusion_is_a_sound_operator(case):
    make, heads, norm_full = FUSION_CASES[case]
    opcheck(torch.ops.hydra.scale_norm_fusion.default, make(), {"linear_heads": heads, "norm_full": norm_full})


def token(width: int, raw: bool) -> tuple[tuple, dict]:
    """Inputs of a decode step of 2 sequences, 3 heads, K = 8 and V = 4."""
    q, k, v = (torch.randn(2, 3, size) for size in (8, 8, 4))
    decay, beta, gate = -torch.rand(2, 3), torch.rand(2, 3), torch.randn(2, 3)
    rates = (torch.randn(3), torch.randn(3)) if raw else (None, None)
    sizes = (24, 24, 12) if width else ()
    weights, pasts = [torch.randn(c, width) for c in sizes], [torch.randn(2, c, width - 1) for c in sizes]
    states = {"state": torch.randn(2, 3, 8, 4), "conv_states": pasts}
    return (q, k, v, decay, beta, gate, torch.randn(3), *rates, weights), states


@pytest.mark.parametrize(("width", "raw"), [(0, False), (4, True)])
def test_decode_step_is_a_sound_operator(width, raw):
    inputs, states = token(width, raw)
    flags = {"valid": torch.tensor([True, False]), "reset": torch.tensor([True, False])} if raw else {}
    opcheck(torch.ops.hydra.decode_step.default, (*inputs, *states.values()), {"eps": 1e-5, **flags})


def test_decode_step_of_padding_and_of_a_first_token():
    inputs, states = token(4, True)
    before = copy.deepcopy(states)
    found = ops.decode_step(*inputs, **states, valid=torch.tensor([True, False]), reset=torch.tensor([True, False]))
    empty = {"state": torch.zeros(2, 3, 8, 4), "conv_states": [torch.zeros_like(x) for x in before["conv_states"]]}
    wanted = ops.decode_step(*inputs, **empty)
    torch.testing.assert_close(found[0], wanted[0])
    torch.testing.assert_close(states["state"], torch.stack([empty["state"][0], before["state"][1]]))
    for after, first, old in zip(states["conv_states"], empty["conv_states"], before["conv_states"], strict=True):
        torch.testing.assert_close(after[0], first[0])
        assert torch.equal(after[1], old[1])


def test_decode_step_is_the_layer_it_replaces():
    """The operators of a hybrid layer, one after the other, on one token."""
    (q, k, v, decay, beta, gate, gamma, A_log, dt_bias, weights), states = token(4, True)
    pasts = [past.clone() for past in states["conv_states"]]
    tokens = [x.flatten(1)[:, None] for x in (q, k, v)]
    mixed, after = zip(*map(ops.causal_conv, tokens, weights, pasts), strict=True)
    heads = [to_heads(x + y, 3) for x, y in zip(tokens, mixed, strict=True)]
    g = -A_log.exp() * torch.nn.functional.softplus(decay + dt_bias)
    o, final = ops.linear_attention(
        *map(l2_norm, heads[:2]), heads[2], g[:, None], beta.sigmoid()[:, None], states["state"].clone()
    )
    gates = 2 * gate.sigmoid()[:, None, :, None]
    wanted = ops.scale_norm_fusion(None, o, gamma, gates, linear_heads=[0, 1, 2])[:, 0]
    found = ops.decode_step(q, k, v, decay, beta, gate, gamma, A_log, dt_bias, weights, **states)
    torch.testing.assert_close((found, states["state"], *states["conv_states"]), (wanted, final, *after))


def test_looking_up_tokens_is_an_operator() -> None:
    for valid in (torch.rand(2, 5) < 0.5, torch.ones(1, 1, dtype=torch.bool), torch.ones(2, 0, dtype=torch.bool)):
        torch.library.opcheck(torch.ops.hydra.previous_tokens.default, (valid,))
        found, alone = ops.previous_tokens(valid, valid), torch.ops.hydra.previous_tokens(valid)
        assert torch.equal(found, alone)


def test_flags_of_a_step_are_bool():
    x, n = torch.randn(2, 3, 8), torch.randn(2, 3)
    flags = torch.ones(2, dtype=torch.long)
    with pytest.raises(ValueError, match=r"valid must be bool, found torch\.int64"):
        ops.decode_step(x, x, x, n, n, None, torch.ones(3), state=torch.zeros(2, 3, 8, 8), valid=flags, reset=flags)


def test_either_output_alone_has_gradients():
    given = recurrence("gated_delta")
    o, state = ops.linear_attention(*given)
    both = torch.autograd.grad((o, state), given, (torch.ones_like(o), torch.ones_like(state)), retain_graph=True)
    of_o = torch.autograd.grad(o, given, torch.ones_like(o), retain_graph=True)
    of_state = torch.autograd.grad(state, given, torch.ones_like(state), allow_unused=True)
    assert not of_state[0].any()  # the queries
    torch.testing.assert_close([x + y for x, y in zip(of_o, of_state, strict=True)], list(both))


def test_backward_operators_are_sound():
    """opcheck of an operator does not reach its backward with mixed dtypes, strided gradients or absent inputs."""
    q, k, v = (strided(2, 4, 5, 8).detach().bfloat16() for _ in range(3))
    grad = torch.randn(2, 4, 5, 8).bfloat16().transpose(1, 2)
    opcheck(torch.ops.hydra.attention_forward.default, (q, k, v), {"softcap": 3.0})
    opcheck(torch.ops.hydra.attention_backward.default, (grad, None, [], q, k, v), {"softcap": 3.0})
    q, k, v, decay, beta, state = (x.detach() for x in recurrence("gated_delta"))
    for grad_state in (torch.zeros_like(state), None):
        inputs = (torch.ones(()).expand_as(v), grad_state, [], q.half(), k, v, decay, beta)
        opcheck(torch.ops.hydra.linear_attention_backward.default, inputs)
    x, weight = torch.randn(2, 5, 3).bfloat16(), torch.randn(3, 4)
    opcheck(torch.ops.hydra.causal_conv_backward.default, (x, x.new_zeros(2, 3, 3), x, weight))
    o, gamma = torch.randn(2, 5, 3, 6).half(), torch.randn(3)
    opcheck(torch.ops.hydra.scale_norm_fusion_backward.default, (o, None, o, gamma), {"linear_heads": [0, 1, 2]})


def test_schemas_are_the_contract():
    schemas = {
        "attention": "(Tensor q, Tensor k, Tensor v, Tensor? mask=None, Tensor? sinks=None, *, float? scale=None, "
        "bool causal=True, int? window=None, float? softcap=None) -> Tensor",
        "linear_attention": "(Tensor q, Tensor k, Tensor v, Tensor? decay=None, Tensor? beta=None, Tensor? state=None, *, "
        'str rule="gated_delta", float? scale=None) -> (Tensor o, Tensor state)',
        "linear_attention_forward": "(Tensor q, Tensor k, Tensor v, Tensor? decay=None, Tensor? beta=None, "
        'Tensor? state=None, *, str rule="gated_delta", float? scale=None) -> (Tensor o, Tensor state, Tensor[] kept)',
        "causal_conv": "(Tensor x, Tensor weight, Tensor? state=None, Tensor? reset=None, Tensor? previous=None) -> "
        "(Tensor y, Tensor state)",
        "scale_norm_fusion": "(Tensor? o_full, Tensor? o_linear, Tensor gamma, Tensor? gate=None, *, int[] linear_heads, "
        "bool norm_full=False, float eps=1e-6) -> Tensor",
    }
    for name, schema in schemas.items():
        assert getattr(torch.ops.hydra, name).default._schema == torch._C.parse_schema(f"hydra::{name}{schema}")


# --- tracing and autocast ----------------------------------------------------------------------------------------------------


def all_four(q, k, v, decay, beta, weight, gamma):
    """A hybrid layer's worth of operators; q, k, v are [B, T, H, D]."""
    x, _ = ops.causal_conv(v.flatten(2), weight)
    v = v + x.view_as(v)
    full = ops.attention(q[:, :, :2].transpose(1, 2), k[:, :, :1].transpose(1, 2), v[:, :, :1].transpose(1, 2))
    linear, _ = ops.linear_attention(q[:, :, 2:], k[:, :, 2:], v[:, :, 2:], decay, beta)
    return ops.scale_norm_fusion(full, linear, gamma, linear_heads=[1, 2])


def layer_inputs(length: int = 7) -> list[Tensor]:
    q, k, v = (normal(2, length, 4, 8) for _ in range(3))
    decay, beta = (torch.rand(2, length, 2).requires_grad_() for _ in range(2))
    return [q, k, v, (-decay).detach().requires_grad_(), beta, normal(32, 3), normal(2)]


@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_to_one_graph_with_the_same_numbers(autocast):
    compiled = torch.compile(all_four, backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (7, 9):
        inputs = layer_inputs(length)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            wanted, found = all_four(*inputs), compiled(*inputs)
        assert found.dtype == wanted.dtype
        assert torch.equal(found, wanted)
        grads = [torch.autograd.grad(out.float().square().sum(), inputs) for out in (wanted, found)]
        torch.testing.assert_close(*grads)


def test_exports_with_the_operators_in_the_graph():
    class Layer(torch.nn.Module):
        def forward(self, *inputs):
            return all_four(*inputs)

    inputs = tuple(x.detach() for x in layer_inputs())
    length = torch.export.Dim("length", min=2)
    shapes = tuple({1: length} if i < 5 else None for i in range(len(inputs)))
    program = torch.export.export(Layer(), inputs, dynamic_shapes=(shapes,))
    targets = [node.target for node in program.graph.nodes]
    for name in ("attention", "linear_attention", "causal_conv", "scale_norm_fusion"):
        assert targets.count(getattr(torch.ops.hydra, name).default) == 1
    other = [x.detach() for x in layer_inputs(12)]
    assert torch.equal(program.module()(*other), all_four(*other))


@pytest.mark.parametrize("wanted", ["nothing", "inputs", "no_grad", "inference"])
def test_only_training_runs_the_forward_that_keeps(wanted):
    class Noted(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append(func)
            return func(*args, **(kwargs or {}))

    calls: list = []
    inputs = [x.detach().requires_grad_(wanted != "nothing") for x in recurrence("gated_delta")]
    mode = {"no_grad": torch.no_grad, "inference": torch.inference_mode}.get(wanted, nullcontext)
    with mode(), Noted():
        o, state = ops.linear_attention(*inputs)
    name = "linear_attention_forward" if wanted == "inputs" else "linear_attention"
    assert [call for call in calls if call.namespace == "hydra"] == [getattr(torch.ops.hydra, name).default]
    assert o.requires_grad == state.requires_grad == (wanted == "inputs")
    assert not vars(o) and not vars(state)


def test_parameters_do_not_change_what_is_exported():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, q, k, v, decay, beta):
            return ops.linear_attention(q * self.scale, k, v, decay, beta)

    program = torch.export.export(Layer(), tuple(x.detach() for x in recurrence("gated_delta", state=False)[:5]))
    for each in (program, program.run_decompositions({})):
        names = {str(node.target) for node in each.graph.nodes if "hydra" in str(node.target)}
        assert names == {"hydra.linear_attention.default"}


def test_a_kernel_is_told_of_a_gradient_that_is_not_there(monkeypatch):
    told = []

    def backward(grad, grad_state, *call, **options):
        told.append(grad_state)
        return reference.backward(grad, grad_state, *call, **options)

    kernel = SimpleNamespace(forward=reference.forward, backward=backward)
    monkeypatch.setattr(registry, "kernel", lambda op, case, device: kernel)
    ops.linear_attention(*recurrence("gated_delta"))[0].sum().backward()
    assert told == [None]


def test_autocast_lowers_attention_as_pytorch_lowers_its_own():
    q, k, v = (normal(2, 2, 6, 4) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.attention(q, k.bfloat16(), v, softcap=4.0)
        plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        assert torch.equal(ops.attention(q, k, v), plain)
    assert out.dtype == torch.bfloat16
    assert all(grad.dtype == torch.float32 for grad in torch.autograd.grad(out.sum(), [q, k, v]))


def test_autocast_lowers_heads_together_and_leaves_gates_and_states():
    q, k, v, decay, beta, state = recurrence("gated_delta", length=40)
    lowered = (*(x.bfloat16() for x in (q, k, v)), decay, beta, state)
    wanted = ops.linear_attention(*lowered)
    with torch.autocast("cpu", torch.bfloat16):
        found = ops.linear_attention(q, k, v.bfloat16(), decay, beta, state)  # as projections and norms leave them
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))
    assert (found[0].dtype, found[1].dtype) == (torch.bfloat16, torch.float32)
    assert all(grad.dtype == torch.float32 for grad in torch.autograd.grad(found[0].sum(), [q, k, decay, beta, state]))
    x, weight = normal(2, 9, 6), normal(6, 4)
    with torch.autocast("cpu", torch.bfloat16):
        found = ops.causal_conv(x, weight)
    assert all(torch.equal(*pair) for pair in zip(found, ops.causal_conv(x.bfloat16(), weight), strict=True))


def test_doubles_are_not_lowered():
    inputs = [None if x is None else x.double() for x in recurrence("gated_delta", length=9)]
    with torch.autocast("cpu", torch.bfloat16):
        found = ops.linear_attention(*inputs)
    assert all(torch.equal(*pair) for pair in zip(found, ops.linear_attention(*inputs), strict=True))


def test_only_inputs_that_need_gradients_get_them():
    q, k, v, decay, beta, state = recurrence("gated_delta")
    ops.linear_attention(q.detach(), k, v.detach(), decay.detach(), beta, state.detach())[0].sum().backward()
    assert all(x.grad is None for x in (q, v, decay, state))
    assert k.grad is not None
    assert beta.grad is not None


# --- the bits of transformers ------------------------------------------------------------------------------------------------

SHAPES = list(product([(4, 4), (4, 2), (6, 1)], [(1, 9), (7, 7), (33, 33), (5, 12)], [(16, 16), (8, 12)]))


def projections(heads: tuple[int, int], lengths: tuple[int, int], dims: tuple[int, int], dtype: torch.dtype):
    q = torch.randn(2, lengths[0], heads[0], dims[0], dtype=dtype).transpose(1, 2)
    k = torch.randn(2, lengths[1], heads[1], dims[0], dtype=dtype).transpose(1, 2)
    v = torch.randn(2, lengths[1], heads[1], dims[1], dtype=dtype).transpose(1, 2)
    owner = SimpleNamespace(num_key_value_groups=heads[0] // heads[1], is_causal=True, training=False)
    return owner, q, k, v


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["none", "bool", "per head", "float"])
def test_attention_has_the_bits_of_sdpa(dtype, kind):
    for heads, lengths, dims in SHAPES:
        if kind == "none" and lengths[1] > lengths[0] > 1:
            continue  # There the interface assumes an empty cache after the queries, the operator a full one before them.
        owner, q, k, v = projections(heads, lengths, dims, dtype)
        mask = None if kind == "none" else causal_mask(*lengths)
        if kind == "per head":
            mask = mask.expand(2, heads[0], *lengths)
        mask = additive(mask, dtype) if kind == "float" else mask
        wanted, _ = sdpa_attention_forward(owner, q, k, v, mask, scaling=0.3)
        assert same(ops.attention(q, k, v, mask, scale=0.3), wanted)
        assert same(ops.attention(q.requires_grad_(), k, v, mask, scale=0.3), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_softcap_and_sinks_have_the_bits_of_eager_attention(dtype, kind):
    for heads, lengths, dims in SHAPES:
        owner, q, k, v = projections(heads, lengths, dims, dtype)
        seen = causal_mask(*lengths)
        mask = seen if kind == "bool" else additive(seen, dtype)
        # A query that sees no key is 0 under a bool mask; transformers has no such mask here, and averages v.
        alive = seen.any(-1).transpose(1, 2)[..., None]
        wanted, _ = softcap_attention(owner, q, k, v, additive(seen, dtype), scaling=0.3, softcap=5.0)
        assert torch.equal(ops.attention(q, k, v, mask, scale=0.3, softcap=5.0) * alive, wanted * alive)
        owner.sinks = torch.randn(heads[0], dtype=dtype)
        wanted, _ = sinks_attention(owner, q, k, v, additive(seen, dtype), scaling=0.3)
        assert torch.equal(ops.attention(q, k, v, mask, owner.sinks, scale=0.3), wanted)


def test_causal_without_a_mask_is_causal_with_one():
    for heads, lengths, dims in SHAPES:
        _, q, k, v = projections(heads, lengths, dims, torch.float32)
        seen = torch.ones(1, 1, *lengths, dtype=torch.bool).tril(lengths[1] - lengths[0])
        for window in (None, 3, 100):
            near = seen if window is None else seen.triu(lengths[1] - lengths[0] - window + 1)
            torch.testing.assert_close(ops.attention(q, k, v, window=window), ops.attention(q, k, v, near))


# --- helpers -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "heads",
    [
        (0,),
        (1, 2),
        (0, 0, 1, 1, 2, 2, 3, 3),
        (3, 1),
        (0, 1, 3),
        (3, 2, 1, 0),
        (0, 0, 3, 3),
        (1, 1),
        (0, 1, 0, 1),
        (2, 2, 0),
    ],
)
@pytest.mark.parametrize("dim", [1, 2, -1])
def test_select_heads_picks_in_order(heads, dim):
    x = torch.randn(2, 4, 4, 4)
    assert torch.equal(ops.select_heads(x, heads, dim), x.index_select(dim, torch.tensor(heads)))


def test_select_heads_of_all_heads_is_the_tensor_itself():
    x = torch.randn(2, 4, 3)
    assert ops.select_heads(x, (0, 1, 2, 3), 1) is x


@pytest.mark.parametrize("heads", [(), (4,), (-1, 0)])
def test_select_heads_refuses_heads_that_are_not_there(heads):
    with pytest.raises(ValueError, match="4 along dimension 1"):
        ops.select_heads(torch.randn(2, 4, 3), heads, 1)


def flags_by_loops(mask: Tensor, batch: int, window: int | None = None) -> tuple[Tensor, Tensor]:
    queries, keys = mask.shape[2:]
    valid, reset = torch.zeros(batch, queries, dtype=torch.bool), torch.zeros(batch, queries, dtype=torch.bool)
    for b in range(batch):
        last = None  # the last valid token before
        for t in range(queries):
            row, start = mask[b % mask.shape[0], 0, t], keys - queries
            if not row[start + t]:
                continue
            valid[b, t] = True
            if last is not None:
                reset[b, t] = not row[start + last] and (window is None or t - last < window)
            elif start > 0 and window is None:
                reset[b, t] = not row[:start].any()
            last = t
    return valid, reset


@pytest.mark.parametrize("lengths", [(1, 1), (1, 4), (5, 5), (5, 8)])
@pytest.mark.parametrize("batch", [1, 3])
def test_token_flags_equal_loops(lengths, batch):
    hidden_states = torch.randn(3, lengths[0], 6)
    for heads, window in product((1, 2), (None, 2)):
        mask = torch.rand(batch, heads, *lengths) < 0.5
        wanted = flags_by_loops(mask, 3, window)
        for form in (mask, additive(mask), additive(mask, torch.bfloat16)):
            found = ops.token_flags(form, hidden_states, window=window)
            assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))


def test_token_flags_of_padding_and_packing():
    documents = torch.tensor([[0, 0, 1, 1, 1], [7, 7, 8, 8, 9]])
    mask = (documents[:, None, :, None] == documents[:, None, None, :]).tril()
    mask[0, :, :, :2] = False
    valid, reset = ops.token_flags(mask, torch.empty(2, 5, 3))
    assert valid.tolist() == [[False, False, True, True, True], [True] * 5]
    assert reset.tolist() == [[False] * 5, [False, False, True, False, True]]


def test_token_flags_without_a_mask():
    valid, reset = ops.token_flags(None, torch.empty(2, 5, 3))
    assert valid.shape == reset.shape == (2, 5)
    assert valid.all()
    assert not reset.any()


def test_token_flags_export_with_any_lengths():
    class Flags(torch.nn.Module):
        def forward(self, mask, hidden_states):
            return ops.token_flags(mask, hidden_states)

    batch, queries, keys = (torch.export.Dim(name, min=2) for name in ("batch", "queries", "keys"))
    shapes = ({0: batch, 2: queries, 3: keys}, {0: batch, 1: queries})
    program = torch.export.export(Flags(), (causal_mask(4, 7), torch.empty(2, 4, 3)), dynamic_shapes=shapes)
    for queries, keys in ((4, 7), (6, 6), (3, 20)):
        mask = torch.rand(3, 1, queries, keys) < 0.5
        found = program.module()(mask, torch.empty(3, queries, 3))
        assert all(torch.equal(*pair) for pair in zip(found, flags_by_loops(mask, 3), strict=True))


# --- errors ------------------------------------------------------------------------------------------------------------------

Q, K, G = torch.zeros(2, 4, 3, 8), torch.zeros(2, 2, 3, 8), torch.zeros(2, 4, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.attention(Q, K[..., :4], K), r"k must have shape \[2, any, any, 8\], found \[2, 2, 3, 4\]"),
        (lambda: ops.attention(Q, Q[:, :3], Q[:, :3]), "q has 4 heads and k 3"),
        (lambda: ops.attention(Q, K.double(), K), "one dtype"),
        (lambda: ops.attention(Q, K, K, torch.zeros(2, 1, 3, 4)), r"mask must have shape .*found \[2, 1, 3, 4\]"),
        (lambda: ops.attention(Q, K, K, torch.zeros(2, 1, 3, 3).long()), "mask must be bool"),
        (lambda: ops.attention(Q, K, K, torch.zeros(2, 1, 3, 3).requires_grad_()), "detach it"),
        (lambda: ops.attention(Q, K, K, None, torch.zeros(3)), r"sinks must have shape \[4\]"),
        (lambda: ops.attention(Q, K, K, window=0), "window must be at least 1"),
        (lambda: ops.attention(Q, K, K, softcap=0.0), "softcap must be positive"),
        (lambda: ops.linear_attention(Q, Q, Q, G, G, rule="other"), "rule must be one of linear, gated"),
        (lambda: ops.linear_attention(Q, Q, Q, None, G), "decay is missing"),
        (lambda: ops.linear_attention(Q, Q, Q, G), "beta is missing"),
        (lambda: ops.linear_attention(Q, Q, Q, G, G, rule="delta"), "decay is given"),
        (lambda: ops.linear_attention(Q, Q, Q, G, G, rule="gated"), "beta is given"),
        (lambda: ops.linear_attention(Q, Q, Q, G.mT, G), r"decay must have shape \[2, 4, 3\]"),
        (lambda: ops.linear_attention(Q, Q, Q, G, G, torch.zeros(2, 3, 8, 7)), r"state must have shape \[2, 3, 8, 8\]"),
        (lambda: ops.causal_conv(G, torch.zeros(4, 2)), r"weight must have shape \[3, any\]"),
        (lambda: ops.causal_conv(G, torch.zeros(3, 2), reset=torch.zeros(2, 4)), "reset must be bool"),
        (lambda: ops.scale_norm_fusion(None, None, G, linear_heads=[]), "both None"),
        (
            lambda: ops.decode_step(Q[0], Q[0], Q[0], G[0], G[0], None, G[0, 0], state=torch.zeros(4, 3, 8, 7)),
            r"state must have shape \[4, 3, 8, 8\]",
        ),
        (
            lambda: ops.decode_step(
                Q[0], Q[0], Q[0], G[0], G[0], None, G[0, 0], G[0, 0], state=torch.zeros(4, 3, 8, 8)
            ),
            "A_log and dt_bias belong together",
        ),
        (
            lambda: ops.decode_step(
                Q[0], Q[0], Q[0], G[0], G[0], None, G[0, 0], state=torch.zeros(4, 3, 8, 8), reset=torch.zeros(4) > 0
            ),
            "valid and reset belong together",
        ),
        (
            lambda: ops.decode_step(Q[0], Q[0], Q[0], G[0], G[0], None, G[0, 0], state=torch.zeros(4, 3, 8, 8).mT),
            "must be contiguous",
        ),
        (
            lambda: ops.scale_norm_fusion(Q, Q, G, linear_heads=[0, 2, 1]),
            "linear_heads must be 3 ascending slots below 6",
        ),
        (lambda: ops.scale_norm_fusion(Q, Q, G, linear_heads=[0, 1, 2]), r"gamma must have shape \[3\]"),
        (lambda: ops.scale_norm_fusion(None, Q, G[0, 0], G, linear_heads=[0, 1, 2]), "gate must have shape"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_graph_that_lacks_a_gate_is_told_so():
    with pytest.raises(ValueError, match="beta is missing"):
        torch.ops.hydra.linear_attention.default(Q, Q, Q, G)

"""The Triton kernels of linear attention against the reference in fp64. Without a GPU they run in Triton's interpreter."""

from __future__ import annotations

import math

import pytest
import torch
from functorch.compile import make_boxed_func
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.nn.functional import normalize
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from hydrasurgery import ops
from hydrasurgery.kernels import registry
from hydrasurgery.kernels.linear_attention import reference

pytest.importorskip("triton", reason="triton is not installed: pip install hydrasurgery[kernels]")

from hydrasurgery.kernels.linear_attention import triton as kernel  # noqa: E402
from hydrasurgery.kernels.linear_attention import triton_call, triton_walks  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FEW = settings(max_examples=12, deadline=None, derandomize=True)
EXACT = 1e-5  # fp32 products in another order


@pytest.fixture(autouse=True)
def _poison():
    """Memory from torch.empty holds NaN: a number that nobody wrote shows."""
    torch.manual_seed(0)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


def inputs(batch, length, heads, keys, values, *, decay=0.1, state=True, states=None, dtype=torch.float32):
    """q, k, v, decay, beta, state: keys of length 1, decays in -2 decay..0, beta in 0..1."""
    tokens = (batch, length, heads)
    drawn = [
        torch.randn(*tokens, keys),
        normalize(torch.randn(*tokens, keys), dim=-1),
        torch.randn(*tokens, values),
        -2 * decay * torch.rand(tokens),
        torch.rand(tokens),
        torch.randn(states or batch, heads, keys, values) if state else None,
    ]
    narrow = [x.to(DEVICE, dtype) for x in drawn[:3]]
    return [*narrow, *(None if x is None else x.to(DEVICE) for x in drawn[3:])]


def truth(
    args: list[Tensor | None], grad: Tensor, grad_state: Tensor, scale=None, l2_norm=False
) -> list[Tensor | None]:
    """(o, final, six gradients) of the reference in fp64; normalised rows by autograd."""
    wide = [None if x is None else x.detach().double().requires_grad_() for x in args]
    q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) if l2_norm else x for x in wide[:2])
    used = [q.detach(), k.detach(), *(None if x is None else x.detach() for x in wide[2:])]
    options = {"rule": "gated_delta", "scale": scale}
    o, final = reference.forward(*used, **options)
    dq, dk, *rest = reference.backward(grad.double(), grad_state.double(), *used, **options)
    if l2_norm:
        dq, dk = torch.autograd.grad((q, k), wide[:2], (dq, dk))
    return [o, final, dq, dk, *rest]


def run(args: list[Tensor | None], grad: Tensor, grad_state: Tensor, **options) -> list[Tensor | None]:
    found = kernel.forward(*args, **options)
    return [*found, *kernel.backward(grad, grad_state, *args, **options)]


def compare(found: list[Tensor | None], wanted: list[Tensor | None], limit: float = EXACT) -> None:
    names = ("o", "state", "dq", "dk", "dv", "ddecay", "dbeta", "dstate")
    for name, have, want in zip(names, found, wanted, strict=True):
        assert (have is None) == (want is None), name
        if have is not None:
            assert have.shape == want.shape and have.isfinite().all(), name
            error = float((have.double() - want).norm() / want.norm().clamp(min=0.1))
            assert error < limit, f"{name}: {error:.1e}"


def weights(args: list[Tensor | None], states: int | None = None) -> tuple[Tensor, Tensor]:
    q, v = args[0], args[2]
    final = (states or q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    return torch.randn_like(v), torch.randn(final, device=DEVICE)


@given(
    batch=st.integers(1, 2),
    length=st.integers(1, 140),
    heads=st.integers(1, 2),
    sizes=st.tuples(st.sampled_from([32, 64, 80]), st.sampled_from([24, 64])),
    segment=st.sampled_from([None, 64, 128]),
    decay=st.sampled_from([0.001, 0.3, 5.0]),
    options=st.fixed_dictionaries({"scale": st.sampled_from([None, 0.3]), "l2_norm": st.booleans()}),
    state=st.booleans(),
)
@FEW
def test_chunks_equal_the_reference(batch, length, heads, sizes, segment, decay, options, state):
    args = inputs(batch, length, heads, *sizes, decay=decay, state=state)
    grads = weights(args)
    # Sums of strong decays are large, and their differences keep fewer digits.
    limit = EXACT if decay < 1 else 10 * EXACT
    compare(run(args, *grads, segment=segment, **options), truth(args, *grads, **options), limit)


@given(
    lengths=st.lists(st.sampled_from([0, 1, 2, 63, 64, 65, 130]), min_size=1, max_size=4).filter(any),
    segment=st.sampled_from([64, 128]),
    state=st.booleans(),
)
@FEW
def test_packed_documents_are_documents_apart(lengths, segment, state):
    args = inputs(1, sum(lengths), 1, 32, 32, state=state, states=len(lengths))
    grad, grad_state = weights(args, len(lengths))
    cuts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    seqlens = torch.tensor(cuts, dtype=torch.int32, device=DEVICE)
    found = run(args, grad, grad_state, cu_seqlens=seqlens, segment=segment)
    for n, span in enumerate(map(slice, cuts[:-1], cuts[1:])):
        row = slice(n, n + 1)
        part = [*(x[:, span] for x in args[:5]), args[5][row] if state else None]
        of_doc = [found[0][:, span], found[1][row], *(x[:, span] for x in found[2:7]), found[7][row] if state else None]
        if lengths[n]:
            compare(of_doc, truth(part, grad[:, span], grad_state[row]))
        else:
            torch.testing.assert_close(found[1][row], args[5][row] if state else torch.zeros_like(grad_state[row]))
            if state:
                torch.testing.assert_close(found[7][row], grad_state[row])


@pytest.mark.parametrize("segment", [64, 128])
@pytest.mark.parametrize("where", [0, 70, 128])
@pytest.mark.parametrize("strength", [50.0, math.inf])
def test_a_strong_decay_starts_anew(strength, where, segment):
    args = inputs(1, 150, 1, 32, 32)
    args[3][:, where] = -strength
    grads = weights(args)
    compare(run(args, *grads, segment=segment), truth(args, *grads), 1e-4)


def test_every_token_forgets_all():
    args = inputs(1, 150, 1, 32, 32)
    args[3].fill_(-math.inf)
    grads = weights(args)
    compare(run(args, *grads, segment=64), truth(args, *grads), 1e-3)


@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
def test_extreme_strengths_of_writing(beta):
    args = inputs(1, 140, 1, 32, 32, decay=0.01)
    args[4].fill_(beta)
    grads = weights(args)
    compare(run(args, *grads, segment=64), truth(args, *grads), 1e-4)


def test_equal_keys_are_the_hardest_inverse():
    args = inputs(1, 130, 1, 32, 32, decay=0.0)
    args[1].copy_(args[1][:, :1].clone())
    args[4].fill_(1.0)
    grads = weights(args)
    compare(run(args, *grads), truth(args, *grads), 1e-4)


def test_growing_states_are_not_forgotten():
    """Long keys make a transition grow: its bound must not be taken for small because decays are strong."""
    args = inputs(1, 192, 1, 32, 32)
    args[3].fill_(-4.0)
    args[1][:, 64:128] *= 10.0
    args[4].fill_(1.0)
    grads = weights(args)
    compare(run(args, *grads, segment=64), truth(args, *grads), 1e-3)


def test_large_inputs_stay_finite():
    args = inputs(1, 130, 1, 32, 32)
    for x in args[:3]:
        x.copy_(100 * x.sign())
    grads = weights(args)
    compare(run(args, *grads, segment=64, l2_norm=True), truth(args, *grads, l2_norm=True))


def test_any_strides():
    args = inputs(2, 70, 2, 32, 32)
    packed = torch.cat([args[0], args[1], args[2]], dim=-1)
    views = [*packed.split(32, dim=-1), args[3].mT.contiguous().mT, args[4][..., :1].expand(-1, -1, 2), args[5].mT]
    grad = torch.randn(2, 70, 2, 64, device=DEVICE)[..., ::2]
    grad_state = torch.randn(2, 1, 1, 32, device=DEVICE).expand(2, 2, 32, 32)
    dense = [x.contiguous() for x in (*views, grad, grad_state)]
    compare(run(views, grad, grad_state), truth(dense[:6], *dense[6:]))


@pytest.mark.parametrize("scale", [0.0, 1e-4])
def test_a_small_scale(scale):
    args = inputs(1, 70, 1, 64, 64)
    grads = weights(args)
    compare(run(args, *grads, scale=scale), truth(args, *grads, scale=scale))


def test_odd_offsets_and_heads_that_share_memory():
    args = inputs(1, 70, 2, 64, 64)
    odd = torch.empty(args[0].numel() + 1, device=DEVICE)[1:].view(args[0].shape).copy_(args[0])
    views = [odd, args[1][:, :, :1].expand(-1, -1, 2, -1), *args[2:]]
    dense = [x.clone(memory_format=torch.contiguous_format) for x in views]
    grads = weights(args)
    compare(run(views, *grads), truth(dense, *grads))


def test_a_padded_token_changes_nothing():
    args = inputs(1, 100, 1, 32, 32)
    state = kernel.forward(*args)[1]
    padded = [torch.cat([x, torch.zeros_like(x[:, :30])], 1) for x in args[:5]]
    torch.testing.assert_close(kernel.forward(*padded, args[5])[1], state, rtol=1e-5, atol=1e-6)


def test_no_gradient_of_the_final_state():
    args = inputs(1, 140, 1, 32, 32)
    grad, grad_state = weights(args)
    compare(run(args, grad, None, segment=64)[2:] + [None] * 2, truth(args, grad, 0 * grad_state)[2:] + [None] * 2)


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU's memory does not hold such tiles of 32 bits")
@pytest.mark.parametrize("size", [64, 256])
def test_cards_with_little_shared_memory_join_by_smaller_tiles(monkeypatch, size):
    monkeypatch.setattr(triton_walks, "_holds_maps", lambda device: False)
    monkeypatch.setattr(kernel, "refusal", lambda *args, **options: None)
    args = inputs(1, 200, 1, size, 32)
    grads = weights(args)
    compare(run(args, *grads, segment=64), truth(args, *grads))


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter's 16-bit products are not those of a GPU")
@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 2e-2), (torch.float16, 4e-3)])
@pytest.mark.parametrize("size", [32, 64, 128, 256])
def test_half_precision_and_equal_bits(dtype, limit, size):
    args = inputs(1, 500, 2, size, size, dtype=dtype)
    grads = weights(args)
    found, again = (run(args, *grads, segment=128) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(found, again, strict=True))
    compare(found, truth(args, *grads), limit)


def test_refusals_say_why():
    q, k, v, decay, beta, _ = inputs(1, 4, 1, 32, 32)
    reason = kernel.refusal
    assert reason(q, k, v, decay, beta, rule="gated_delta") is None
    assert "gated_delta" in reason(q, k, v, None, beta, rule="delta")
    assert "one decay a head" in reason(q, k, v, decay[..., None].expand(q.shape), beta, rule="gated_delta")
    assert "head sizes 512 and 32" in reason(*(q.repeat(1, 1, 1, 16),) * 2, v, decay, beta, rule="gated_delta")
    wide = [x.new_zeros(1, 4, 1, 256) for x in (q, k)]
    assert "float32 heads of more than 128" in reason(*wide, v, decay, beta, rule="gated_delta")
    assert reason(*(x.half() for x in (*wide, v)), decay, beta, rule="gated_delta") is None
    assert "must share one" in reason(q.double(), k, v, decay, beta, rule="gated_delta")
    with pytest.raises(ValueError, match="head sizes"):
        kernel.forward(*(q.repeat(1, 1, 1, 16),) * 2, v, decay, beta, None)
    with pytest.raises(ValueError, match="B = 1"):
        two = [torch.cat([x, x]) for x in (q, k, v, decay, beta)]
        kernel.forward(*two, None, cu_seqlens=torch.tensor([0, 4]))


@pytest.mark.parametrize("length", [100, 450])
def test_what_a_forward_keeps_changes_no_bit_of_the_gradients(length, monkeypatch):
    monkeypatch.setattr(triton_call, "processors", lambda device: 32)  # so that 450 tokens are two segments
    args = inputs(1, length, 1, 64, 64, decay=0.01)
    grad, grad_state = weights(args)
    o, final, kept = kernel.forward_keeping(*args)
    assert (len(kept) == 3) == (length == 100)
    plain = [*kernel.forward(*args), *kernel.backward(grad, grad_state, *args)]
    for have, want in zip((o, final, *kernel.backward(grad, grad_state, *args, kept=kept)), plain, strict=True):
        assert torch.equal(have, want)


def test_autograd_hands_on_what_the_forward_keeps(monkeypatch):
    found = []
    original = kernel._find_basis
    monkeypatch.setattr(kernel, "_find_basis", lambda *call: found.append(call) or original(*call))
    monkeypatch.setattr(registry, "kernel", lambda op, case, device: kernel)
    args = [x.requires_grad_() for x in inputs(1, 70, 2, 64, 64)]
    grad, grad_state = weights(args)
    both = [ops.linear_attention(*args) for _ in range(2)]  # the second must not take the place of the first
    gradients = [torch.autograd.grad(outputs, args, (grad, grad_state)) for outputs in both]
    assert len(found) == 2
    wanted = truth(args, grad, grad_state)[2:]
    for each in gradients:
        compare([None, None, *each], [None, None, *wanted])


TRAINING, GRADIENTS = (
    torch.ops.hydra.linear_attention_forward.default,
    torch.ops.hydra.linear_attention_backward.default,
)


@pytest.mark.parametrize("processors", [1, 32])
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 2, 64, 64), (2, 100, 1, 32, 24), (1, 450, 2, 64, 64), (1, 1300, 1, 80, 64)])
def test_the_fake_kernel_knows_what_a_forward_keeps(shape, state, processors, monkeypatch):
    monkeypatch.setattr(registry, "kernel", lambda op, case, device: kernel)
    monkeypatch.setattr(triton_call, "processors", lambda device: processors)  # with 32, long sequences are split
    args = inputs(*shape, state=state)
    with FakeTensorMode() as mode:
        promised = TRAINING(*(None if x is None else mode.from_tensor(x) for x in args))
    found = TRAINING(*args)
    assert (len(found[2]) == 7) == (processors == 32 and shape[1] >= 450)
    for have, want in zip((*found[:2], *found[2]), (*promised[:2], *promised[2]), strict=True):
        assert (have.shape, have.stride(), have.dtype) == (want.shape, want.stride(), want.dtype)


@pytest.mark.parametrize("length", [100, 450])
def test_training_operators_are_sound(length, monkeypatch):
    monkeypatch.setattr(registry, "kernel", lambda op, case, device: kernel)
    monkeypatch.setattr(triton_call, "processors", lambda device: 32)
    args = inputs(1, length, 1, 64, 64)
    # Memory of maps that a first and a last segment do not have stays as it was found: values are not compared.
    torch.library.opcheck(TRAINING, args, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))
    torch.library.opcheck(torch.ops.hydra.linear_attention.default, [x.requires_grad_() for x in args])


@pytest.mark.parametrize(("length", "count"), [(70, 3), (450, 7)])
def test_compiled_training_hands_on_what_the_forward_keeps(length, count, monkeypatch):
    monkeypatch.setattr(registry, "kernel", lambda op, case, device: kernel)
    monkeypatch.setattr(triton_call, "processors", lambda device: 32)
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph.graph)
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    compiled = torch.compile(ops.linear_attention, backend=aot_autograd(fw_compiler=keep), fullgraph=True)
    args = [x.requires_grad_() for x in inputs(1, length, 1, 64, 64)]
    grads = weights(args)
    wanted = torch.autograd.grad(ops.linear_attention(*args), args, grads)
    found = torch.autograd.grad(compiled(*args), args, grads)
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))
    forward, backward = graphs
    (run,) = forward.find_nodes(op="call_function", target=TRAINING)
    (kept,) = [node for node in run.users if node.args[1] == 2]
    (outputs,) = forward.output_node().args
    assert len(kept.users) == count and set(kept.users) <= set(outputs)
    (gradients,) = backward.find_nodes(op="call_function", target=GRADIENTS)
    assert [node.op for node in gradients.args[2]] == ["placeholder"] * count


@pytest.mark.parametrize("backend", ["aot_eager", "aot_eager_default_partitioner"])
def test_lengths_share_graphs_in_compiled_training(backend, monkeypatch):
    monkeypatch.setattr(registry, "kernel", lambda op, case, device: kernel)
    monkeypatch.setattr(triton_call, "processors", lambda device: 32)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(ops.linear_attention, backend=counter, fullgraph=True, dynamic=True)
    for length in (70, 450, 500, 100):
        args = [x.requires_grad_() for x in inputs(1, length, 1, 32, 32)]
        grads = weights(args)
        pair = (torch.autograd.grad(f(*args), args, grads) for f in (ops.linear_attention, compiled))
        assert all(torch.equal(*each) for each in zip(*pair, strict=True))
    assert counter.frame_count == 2  # one where sequences are split into segments, and one where not


@pytest.mark.parametrize("kind", ["reentrant", "whole", "selective"])
def test_checkpoints_change_no_gradient(kind, monkeypatch):
    monkeypatch.setattr(registry, "kernel", lambda op, case, device: kernel)
    args = [x.requires_grad_() for x in inputs(1, 70, 1, 64, 64, state=False)[:5]]

    def loss(*args):
        return ops.linear_attention(*args)[0].sum()

    options = {"use_reentrant": kind == "reentrant"}
    if kind == "selective":
        options["context_fn"] = lambda: create_selective_checkpoint_contexts([TRAINING])
    wanted = torch.autograd.grad(loss(*args), args)
    runs = []
    for name in ("forward", "forward_keeping"):
        run = getattr(kernel, name)
        monkeypatch.setattr(kernel, name, lambda *call, run=run, **options: runs.append(run) or run(*call, **options))
    checkpoint(loss, *args, **options).backward()
    assert len(runs) == (1 if kind == "selective" else 2)
    assert all(torch.equal(x.grad, want) for x, want in zip(args, wanted, strict=True))

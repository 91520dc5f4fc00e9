"""The reference kernels against their definitions: a token at a time, in fp64, and finite differences."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hydrasurgery import ops
from hydrasurgery.kernels.attention import efficient
from hydrasurgery.kernels.attention import reference as attention_kernel
from hydrasurgery.kernels.linear_attention import reference as linear_kernel
from hydrasurgery.kernels.linear_attention.reference import DECAY_RULES, DELTA_RULES, naive

DOUBLE = torch.float64
FEW = settings(max_examples=12, deadline=None, derandomize=True)
CASES = [(rule, channels) for rule in ops.RULES for channels in (False, True) if rule in DECAY_RULES or not channels]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def normal(*shape: int, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(*shape, dtype=dtype).requires_grad_()


def compare(found, wanted, inputs, tolerance: float = 1e-9) -> None:
    """Equal outputs, and equal gradients of random weights on them for every input."""
    found, wanted = [x if isinstance(x, tuple) else (x,) for x in (found, wanted)]
    weights = [torch.randn_like(x) for x in wanted]
    totals = [sum((x * w).sum() for x, w in zip(side, weights, strict=True)) for side in (found, wanted)]
    found = [*found, *torch.autograd.grad(totals[0], inputs)]
    wanted = [*wanted, *torch.autograd.grad(totals[1], inputs)]
    for have, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(have, want, rtol=tolerance, atol=tolerance)


# --- linear attention --------------------------------------------------------------------------------------------------------


def recurrence(rule, channels, batch=2, length=7, heads=3, key=5, value=4, state=True) -> dict[str, Tensor]:
    """Inputs of `rule`, keys of length 1, and mild decays."""
    q, k = normal(batch, length, heads, key), torch.randn(batch, length, heads, key, dtype=DOUBLE)
    inputs = {"q": q, "k": torch.nn.functional.normalize(k, dim=-1), "v": normal(batch, length, heads, value)}
    if rule in DECAY_RULES:
        inputs["decay"] = -0.5 * torch.rand(batch, length, heads, *[key] * channels, dtype=DOUBLE)
    if rule in DELTA_RULES:
        inputs["beta"] = torch.rand(batch, length, heads, dtype=DOUBLE)
    if state:
        inputs["state"] = normal(batch, heads, key, value)
    return {name: x.detach().requires_grad_() for name, x in inputs.items()}


@pytest.mark.parametrize(("rule", "channels"), CASES)
@pytest.mark.parametrize("length", [1, 2, 31, 32, 63, 64, 65])
def test_chunks_equal_the_recurrence(rule, channels, length):
    inputs = recurrence(rule, channels, length=length)
    compare(ops.linear_attention(**inputs, rule=rule), naive(**inputs, rule=rule), list(inputs.values()))


@given(
    case=st.sampled_from(CASES),
    shape=st.tuples(*(st.integers(1, high) for high in (2, 70, 3, 40, 9))),
    state=st.booleans(),
    scale=st.sampled_from([None, 0.3]),
)
@FEW
def test_chunks_equal_the_recurrence_for_any_shape(case, shape, state, scale):
    rule, channels = case
    inputs = recurrence(rule, channels, *shape, state=state)
    found = ops.linear_attention(**inputs, rule=rule, scale=scale)
    compare(found, naive(**inputs, rule=rule, scale=scale), list(inputs.values()))


@pytest.mark.parametrize(("rule", "channels"), CASES)
@pytest.mark.parametrize("length", [1, 3, 37])
def test_linear_attention_gradients_are_finite_differences(rule, channels, length):
    inputs = recurrence(rule, channels, batch=1, length=length, heads=2, key=3, value=2)

    def call(*tensors):
        return ops.linear_attention(**dict(zip(inputs, tensors, strict=True)), rule=rule)

    assert torch.autograd.gradcheck(call, tuple(inputs.values()), fast_mode=length > 3)


@pytest.mark.parametrize(("rule", "channels"), CASES)
def test_segments_change_nothing(rule, channels, monkeypatch):
    inputs = recurrence(rule, channels, length=150)
    whole = ops.linear_attention(**inputs, rule=rule)
    grads = torch.autograd.grad(whole[0].sum() + whole[1].sum(), list(inputs.values()))
    monkeypatch.setattr(linear_kernel, "SEGMENT", 64)
    parts = ops.linear_attention(**inputs, rule=rule)
    again = torch.autograd.grad(parts[0].sum() + parts[1].sum(), list(inputs.values()))
    torch.testing.assert_close((*parts, *again), (*whole, *grads), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("rule", "channels"), CASES)
@pytest.mark.parametrize("cut", [1, 33, 64])
def test_two_calls_with_the_state_are_one(rule, channels, cut):
    inputs = recurrence(rule, channels, length=70)
    whole, final = ops.linear_attention(**inputs, rule=rule)
    state, parts = inputs.pop("state"), []
    for span in (slice(0, cut), slice(cut, None)):
        o, state = ops.linear_attention(**{name: x[:, span] for name, x in inputs.items()}, state=state, rule=rule)
        parts.append(o)
    torch.testing.assert_close((torch.cat(parts, 1), state), (whole, final), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("rule", "channels"), CASES)
def test_no_later_token_changes_an_output(rule, channels):
    inputs = recurrence(rule, channels, length=70)
    before = ops.linear_attention(**inputs, rule=rule)[0]
    changed = {name: x.detach().clone() for name, x in inputs.items()}
    for name in changed.keys() - {"state"}:
        changed[name][:, 40:] = -torch.rand_like(changed[name][:, 40:])
    after = ops.linear_attention(**changed, rule=rule)[0]
    assert torch.equal(before[:, :40], after[:, :40])
    assert not torch.allclose(before[:, 40:], after[:, 40:])


@pytest.mark.parametrize(("rule", "channels"), CASES)
@pytest.mark.parametrize("length", [1, 40])
def test_padding_tokens_leave_the_state_untouched(rule, channels, length):
    inputs = recurrence(rule, channels, length=length)
    for name in inputs.keys() - {"q", "state"}:
        inputs[name] = torch.zeros_like(inputs[name])
    assert torch.equal(ops.linear_attention(**inputs, rule=rule)[1], inputs["state"])


@pytest.mark.parametrize(("rule", "channels"), [case for case in CASES if case[0] in DECAY_RULES])
@pytest.mark.parametrize("strength", ["-50", "-1e4", "-inf", "one token"])
def test_strong_decay_is_exact_in_single_precision(rule, channels, strength):
    inputs = recurrence(rule, channels, length=70, key=36)
    with torch.no_grad():
        if strength == "one token":
            # The weak decays after it are what a sum in fp32 would lose.
            inputs["decay"][:, 5] = -1e4
        else:
            inputs["decay"].fill_(float(strength))
    single = {name: x.detach().float().requires_grad_() for name, x in inputs.items()}
    found, wanted = ops.linear_attention(**single, rule=rule), naive(**inputs, rule=rule)
    grads = torch.autograd.grad(found[0].square().sum() + found[1].square().sum(), list(single.values()))
    exact = torch.autograd.grad(wanted[0].square().sum() + wanted[1].square().sum(), list(inputs.values()))
    assert all(x.isfinite().all() for x in (*found, *grads))
    scales = [max(1.0, float(x.detach().abs().max())) for x in (*wanted, *exact)]
    for have, want, scale in zip((*found, *grads), (*wanted, *exact), scales, strict=True):
        torch.testing.assert_close(have.double() / scale, want / scale, rtol=0, atol=2e-5)


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_write_strength_at_its_ends(beta):
    inputs = recurrence("delta", False, length=65, key=4)
    inputs["beta"] = torch.full_like(inputs["beta"], beta).requires_grad_()
    compare(ops.linear_attention(**inputs, rule="delta"), naive(**inputs, rule="delta"), list(inputs.values()))
    state = ops.linear_attention(**inputs, rule="delta")[1]
    if beta == 0:
        assert torch.equal(state, inputs["state"])
    else:
        last = (inputs["k"][:, -1, :, None] @ state).squeeze(-2)
        torch.testing.assert_close(last, inputs["v"][:, -1])


def test_equal_keys_do_not_blow_up():
    """Keys all alike, beta 1: powers of the triangular system grow like binomials, a substitution does not."""
    inputs = recurrence("delta", False, length=64, key=40)
    inputs["k"] = inputs["k"][:, :1].expand_as(inputs["k"])
    inputs["beta"] = torch.ones_like(inputs["beta"])
    single = {name: x.float() for name, x in inputs.items()}
    found, wanted = ops.linear_attention(**single, rule="delta"), naive(**inputs, rule="delta")
    torch.testing.assert_close(found, tuple(x.float() for x in wanted), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_linear_attention_in_lower_precision(dtype):
    inputs = recurrence("gated_delta", False, length=70)
    low = {name: x.detach() if name in ("decay", "state") else x.detach().to(dtype) for name, x in inputs.items()}
    low["decay"], low["state"] = low["decay"].float(), low["state"].float()
    low = {name: x.requires_grad_() for name, x in low.items()}
    o, state = ops.linear_attention(**low)
    wanted = naive(**{name: x.double() for name, x in low.items()})
    assert (o.dtype, state.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(o.double(), wanted[0], rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
    torch.testing.assert_close(state.double(), wanted[1], rtol=1e-5, atol=1e-5)
    for x, grad in zip(low.values(), torch.autograd.grad(o.sum() + state.sum(), list(low.values())), strict=True):
        assert grad.dtype == x.dtype
        assert grad.shape == x.shape


# --- attention ---------------------------------------------------------------------------------------------------------------


def attention_by_loops(q, k, v, mask=None, sinks=None, *, scale=None, causal=True, window=None, softcap=None) -> Tensor:
    """The definition, a query of a head of a sequence at a time."""
    batch, heads, queries, dim = q.shape
    keys, scale = k.shape[2], dim**-0.5 if scale is None else scale
    rows = []
    for b, t, h in product(range(batch), range(queries), range(heads)):
        scores = (k[b, h * k.shape[1] // heads] @ q[b, h, t]) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        here, seen = t + keys - queries, [True] * keys
        if mask is None:
            seen = [(not causal or j <= here) and (window is None or j > here - window) for j in range(keys)]
        else:
            row = mask[b % mask.shape[0], h % mask.shape[1], t]
            if mask.dtype == torch.bool:
                seen = row.tolist()
            else:
                scores = scores + row
        chosen = [j for j in range(keys) if seen[j]]
        logits = scores[chosen]
        if sinks is not None:
            logits = torch.cat([logits, sinks[h : h + 1]])
        p = logits.softmax(0)[: len(chosen)]
        rows.append(p @ v[b, h * k.shape[1] // heads][chosen] if chosen else torch.zeros_like(v[b, 0, 0]))
    return torch.stack(rows).view(batch, queries, heads, -1)


def draw_mask(kind: str, queries: int, keys: int) -> Tensor | None:
    """A mask for 4 heads; the first of several queries sees nothing, except under the float one."""
    if kind == "none":
        return None
    if kind == "float":
        return torch.randn(1, 4, queries, keys, dtype=DOUBLE).index_fill(3, torch.arange(keys // 2), -torch.inf)
    seen = torch.rand(2, 4 if kind == "per head" else 1, queries, keys) < 0.5
    seen[..., 0, :] = False
    seen[..., -1, -1] = True
    return seen


@pytest.mark.parametrize("kind", ["none", "bool", "per head", "float"])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_attention_equals_loops(kind, softcap, with_sinks):
    for groups, queries, keys in ((4, 4, 4), (2, 4, 6), (1, 1, 5), (2, 1, 1)):
        mask = draw_mask(kind, queries, keys)
        q, k, v = normal(2, 4, queries, 3), normal(2, groups, keys, 3), normal(2, groups, keys, 5)
        sinks = normal(4) if with_sinks else None
        inputs = [q, k, v] if sinks is None else [q, k, v, sinks]
        options = {"softcap": softcap, "scale": 0.8}
        found = ops.attention(q, k, v, mask, sinks, **options)
        compare(found, attention_by_loops(q, k, v, mask, sinks, **options), inputs)


@given(
    lengths=st.tuples(st.integers(1, 6), st.integers(0, 4)),
    window=st.one_of(st.none(), st.integers(1, 9)),
    causal=st.booleans(),
    softcap=st.sampled_from([None, 2.0]),
)
@FEW
def test_attention_equals_loops_for_any_window(lengths, window, causal, softcap):
    queries, keys = lengths[0], sum(lengths)
    q, k, v = normal(2, 2, queries, 3), normal(2, 1, keys, 3), normal(2, 1, keys, 3)
    options = {"window": window, "causal": causal, "softcap": softcap}
    compare(ops.attention(q, k, v, **options), attention_by_loops(q, k, v, **options), [q, k, v])


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"window": 2}])
def test_attention_gradients_are_finite_differences(options):
    inputs = (normal(1, 2, 3, 2), normal(1, 1, 4, 2), normal(1, 1, 4, 3), None, normal(2))
    assert torch.autograd.gradcheck(lambda *x: ops.attention(*x, **options), inputs)


@pytest.mark.parametrize("options", [{}, {"window": 3}, {"causal": False}, {"window": 3, "causal": False}])
@pytest.mark.parametrize("masked", [False, True])
def test_blocks_of_queries_change_no_gradient(options, masked, monkeypatch):
    q, k, v = normal(2, 4, 7, 3), normal(2, 2, 9, 3), normal(2, 2, 9, 3)
    mask = draw_mask("bool", 7, 9) if masked else None
    weight = torch.randn(2, 7, 4, 3, dtype=DOUBLE)
    whole = torch.autograd.grad((ops.attention(q, k, v, mask, **options) * weight).sum(), [q, k, v])
    for budget in (1, 2 * 4 * 9 * 3):
        monkeypatch.setattr(attention_kernel, "BACKWARD_SCORES_CPU", budget)
        found = torch.autograd.grad((ops.attention(q, k, v, mask, **options) * weight).sum(), [q, k, v])
        torch.testing.assert_close(found, whole, rtol=1e-12, atol=1e-12)


def test_blocks_of_the_eager_forward_change_nothing(monkeypatch):
    q, k, v = normal(2, 4, 7, 3), normal(2, 2, 7, 3), normal(2, 2, 7, 3)
    whole = ops.attention(q, k, v, softcap=3.0)
    monkeypatch.setattr(attention_kernel, "EAGER_SCORES", 2 * 4 * 7 * 2)
    torch.testing.assert_close(ops.attention(q, k, v, softcap=3.0), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["bool", "-inf", "minimum"])
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}])
def test_a_query_without_keys_is_harmless(kind, options):
    seen = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
    seen[0, :, :2] = False
    low = -torch.inf if kind == "-inf" else torch.finfo(torch.float32).min
    mask = seen if kind == "bool" else torch.zeros(2, 1, 5, 5).masked_fill(~seen, low)
    q, k, v = (normal(2, 2, 5, 4, dtype=torch.float32) for _ in range(3))
    out = ops.attention(q, k, v, mask, **options)
    assert out.isfinite().all()
    if kind != "minimum":
        assert not out[0, :2].any()
    grads = torch.autograd.grad(out[0, :2].sum(), [q, k, v], retain_graph=True)
    assert not any(grad.any() for grad in grads)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), [q, k, v]))


@pytest.mark.parametrize("kind", ["bool", "lowest", "large", "infinite"])
def test_a_mask_as_numbers_leaves_no_row_without_keys(kind):
    """Such a row is NaN in PyTorch's memory-efficient kernels."""
    seen = torch.rand(2, 1, 5, 13) < 0.5
    seen[0, :, :2] = False
    lowest = {"lowest": torch.finfo(torch.float32).min, "large": -1e9, "infinite": -torch.inf}
    mask = seen if kind == "bool" else torch.where(seen, 0.5, lowest[kind])
    added, blind = efficient._bias(mask, torch.float16)
    assert torch.equal(blind, ~seen.any(-1, keepdim=True))
    assert torch.equal(added.isinf(), ~seen & ~blind)
    assert (added[seen] == (0 if kind == "bool" else 0.5)).all()
    assert not added[blind.expand_as(added)].any() and added.stride(2) % 8 == 0


def test_no_later_key_changes_an_output():
    q, k, v = (normal(2, 2, 8, 4) for _ in range(3))
    before = ops.attention(q, k, v)
    later = torch.arange(8)[:, None] >= 5
    k, v = torch.where(later, torch.randn_like(k), k), torch.where(later, torch.randn_like(v), v)
    torch.testing.assert_close(ops.attention(q, k, v)[:, :5], before[:, :5])


# --- causal convolution ------------------------------------------------------------------------------------------------------


def conv_by_loops(x, weight, state=None, reset=None) -> tuple[Tensor, Tensor]:
    """The definition, a token and a tap at a time."""
    batch, length, channels = x.shape
    width = weight.shape[1]
    past = torch.zeros(batch, channels, width - 1, dtype=x.dtype) if state is None else state
    line = torch.cat([past, x.mT], dim=2)
    starts = torch.zeros(batch, length, dtype=torch.bool) if reset is None else reset

    def reaches(b: int, here: int, there: int) -> bool:
        """No document starts after `there`, up to `here`; both count from the first token of x."""
        return not any(bool(starts[b, s]) for s in range(max(there + 1, 0), here + 1))

    y = torch.zeros_like(x)
    for b, t, tap in product(range(batch), range(length), range(width)):
        if reaches(b, t, t - tap):
            y[b, t] = y[b, t] + weight[:, width - 1 - tap] * line[b, :, t + width - 1 - tap]
    places = range(length - width + 1, length)
    tails = [
        [line[b, :, p + width - 1] * float(reaches(b, length - 1, p)) for p in places] or [line[b, :, :0]]
        for b in range(batch)
    ]
    return y, torch.stack([torch.stack(tail, 1) if width > 1 else tail[0] for tail in tails])


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(1, 4), st.integers(1, 5)),
    state=st.booleans(),
    reset=st.booleans(),
)
@settings(max_examples=30, deadline=None, derandomize=True)
def test_causal_conv_equals_loops(shape, state, reset):
    batch, length, channels, width = shape
    x, weight = normal(batch, length, channels), normal(channels, width)
    past = normal(batch, channels, width - 1) if state else None
    starts = torch.rand(batch, length) < 0.4 if reset else None
    inputs = [x, weight] if past is None else [x, weight, past]
    compare(ops.causal_conv(x, weight, past, starts), conv_by_loops(x, weight, past, starts), inputs)


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(0, 9), st.integers(1, 3), st.integers(1, 5)),
    state=st.booleans(),
    reset=st.booleans(),
    real=st.sampled_from([0.0, 0.3, 0.7, 1.0]),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_a_convolution_with_padding_is_one_of_the_tokens_without_it(shape, state, reset, real):
    batch, length, channels, width = shape
    x, weight = normal(batch, length, channels), normal(channels, width)
    past = normal(batch, channels, width - 1) if state else None
    valid = torch.rand(batch, length) < real
    starts = (torch.rand(batch, length) < 0.4) & valid if reset else None
    rows, tails = [], []
    for b in range(batch):
        one = None if starts is None else starts[b : b + 1, valid[b]]
        before = None if past is None else past[b : b + 1]
        y, tail = ops.causal_conv(x[b : b + 1, valid[b]], weight, before, one)
        rows.append(torch.zeros(length, channels, dtype=DOUBLE).masked_scatter(valid[b, :, None], y[0]))
        tails.append(tail[0])
    inputs = [x, weight] if past is None else [x, weight, past]
    found = ops.causal_conv(x, weight, past, starts, ops.previous_tokens(valid, x))
    compare(found, (torch.stack(rows), torch.stack(tails)), inputs)


def test_causal_conv_gradients_are_finite_differences():
    inputs = (normal(2, 5, 3), normal(3, 4), normal(2, 3, 3), torch.rand(2, 5) < 0.3)
    for previous in (None, ops.previous_tokens(torch.tensor([[1, 0, 1, 1, 0], [0, 1, 0, 0, 1]]).bool(), inputs[0])):
        assert torch.autograd.gradcheck(ops.causal_conv, (*inputs, previous))


@pytest.mark.parametrize("cut", [1, 2, 6])
def test_two_convolutions_with_the_state_are_one(cut):
    x, weight, state = normal(3, 9, 4), normal(4, 4), normal(3, 4, 3)
    reset = torch.rand(3, 9) < 0.3
    whole, final = ops.causal_conv(x, weight, state, reset)
    first, middle = ops.causal_conv(x[:, :cut], weight, state, reset[:, :cut])
    second, last = ops.causal_conv(x[:, cut:], weight, middle, reset[:, cut:])
    torch.testing.assert_close((torch.cat([first, second], 1), last), (whole, final))


def test_packed_documents_do_not_see_each_other():
    x, weight = normal(1, 9, 4), normal(4, 4)
    reset = torch.zeros(1, 9, dtype=torch.bool)
    reset[:, [0, 5]] = True
    found = ops.causal_conv(x, weight, normal(1, 4, 3), reset)
    alone = [ops.causal_conv(x[:, span], weight) for span in (slice(0, 5), slice(5, 9))]
    torch.testing.assert_close(found, (torch.cat([y for y, _ in alone], 1), alone[1][1]))
    poisoned = x.detach().clone()
    poisoned[:, :5] = math.nan
    assert torch.equal(ops.causal_conv(poisoned, weight, None, reset)[0][:, 5:], found[0][:, 5:])


def test_no_later_input_changes_a_convolution():
    x, weight = normal(2, 9, 4), normal(4, 3)
    changed = torch.where(torch.arange(9)[:, None] >= 5, torch.randn_like(x), x)
    assert torch.equal(ops.causal_conv(x, weight)[0][:, :5], ops.causal_conv(changed, weight)[0][:, :5])


# --- scale-normalised fusion -------------------------------------------------------------------------------------------------


def fusion_by_loops(o_full, o_linear, gamma, gate=None, *, linear_heads, norm_full=False, eps=1e-6) -> Tensor:
    """The definition, a slot at a time."""
    total = sum(o.shape[2] for o in (o_full, o_linear) if o is not None)
    slots, full, linear = [], 0, 0
    for slot in range(total):
        if slot in linear_heads:
            o = o_linear[:, :, linear]
            factor = gamma[slot if norm_full else linear] * (1 if gate is None else gate[:, :, linear])
            slots.append(factor * o / (o.square().mean(-1, keepdim=True) + eps).sqrt())
            linear += 1
        else:
            o = o_full[:, :, full]
            slots.append(gamma[slot] * o / (o.square().mean(-1, keepdim=True) + eps).sqrt() if norm_full else o)
            full += 1
    return torch.stack(slots, 2)


FUSIONS = [
    (heads, norm_full, gate)
    for heads in ([], [0], [1, 2, 4], [0, 1, 2, 3, 4])
    for norm_full in (False, True)
    for gate in ((None, 1, 6) if heads else (None,))
]


def fusion(heads: list[int], norm_full: bool, gate: int | None, dtype: torch.dtype = DOUBLE) -> tuple:
    linear = len(heads)
    o_full = normal(2, 3, 5 - linear, 6, dtype=dtype) if linear < 5 else None
    o_linear = normal(2, 3, linear, 6, dtype=dtype) if linear else None
    gates = normal(2, 3, linear, gate, dtype=dtype) if gate else None
    return o_full, o_linear, normal(5 if norm_full else linear, dtype=dtype), gates


@pytest.mark.parametrize(("heads", "norm_full", "gate"), FUSIONS)
def test_fusion_equals_loops(heads, norm_full, gate):
    inputs = fusion(heads, norm_full, gate)
    options = {"linear_heads": heads, "norm_full": norm_full, "eps": 1e-3}
    given_inputs = [x for x in inputs if x is not None and x.numel()]
    compare(ops.scale_norm_fusion(*inputs, **options), fusion_by_loops(*inputs, **options), given_inputs)


@pytest.mark.parametrize("gate", [None, 1, 6])
def test_fusion_gradients_are_finite_differences(gate):
    options = {"linear_heads": [1, 2, 4], "norm_full": True, "eps": 1e-2}
    assert torch.autograd.gradcheck(lambda *x: ops.scale_norm_fusion(*x, **options), fusion([1, 2, 4], True, gate))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_full_heads_pass_through_bit_for_bit(dtype):
    o_full, _, gamma, _ = fusion([], False, None, dtype)
    assert torch.equal(ops.scale_norm_fusion(o_full, None, gamma, linear_heads=[]), o_full)
    o_full, o_linear, gamma, gate = fusion([1, 2, 4], False, 6, dtype)
    out = ops.scale_norm_fusion(o_full, o_linear, gamma.float(), gate, linear_heads=[1, 2, 4])
    assert out.dtype == dtype
    assert torch.equal(out[:, :, [0, 3]], o_full)

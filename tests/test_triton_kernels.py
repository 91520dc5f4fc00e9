"""The Triton kernels against the references in fp64: outputs, gradients and states, for any shape, on poisoned memory."""

from __future__ import annotations

import importlib
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hydrasurgery import ops
from hydrasurgery.kernels.attention import reference as attention_reference
from hydrasurgery.kernels.causal_conv import reference as conv_reference
from hydrasurgery.kernels.decode_step import reference as decode_reference
from hydrasurgery.kernels.rotary import TURNS
from hydrasurgery.kernels.scale_norm_fusion import reference as fusion_reference

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FEW = settings(max_examples=30, deadline=None, derandomize=True)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def kernel(op: str):
    return importlib.import_module(f"hydrasurgery.kernels.{op}.triton")


@pytest.fixture(autouse=True)
def _seed_and_poison(monkeypatch):
    torch.manual_seed(0)
    poison(monkeypatch)


def poison(monkeypatch):
    """Memory comes filled with NaN, so that what a kernel leaves unwritten shows."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        make = getattr(owner, name)

        def poisoned(*args, make=make, **kwargs):
            out = make(*args, **kwargs)
            return out.fill_(torch.nan) if out.is_floating_point() else out

        monkeypatch.setattr(owner, name, poisoned)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def wide(x):
    """fp64 copies of a tensor, or of the tensors in a list or tuple."""
    if isinstance(x, (list, tuple)):
        return [wide(part) for part in x]
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def compare(found, wanted, dtype: torch.dtype) -> None:
    """Each tensor to within its dtype's rounding, relative to the whole tensor's size."""
    for number, (have, want) in enumerate(zip(found, wanted, strict=True)):
        if want is None:
            assert have is None
            continue
        assert have.shape == want.shape, number
        error = (have.double() - want).norm()
        assert error <= TOLERANCE[dtype] * (want.norm() + 1e-2), (number, float(error), float(want.norm()))


# --- fusion ------------------------------------------------------------------------------------------------------------------


@given(
    batch=st.integers(1, 2),
    length=st.integers(1, 40),
    slots=st.lists(st.booleans(), min_size=1, max_size=7),
    dim=st.integers(4, 70),
    gate=st.sampled_from([None, 1, "D"]),
    norm_full=st.booleans(),
    dtype=DTYPES,
)
@FEW
def test_fusion_and_its_gradients(batch, length, slots, dim, gate, norm_full, dtype):
    check_fusion(batch, length, slots, dim, gate, norm_full, dtype)


@pytest.mark.parametrize("slot", [0, 31, 32, 63, 64])
def test_fusion_of_one_linear_head(slot):
    """A word of bits that is 1 is a case of its own for the compiler, though not for the interpreter."""
    check_fusion(1, 1, [i == slot for i in range(slot + 2)], 4, None, False, torch.float32)


@pytest.mark.parametrize("norm_full", [False, True])
def test_fusion_of_more_heads_than_a_word_has_bits(norm_full):
    generator = torch.Generator().manual_seed(1)
    for heads in (63, 64, 65, 100, 128):
        slots = (torch.rand(heads, generator=generator) < 0.6).tolist()
        check_fusion(1, 2, slots, 3, 1, norm_full, torch.float32)


def check_fusion(batch, length, slots, dim, gate, norm_full, dtype):
    linear_heads = [slot for slot, linear in enumerate(slots) if linear]
    linear, full = len(linear_heads), len(slots) - len(linear_heads)
    o_full = normal(batch, length, full, dim, dtype=dtype) if full else None
    o_linear = normal(batch, length, linear, dim, dtype=dtype) if linear else None
    gates = (
        None if gate is None or not linear else normal(batch, length, linear, dim if gate == "D" else 1, dtype=dtype)
    )
    gamma = normal(len(slots) if norm_full else linear)
    grad = normal(batch, length, len(slots), dim, dtype=dtype)
    inputs, options = (o_full, o_linear, gamma, gates), dict(linear_heads=linear_heads, norm_full=norm_full, eps=1e-6)
    fast = kernel("scale_norm_fusion")
    compare([fast.forward(*inputs, **options)], [fusion_reference.forward(*wide(inputs), **options)], dtype)
    found = fast.backward(grad, *inputs, **options)
    compare(found, fusion_reference.backward(grad.double(), *wide(inputs), **options), dtype)
    again = fast.backward(grad, *inputs, **options)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True) if a is not None)


# --- convolution -------------------------------------------------------------------------------------------------------------


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 20)),
    width=st.integers(1, 5),
    state=st.booleans(),
    reset=st.sampled_from([None, 0.1, 0.5]),
    padding=st.sampled_from([None, 0.2, 0.9, 1.0]),
    dtype=DTYPES,
)
@FEW
def test_causal_conv_and_its_gradients(shape, width, state, reset, padding, dtype):
    check_conv(shape, width, state, reset, padding, dtype)


def test_causal_conv_over_several_tiles(monkeypatch):
    fast = kernel("causal_conv")
    if DEVICE == "cpu":  # the interpreter takes as long for a tile of any size, and much longer for many of them
        monkeypatch.setattr(fast, "TILES", 4)
    monkeypatch.setattr(fast, "PROGRAMS", 0.001)  # as many tiles a program as there may be
    shape = (2, fast.BACKWARD_TOKENS * fast.TILES + 5, fast.CHANNELS + 3)
    for padding in (None, 0.5):
        check_conv(shape, 4, True, 0.05, padding, torch.float32)


def test_a_convolution_across_padding_of_many_tiles():
    check_conv((1, 300, 4), 3, True, None, range(5, 290), torch.float32)


def check_conv(shape, width, state, reset, padding, dtype):
    """`padding`: the share of tokens that is, or which tokens are."""
    batch, length, channels = shape
    x, weight = normal(*shape, dtype=dtype), normal(channels, width, dtype=dtype)
    past = normal(batch, channels, width - 1, dtype=dtype) if state else None
    starts = None if reset is None else torch.rand(batch, length, device=DEVICE) < reset
    grads = normal(*shape, dtype=dtype), normal(batch, channels, width - 1, dtype=dtype)
    previous = None
    if padding is not None:
        padded = torch.rand(batch, length, device=DEVICE) < (padding if isinstance(padding, float) else 0)
        if not isinstance(padding, float):
            padded[:, list(padding)] = True
        starts = starts if starts is None else starts & ~padded
        previous = ops.previous_tokens(~padded, x)
    inputs = (x, weight, past, starts, previous)
    fast = kernel("causal_conv")
    compare(fast.forward(*inputs), conv_reference.forward(*wide(inputs)), dtype)
    compare(fast.backward(*grads, *inputs), conv_reference.backward(*wide(grads), *wide(inputs)), dtype)


# --- decode ------------------------------------------------------------------------------------------------------------------


@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    key=st.integers(4, 40),
    value=st.integers(4, 40),
    width=st.sampled_from([0, 1, 2, 4]),
    raw=st.booleans(),
    gated=st.booleans(),
    flags=st.booleans(),
    turn=st.sampled_from([None, *TURNS]),
    dtype=DTYPES,
)
@FEW
def test_decode_step(batch, heads, key, value, width, raw, gated, flags, turn, dtype):
    check_decode(batch, heads, key, value, width, raw, gated, flags, turn, dtype)


def test_decode_step_of_a_state_of_several_tiles(monkeypatch):
    monkeypatch.setattr(kernel("decode_step"), "STATE_ELEMENTS", 64)
    check_decode(2, 2, 16, 13, 4, True, True, True, "pairs", torch.float32)


@pytest.mark.parametrize("turn", TURNS)
def test_decode_step_rotates(turn):
    check_decode(3, 2, 24, 13, 4, True, True, True, turn, torch.float32)


def check_decode(batch, heads, key, value, width, raw, gated, flags, turn, dtype):
    q, k = (normal(batch, heads + 1, key, dtype=dtype)[:, 1:] for _ in range(2))  # a part of all heads, as it comes
    v = normal(batch, value, heads, dtype=dtype).mT
    decay, beta = normal(batch, heads), normal(batch, heads)
    gates = (decay, beta) if raw else (-decay.abs(), beta.sigmoid())
    rates = (normal(heads), normal(heads)) if raw else (None, None)
    gate = normal(batch, heads, dtype=dtype) if gated else None
    sizes = (heads * key, heads * key, heads * value) if width else ()
    weights = [normal(size, width, dtype=dtype) for size in sizes]
    inputs = (q, k, v, *gates, gate, normal(heads), *rates, weights)
    states = normal(batch, heads, key, value), [normal(batch, size, width - 1, dtype=dtype) for size in sizes]
    exact = wide(states)
    options = {"scale": None, "eps": 1e-5}
    if turn is not None:
        angles = normal(1 + (batch - 1) * (key % 2), key // 4 * 2)
        options |= {"cos": angles.cos(), "sin": angles.sin(), "turn": turn}
    if flags:
        options["valid"], options["reset"] = (torch.rand(2, batch, device=DEVICE) > 0.3).unbind()
    out = kernel("decode_step").forward(*inputs, *states, **options)
    wanted = decode_reference.forward(*wide(inputs), *exact, **options)
    compare([out, *states[1]], [wanted, *exact[1]], dtype)
    compare([states[0]], [exact[0]], torch.float32)


def test_decode_step_keeps_slow_decays():
    """softplus(-14) is 8e-7, of which fp32 would lose a digit in 1 + 8e-7."""
    zeros, ones = torch.zeros(1, 1, 4, device=DEVICE), torch.ones(1, device=DEVICE)
    pre, A_log = torch.full((1, 1), -14.0, device=DEVICE), torch.full((1,), 13.0, device=DEVICE)
    inputs = (zeros, zeros, zeros, pre, pre, None, ones, A_log, 0 * ones, [])
    state = torch.ones(1, 1, 4, 4, device=DEVICE)
    exact = state.double()
    kernel("decode_step").forward(*inputs, state, [], scale=None, eps=1e-6)
    decode_reference.forward(*wide(inputs), exact, [], scale=None, eps=1e-6)
    torch.testing.assert_close(state.double(), exact, rtol=1e-6, atol=0)


# --- attention of one query ---------------------------------------------------------------------------------------------------


def seen_keys(kind: str, batch: int, heads: int, keys: int) -> Tensor | None:
    """A mask of [B, 1 or H, 1, S]: any keys, each at random; a row may see none. "added" has -inf, finite numbers elsewhere."""
    if kind == "none":
        return None
    shown = torch.rand(batch, heads if kind == "by head" else 1, 1, keys, device=DEVICE) < 0.6
    if kind != "added":
        return shown
    shown[..., 0] = True
    return torch.where(shown, torch.randn(shown.shape, device=DEVICE), -torch.inf)


@FEW
@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 3), st.integers(1, 300)),
    widths=st.sampled_from([(8, 8), (20, 12), (64, 64), (128, 256)]),
    kind=st.sampled_from(["none", "bool", "by head", "added"]),
    window=st.sampled_from([None, 1, 70]),
    softcap=st.sampled_from([None, 5.0]),
    sinks=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16]),
)
def test_attention_of_one_query(shape, widths, kind, window, softcap, sinks, dtype):
    batch, groups, each, keys = shape
    heads, (dim, values) = groups * each, widths
    q = normal(batch, 1, heads, dim, dtype=dtype).transpose(1, 2)
    # A static cache: only a part of it, and what no head sees is not read.
    cache = normal(batch, groups, keys + 7, dim + values, dtype=dtype)
    mask = seen_keys(kind, batch, heads, keys)
    if kind == "bool":
        hidden = ~mask.expand(batch, groups, 1, keys)[:, :, 0, :, None]
        cache[:, :, :keys] = torch.where(hidden, torch.nan, cache[:, :, :keys])
    k, v = cache[:, :, :keys, :dim], cache[:, :, :keys, dim:]
    sink = normal(heads) if sinks else None
    options = {"scale": None, "causal": True, "window": window, "softcap": softcap}
    found = kernel("attention").forward(q, k, v, mask, sink, **options)
    wanted = attention_reference.forward(*wide((q, k.nan_to_num(), v.nan_to_num(), mask, sink)), **options)
    assert found.shape == wanted.shape
    compare((found,), (wanted,), dtype)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("first", [0, 4_154])
def test_more_parts_of_the_keys_than_are_joined_at_once(monkeypatch, first, sinks):
    monkeypatch.setattr(kernel("attention"), "_wave", lambda device: 1000)
    keys = 64 * 66  # of wide values 64 parts are joined at once
    q, k, v = normal(1, 2, 1, 16), normal(1, 1, keys, 16), normal(1, 1, keys, 256)
    mask = torch.arange(keys, device=DEVICE).expand(1, 1, 1, keys) >= first  # or only the last two parts' keys
    given = q, k, v, mask, normal(2) if sinks else None
    options = {"scale": None, "causal": True, "window": None, "softcap": None}
    found = kernel("attention").forward(*given, **options)
    compare((found,), (attention_reference.forward(*wide(given), **options),), torch.float32)


def test_a_query_that_sees_nothing_gives_nothing():
    q, k, v = normal(1, 2, 1, 16), normal(1, 1, 130, 16), normal(1, 1, 130, 16)
    mask = torch.zeros(1, 1, 1, 130, dtype=torch.bool, device=DEVICE)
    options = {"scale": None, "causal": True, "window": None, "softcap": None}
    assert not kernel("attention").forward(q, k, v, mask, None, **options).any()
    lowest = torch.full((1, 1, 1, 130), torch.finfo(torch.float32).min, device=DEVICE)
    found = kernel("attention").forward(q, k, v, lowest, None, **options)
    torch.testing.assert_close(found[0, 0], v[0].mean(1).expand(2, 16))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_calls_of_another_kind_find_kernels_of_their_own():
    """Aligned or not, of 1, 16 or 17 numbers, in two dtypes, with and without a table a row; each kind twice."""
    from hydrasurgery.kernels.rotary import rotate
    from hydrasurgery.kernels.rotate import triton as kernel

    kinds = product((torch.float32, torch.bfloat16), (1, 16, 17), (1, 2), (0, 1))
    for dtype, length, rows, shift in kinds:
        size = 2 * 3 * length * 8
        for _ in range(2):
            x = torch.randn(size + 1, device="cuda", dtype=dtype)[shift : size + shift].view(2, 3, length, 8)
            cos, sin = torch.randn(2, rows, 1, length, 8, device="cuda", dtype=dtype)
            (found,) = kernel.forward([x], cos, sin, turn="half")
            wanted = rotate(x.double(), cos.double(), sin.double(), "half")
            assert torch.allclose(found.double(), wanted, atol=1e-5 if dtype == torch.float32 else 5e-2)

"""A linear head's inputs in Triton: short convolution, rotary embedding and norm in one pass over memory.

A program owns some tokens of one head, as two halves of its channels: what the embedding pairs is then in the same place of both.
Neighbours are found as in `hydrasurgery.kernels.causal_conv.triton`, whose backward this one ends with.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hydrasurgery.kernels.causal_conv import triton as causal_conv
from hydrasurgery.kernels.causal_conv.triton import _before, _starts
from hydrasurgery.kernels.head_inputs.reference import L2_EPS

TILE = 2048  # numbers of a half, of one program
WARPS = 4


@triton.jit
def _input(x, state, place, channel, live, wanted, x_t, WIDTH: tl.constexpr, STATE: tl.constexpr):
    """Inputs [place, channel] of one head, those before the first token from the state; 0 where not `wanted`."""
    inside = wanted[:, None] & live[None, :]
    before = (place < 0)[:, None]
    at = place.to(tl.int64)[:, None] * x_t + channel[None, :]
    value = tl.load(x + at, mask=inside & ~before, other=0).to(tl.float32)
    if STATE:
        slot = channel[None, :] * (WIDTH - 1) + (place + WIDTH - 1)[:, None]
        value += tl.load(state + slot, mask=inside & before, other=0).to(tl.float32)
    return value


@triton.jit
def _turned(
    x, weight, state, reset, links, cos, sin, row, low, high, live, x_t, T,
    D: tl.constexpr, WIDTH: tl.constexpr, STATE: tl.constexpr, RESET: tl.constexpr, LINKS: tl.constexpr,
    TURN: tl.constexpr,
):  # fmt: skip
    """Both halves [row, channel] of x + conv(x), rotated; both of x; and which rows are tokens."""
    place = row
    token = row < T
    if LINKS:  # a token is what the place after it follows; else it is padding
        token = token & (tl.load(links + row + 1, mask=token, other=-1) == row)
    same = token
    own_low = _input(x, state, place, low, live, same, x_t, WIDTH, STATE)
    own_high = _input(x, state, place, high, live, same, x_t, WIDTH, STATE)
    a, b = own_low, own_high
    for back in tl.static_range(WIDTH):
        tap = WIDTH - 1 - back
        if back > 0:
            if RESET:
                same = same & ~_starts(reset, place, T)
            place = _before(links, place, T, LINKS)
        seen = same & (place >= 1 - WIDTH)
        a += _input(x, state, place, low, live, seen, x_t, WIDTH, STATE) * tl.load(
            weight + low * WIDTH + tap, mask=live, other=0
        ).to(tl.float32)
        b += _input(x, state, place, high, live, seen, x_t, WIDTH, STATE) * tl.load(
            weight + high * WIDTH + tap, mask=live, other=0
        ).to(tl.float32)
    if TURN:
        known = (row < T)[:, None] & live[None, :]
        at = row.to(tl.int64)[:, None] * D
        c_low = tl.load(cos + at + low[None, :], mask=known, other=0).to(tl.float32)
        c_high = tl.load(cos + at + high[None, :], mask=known, other=0).to(tl.float32)
        s_low = tl.load(sin + at + low[None, :], mask=known, other=0).to(tl.float32)
        s_high = tl.load(sin + at + high[None, :], mask=known, other=0).to(tl.float32)
        a, b = a * c_low - b * s_low, b * c_high + a * s_high
    return a, b, own_low, own_high, token


@triton.jit(do_not_specialize=["T"])
def _forward_kernel(
    x, weight, state, reset, links, cos, sin, y, tail, x_b, x_h, x_t, turn_b, T, eps,
    HEADS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, STATE: tl.constexpr, RESET: tl.constexpr,
    LINKS: tl.constexpr, TURN: tl.constexpr, NORM: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first, head, batch = tl.program_id(0) * TOKENS, tl.program_id(1), tl.program_id(2).to(tl.int64)
    half: tl.constexpr = D // 2
    row, low = first + tl.arange(0, TOKENS), tl.arange(0, BLOCK)
    live, high = low < half, low + half
    past = (batch * HEADS + head) * D * (WIDTH - 1)
    x, state, tail = x + batch * x_b + head * x_h, state + past, tail + past
    weight += head * D * WIDTH
    reset += batch * T
    links += batch * (T + 1)
    cos, sin = cos + batch * turn_b, sin + batch * turn_b
    a, b, _, _, _ = _turned(
        x, weight, state, reset, links, cos, sin, row, low, high, live, x_t, T, D, WIDTH, STATE, RESET, LINKS, TURN
    )
    if NORM:
        inverse = tl.rsqrt(tl.sum(a * a, 1) + tl.sum(b * b, 1) + eps)[:, None]
        a, b = a * inverse, b * inverse
    at = ((batch * T + row.to(tl.int64)) * HEADS + head)[:, None] * D
    inside = (row < T)[:, None] & live[None, :]
    tl.store(y + at + low[None, :], a.to(y.dtype.element_ty), mask=inside)
    tl.store(y + at + high[None, :], b.to(y.dtype.element_ty), mask=inside)
    if first + TOKENS >= T:
        last = T + tl.zeros((1,), tl.int32)
        kept = last >= 0
        for back in tl.static_range(WIDTH - 1):
            last = _before(links, last, T, LINKS)
            seen = kept & (last >= 1 - WIDTH)
            ended = _input(x, state, last, low, live, seen, x_t, WIDTH, STATE)
            tl.store(
                tail + low[None, :] * (WIDTH - 1) + (WIDTH - 2 - back),
                ended.to(tail.dtype.element_ty),
                mask=live[None, :],
            )
            ended = _input(x, state, last, high, live, seen, x_t, WIDTH, STATE)
            tl.store(
                tail + high[None, :] * (WIDTH - 1) + (WIDTH - 2 - back),
                ended.to(tail.dtype.element_ty),
                mask=live[None, :],
            )
            if RESET:
                kept = kept & ~_starts(reset, last, T)


@triton.jit(do_not_specialize=["T"])
def _backward_kernel(
    grad, x, weight, state, reset, links, cos, sin, mixed, tokens, x_b, x_h, x_t, turn_b, T, eps,
    HEADS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, STATE: tl.constexpr, RESET: tl.constexpr,
    LINKS: tl.constexpr, TURN: tl.constexpr, NORM: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`mixed`: the gradient of x + conv(x); `tokens`: x, dense and 0 at padding."""
    first, head, batch = tl.program_id(0) * TOKENS, tl.program_id(1), tl.program_id(2).to(tl.int64)
    half: tl.constexpr = D // 2
    row, low = first + tl.arange(0, TOKENS), tl.arange(0, BLOCK)
    live, high = low < half, low + half
    x, state = x + batch * x_b + head * x_h, state + (batch * HEADS + head) * D * (WIDTH - 1)
    weight += head * D * WIDTH
    reset += batch * T
    links += batch * (T + 1)
    cos, sin = cos + batch * turn_b, sin + batch * turn_b
    a, b, own_low, own_high, token = _turned(
        x, weight, state, reset, links, cos, sin, row, low, high, live, x_t, T, D, WIDTH, STATE, RESET, LINKS, TURN
    )
    inside = (row < T)[:, None] & live[None, :]
    at = ((batch * T + row.to(tl.int64)) * HEADS + head)[:, None] * D
    da = tl.load(grad + at + low[None, :], mask=inside & token[:, None], other=0).to(tl.float32)
    db = tl.load(grad + at + high[None, :], mask=inside & token[:, None], other=0).to(tl.float32)
    if NORM:
        inverse = tl.rsqrt(tl.sum(a * a, 1) + tl.sum(b * b, 1) + eps)[:, None]
        a, b = a * inverse, b * inverse
        along = (tl.sum(a * da, 1) + tl.sum(b * db, 1))[:, None]
        da, db = inverse * (da - a * along), inverse * (db - b * along)
    if TURN:
        place = row.to(tl.int64)[:, None] * D
        c_low = tl.load(cos + place + low[None, :], mask=inside, other=0).to(tl.float32)
        c_high = tl.load(cos + place + high[None, :], mask=inside, other=0).to(tl.float32)
        s_low = tl.load(sin + place + low[None, :], mask=inside, other=0).to(tl.float32)
        s_high = tl.load(sin + place + high[None, :], mask=inside, other=0).to(tl.float32)
        da, db = da * c_low + db * s_high, db * c_high - da * s_low
    tl.store(mixed + at + low[None, :], da.to(mixed.dtype.element_ty), mask=inside)
    tl.store(mixed + at + high[None, :], db.to(mixed.dtype.element_ty), mask=inside)
    tl.store(tokens + at + low[None, :], own_low.to(tokens.dtype.element_ty), mask=inside)
    tl.store(tokens + at + high[None, :], own_high.to(tokens.dtype.element_ty), mask=inside)


def forward(
    x: Tensor,
    weight: Tensor,
    state: Tensor | None,
    reset: Tensor | None,
    previous: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    norm: bool,
) -> tuple[Tensor, Tensor]:
    """As `reference.forward`."""
    batch, heads, length, dim = x.shape
    width = weight.shape[1]
    y, tail = x.new_empty(batch, length, heads, dim), x.new_empty(batch, heads * dim, width - 1)
    if batch and heads:
        grid, inputs, options = _launch(x, weight, state, reset, previous, cos, sin, norm)
        tensors, numbers = inputs
        _forward_kernel[grid](*tensors, y, tail, *numbers, **options)
    return y, tail


def backward(
    grad: Tensor,
    grad_state: Tensor,
    x: Tensor,
    weight: Tensor,
    state: Tensor | None,
    reset: Tensor | None,
    previous: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    norm: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As `reference.backward`."""
    batch, heads, length, dim = x.shape
    mixed, tokens = (x.new_empty(batch, length, heads * dim) for _ in range(2))
    if mixed.numel():
        grid, inputs, options = _launch(x, weight, state, reset, previous, cos, sin, norm)
        tensors, numbers = inputs
        _backward_kernel[grid](grad.contiguous(), *tensors, mixed, tokens, *numbers, **options)
    dx, dweight, dstate = causal_conv.backward(mixed, grad_state, tokens, weight, state, reset, previous)
    return dx.add_(mixed).view(batch, length, heads, dim).transpose(1, 2), dweight, dstate


def _launch(
    x: Tensor,
    weight: Tensor,
    state: Tensor | None,
    reset: Tensor | None,
    previous: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    norm: bool,
) -> tuple[tuple[int, int, int], tuple[list[Tensor], list[int | float]], dict[str, int | bool]]:
    """Grid; tensors and numbers; constants and warps. An absent tensor is never read; x stands in for it."""
    batch, heads, length, dim = x.shape
    x = x if x.stride(3) == 1 else x.contiguous()
    links = x if previous is None else previous.to(torch.int32).contiguous()
    flags = x if reset is None else reset.contiguous().view(torch.uint8)
    tables = [x if table is None else table.contiguous() for table in (cos, sin)]
    block = triton.next_power_of_2(dim // 2)
    tokens = max(1, TILE // block)
    tensors = [x, weight.contiguous(), x if state is None else state.contiguous(), flags, links, *tables]
    turn_batch = 0 if cos is None or cos.shape[0] == 1 else length * dim
    numbers = [*x.stride()[:3], turn_batch, length, L2_EPS]
    options = {
        "HEADS": heads, "D": dim, "WIDTH": weight.shape[1], "STATE": state is not None, "RESET": reset is not None,
        "LINKS": previous is not None, "TURN": cos is not None, "NORM": norm, "TOKENS": tokens, "BLOCK": block,
        "num_warps": WARPS,
    }  # fmt: skip
    return (max(1, triton.cdiv(length, tokens)), heads, batch), (tensors, numbers), options

"""Depthwise causal convolution in Triton: one launch and one pass over memory each way.

Position t of the padded sequence runs from -(W-1), the oldest input of the state, to T-1. Going from a token to its neighbours,
`same` says whether they still belong to its document; it can only turn False.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS, CHANNELS = 32, 128  # a tile
TILES = 16  # tiles that a backward program walks: their shares of d weight are one


@triton.jit
def _load(
    x, state, batch, time, channel, wanted, T, C, WIDTH: tl.constexpr, STATE: tl.constexpr
):  # fmt: skip
    """Inputs [time, channel] of the padded sequence, 0 where not `wanted` (and before the start without a state)."""
    inside = (channel < C)[None, :] & wanted
    at = (batch * T + time.to(tl.int64))[:, None] * C + channel[None, :]
    value = tl.load(x + at, mask=inside & (time >= 0)[:, None], other=0).to(tl.float32)
    if STATE:
        at = (batch * C + channel.to(tl.int64))[None, :] * (WIDTH - 1) + (time + WIDTH - 1)[:, None]
        value += tl.load(state + at, mask=inside & (time < 0)[:, None], other=0).to(tl.float32)
    return value


@triton.jit
def _starts(reset, batch, time, T):
    """Whether a document starts at each time; False outside the sequence."""
    return tl.load(reset + batch * T + time, mask=(time >= 0) & (time < T), other=0) != 0


@triton.jit
def _forward_kernel(
    x, weight, state, reset, y, tail, T, C,
    WIDTH: tl.constexpr, STATE: tl.constexpr, RESET: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    block, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    time = block * TOKENS + tl.arange(0, TOKENS)
    same = time < T
    total = tl.zeros((TOKENS, CHANNELS), tl.float32)
    for back in tl.static_range(WIDTH):
        value = _load(x, state, batch, time - back, channel, same[:, None], T, C, WIDTH, STATE)
        tap = tl.load(weight + channel * WIDTH + (WIDTH - 1 - back), mask=channel < C, other=0).to(tl.float32)
        total += value * tap[None, :]
        if RESET:
            same = same & ~_starts(reset, batch, time - back, T)
    at = (batch * T + time.to(tl.int64))[:, None] * C + channel[None, :]
    tl.store(y + at, total.to(y.dtype.element_ty), mask=(time < T)[:, None] & (channel < C)[None, :])
    if block == tl.num_programs(1) - 1:
        last = T - 1 + tl.zeros((1,), tl.int32)
        kept = last >= 0
        for back in tl.static_range(WIDTH - 1):
            value = _load(x, state, batch, last - back, channel, kept[:, None], T, C, WIDTH, STATE)
            at = (batch * C + channel.to(tl.int64))[None, :] * (WIDTH - 1) + (WIDTH - 2 - back)
            tl.store(tail + at, value.to(tail.dtype.element_ty), mask=(channel < C)[None, :])
            if RESET:
                kept = kept & ~_starts(reset, batch, last - back, T)


@triton.jit
def _backward_kernel(
    grad, grad_tail, x, weight, state, reset, dx, dweight, dstate, T, C,
    WIDTH: tl.constexpr, TAPS: tl.constexpr, STATE: tl.constexpr, RESET: tl.constexpr,
    TILES: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    part, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    tap_index = tl.arange(0, TAPS)
    dtaps = tl.zeros((CHANNELS, TAPS), tl.float32)
    column = (channel < C)[None, :]
    for tile in range(TILES):
        time = (part * TILES + tile) * TOKENS + tl.arange(0, TOKENS) - (WIDTH - 1)
        same = time < T
        value = _load(x, state, batch, time, channel, same[:, None], T, C, WIDTH, STATE)
        total = tl.zeros((TOKENS, CHANNELS), tl.float32)
        for ahead in tl.static_range(WIDTH):
            later = time + ahead
            if RESET and ahead > 0:
                same = same & ~_starts(reset, batch, later, T)
            at = (batch * T + later.to(tl.int64))[:, None] * C + channel[None, :]
            seen = (same & (later >= 0) & (later < T))[:, None] & column
            dy = tl.load(grad + at, mask=seen, other=0).to(tl.float32)
            tap = tl.load(weight + channel * WIDTH + (WIDTH - 1 - ahead), mask=channel < C, other=0).to(tl.float32)
            total += dy * tap[None, :]
            share = tl.sum(dy * value, axis=0)
            dtaps += tl.where(tap_index[None, :] == WIDTH - 1 - ahead, share[:, None], 0.0)
        slot = time - (T - WIDTH + 1)
        at = (batch * C + channel.to(tl.int64))[None, :] * (WIDTH - 1) + slot[:, None]
        total += tl.load(grad_tail + at, mask=(same & (slot >= 0))[:, None] & column, other=0).to(tl.float32)
        at = (batch * T + time.to(tl.int64))[:, None] * C + channel[None, :]
        tl.store(dx + at, total.to(dx.dtype.element_ty), mask=((time >= 0) & (time < T))[:, None] & column)
        if STATE:
            at = (batch * C + channel.to(tl.int64))[None, :] * (WIDTH - 1) + (time + WIDTH - 1)[:, None]
            tl.store(dstate + at, total.to(dstate.dtype.element_ty), mask=(time < 0)[:, None] & column)
    at = ((batch * tl.num_programs(1) + part) * C + channel.to(tl.int64))[:, None] * WIDTH + tap_index[None, :]
    tl.store(dweight + at, dtaps, mask=(channel < C)[:, None] & (tap_index < WIDTH)[None, :])


def forward(x: Tensor, weight: Tensor, state: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    """As `reference.forward`: (y [B, T, C], state after x [B, C, W-1])."""
    x, weight = x.contiguous(), weight.contiguous()
    (batch, length, channels), width = x.shape, weight.shape[1]
    y, tail = torch.empty_like(x), x.new_empty(batch, channels, width - 1)
    if not batch or not channels:
        return y, tail
    grid = (triton.cdiv(channels, CHANNELS), max(1, triton.cdiv(length, TOKENS)), batch)
    _forward_kernel[grid](
        x, weight, *_optional(x, state, reset), y, tail, length, channels,
        WIDTH=width, STATE=state is not None, RESET=reset is not None, TOKENS=TOKENS, CHANNELS=CHANNELS, num_warps=4,
    )  # fmt: skip
    return y, tail


def backward(
    grad: Tensor, grad_state: Tensor, x: Tensor, weight: Tensor, state: Tensor | None, reset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As `reference.backward`. Programs leave their shares of d weight, summed in a fixed order."""
    grad, grad_state, x, weight = (t.contiguous() for t in (grad, grad_state, x, weight))
    (batch, length, channels), width = x.shape, weight.shape[1]
    parts = triton.cdiv(length + width - 1, TOKENS * TILES)
    dx = torch.empty_like(x)
    dstate = None if state is None else torch.empty_like(state, memory_format=torch.contiguous_format)
    shares = torch.empty(batch, parts, channels, width, dtype=torch.float32, device=x.device)
    if shares.numel():
        _backward_kernel[(triton.cdiv(channels, CHANNELS), parts, batch)](
            grad, grad_state, x, weight, *_optional(x, state, reset), dx, shares, x if dstate is None else dstate,
            length, channels, WIDTH=width, TAPS=triton.next_power_of_2(width), STATE=state is not None,
            RESET=reset is not None, TILES=TILES, TOKENS=TOKENS, CHANNELS=CHANNELS, num_warps=4,
        )  # fmt: skip
    return dx, shares.sum((0, 1)).to(weight.dtype), dstate


def _optional(x: Tensor, state: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    """An absent tensor is never read; x stands in for it."""
    return x if state is None else state.contiguous(), x if reset is None else reset.contiguous().view(torch.uint8)

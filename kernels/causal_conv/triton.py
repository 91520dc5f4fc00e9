"""Depthwise causal convolution in Triton: one launch and one pass over memory each way.

Position t of the padded sequence runs from -(W-1), the oldest input of the state, to T-1. Going from a token to its neighbours,
`same` says whether they still belong to its document; it can only turn False. Where there may be padding, neighbours are looked up:
`links` [B, T + 1] holds for each token, and for the one that will come next, the last token before it (forward), or for each token,
and first for the state's last input, the next token (backward).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hydrasurgery.kernels.cards import processors
from hydrasurgery.kernels.launching import cdiv, launch, power_of_2

CHANNELS = 128  # of a tile, both ways
TOKENS, WARPS = 16, 4
BACKWARD_TOKENS, BACKWARD_WARPS = 8, 1  # one warp holds all rows of a tile, so sums over them stay inside its threads
TILES = 64  # that a backward program walks at most: their shares of d weight are one
PROGRAMS = 16  # a processor, as far as there are tiles


@triton.jit
def _load(x, state, first, row, channel, wanted, C, WIDTH: tl.constexpr, STATE: tl.constexpr, LINKS: tl.constexpr):
    """Inputs [first + row, channel] of one padded sequence, 0 where not `wanted` and before the start without a state.

    `x` points at position `first`, `state` at the sequence's own, so that offsets fit 32 bits.
    """
    inside = (channel < C)[None, :] & wanted[:, None]
    before = (first + row < 0)[:, None]
    line = row.to(tl.int64) if LINKS else row  # as far away as the padding is long
    value = tl.load(x + line[:, None] * C + channel[None, :], mask=inside & ~before, other=0).to(tl.float32)
    if STATE and (LINKS or first < WIDTH):  # without padding no tap of later tiles reaches the state
        at = channel[None, :] * (WIDTH - 1) + (first + row + WIDTH - 1)[:, None]
        value += tl.load(state + at, mask=inside & before, other=0).to(tl.float32)
    return value


@triton.jit
def _starts(reset, time, T):
    """Whether a document starts at each time; False outside the sequence."""
    return tl.load(reset + time, mask=(time >= 0) & (time < T), other=0) != 0


@triton.jit
def _before(links, place, T, LINKS: tl.constexpr):
    """The position before each of `place`."""
    if LINKS:
        here = (place >= 0) & (place <= T)
        return tl.where(here, tl.load(links + place, mask=here, other=0), place - 1)
    else:
        return place - 1


@triton.jit
def _after(links, place, T, LINKS: tl.constexpr):
    """The position after each of `place`; T or more: none."""
    if LINKS:
        here = (place >= -1) & (place < T)
        return tl.where(here, tl.load(links + place + 1, mask=here, other=0), place + 1)
    else:
        return place + 1


@triton.jit
def _forward_kernel(
    x, weight, state, reset, links, y, tail, T, C,
    WIDTH: tl.constexpr, STATE: tl.constexpr, RESET: tl.constexpr, LINKS: tl.constexpr,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    first, batch = tl.program_id(1) * TOKENS, tl.program_id(2).to(tl.int64)
    channel, row = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS), tl.arange(0, TOKENS)
    column = (channel < C)[None, :]
    x, y = x + (batch * T + first) * C, y + (batch * T + first) * C
    state, tail, reset = state + batch * C * (WIDTH - 1), tail + batch * C * (WIDTH - 1), reset + batch * T
    links += batch * (T + 1)
    place = first + row
    same = place < T
    if LINKS:  # a token is what the place behind it follows; else it is padding
        same = same & (tl.load(links + place + 1, mask=same, other=-1) == place)
    total = tl.zeros((TOKENS, CHANNELS), tl.float32)
    for back in tl.static_range(WIDTH):
        value = _load(x, state, first, place - first, channel, same, C, WIDTH, STATE, LINKS)
        tap = tl.load(weight + channel * WIDTH + (WIDTH - 1 - back), mask=channel < C, other=0).to(tl.float32)
        total += value * tap[None, :]
        if RESET:
            same = same & ~_starts(reset, place, T)
        place = _before(links, place, T, LINKS)
    live = (first + row < T)[:, None] & column
    tl.store(y + row[:, None] * C + channel[None, :], total.to(y.dtype.element_ty), mask=live)
    if first + TOKENS >= T:
        last = T + tl.zeros((1,), tl.int32)
        kept = last >= 0
        for back in tl.static_range(WIDTH - 1):
            last = _before(links, last, T, LINKS)
            ended = _load(x, state, first, last - first, channel, kept, C, WIDTH, STATE, LINKS)
            slot = channel[None, :] * (WIDTH - 1) + (WIDTH - 2 - back)
            tl.store(tail + slot, ended.to(tail.dtype.element_ty), mask=column)
            if RESET:
                kept = kept & ~_starts(reset, last, T)


@triton.jit(do_not_specialize=["tiles"])
def _backward_kernel(
    grad, grad_tail, x, weight, state, reset, links, dx, dweight, dstate, T, C, tiles,
    WIDTH: tl.constexpr, TAPS: tl.constexpr, STATE: tl.constexpr, RESET: tl.constexpr, LINKS: tl.constexpr,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    part, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    channel, row, tap_of = (
        tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS),
        tl.arange(0, TOKENS),
        tl.arange(0, TAPS),
    )
    column = (channel < C)[None, :]
    begin = part * tiles * TOKENS - (WIDTH - 1)
    grad, x, dx = grad + (batch * T + begin) * C, x + (batch * T + begin) * C, dx + (batch * T + begin) * C
    past = batch * C * (WIDTH - 1)
    state, dstate, grad_tail, reset = state + past, dstate + past, grad_tail + past, reset + batch * T
    links += batch * (T + 1)
    dtaps = tl.zeros((TAPS, CHANNELS), tl.float32)
    for tile in range(tl.minimum(tiles, tl.cdiv(T - begin, TOKENS))):
        first = begin + tile * TOKENS
        time = first + row
        same = time < T
        if LINKS:  # padding leads nowhere
            same = same & (tl.load(links + time + 1, mask=same & (time >= 0), other=0) != -2)
        later, steps = time, tl.zeros((TOKENS,), tl.int32)  # `steps`: how many follow, W - 1 at most
        value = _load(x, state, first, row, channel, same, C, WIDTH, STATE, LINKS)
        total = tl.zeros((TOKENS, CHANNELS), tl.float32)
        for ahead in tl.static_range(WIDTH):
            if ahead > 0:
                later = _after(links, later, T, LINKS)
                steps += (later < T).to(tl.int32)
            if RESET and ahead > 0:
                same = same & ~_starts(reset, later, T)
            seen = (same & (later >= 0) & (later < T))[:, None] & column
            line = (later - first).to(tl.int64) if LINKS else later - first
            dy = tl.load(grad + line[:, None] * C + channel[None, :], mask=seen, other=0).to(tl.float32)
            tap = tl.load(weight + channel * WIDTH + (WIDTH - 1 - ahead), mask=channel < C, other=0).to(tl.float32)
            total += dy * tap[None, :]
            share = tl.sum(dy * value, axis=0)
            dtaps += tl.where(tap_of[:, None] == WIDTH - 1 - ahead, share[None, :], 0.0)
        slot = WIDTH - 2 - steps
        if LINKS or first + TOKENS > T - WIDTH + 1:
            ends = (same & (slot >= 0))[:, None] & column
            at = channel[None, :] * (WIDTH - 1) + slot[:, None]
            total += tl.load(grad_tail + at, mask=ends, other=0).to(tl.float32)
        inside = ((time >= 0) & (time < T))[:, None] & column
        tl.store(dx + row[:, None] * C + channel[None, :], total.to(dx.dtype.element_ty), mask=inside)
        if STATE and first < 0:
            at = channel[None, :] * (WIDTH - 1) + (time + WIDTH - 1)[:, None]
            tl.store(dstate + at, total.to(dstate.dtype.element_ty), mask=(time < 0)[:, None] & column)
        grad, x, dx = grad + TOKENS * C, x + TOKENS * C, dx + TOKENS * C
    share_of = dweight + (batch * tl.num_programs(1) + part) * C * WIDTH
    tl.store(share_of + channel[None, :] * WIDTH + tap_of[:, None], dtaps, mask=(tap_of < WIDTH)[:, None] & column)


def forward(
    x: Tensor, weight: Tensor, state: Tensor | None, reset: Tensor | None, previous: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `reference.forward`: (y [B, T, C], state after x [B, C, W-1])."""
    x, weight = x.contiguous(), weight.contiguous()
    (batch, length, channels), width = x.shape, weight.shape[1]
    y, tail = torch.empty_like(x), x.new_empty(batch, channels, width - 1)
    if not batch or not channels:
        return y, tail
    links = x if previous is None else previous.to(torch.int32).contiguous()
    grid = (cdiv(channels, CHANNELS), max(1, cdiv(length, TOKENS)), batch)
    launch(
        _forward_kernel, grid,
        x, weight, *_optional(x, state, reset), links, y, tail, length, channels, WIDTH=width, STATE=state is not None,
        RESET=reset is not None, LINKS=previous is not None, TOKENS=TOKENS, CHANNELS=CHANNELS, num_warps=WARPS,
    )  # fmt: skip
    return y, tail


def backward(
    grad: Tensor,
    grad_state: Tensor,
    x: Tensor,
    weight: Tensor,
    state: Tensor | None,
    reset: Tensor | None,
    previous: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As `reference.backward`. Programs leave their shares of d weight, summed in a fixed order."""
    grad, grad_state, x, weight = (t.contiguous() for t in (grad, grad_state, x, weight))
    (batch, length, channels), width = x.shape, weight.shape[1]
    whole, columns = cdiv(length + width - 1, BACKWARD_TOKENS), cdiv(channels, CHANNELS)
    tiles = max(1, min(TILES, int(whole * columns * batch / (PROGRAMS * processors(x.device)))))
    parts = cdiv(whole, tiles)
    dx = torch.empty_like(x)
    dstate = None if state is None else torch.empty_like(state, memory_format=torch.contiguous_format)
    shares = torch.empty(batch, parts, channels, width, dtype=torch.float32, device=x.device)
    links = x if previous is None else _following(previous)
    if shares.numel():
        launch(
            _backward_kernel, (columns, parts, batch),
            grad, grad_state, x, weight, *_optional(x, state, reset), links, dx, shares, x if dstate is None else dstate,
            length, channels, tiles, WIDTH=width, TAPS=power_of_2(width), STATE=state is not None,
            RESET=reset is not None, LINKS=previous is not None, TOKENS=BACKWARD_TOKENS, CHANNELS=CHANNELS,
            num_warps=BACKWARD_WARPS,
        )  # fmt: skip
    return dx, shares.sum((0, 1)).to(weight.dtype), dstate


def _following(previous: Tensor) -> Tensor:
    """[B, T + 1] int32: the token after the state's last input, and after each token; T where there is none, -2 for padding."""
    batch, length = previous.shape[0], previous.shape[1] - 1
    place = torch.arange(length, device=previous.device).expand(batch, -1)
    valid = previous[:, 1:] == place
    found = torch.full((batch, length + 2), length, device=previous.device)
    found.scatter_(1, torch.where(valid, previous[:, :-1] + 1, length + 1), place)
    found[:, 1:-1].masked_fill_(~valid, -2)
    return found[:, :-1].to(torch.int32).contiguous()


def _optional(x: Tensor, state: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    """An absent tensor is never read; x stands in for it."""
    return x if state is None else state.contiguous(), x if reset is None else reset.contiguous().view(torch.uint8)

"""What q, k and v of linear heads go through before the recurrence, in Triton: one launch forwards, two backwards.

A program owns some tokens of one head of q, k or v (its `part`), as two halves of its channels: `_channels` says which, so that
what a rotary embedding pairs is in the same place of both. Neighbours are found as in `hydrasurgery.kernels.causal_conv.triton`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hydrasurgery.kernels.cards import processors
from hydrasurgery.kernels.causal_conv.triton import _after, _before, _following, _starts
from hydrasurgery.kernels.head_inputs.reference import L2_EPS, States
from hydrasurgery.kernels.launching import cdiv, launch, power_of_2

TILE = 2048  # numbers of a half, of one program
WARPS = 4
SHARES = 32  # programs a processor that leave a share of the weights' gradient
TURNS = {"half": 1, "half-back": 2, "pairs": 3}
NUMBERS = ("T", "loops")


@triton.jit
def _number(part, first, second, third):
    """One of three numbers. Those that are 1 are constants to Triton, which a branch cannot change."""
    return tl.where(part == 2, third, tl.where(part == 1, second, first))


@triton.jit
def _part(part, first, second, third):
    """One of three pointers."""
    chosen = first
    if part == 1:
        chosen = second
    if part == 2:
        chosen = third
    return chosen


@triton.jit
def _channels(place, D: tl.constexpr, R: tl.constexpr, TURN: tl.constexpr):
    """(first channels, second channels, whether they are turned) of pairs number `place`; those that pass come last."""
    half: tl.constexpr = R // 2
    turned = place < half
    if TURN == 3:
        low, high = 2 * place, 2 * place + 1
    elif TURN == 0:
        low, high = place, place + D // 2
    else:
        low = tl.where(turned, place, place + half)
        high = tl.where(turned, place + half, place + half + (D - R) // 2)
    return low, high, turned


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
def _tap(weight, channel, live, tap, WIDTH: tl.constexpr):
    return tl.load(weight + channel * WIDTH + tap, mask=live, other=0).to(tl.float32)[None, :]


@triton.jit
def _table(table, row, channel, known, turned, other, R: tl.constexpr):
    """[row, channel] of cos or sin; `other` for channels that are not turned."""
    mask = known[:, None] & turned[None, :]
    return tl.load(table + row.to(tl.int64)[:, None] * R + channel[None, :], mask=mask, other=other).to(tl.float32)


@triton.jit
def _mixed(
    x, weight, state, reset, links, row, low, high, live, x_t, T,
    WIDTH: tl.constexpr, STATE: tl.constexpr, RESET: tl.constexpr, LINKS: tl.constexpr,
):  # fmt: skip
    """Both halves [row, channel] of x + conv(x), and which rows are tokens."""
    place = row
    same = row < T
    if LINKS:  # a token is what the place after it follows; else it is padding
        same = same & (tl.load(links + row + 1, mask=same, other=-1) == row)
    token = same
    a = _input(x, state, place, low, live, same, x_t, WIDTH, STATE)
    b = _input(x, state, place, high, live, same, x_t, WIDTH, STATE)
    own_a, own_b = a, b
    for back in tl.static_range(WIDTH):
        if back == 0:
            a += own_a * _tap(weight, low, live, WIDTH - 1, WIDTH)
            b += own_b * _tap(weight, high, live, WIDTH - 1, WIDTH)
        else:
            if RESET:
                same = same & ~_starts(reset, place, T)
            place = _before(links, place, T, LINKS)
            seen = same & (place >= 1 - WIDTH)
            tap = WIDTH - 1 - back
            a += _input(x, state, place, low, live, seen, x_t, WIDTH, STATE) * _tap(weight, low, live, tap, WIDTH)
            b += _input(x, state, place, high, live, seen, x_t, WIDTH, STATE) * _tap(weight, high, live, tap, WIDTH)
    return a, b, token


@triton.jit
def _turned(a, b, cos, sin, row, low, high, turned, T, sign, R: tl.constexpr):
    known = row < T
    c_low, c_high = _table(cos, row, low, known, turned, 1.0, R), _table(cos, row, high, known, turned, 1.0, R)
    s_low, s_high = _table(sin, row, low, known, turned, 0.0, R), _table(sin, row, high, known, turned, 0.0, R)
    return a * c_low - b * s_low * sign, b * c_high + a * s_high * sign


@triton.jit
def _turned_back(da, db, cos, sin, row, low, high, turned, T, sign, R: tl.constexpr):
    known = row < T
    c_low, c_high = _table(cos, row, low, known, turned, 1.0, R), _table(cos, row, high, known, turned, 1.0, R)
    s_low, s_high = _table(sin, row, low, known, turned, 0.0, R), _table(sin, row, high, known, turned, 0.0, R)
    return da * c_low + db * s_high * sign, db * c_high - da * s_low * sign


@triton.jit(do_not_specialize=["T"])
def _forward_kernel(
    x0, x1, x2, w0, w1, w2, s0, s1, s2, reset, links, cos, sin, y, tail,
    b0, b1, b2, h0, h1, h2, t0, t1, t2, turn_b, T, eps,
    B: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, R: tl.constexpr, NORMED: tl.constexpr, WIDTH: tl.constexpr,
    STATE: tl.constexpr, RESET: tl.constexpr, LINKS: tl.constexpr, TURN: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    first, batch = tl.program_id(0) * TOKENS, tl.program_id(2).to(tl.int64)
    part, head = tl.program_id(1) // HEADS, tl.program_id(1) % HEADS
    row, place = first + tl.arange(0, TOKENS), tl.arange(0, BLOCK)
    live = place < D // 2
    low, high, turned = _channels(place, D, R, TURN)
    past = (batch * HEADS + head) * D * (WIDTH - 1)
    x = _part(part, x0, x1, x2) + batch * _number(part, b0, b1, b2) + head * _number(part, h0, h1, h2)
    x_t = _number(part, t0, t1, t2)
    weight, state = _part(part, w0, w1, w2) + head * D * WIDTH, _part(part, s0, s1, s2) + past
    reset += batch * T
    links += batch * (T + 1)
    cos, sin = cos + batch * turn_b, sin + batch * turn_b
    a, b, _ = _mixed(x, weight, state, reset, links, row, low, high, live, x_t, T, WIDTH, STATE, RESET, LINKS)
    if part < NORMED:
        if TURN > 0:
            a, b = _turned(a, b, cos, sin, row, low, high, turned & live, T, -1.0 if TURN == 2 else 1.0, R)
        inverse = tl.rsqrt(tl.sum(a * a, 1) + tl.sum(b * b, 1) + eps)[:, None]
        a, b = a * inverse, b * inverse
    line = (part.to(tl.int64) * B + batch) * T + row.to(tl.int64)
    at = (line * HEADS + head)[:, None] * D
    inside = (row < T)[:, None] & live[None, :]
    tl.store(y + at + low[None, :], a.to(y.dtype.element_ty), mask=inside)
    tl.store(y + at + high[None, :], b.to(y.dtype.element_ty), mask=inside)
    if first + TOKENS >= T:
        tail += part.to(tl.int64) * B * HEADS * D * (WIDTH - 1) + past
        last = T + tl.zeros((1,), tl.int32)
        kept = last >= 0
        for back in tl.static_range(WIDTH - 1):
            last = _before(links, last, T, LINKS)
            seen = kept & (last >= 1 - WIDTH)
            slot = WIDTH - 2 - back
            ended = _input(x, state, last, low, live, seen, x_t, WIDTH, STATE).to(tail.dtype.element_ty)
            tl.store(tail + low[None, :] * (WIDTH - 1) + slot, ended, mask=live[None, :])
            ended = _input(x, state, last, high, live, seen, x_t, WIDTH, STATE).to(tail.dtype.element_ty)
            tl.store(tail + high[None, :] * (WIDTH - 1) + slot, ended, mask=live[None, :])
            if RESET:
                kept = kept & ~_starts(reset, last, T)


@triton.jit(do_not_specialize=["T"])
def _mixed_gradient(
    g0, g1, g2, x0, x1, x2, w0, w1, w2, s0, s1, s2, reset, links, cos, sin, mixed,
    b0, b1, b2, h0, h1, h2, t0, t1, t2, turn_b, T, eps,
    B: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, R: tl.constexpr, NORMED: tl.constexpr, WIDTH: tl.constexpr,
    STATE: tl.constexpr, RESET: tl.constexpr, LINKS: tl.constexpr, TURN: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of x + conv(x), 0 at padding: what is done to q and k after it, backwards."""
    first, batch = tl.program_id(0) * TOKENS, tl.program_id(2).to(tl.int64)
    part, head = tl.program_id(1) // HEADS, tl.program_id(1) % HEADS
    row, place = first + tl.arange(0, TOKENS), tl.arange(0, BLOCK)
    live = place < D // 2
    low, high, turned = _channels(place, D, R, TURN)
    past = (batch * HEADS + head) * D * (WIDTH - 1)
    reset += batch * T
    links += batch * (T + 1)
    cos, sin = cos + batch * turn_b, sin + batch * turn_b
    grad = _part(part, g0, g1, g2)
    at = ((batch * T + row.to(tl.int64)) * HEADS + head)[:, None] * D
    token = row < T
    inside = token[:, None] & live[None, :]
    if LINKS:
        token = token & (tl.load(links + row + 1, mask=token, other=-1) == row)
    known = token[:, None] & live[None, :]
    da = tl.load(grad + at + low[None, :], mask=known, other=0).to(tl.float32)
    db = tl.load(grad + at + high[None, :], mask=known, other=0).to(tl.float32)
    if part < NORMED:
        x = _part(part, x0, x1, x2) + batch * _number(part, b0, b1, b2) + head * _number(part, h0, h1, h2)
        x_t = _number(part, t0, t1, t2)
        weight, state = _part(part, w0, w1, w2) + head * D * WIDTH, _part(part, s0, s1, s2) + past
        a, b, _ = _mixed(x, weight, state, reset, links, row, low, high, live, x_t, T, WIDTH, STATE, RESET, LINKS)
        sign: tl.constexpr = -1.0 if TURN == 2 else 1.0
        if TURN > 0:
            a, b = _turned(a, b, cos, sin, row, low, high, turned & live, T, sign, R)
        inverse = tl.rsqrt(tl.sum(a * a, 1) + tl.sum(b * b, 1) + eps)[:, None]
        a, b = a * inverse, b * inverse
        along = (tl.sum(a * da, 1) + tl.sum(b * db, 1))[:, None]
        da, db = inverse * (da - a * along), inverse * (db - b * along)
        if TURN > 0:
            da, db = _turned_back(da, db, cos, sin, row, low, high, turned & live, T, sign, R)
    at += part.to(tl.int64) * B * T * HEADS * D
    tl.store(mixed + at + low[None, :], da.to(mixed.dtype.element_ty), mask=inside)
    tl.store(mixed + at + high[None, :], db.to(mixed.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=NUMBERS)
def _input_gradient(
    mixed, grad_tail, x0, x1, x2, w0, w1, w2, s0, s1, s2, reset, links, y0, y1, y2, dweight, d0, d1, d2,
    b0, b1, b2, h0, h1, h2, t0, t1, t2, T, loops,
    B: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, TAPS: tl.constexpr,
    STATE: tl.constexpr, TAIL: tl.constexpr, RESET: tl.constexpr, LINKS: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of x, of the weight (a share for `loops` tiles of tokens) and of the state, from that of x + conv(x)."""
    chunk, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    part, head = tl.program_id(1) // HEADS, tl.program_id(1) % HEADS
    channel, tap_of = tl.arange(0, BLOCK), tl.arange(0, TAPS)
    live = channel < D
    past = (batch * HEADS + head) * D * (WIDTH - 1)
    x = _part(part, x0, x1, x2) + batch * _number(part, b0, b1, b2) + head * _number(part, h0, h1, h2)
    x_t = _number(part, t0, t1, t2)
    weight, state = _part(part, w0, w1, w2) + head * D * WIDTH, _part(part, s0, s1, s2) + past
    dstate = _part(part, d0, d1, d2) + past
    grad_tail += part.to(tl.int64) * B * HEADS * D * (WIDTH - 1) + past
    line = (batch * T * HEADS + head) * D
    mixed += part.to(tl.int64) * B * T * HEADS * D + line
    dx = _part(part, y0, y1, y2) + line
    reset += batch * T
    links += batch * (T + 1)
    dtaps = tl.zeros((TAPS, BLOCK), tl.float32)
    for tile in range(loops):
        time = (chunk * loops + tile) * TOKENS - (WIDTH - 1) + tl.arange(0, TOKENS)
        same = time < T
        if LINKS:  # padding leads nowhere
            same = same & (tl.load(links + time + 1, mask=same & (time >= 0), other=0) != -2)
        later, steps = time, tl.zeros((TOKENS,), tl.int32)  # `steps`: how many follow, W - 1 at most
        value = _input(x, state, time, channel, live, same & (time >= 1 - WIDTH), x_t, WIDTH, STATE)
        total = tl.zeros((TOKENS, BLOCK), tl.float32)
        for ahead in tl.static_range(WIDTH):
            if ahead > 0:
                later = _after(links, later, T, LINKS)
                steps += (later < T).to(tl.int32)
                if RESET:
                    same = same & ~_starts(reset, later, T)
            seen = (same & (later >= 0) & (later < T))[:, None] & live[None, :]
            at = later.to(tl.int64)[:, None] * (HEADS * D) + channel[None, :]
            dy = tl.load(mixed + at, mask=seen, other=0).to(tl.float32)
            total += dy * _tap(weight, channel, live, WIDTH - 1 - ahead, WIDTH)
            if ahead == 0:
                total += dy
            share = tl.sum(dy * value, axis=0)
            dtaps += tl.where(tap_of[:, None] == WIDTH - 1 - ahead, share[None, :], 0.0)
        if TAIL:
            slot = WIDTH - 2 - steps
            ends = (same & (slot >= 0))[:, None] & live[None, :]
            at = channel[None, :] * (WIDTH - 1) + slot[:, None]
            total += tl.load(grad_tail + at, mask=ends, other=0).to(tl.float32)
        inside = ((time >= 0) & (time < T))[:, None] & live[None, :]
        at = time.to(tl.int64)[:, None] * (HEADS * D) + channel[None, :]
        tl.store(dx + at, total.to(dx.dtype.element_ty), mask=inside)
        if STATE:
            at = channel[None, :] * (WIDTH - 1) + (time + WIDTH - 1)[:, None]
            kept = ((time < 0) & (time >= 1 - WIDTH))[:, None] & live[None, :]
            tl.store(dstate + at, total.to(dstate.dtype.element_ty), mask=kept)
    row = (batch * tl.num_programs(0) + chunk) * tl.num_programs(1) + tl.program_id(1)
    at = row * D * WIDTH + channel[None, :] * WIDTH + tap_of[:, None]
    tl.store(dweight + at, dtaps, mask=(tap_of < WIDTH)[:, None] & live[None, :])


class _Group(NamedTuple):
    """Equally wide ones of q, k and v, as one launch takes them; `normed` of them are rotated and normalised."""

    heads: list[Tensor]
    weights: list[Tensor]
    states: list[Tensor]
    normed: int
    size: tuple[int, int, int, int]  # B, H, T, D
    width: int
    has_state: bool

    def three(self, tensors: Sequence[Any]) -> list[Any]:
        return [tensors[min(part, len(tensors) - 1)] for part in range(3)]

    @property
    def tensors(self) -> list[Tensor]:
        return [x for part in (self.heads, self.weights, self.states) for x in self.three(part)]

    @property
    def strides(self) -> list[int]:
        return [stride for dim in (0, 1, 2) for stride in self.three([x.stride(dim) for x in self.heads])]

    def stack(self, *shape: int) -> Tensor:
        return self.heads[0].new_empty(len(self.heads), self.size[0], *shape)

    def constants(self, tokens: int, block: int) -> dict[str, Any]:
        batch, heads, _, dim = self.size
        return {
            "B": batch, "HEADS": heads, "D": dim, "WIDTH": self.width, "STATE": self.has_state, "TOKENS": tokens,
            "BLOCK": block, "num_warps": WARPS,
        }  # fmt: skip


def _groups(heads: Sequence[Tensor], weights: Sequence[Tensor], states: States) -> list[_Group]:
    """An absent tensor is never read; any other stands in for it."""
    heads = [x if x.stride(3) == 1 else x.contiguous() for x in heads]
    weights = [weight.contiguous() for weight in weights]
    width = weights[0].shape[1] if weights else 0
    found = []
    for parts, normed in (
        ((slice(0, 3), 2),) if heads[0].shape == heads[2].shape else ((slice(0, 2), 2), (slice(2, 3), 0))
    ):
        past = [x.contiguous() for x in states[parts] if x is not None] if weights else []
        own = heads[parts]
        found.append(
            _Group(own, weights[parts] or own, past or own, normed, tuple(own[0].shape), width, bool(past))  # type: ignore[arg-type]
        )
    return found


def forward(
    heads: Sequence[Tensor],
    weights: Sequence[Tensor],
    states: States,
    reset: Tensor | None,
    previous: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    turn: str = "half",
) -> tuple[list[Tensor], list[Tensor]]:
    """As `reference.forward`."""
    results, tails = [], []
    for group in _groups(heads, weights, states):
        batch, count, length, dim = group.size
        y = group.stack(length, count, dim)
        tail = group.stack(count * dim, max(0, group.width - 1))
        if batch and count:
            flags, options = _flags(group, reset, previous, cos, sin, turn)
            tokens, block = _tile(dim // 2)
            grid = (max(1, cdiv(length, tokens)), len(group.heads) * count, batch)
            launch(
                _forward_kernel, grid,
                *group.tensors, *flags[:-1], y, tail, *group.strides, flags[-1], length, L2_EPS,
                **group.constants(tokens, block), **options,
            )  # fmt: skip
        results.append(y)
        tails += [tail] if weights else []
    return results, tails


def backward(
    grads: Sequence[Tensor],
    grad_tails: Sequence[Tensor] | None,
    heads: Sequence[Tensor],
    weights: Sequence[Tensor],
    states: States,
    reset: Tensor | None,
    previous: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    turn: str = "half",
) -> tuple[list[Tensor], list[Tensor], list[Tensor | None]]:
    """As `reference.backward`. Programs leave their shares of the weights' gradients, summed in a fixed order."""
    dheads: list[Tensor] = []
    dweights: list[Tensor] = []
    dstates: list[Tensor | None] = []
    for group in _groups(heads, weights, states):
        batch, count, length, dim = group.size
        own = [grad.contiguous() for grad in grads[len(dheads) : len(dheads) + len(group.heads)]]
        mixed = group.stack(length, count, dim)
        if mixed.numel():
            flags, options = _flags(group, reset, previous, cos, sin, turn)
            tokens, block = _tile(dim // 2)
            grid = (cdiv(length, tokens), len(group.heads) * count, batch)
            launch(
                _mixed_gradient, grid,
                *group.three(own), *group.tensors, *flags[:-1], mixed, *group.strides, flags[-1], length, L2_EPS,
                **group.constants(tokens, block), **options,
            )  # fmt: skip
        if not weights:
            dheads += mixed.unbind(0)
            continue
        end = None if grad_tails is None else grad_tails[len(dweights)].contiguous()
        dx, taps, past = _input_gradients(group, mixed, end, reset, previous)
        dheads += dx
        dweights.append(taps)
        dstates += past
    return dheads, dweights, dstates


def _input_gradients(
    group: _Group, mixed: Tensor, grad_tail: Tensor | None, reset: Tensor | None, previous: Tensor | None
) -> tuple[list[Tensor], Tensor, list[Tensor | None]]:
    """(of each part dx [B, T, H, D], d weight [parts, H * D, W], of each part d state)."""
    (batch, count, length, dim), width, parts = group.size, group.width, len(group.heads)
    dx = [torch.empty_like(part) for part in mixed.unbind(0)]
    past = [torch.empty_like(state) if group.has_state else None for state in group.states]
    tokens, block = _tile(dim)
    tiles = cdiv(length + width - 1, tokens)
    room = SHARES * processors(mixed.device) // max(1, parts * count * batch)
    loops = cdiv(tiles, max(1, min(tiles, room)))
    shares = mixed.new_empty(batch, cdiv(tiles, loops), parts, count * dim, width, dtype=torch.float32)
    if shares.numel():
        links = mixed if previous is None else _following(previous)
        flags = mixed if reset is None else reset.contiguous().view(torch.uint8)
        launch(
            _input_gradient, (shares.shape[1], parts * count, batch),
            mixed, mixed if grad_tail is None else grad_tail, *group.tensors, flags, links, *group.three(dx), shares,
            *group.three([mixed if d is None else d for d in past]), *group.strides, length, loops,
            **group.constants(tokens, block), TAPS=power_of_2(width), TAIL=grad_tail is not None,
            RESET=reset is not None, LINKS=previous is not None,
        )  # fmt: skip
    return dx, shares.sum((0, 1)), past


def _tile(channels: int) -> tuple[int, int]:
    """(tokens, channels) that a program holds at once."""
    block = power_of_2(channels)
    return max(1, TILE // block), block


def _flags(
    group: _Group, reset: Tensor | None, previous: Tensor | None, cos: Tensor | None, sin: Tensor | None, turn: str
) -> tuple[list[Any], dict[str, Any]]:
    """reset, links, cos and sin, then the stride of the tables' rows; and the constants that go with them."""
    dummy, (_, _, length, dim) = group.heads[0], group.size
    links = dummy if previous is None else previous.to(torch.int32).contiguous()
    flags = dummy if reset is None else reset.contiguous().view(torch.uint8)
    turned = cos is not None and group.normed > 0
    width = dim if cos is None else cos.shape[-1]
    tables = [dummy if table is None else table.contiguous() for table in (cos, sin)]
    stride = 0 if cos is None or cos.shape[0] == 1 else length * width
    options = {
        "R": width, "NORMED": group.normed, "RESET": reset is not None, "LINKS": previous is not None,
        "TURN": TURNS[turn] if turned else 0,
    }  # fmt: skip
    return [flags, links, *tables, stride], options

"""Scores of a tile of queries and a block of keys: what forward and backward of attention in Triton have in common."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = 1.4426950408889634
_LOG2E = tl.constexpr(LOG2E)


@triton.jit
def _scores(
    q, k, place, key, S, reach, scale, cap, window,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores in units of log 2, -inf where a query does not see a key, and the slope of the softcap."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    slope = s
    if CAP:
        bent = 2.0 * tl.sigmoid(2.0 * s / cap) - 1.0
        s, slope = cap * bent, 1.0 - bent * bent
    s *= _LOG2E
    if not WHOLE:
        seen = (key < S)[None, :] & (place >= 0)[:, None]
        if CAUSAL:
            seen = seen & (key[None, :] <= place[:, None])
        if WINDOW:
            seen = seen & (key[None, :] > place[:, None] - window)
        if MASK:
            seen = seen & (tl.load(reach + key, mask=key < S, other=0)[None, :] > place[:, None])
        s = tl.where(seen, s, float("-inf"))
    return s, slope


@triton.jit
def _tile(x, place, stride, column, SIZE: tl.constexpr, LIMIT):
    """Rows [place] of a matrix whose columns are contiguous; 0 outside."""
    inside = ((place >= 0) & (place < LIMIT))[:, None] & (column < SIZE)[None, :]
    return tl.load(x + place.to(tl.int64)[:, None] * stride + column[None, :], mask=inside, other=0.0)


@triton.jit
def _span(
    reach, low, open, batch, tile, tiles, T, S, window,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Of a tile of queries: the place of the first query of all, and of the tile's; the keys [begin, end) that one of them may see,
    of which all see [middle, whole)."""
    start, begin, end = S - T, S * 0, S
    if MASK:
        start = tl.load(reach + batch * (S + 1) + S)
        begin = tl.load(low + batch * tiles + tile) * KEYS
    first = start + tile * QUERIES
    if CAUSAL:
        end = tl.minimum(S, first + QUERIES)
    if WINDOW:
        begin = tl.maximum(0, first - window + 1) // KEYS * KEYS
    middle, whole = begin, end // KEYS * KEYS
    if CAUSAL:
        whole = tl.minimum(whole, tl.maximum(0, (first + 1) // KEYS * KEYS))
    if MASK:
        middle = tl.load(open + batch * tiles + tile) * KEYS
    if WINDOW:
        middle = tl.cdiv(tl.maximum(0, first + QUERIES - window), KEYS) * KEYS
    return start, first, begin, middle, whole, end

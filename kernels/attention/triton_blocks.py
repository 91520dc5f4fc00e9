"""Softmax attention of many queries in Triton, forward and backward: causal, windows, reach masks, softcap, sinks, grouped heads.

Keys go by in blocks under a tile of queries, with the softmax's largest score and sum carried along (FlashAttention-2). A tile
visits the blocks between the first key that one of its queries sees and its own diagonal: some that only some queries see, then
those that all see, where nothing is compared, then the diagonal's. Under a reach mask the first kind is passed over where no query
sees anything. Few queries over many keys take the keys in parts. Backward, a program owns a block of keys, or a tile of queries, so
sums have one order and two runs give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hydrasurgery.kernels.attention.reach import OPEN, parts
from hydrasurgery.kernels.attention.triton_blocks_gradients import _backward_keys, _backward_queries, _delta
from hydrasurgery.kernels.attention.triton_scores import _LOG2E, LOG2E, _scores, _span, _tile
from hydrasurgery.kernels.cards import processors
from hydrasurgery.kernels.launching import cdiv, launch, power_of_2


class Tiles(NamedTuple):
    """Queries and keys of a step, warps, and loads under way."""

    queries: int
    keys: int
    warps: int
    stages: int


@triton.jit
def _walk(
    y, top, total, q, k, v, k_t, v_t, place, first, begin, end, S, reach, most, scale, cap, window,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, WHOLE: tl.constexpr,
    DIM: tl.constexpr, VALUES: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Goes on with a tile of queries over keys [begin, end)."""
    column, across = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    for at in range(begin, end, KEYS):
        shown = True
        if MASK and not WHOLE:
            shown = tl.load(most + at // KEYS) > first
        if shown:
            key = at + tl.arange(0, KEYS)
            s, _ = _scores(
                q, _tile(k, key, k_t, column, DIM, S), place, key, S, reach, scale, cap, window,
                MASK, CAUSAL, WINDOW, CAP, WHOLE, PRECISION,
            )  # fmt: skip
            higher = tl.maximum(top, tl.max(s, 1))
            base = tl.where(higher > float("-inf"), higher, 0.0)
            p = tl.exp2(s - base[:, None])
            fall = tl.exp2(top - base)
            values = _tile(v, key, v_t, across, VALUES, S)
            y = tl.dot(p.to(values.dtype), values, y * fall[:, None], input_precision=PRECISION)
            total = total * fall + tl.sum(p, 1)
            top = higher
    return y, top, total


@triton.jit(do_not_specialize=["T", "S", "share", "window", "blocks", "tiles"])
def _forward(
    q, k, v, reach, most, low, open, sinks, out, lse, T, S, share, scale, cap, window,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, blocks, tiles,
    GROUP: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, VALUES: tl.constexpr, MASK: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, SINKS: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of one head's queries over one part of the keys, `share` blocks."""
    tile = tiles - 1 - tl.program_id(0) % tiles  # those with most keys first
    part = tl.program_id(0) // tiles
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = tile * QUERIES + tl.arange(0, QUERIES)
    q += batch * q_b + head.to(tl.int64) * q_h
    k += batch * k_b + (head // GROUP).to(tl.int64) * k_h
    v += batch * v_b + (head // GROUP).to(tl.int64) * v_h
    start, first, begin, middle, whole, end = _span(
        reach, low, open, batch, tile, tiles, T, S, window, MASK, CAUSAL, WINDOW, QUERIES, KEYS
    )
    if MASK:
        reach, most = reach + batch * (S + 1), most + batch * blocks
    begin, end = tl.maximum(begin, part * share * KEYS), tl.minimum(end, (part + 1) * share * KEYS)
    middle = tl.minimum(tl.maximum(middle, begin), end)
    whole = tl.minimum(tl.maximum(whole, middle), end)
    place = tl.where(row < T, start + row, -1)
    queries = _tile(q, row, q_t, tl.arange(0, BLOCK_D), DIM, T)
    top = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    if SINKS:  # noqa: SIM102
        if part == 0:
            top = tl.zeros((QUERIES,), tl.float32) + tl.load(sinks + head).to(tl.float32) * _LOG2E
            total += 1.0
    y = tl.zeros((QUERIES, BLOCK_V), tl.float32)
    if MASK or WINDOW:
        y, top, total = _walk(
            y, top, total, queries, k, v, k_t, v_t, place, first, begin, middle, S, reach, most, scale, cap, window,
            MASK, CAUSAL, WINDOW, CAP, False, DIM, VALUES, BLOCK_D, BLOCK_V, KEYS, PRECISION,
        )  # fmt: skip
    y, top, total = _walk(
        y, top, total, queries, k, v, k_t, v_t, place, first, middle, whole, S, reach, most, scale, cap, window,
        MASK, CAUSAL, WINDOW, CAP, True, DIM, VALUES, BLOCK_D, BLOCK_V, KEYS, PRECISION,
    )  # fmt: skip
    y, top, total = _walk(
        y, top, total, queries, k, v, k_t, v_t, place, first, whole, end, S, reach, most, scale, cap, window,
        MASK, CAUSAL, WINDOW, CAP, False, DIM, VALUES, BLOCK_D, BLOCK_V, KEYS, PRECISION,
    )  # fmt: skip
    seen = (total > 0) & (top > float("-inf"))
    y = tl.where(seen[:, None], y / tl.where(seen, total, 1.0)[:, None], 0.0)
    across = tl.arange(0, BLOCK_V)
    line = part * tl.num_programs(2) + batch
    at = ((line * T + row.to(tl.int64)) * HEADS + head)[:, None] * VALUES + across[None, :]
    tl.store(out + at, y.to(out.dtype.element_ty), mask=(row < T)[:, None] & (across < VALUES)[None, :])
    # Infinite where nothing was seen: the backward's weights are 0 then.
    found = tl.where(seen, top + tl.log2(tl.where(seen, total, 1.0)), float("inf"))
    tl.store(lse + (line * HEADS + head) * T + row, found, mask=row < T)


# --- calls --------------------------------------------------------------------------------------------------------------------


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    *,
    scale: float | None,
    causal: bool,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """As `reference.forward`, with a reach mask or none: q [B, H, T, D], k [B, G, S, D], v [B, G, S, Dv] -> [B, T, H, Dv]."""
    return _run(q, k, v, mask, sinks, scale, causal, window, softcap)[0]


def forward_keeping(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    *,
    scale: float | None,
    causal: bool,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """`forward`, and of the softmax what `backward` need not compute again: a number a query and head."""
    out, lse = _run(q, k, v, mask, sinks, scale, causal, window, softcap)
    return out, (lse,)


def kept_like(q: Tensor) -> tuple[Tensor, ...]:
    """Unfilled tensors of the shapes and dtypes that `forward_keeping` keeps."""
    return (q.new_empty(q.shape[:3], dtype=torch.float32),)


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    *,
    scale: float | None,
    causal: bool,
    window: int | None,
    softcap: float | None,
    kept: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """As `reference.backward`, for what `forward` takes. `kept`: the output, and what `forward_keeping` keeps; without it the
    forward runs once more."""
    q, k, v = _dense(q, k, v)
    batch, heads, queries, dim = q.shape
    groups, keys, values = k.shape[1:3] + v.shape[3:]
    out, lse = kept if kept else _run(q, k, v, mask, sinks, scale, causal, window, softcap)
    grad = grad.to(q.dtype).contiguous()
    delta = torch.empty_like(lse)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    if not (q.numel() and k.numel()):
        return torch.zeros_like(q), dk.zero_(), dv.zero_(), None if sinks is None else torch.zeros_like(sinks)
    block_v = max(16, power_of_2(values))
    launch(
        _delta, (cdiv(queries, 64), heads, batch), grad, out, delta, queries,
        HEADS=heads, VALUES=values, BLOCK_V=block_v, ROWS=64, num_warps=4,
    )  # fmt: skip
    tiles = _tiles(q, max(dim, values), backward=True)
    numbers, options = _numbers(q, k, v, mask, scale, causal, window, softcap, tiles)
    reach, most, _, _, least = _structure(q, mask, tiles)
    launch(
        _backward_keys, (cdiv(keys, tiles.keys), groups, batch),
        grad, q, k, v, reach, most, least, lse, delta, dk, dv, *numbers, cdiv(keys, tiles.keys), **options,
    )  # fmt: skip
    other = Tiles(tiles.keys, tiles.queries, tiles.warps, tiles.stages)
    numbers, options = _numbers(q, k, v, mask, scale, causal, window, softcap, other)
    reach, most, low, open_from, _ = _structure(q, mask, other)
    launch(
        _backward_queries, (cdiv(queries, other.queries), heads, batch),
        grad, q, k, v, reach, most, low, open_from, lse, delta, dq, *numbers, cdiv(keys, other.keys),
        cdiv(queries, other.queries), **options,
    )  # fmt: skip
    dsinks = None
    if sinks is not None:
        share = torch.exp2(sinks.float()[:, None] * LOG2E - lse)
        dsinks = -(share * delta).sum((0, 2)).to(sinks.dtype)
    return dq, dk, dv, dsinks


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    scale: float | None,
    causal: bool,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Outputs, and the logarithms (of base 2) of each query's sum of weights [B, H, T]."""
    q, k, v = _dense(q, k, v)
    batch, heads, queries, dim = q.shape
    keys, values = k.shape[2], v.shape[3]
    out = q.new_empty(batch, queries, heads, values)
    lse = q.new_empty(batch, heads, queries, dtype=torch.float32)
    if not (q.numel() and keys):
        return out.zero_(), lse.fill_(torch.inf)
    tiles = _tiles(q, max(dim, values))
    numbers, options = _numbers(q, k, v, mask, scale, causal, window, softcap, tiles)
    reach, most, low, open_from, _ = _structure(q, mask, tiles)
    rows, blocks = cdiv(queries, tiles.queries), cdiv(keys, tiles.keys)
    count = _parts(q, rows * heads * batch, blocks)
    share = cdiv(blocks, count)
    ys, sums = out, lse
    if count > 1:
        ys, sums = (x.new_empty(count, *x.shape, dtype=torch.float32) for x in (out, lse))
    launch(
        _forward, (rows * count, heads, batch),
        q, k, v, reach, most, low, open_from, q if sinks is None else sinks.contiguous(), ys, sums, *numbers[:2], share,
        *numbers[2:], blocks, rows, SINKS=sinks is not None, **options,
    )  # fmt: skip
    return (out, lse) if count == 1 else _joined(ys, sums, q.dtype)


def _parts(q: Tensor, programs: int, blocks: int) -> int:
    """In how many parts the keys go, so that few queries over many keys fill the card too."""
    if q.device.type != "cuda":
        return 2 if blocks > 2 and programs <= 4 else 1
    return max(1, min(2 * processors(q.device) // programs, blocks // 32))


def _joined(ys: Tensor, sums: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Parts of the keys [P, B, T, H, Dv], with the logarithms of their sums [P, B, H, T], as one."""
    sums = sums.masked_fill(sums == torch.inf, -torch.inf)
    top = sums.amax(0).clamp(min=torch.finfo(torch.float32).min)
    weights = torch.exp2(sums - top)
    total = weights.sum(0)
    share = weights / total.clamp(min=torch.finfo(torch.float32).tiny)
    out = (ys * share.transpose(2, 3)[..., None]).sum(0).to(dtype)
    return out, torch.where(total > 0, top + torch.log2(total), torch.inf)


def _dense(*tensors: Tensor) -> list[Tensor]:
    return [x if x.stride(3) == 1 else x.contiguous() for x in tensors]


def _numbers(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float | None,
    causal: bool,
    window: int | None,
    softcap: float | None,
    tiles: Tiles,
) -> tuple[list[int | float], dict[str, Any]]:
    """What all three kernels take as numbers, and as constants."""
    dim, values = q.shape[3], v.shape[3]
    bites = mask is None and window is not None and window < k.shape[2]
    numbers = [
        q.shape[2], k.shape[2], dim**-0.5 if scale is None else scale, 1.0 if softcap is None else softcap,
        window if bites else 0, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
    ]  # fmt: skip
    options = {
        "GROUP": q.shape[1] // k.shape[1], "HEADS": q.shape[1], "DIM": dim, "VALUES": values, "MASK": mask is not None,
        "CAUSAL": causal or mask is not None, "WINDOW": bites, "CAP": softcap is not None,
        "BLOCK_D": max(16, power_of_2(dim)), "BLOCK_V": max(16, power_of_2(values)),
        "QUERIES": tiles.queries, "KEYS": tiles.keys, "PRECISION": "tf32x3" if q.dtype == torch.float32 else "tf32",
        "num_warps": tiles.warps, "num_stages": tiles.stages,
    }  # fmt: skip
    return numbers, options  # type: ignore[return-value]


def _structure(q: Tensor, mask: Tensor | None, tiles: Tiles) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A reach mask's rows [B, S + 1]; each key block's largest reach [B, blocks]; for each tile of queries the first block in which
    one of them may see a key, and that from which on they see all keys before them [B, tiles]; each block's least reach."""
    if mask is None:
        return q, q, q, q, q
    if mask.is_inference() or q.is_cuda and torch.cuda.is_current_stream_capturing():
        return _structure_of(q, mask, tiles)
    key = (q.shape[2], tiles.queries, tiles.keys, mask._version)
    known = vars(mask).setdefault("_hydra_structure", {})  # once for all layers that are given one mask
    if key not in known:
        known[key] = _structure_of(q, mask, tiles)
    found: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = known[key]
    return found


def _structure_of(q: Tensor, mask: Tensor, tiles: Tiles) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    reach, first = parts(mask)
    queries, keys = q.shape[2], reach.shape[1]
    padded = torch.nn.functional.pad(reach, (0, -keys % tiles.keys))
    most = padded.unflatten(1, (-1, tiles.keys)).amax(2)
    # Keys after the last query hide nothing from anyone.
    key = torch.arange(padded.shape[1], device=q.device)
    least = padded.masked_fill(key >= first + queries, OPEN).unflatten(1, (-1, tiles.keys)).amin(2)
    place = (first + torch.arange(0, queries, tiles.queries, device=q.device)).to(reach.dtype)
    # Of places and reaches that only rise: the first block that reaches beyond a tile's first query, or its last one.
    low = torch.searchsorted(most.cummax(1).values, place, right=True)
    rising = least.flip(1).cummin(1).values.flip(1)
    open_from = torch.searchsorted(rising.contiguous(), place + (tiles.queries - 1), right=True)
    return (
        mask[:, 0, 0].contiguous(),
        most.contiguous(),
        low.to(torch.int32),
        open_from.to(torch.int32),
        least.contiguous(),
    )


def _tiles(q: Tensor, width: int, backward: bool = False) -> Tiles:
    """What fits the registers and the shared memory of a card, by dtype and width of a head."""
    capability = torch.cuda.get_device_capability(q.device) if q.device.type == "cuda" else (9, 0)
    return _fit(capability, q.dtype == torch.float32, width, backward)


def _fit(capability: tuple[int, int], single: bool, width: int, backward: bool) -> Tiles:
    """Of those timed on an H100 the fastest (16,384 tokens, bf16); less where a card has less than its shared memory."""
    large, half = capability in ((9, 0), (10, 0)), capability == (8, 0)
    if single:
        return Tiles(32 if width > 64 else 64, 32, 4, 1)
    if backward:
        return Tiles(32, 32, 4, 1) if width > 128 else Tiles(64, 64, 4, 2 if large or half else 1)
    if width > 128:
        return Tiles(64, 64, 8, 2) if large else Tiles(64, 32, 4, 1)
    if width > 64:
        return Tiles(128, 128, 8, 3) if large else Tiles(128, 64, 8, 3) if half else Tiles(64, 64, 4, 2)
    return Tiles(128, 64, 4, 3 if large else 2)

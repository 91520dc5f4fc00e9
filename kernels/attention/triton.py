"""Softmax attention of one query over a cache, in Triton: any mask, window, softcap and sinks, grouped heads read once.

PyTorch's fused kernels give a query with a mask one program per head, which walks all keys by itself. Here the keys are cut into
parts, enough to fill the card; each part leaves its outputs, the largest score and the sum of weights, and a second kernel joins
them in order. A block of keys that nobody may see is not read, so an empty static cache costs only its mask.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hydrasurgery.kernels.attention.reach import is_reach
from hydrasurgery.kernels.cards import processors
from hydrasurgery.kernels.launching import cdiv, launch, power_of_2

KEYS = 64  # a block's


@triton.jit(do_not_specialize=["keys", "share", "first"])
def _part_kernel(
    q, k, v, mask, outs, tops, sums, keys, share, first, scale, cap,
    q_b, q_h, k_b, k_h, k_t, v_b, v_h, v_t, m_b, m_h, m_t,
    GROUP: tl.constexpr, DIM: tl.constexpr, VALUES: tl.constexpr, MASK: tl.constexpr, CAP: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_V: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One part of the keys for a KV group's heads: outputs, the largest score and the sum of 2^(score - largest), fp32."""
    part, group, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows, columns, places = tl.arange(0, ROWS), tl.arange(0, BLOCK), tl.arange(0, BLOCK_V)
    head = group * GROUP + rows
    live = rows < GROUP
    where = q + batch.to(tl.int64) * q_b + head[:, None] * q_h + columns[None, :]
    queries = tl.load(where, mask=live[:, None] & (columns < DIM)[None, :], other=0.0)
    first_k = k + batch.to(tl.int64) * k_b + group.to(tl.int64) * k_h
    first_v = v + batch.to(tl.int64) * v_b + group.to(tl.int64) * v_h
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    y = tl.zeros((ROWS, BLOCK_V), tl.float32)
    for at in range(part * share, tl.minimum((part + 1) * share, keys), KEYS):
        key = at + tl.arange(0, KEYS)
        inside = (key < keys) & (key >= first)
        seen = live[:, None] & inside[None, :]
        added = tl.zeros((ROWS, KEYS), tl.float32)
        if MASK != "none":
            given = mask + batch.to(tl.int64) * m_b + head[:, None].to(tl.int64) * m_h + key[None, :] * m_t
            if MASK == "reach":
                place = tl.load(mask + batch.to(tl.int64) * m_b + keys)
                seen = seen & (key <= place)[None, :] & (tl.load(given, mask=seen, other=0) > place)
            elif MASK == "bool":
                seen = seen & (tl.load(given, mask=seen, other=0) != 0)
            else:
                added = tl.load(given, mask=seen, other=float("-inf")).to(tl.float32)
                seen = seen & (added > float("-inf"))
                added = tl.maximum(added, -1e30)  # A row of the lowest finite numbers is a row of equals.
        shown = tl.max(seen.to(tl.int32), 0)[:, None] > 0
        if tl.max(seen.to(tl.int32)) > 0:
            at_k = first_k + key[:, None].to(tl.int64) * k_t + columns[None, :]
            kt = tl.load(at_k, mask=shown & (columns < DIM)[None, :], other=0.0)
            s = tl.dot(queries, tl.trans(kt), input_precision=PRECISION) * scale
            if CAP:
                s = cap * (2.0 * tl.sigmoid(2.0 * s / cap) - 1.0)
            s = tl.where(seen, (s + added) * 1.4426950408889634, float("-inf"))
            higher = tl.maximum(top, tl.max(s, 1))
            base = tl.where(higher > float("-inf"), higher, 0.0)
            p = tl.exp2(s - base[:, None])
            fall = tl.exp2(top - base)
            at_v = first_v + key[:, None].to(tl.int64) * v_t + places[None, :]
            vt = tl.load(at_v, mask=shown & (places < VALUES)[None, :], other=0.0)
            y = tl.dot(p.to(vt.dtype), vt, y * fall[:, None], input_precision=PRECISION)
            total = total * fall + tl.sum(p, 1)
            top = higher
    row = (batch.to(tl.int64) * GROUP * tl.num_programs(1) + head) * tl.num_programs(0) + part
    tl.store(tops + row, top, mask=live)
    tl.store(sums + row, total, mask=live)
    tl.store(outs + row[:, None] * VALUES + places[None, :], y, mask=live[:, None] & (places < VALUES)[None, :])


@triton.jit(do_not_specialize=["parts"])
def _join_kernel(
    outs, tops, sums, sinks, out, parts,
    VALUES: tl.constexpr, SINKS: tl.constexpr, PARTS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """A head's parts brought to one largest score and added up; a sink takes weight and gives nothing."""
    head, row = tl.program_id(0), tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    places = tl.arange(0, BLOCK_V)
    top = tl.full((1,), float("-inf"), tl.float32)
    total = tl.zeros((1,), tl.float32)
    y = tl.zeros((1, BLOCK_V), tl.float32)
    if SINKS:
        top = tl.zeros((1,), tl.float32) + tl.load(sinks + head).to(tl.float32) * 1.4426950408889634
        total += 1.0
    for at in range(0, parts, PARTS):
        part = at + tl.arange(0, PARTS)
        inside = part < parts
        tops_ = tl.load(tops + row * parts + part, mask=inside, other=float("-inf"))
        higher = tl.maximum(top, tl.max(tops_, 0))
        base = tl.where(higher > float("-inf"), higher, 0.0)
        weight, fall = tl.exp2(tops_ - base), tl.exp2(top - base)
        values = tl.load(
            outs + (row * parts + part)[:, None] * VALUES + places[None, :],
            mask=inside[:, None] & (places < VALUES)[None, :],
            other=0.0,
        )
        y = y * fall[:, None] + tl.sum(values * weight[:, None], 0)[None, :]
        total = total * fall + tl.sum(tl.load(sums + row * parts + part, mask=inside, other=0.0) * weight, 0)
        top = higher
    y = tl.where(total > 0, y / tl.where(total > 0, total, 1.0), 0.0)
    tl.store(out + row * VALUES + places[None, :], y.to(out.dtype.element_ty), mask=(places < VALUES)[None, :])


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
    """As `reference.forward`, for one query: q [B, H, 1, D], k [B, G, S, D], v [B, G, S, Dv] -> [B, 1, H, Dv]."""
    batch, heads, _, dim = q.shape
    groups, keys, values = k.shape[1], k.shape[2], v.shape[3]
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    if not (q.numel() and keys):
        return q.new_zeros(batch, 1, heads, values)
    kind = "none" if mask is None else "reach" if is_reach(mask) else "bool" if mask.dtype == torch.bool else "added"
    seen = q if mask is None else mask.expand(batch, heads, 1, mask.shape[3])
    seen = seen.view(torch.uint8) if kind == "bool" else seen
    blocks = cdiv(keys, KEYS)
    parts = max(1, min(blocks, cdiv(_wave(q.device), batch * groups)))
    share = KEYS * cdiv(blocks, parts)
    parts = cdiv(keys, share)
    outs = q.new_empty(batch, heads, parts, values, dtype=torch.float32)
    tops, sums = q.new_empty(2, batch, heads, parts, dtype=torch.float32).unbind()
    out = q.new_empty(batch, 1, heads, values)
    block_v = max(16, power_of_2(values))
    launch(
        _part_kernel, (parts, groups, batch),
        q, k, v, seen, outs, tops, sums, keys, share,
        0 if mask is not None or window is None else keys - window,
        dim**-0.5 if scale is None else scale, 1.0 if softcap is None else softcap,
        *q.stride()[:2], *k.stride()[:3], *v.stride()[:3], *seen.stride()[:2], seen.stride(3),
        GROUP=heads // groups, DIM=dim, VALUES=values, MASK=kind, CAP=softcap is not None,
        ROWS=max(16, power_of_2(heads // groups)), BLOCK=max(16, power_of_2(dim)),
        BLOCK_V=block_v, KEYS=KEYS, PRECISION="tf32x3" if q.dtype == torch.float32 else "tf32", num_warps=4,
    )  # fmt: skip
    launch(
        _join_kernel, (heads, batch, 1),
        outs, tops, sums, q if sinks is None else sinks.contiguous(), out, parts,
        VALUES=values, SINKS=sinks is not None, PARTS=max(16, min(128, 16384 // block_v)), BLOCK_V=block_v, num_warps=4,
    )  # fmt: skip
    return out


def _wave(device: torch.device) -> int:
    """Programs that the card holds at once, about: three per processor."""
    return 3 * processors(device)

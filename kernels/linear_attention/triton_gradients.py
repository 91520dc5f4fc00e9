"""The gradients of all chunks at once, from the states and their gradients that the walks have kept."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hydrasurgery.kernels.linear_attention.triton_call import Basis, tiles, tokens
from hydrasurgery.kernels.linear_attention.triton_launch import Run
from hydrasurgery.kernels.linear_attention.triton_prepare import _C, _piece, _tile


def chunk_gradients(
    run: Run, basis: Basis, grad: Tensor, states: Tensor, dstates: Tensor, updates: Tensor, errors: Tensor
) -> tuple[Tensor, ...]:
    call = run.call
    inputs = (call.q, call.k, call.v, call.decay, call.beta)
    grads = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs)
    block = min(call.values, 32)  # A tile of S passes through registers, which the sums need.
    args = (
        *(tokens(grad, block), run.q, run.k, tokens(call.v, block), *basis.vectors.unbind()),
        *(tiles(x, block) for x in (states, dstates, updates, errors)),
        # k's sum is in units of the scale; a small one would overflow float16.
        *(*grads, call.chunk_table, call.length, call.heads, call.scale, call.scale if abs(call.scale) > 0.01 else 1.0),
    )
    run("gradients", _gradients, (call.heads * call.cut.chunks, 1, 1), args, L2=call.l2_norm, BV=block)
    return grads


@triton.jit
def _between(total, item, TURNED: tl.constexpr):
    """D_ij = e^{G_i - G_j} for tokens i (rows) and j, or turned, D_ji; 1 where it is not used."""
    rows = tl.arange(0, _C)
    g_i, g_j = tl.load(total + item * _C + rows)[:, None], tl.load(total + item * _C + rows)[None, :]
    return tl.exp2(tl.minimum(g_j - g_i if TURNED else g_i - g_j, 0.0))


@triton.jit(do_not_specialize=["length", "heads"])
def _gradients(
    grad,
    q,
    k,
    v,
    total,
    rows_q,
    rows_k,
    writes,
    states,
    dstates,
    updates,
    errors,
    dq,
    dk,
    dv,
    ddecay,
    dbeta,
    table,
    length,
    heads,
    scale,
    unit,
    L2: tl.constexpr,
    BV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    VARLEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One chunk and head, from S before it, dS' after it, U and Z. With D_ij = e^{G_i - G_j}, q and k with their factors:

        F = (do U^T) D, H = -beta (Z U^T) D below the diagonal
        dq = F k + e^G do S^T
        dk = H k - beta e^G Z S^T                      (the part that rises with G)
           + F^T q + H^T k + (e^{G_C - G} U) dS'^T     (the part that falls with it)
        dbeta = Z . (v - (k e^G) S - P U) = Z . v - e^G k . (Z S^T) - rows of P (Z U^T)
        dG = q . dq + k . (the rising part - the falling part), and at the last token also that of G_C

    A norm's backward takes a row's own direction away: with y = r x, dx = r (dy - y (y . dy)). There is one sum [64, K] at a time,
    and each part reads its tiles again: registers are what is short. F and H are rounded alike where they stand and where they are
    turned (which is why k's sum is in units of the scale): dG is a sum of differences, and what cancels must cancel exactly.
    """
    head, index = tl.program_id(0) % heads, tl.program_id(0) // heads
    doc, start, stop, _, _, _ = _piece(table, index, length, _C, VARLEN)
    if doc < 0:
        return
    dtype = q.dtype
    rows, channels = tl.arange(0, _C), tl.arange(0, K)
    i, j = rows[:, None], rows[None, :]
    valid = rows < stop - start
    item = index.to(tl.int64) * heads + head
    local = (index * heads + head) * _C
    cell = (index * heads + head) * K
    token = start.to(tl.int64)
    if not VARLEN:
        token += doc.to(tl.int64) * length
    line = token * heads + head  # The first row in a contiguous [tokens, heads].
    row_k = line * K + rows[:, None] * (heads * K) + channels[None, :]
    g_end = tl.load(total + item * _C + _C - 1)

    # q, through F.
    f = tl.zeros([_C, _C], tl.float32)
    y = tl.zeros([_C, K], tl.float32)
    for at in range(0, V, BV):
        do = _tile(grad, doc, head, start, at, VARLEN)
        f = tl.dot(do, tl.trans(updates.load([local, at])), f, input_precision=PRECISION)
        y = tl.dot(do, tl.trans(states.load([cell, at])), y, input_precision=PRECISION)
    factor = tl.load(rows_k + item * _C + rows)
    f = tl.where(i >= j, f * _between(total, item, False), 0.0) * factor[None, :]
    y *= tl.exp2(tl.load(total + item * _C + rows))[:, None]
    y = tl.dot(f.to(dtype), _tile(k, doc, head, start, 0, VARLEN), y, input_precision=PRECISION)
    factor = tl.load(rows_q + item * _C + rows)
    raw = _tile(q, doc, head, start, 0, VARLEN).to(tl.float32)
    dg = tl.sum(y * raw, 1) * factor
    y *= factor[:, None]
    if L2:
        norm = factor / scale
        y -= (norm * norm * dg)[:, None] * raw
    tl.store(dq + row_k, y.to(dq.dtype.element_ty), mask=valid[:, None])

    # v and beta, and the part of k that rises with G, through H.
    h = tl.zeros([_C, _C], tl.float32)
    y = tl.zeros([_C, K], tl.float32)
    db = tl.zeros([_C], tl.float32)
    write = tl.load(writes + item * _C + rows)
    for at in range(0, V, BV):
        columns = at + tl.arange(0, BV)
        z = errors.load([local, at])
        h = tl.dot(z, tl.trans(updates.load([local, at])), h, input_precision=PRECISION)
        y = tl.dot(z, tl.trans(states.load([cell, at])), y, input_precision=PRECISION)
        wide = z.to(tl.float32)
        db += tl.sum(wide * _tile(v, doc, head, start, at, VARLEN).to(tl.float32), 1)
        out = dv + line * V + rows[:, None] * (heads * V) + columns[None, :]
        tl.store(out, (wide * write[:, None]).to(dv.dtype.element_ty), mask=valid[:, None])
    kt = _tile(k, doc, head, start, 0, VARLEN)
    gram = tl.dot(kt, tl.trans(kt), input_precision=PRECISION)
    factor = tl.load(rows_k + item * _C + rows)
    h = tl.where(i > j, h * _between(total, item, False), 0.0) * factor[None, :]
    rise = tl.exp2(tl.load(total + item * _C + rows))
    kt = _tile(k, doc, head, start, 0, VARLEN)
    db -= (tl.sum(h * gram, 1) + tl.sum(y * kt.to(tl.float32), 1) * rise) * factor
    taken = -write / unit
    h *= taken[:, None]
    y = tl.dot(h.to(dtype), kt, y * (taken * rise)[:, None], input_precision=PRECISION)
    up = tl.sum(y * kt.to(tl.float32), 1)
    tl.store(dbeta + line + rows * heads, db.to(dbeta.dtype.element_ty), mask=valid)

    # The part of k that falls with G, through F^T and H^T: onto the same sum, its products with k by difference.
    f = tl.zeros([_C, _C], tl.float32)
    h = tl.zeros([_C, _C], tl.float32)
    fall = tl.exp2(tl.minimum(g_end - tl.load(total + item * _C + rows), 0.0))
    for at in range(0, V, BV):
        columns = at + tl.arange(0, BV)
        u = updates.load([local, at])
        f = tl.dot(u, tl.trans(_tile(grad, doc, head, start, at, VARLEN)), f, input_precision=PRECISION)
        h = tl.dot(u, tl.trans(errors.load([local, at])), h, input_precision=PRECISION)
        ds = dstates.load([cell, at])
        carried = (u.to(tl.float32) * (fall / unit)[:, None]).to(dtype)
        y = tl.dot(carried, tl.trans(ds), y, input_precision=PRECISION)
    factor = tl.load(rows_k + item * _C + rows)
    kt = _tile(k, doc, head, start, 0, VARLEN)
    whole = tl.sum((tl.sum(y * kt.to(tl.float32), 1) - up) * factor, 0) * unit
    between = _between(total, item, True)
    f = tl.where(j >= i, f * between, 0.0) * (tl.load(rows_q + item * _C + rows) / unit)[None, :]
    h = tl.where(j > i, h * between, 0.0) * (taken * factor)[None, :]
    y = tl.dot(f.to(dtype), _tile(q, doc, head, start, 0, VARLEN), y, input_precision=PRECISION)
    y = tl.dot(h.to(dtype), kt, y, input_precision=PRECISION)
    both = tl.sum(y * kt.to(tl.float32), 1)
    factor *= unit
    dg += (2.0 * up - both) * factor
    y *= factor[:, None]
    if L2:
        y -= (factor * factor * factor / (unit * unit) * both)[:, None] * kt.to(tl.float32)
    tl.store(dk + row_k, y.to(dk.dtype.element_ty), mask=valid[:, None])

    # e^{G_C} also multiplies S.
    shared = tl.zeros([K], tl.float32)
    for at in range(0, V, BV):
        shared += tl.sum(states.load([cell, at]).to(tl.float32) * dstates.load([cell, at]).to(tl.float32), 1)
    whole += tl.sum(shared, 0) * tl.exp2(g_end)
    dg = tl.cumsum(dg, 0, reverse=True) + whole
    tl.store(ddecay + line + rows * heads, dg.to(ddecay.dtype.element_ty), mask=valid)

"""What a chunk's outputs and gradients both need, found for all chunks at once; and where a piece's tokens stand."""

from __future__ import annotations

import triton
import triton.language as tl

from hydrasurgery.kernels.linear_attention.triton_call import CHUNK, Basis
from hydrasurgery.kernels.linear_attention.triton_launch import Run

EPS = 1e-6  # of the norms of rows

_C = tl.constexpr(CHUNK)
# exp(-110) is 0 in fp32: a stronger decay means the same and would cost the sums their low bits.
_STRONGEST = tl.constexpr(-110.0)
_LOG2E = tl.constexpr(1.4426950408889634)


def prepare(run: Run, basis: Basis) -> None:
    """Fill the parts of `basis` that belong to chunks."""
    call = run.call
    args = (
        *(run.q, run.k, call.decay, call.beta, basis.solve, *basis.vectors.unbind(), basis.reach, call.chunk_table),
        *(*call.decay.stride(), *call.beta.stride()),
        *(call.length, call.heads, call.scale, EPS),
    )
    run("prepare", _prepare, (call.heads * call.cut.chunks, 1, 1), args, L2=call.l2_norm)


@triton.jit
def _piece(table, index, length, size, VARLEN: tl.constexpr):
    """(document, start, stop, first chunk, is first, is last) of a piece of at most `size` tokens; tokens count from the row."""
    if VARLEN:
        row = table + index * 6
        doc, start, stop = tl.load(row), tl.load(row + 1), tl.load(row + 2)
        chunk, first, last = tl.load(row + 3), tl.load(row + 4), tl.load(row + 5)
    else:
        pieces = (length + size - 1) // size
        doc = index // pieces
        part = index % pieces
        start = part * size
        stop = tl.minimum(start + size, length)
        chunk = doc * ((length + _C - 1) // _C) + part * (size // _C)
        first = (part == 0).to(tl.int32)
        last = (part == pieces - 1).to(tl.int32)
    return doc, start, stop, chunk, first, last


@triton.jit
def _row(base, doc, head, token, stride_b, stride_t, stride_h, VARLEN: tl.constexpr):
    """Where a token's number stands."""
    where = base + token.to(tl.int64) * stride_t + head * stride_h
    if not VARLEN:
        where += doc.to(tl.int64) * stride_b
    return where


@triton.jit
def _tile(tokens, doc, head, at, column, VARLEN: tl.constexpr):
    """[C, D] of a `_tokens`: rows from token `at` on. Rows past a document's end are the next document's, those past the sequence's
    end 0: whoever reads them has factors that are 0 there."""
    tile = tokens.load([0 if VARLEN else doc, head, at, column])
    return tl.reshape(tile, (tile.shape[2], tile.shape[3]))


@triton.jit
def _invert(lower, PRECISION: tl.constexpr):
    """(I + lower)^-1 for a strictly lower [64, 64].

    The inverse of [[A, 0], [B, C]] is [[A', 0], [-C' B A', C']]: blocks grow from 1 to 64 rows, all of one size at once, and with
    X = diag(A', C', ...) a step is X - X B X. Blocks up to 16 rows are done as four separate [16, 16].
    """
    i4, j4 = tl.arange(0, 4)[:, None], tl.arange(0, 4)[None, :]
    same = (i4 == j4)[:, None, :, None]
    blocks = tl.sum(tl.where(same, tl.reshape(lower, (4, 16, 4, 16)), 0.0), axis=2)
    i, j = tl.arange(0, 16)[None, :, None], tl.arange(0, 16)[None, None, :]
    x = tl.where(i == j, 1.0, 0.0) - tl.where(i // 2 == j // 2, blocks, 0.0)
    for level in tl.static_range(1, 4):
        corner = tl.where((i >> (level + 1) == j >> (level + 1)) & (i >> level != j >> level), blocks, 0.0)
        x -= tl.dot(tl.dot(x, corner, input_precision=PRECISION), x, input_precision=PRECISION)
    x = tl.reshape(tl.where(same, tl.expand_dims(x, 2), 0.0), (64, 64))
    i, j = tl.arange(0, 64)[:, None], tl.arange(0, 64)[None, :]
    for level in tl.static_range(4, 6):
        corner = tl.where((i >> (level + 1) == j >> (level + 1)) & (i >> level != j >> level), lower, 0.0)
        x -= tl.dot(tl.dot(x, corner, input_precision=PRECISION), x, input_precision=PRECISION)
    return x


@triton.jit(do_not_specialize=["decay", "beta", "g_b", "g_t", "g_h", "b_b", "b_t", "b_h", "length", "heads"])
def _prepare(
    q,
    k,
    decay,
    beta,
    solve,
    total,
    rows_q,
    rows_k,
    writes,
    reach,
    table,
    g_b,
    g_t,
    g_h,
    b_b,
    b_t,
    b_h,
    length,
    heads,
    scale,
    eps,
    L2: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    VARLEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One chunk and head: T, G, the factors of rows (norms, and the scale of q) and the log of the bound of |M|."""
    head, index = tl.program_id(0) % heads, tl.program_id(0) // heads
    doc, start, stop, _, _, _ = _piece(table, index, length, _C, VARLEN)
    if doc < 0:
        return
    rows = tl.arange(0, _C)
    valid = rows < stop - start
    item = index.to(tl.int64) * heads + head
    steps = tl.load(_row(decay, doc, head, start, g_b, g_t, g_h, VARLEN) + rows * g_t, mask=valid, other=0.0)
    g = tl.cumsum(tl.maximum(steps.to(tl.float32), _STRONGEST), 0)
    write = tl.load(_row(beta, doc, head, start, b_b, b_t, b_h, VARLEN) + rows * b_t, mask=valid, other=0.0)
    write = write.to(tl.float32)

    kt = _tile(k, doc, head, start, 0, VARLEN)
    gram = tl.dot(kt, tl.trans(kt), input_precision=PRECISION)
    i, j = rows[:, None], rows[None, :]
    square = tl.sum(tl.where(i == j, gram, 0.0), 1)
    factor_q = tl.where(valid, scale, 0.0)
    factor_k = tl.where(valid, 1.0, 0.0)
    if L2:
        qt = _tile(q, doc, head, start, 0, VARLEN).to(tl.float32)
        factor_q *= tl.rsqrt(tl.sum(qt * qt, 1) + eps)
        factor_k *= tl.rsqrt(square + eps)
        square *= factor_k * factor_k
        gram *= factor_k[:, None] * factor_k[None, :]
    steps = g * _LOG2E
    between = tl.exp2(tl.minimum(steps[:, None] - steps[None, :], 0.0))
    lower = tl.where(i > j, write[:, None] * gram * between, 0.0)
    x = _invert(lower, PRECISION)
    tl.store(solve + item * _C * _C + i * _C + j, x.to(solve.dtype.element_ty))
    tl.store(total + item * _C + rows, steps)
    tl.store(writes + item * _C + rows, write)
    tl.store(rows_q + item * _C + rows, factor_q)
    tl.store(rows_k + item * _C + rows, factor_k)
    growth = tl.log(tl.maximum(tl.abs(1.0 - write * square), 1.0))
    tl.store(reach + item, tl.sum(growth, 0) + tl.min(g, 0))

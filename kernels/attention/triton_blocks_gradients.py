"""The gradients of `hydrasurgery.kernels.attention.triton_blocks`: of a block of keys, and of a tile of queries.

With p the weights, dp = dy v^T and delta = y . dy: ds = p (dp - delta), and through the softcap ds *= 1 - tanh^2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hydrasurgery.kernels.attention.triton_scores import _scores, _span, _tile


@triton.jit
def _delta(grad, out, delta, T, HEADS: tl.constexpr, VALUES: tl.constexpr, BLOCK_V: tl.constexpr, ROWS: tl.constexpr):
    """The product of each output with its gradient [B, H, T]."""
    row, head, batch = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1), tl.program_id(2).to(tl.int64)
    across = tl.arange(0, BLOCK_V)
    at = ((batch * T + row.to(tl.int64)) * HEADS + head)[:, None] * VALUES + across[None, :]
    inside = (row < T)[:, None] & (across < VALUES)[None, :]
    product = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32) * tl.load(out + at, mask=inside, other=0.0).to(
        tl.float32
    )
    tl.store(delta + (batch * HEADS + head) * T + row, tl.sum(product, 1), mask=row < T)


@triton.jit
def _key_gradients(
    dkeys, dvalues, grad, q, keys, values, lse, delta, q_t, dy_t, key, start, begin, end, T, S, reach, scale, cap, window,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, WHOLE: tl.constexpr,
    DIM: tl.constexpr, VALUES: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, QUERIES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Goes on with a block of keys over the queries [begin, end) of one head."""
    column, across = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    for at in range(begin, end, QUERIES):
        row = at + tl.arange(0, QUERIES)
        place = tl.where(row < T, start + row, -1)
        queries = _tile(q, row, q_t, column, DIM, T)
        s, slope = _scores(
            queries, keys, place, key, S, reach, scale, cap, window, MASK, CAUSAL, WINDOW, CAP, WHOLE, PRECISION
        )
        p = tl.exp2(s - tl.load(lse + row, mask=row < T, other=float("inf"))[:, None])
        dy = _tile(grad, row, dy_t, across, VALUES, T)
        dvalues = tl.dot(tl.trans(p.to(dy.dtype)), dy, dvalues, input_precision=PRECISION)
        dp = tl.dot(dy, tl.trans(values), input_precision=PRECISION)
        ds = p * (dp - tl.load(delta + row, mask=row < T, other=0.0)[:, None])
        if CAP:
            ds *= slope
        dkeys = tl.dot(tl.trans(ds.to(queries.dtype)), queries, dkeys, input_precision=PRECISION)
    return dkeys, dvalues


@triton.jit(do_not_specialize=["T", "S", "window", "blocks"])
def _backward_keys(
    grad, q, k, v, reach, most, least, lse, delta, dk, dv, T, S, scale, cap, window,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, blocks,
    GROUP: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, VALUES: tl.constexpr, MASK: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of keys and values: over all queries that see it, of all heads of the group."""
    block, group, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    column, across = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    key = block * KEYS + tl.arange(0, KEYS)
    keys = _tile(k + batch * k_b + group.to(tl.int64) * k_h, key, k_t, column, DIM, S)
    values = _tile(v + batch * v_b + group.to(tl.int64) * v_h, key, v_t, across, VALUES, S)
    start, begin, end = S - T, 0, T
    middle, whole = 0, T // QUERIES * QUERIES  # queries [middle, whole) see all keys of the block
    if MASK:
        reach += batch * (S + 1)
        start = tl.load(reach + S)
        end = tl.minimum(T, tl.maximum(0, tl.load(most + batch * blocks + block) - start))
        whole = tl.minimum(T, tl.maximum(0, tl.load(least + batch * blocks + block) - start)) // QUERIES * QUERIES
    if CAUSAL:
        begin = tl.maximum(0, block * KEYS - start) // QUERIES * QUERIES
        middle = tl.cdiv(tl.maximum(0, block * KEYS + KEYS - 1 - start), QUERIES) * QUERIES
    if WINDOW:
        end = tl.minimum(T, tl.maximum(0, block * KEYS + KEYS - 1 + window - start))
        whole = tl.minimum(whole, tl.maximum(0, block * KEYS + window - start) // QUERIES * QUERIES)
    if block * KEYS + KEYS > S:
        whole = 0
    middle = tl.minimum(tl.maximum(middle, begin), tl.maximum(end, begin))
    whole = tl.minimum(tl.maximum(whole, middle), tl.maximum(end, middle))
    dkeys = tl.zeros((KEYS, BLOCK_D), tl.float32)
    dvalues = tl.zeros((KEYS, BLOCK_V), tl.float32)
    for one in range(GROUP):
        head = group * GROUP + one
        line = (batch * HEADS + head) * T
        of_q, dy = q + batch * q_b + head.to(tl.int64) * q_h, grad + (batch * T * HEADS + head) * VALUES
        dkeys, dvalues = _key_gradients(
            dkeys, dvalues, dy, of_q, keys, values, lse + line, delta + line, q_t, HEADS * VALUES, key, start, begin, middle,
            T, S, reach, scale, cap, window, MASK, CAUSAL, WINDOW, CAP, False, DIM, VALUES, BLOCK_D, BLOCK_V, QUERIES,
            PRECISION,
        )  # fmt: skip
        dkeys, dvalues = _key_gradients(
            dkeys, dvalues, dy, of_q, keys, values, lse + line, delta + line, q_t, HEADS * VALUES, key, start, middle, whole,
            T, S, reach, scale, cap, window, MASK, CAUSAL, WINDOW, CAP, True, DIM, VALUES, BLOCK_D, BLOCK_V, QUERIES,
            PRECISION,
        )  # fmt: skip
        dkeys, dvalues = _key_gradients(
            dkeys, dvalues, dy, of_q, keys, values, lse + line, delta + line, q_t, HEADS * VALUES, key, start, whole, end,
            T, S, reach, scale, cap, window, MASK, CAUSAL, WINDOW, CAP, False, DIM, VALUES, BLOCK_D, BLOCK_V, QUERIES,
            PRECISION,
        )  # fmt: skip
    at = (batch * tl.num_programs(1) + group) * S + key.to(tl.int64)
    inside = (key < S)[:, None]
    dkeys = (dkeys * scale).to(dk.dtype.element_ty)
    tl.store(dk + at[:, None] * DIM + column[None, :], dkeys, mask=inside & (column < DIM)[None, :])
    dvalues = dvalues.to(dv.dtype.element_ty)
    tl.store(dv + at[:, None] * VALUES + across[None, :], dvalues, mask=inside & (across < VALUES)[None, :])


@triton.jit
def _query_gradients(
    total, queries, dy, found, along, k, v, k_t, v_t, place, first, begin, end, S, reach, most, scale, cap, window,
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
            keys = _tile(k, key, k_t, column, DIM, S)
            s, slope = _scores(
                queries, keys, place, key, S, reach, scale, cap, window, MASK, CAUSAL, WINDOW, CAP, WHOLE, PRECISION
            )
            p = tl.exp2(s - found[:, None])
            dp = tl.dot(dy, tl.trans(_tile(v, key, v_t, across, VALUES, S)), input_precision=PRECISION)
            ds = p * (dp - along[:, None])
            if CAP:
                ds *= slope
            total = tl.dot(ds.to(keys.dtype), keys, total, input_precision=PRECISION)
    return total


@triton.jit(do_not_specialize=["T", "S", "window", "blocks", "tiles"])
def _backward_queries(
    grad, q, k, v, reach, most, low, open, lse, delta, dq, T, S, scale, cap, window,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, blocks, tiles,
    GROUP: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, VALUES: tl.constexpr, MASK: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of queries: over all keys that it sees."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    column, across = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    row = tile * QUERIES + tl.arange(0, QUERIES)
    k += batch * k_b + (head // GROUP).to(tl.int64) * k_h
    v += batch * v_b + (head // GROUP).to(tl.int64) * v_h
    start, first, begin, middle, whole, end = _span(
        reach, low, open, batch, tile, tiles, T, S, window, MASK, CAUSAL, WINDOW, QUERIES, KEYS
    )
    if MASK:
        reach, most = reach + batch * (S + 1), most + batch * blocks
    middle = tl.minimum(tl.maximum(middle, begin), tl.maximum(end, begin))
    whole = tl.minimum(tl.maximum(whole, middle), tl.maximum(end, middle))
    place = tl.where(row < T, start + row, -1)
    queries = _tile(q + batch * q_b + head.to(tl.int64) * q_h, row, q_t, column, DIM, T)
    dy = _tile(grad + (batch * T * HEADS + head) * VALUES, row, HEADS * VALUES, across, VALUES, T)
    line = (batch * HEADS + head) * T
    found = tl.load(lse + line + row, mask=row < T, other=float("inf"))
    along = tl.load(delta + line + row, mask=row < T, other=0.0)
    total = tl.zeros((QUERIES, BLOCK_D), tl.float32)
    if MASK or WINDOW:
        total = _query_gradients(
            total, queries, dy, found, along, k, v, k_t, v_t, place, first, begin, middle, S, reach, most, scale, cap, window,
            MASK, CAUSAL, WINDOW, CAP, False, DIM, VALUES, BLOCK_D, BLOCK_V, KEYS, PRECISION,
        )  # fmt: skip
    total = _query_gradients(
        total, queries, dy, found, along, k, v, k_t, v_t, place, first, middle, whole, S, reach, most, scale, cap, window,
        MASK, CAUSAL, WINDOW, CAP, True, DIM, VALUES, BLOCK_D, BLOCK_V, KEYS, PRECISION,
    )  # fmt: skip
    total = _query_gradients(
        total, queries, dy, found, along, k, v, k_t, v_t, place, first, whole, end, S, reach, most, scale, cap, window,
        MASK, CAUSAL, WINDOW, CAP, False, DIM, VALUES, BLOCK_D, BLOCK_V, KEYS, PRECISION,
    )  # fmt: skip
    at = (batch * HEADS + head) * T + row.to(tl.int64)
    inside = (row < T)[:, None] & (column < DIM)[None, :]
    tl.store(dq + at[:, None] * DIM + column[None, :], (total * scale).to(dq.dtype.element_ty), mask=inside)

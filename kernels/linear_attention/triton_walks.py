"""The walks along the segments of a sequence, forwards and backwards, and the joining of segments in order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hydrasurgery.kernels.launching import cdiv
from hydrasurgery.kernels.linear_attention.triton_call import Basis, tokens
from hydrasurgery.kernels.linear_attention.triton_launch import Run
from hydrasurgery.kernels.linear_attention.triton_prepare import _C, _piece, _tile

# e^-200 times the largest fp32 number, over 256 channels, rounds to 0 in fp32.
_FORGOTTEN = tl.constexpr(-200.0)


def walk(
    run: Run,
    basis: Basis,
    state: Tensor | None,
    final: Tensor | None,
    *,
    maps: bool = False,
    o: Tensor | None = None,
    states: Tensor | None = None,
    updates: Tensor | None = None,
) -> None:
    """Forwards through all segments: to find their maps, or else the outputs, or the states and updates of chunks."""
    call = run.call
    columns = call.values // call.block + (cdiv(call.keys, call.block) if maps else 0)
    # Where a kernel reads and writes nothing stands something of the same type: one compiled kernel for all.
    number, flag, tile = basis.reach, basis.reach.view(torch.int32), basis.solve
    args = (
        *(run.q, run.k, run.v, *basis.chunks),
        *(number if x is None else x for x in (state, basis.ends, final, basis.move, basis.turned)),
        flag if basis.moves is None else basis.moves,
        *(tile if x is None else x for x in (o, states, updates)),
        *(call.segment_table, call.length, call.heads, call.cut.size),
        *(int(x) for x in (state is not None, final is not None, maps, basis.turned is not None)),
    )
    name = "scan" if o is None else "outputs"
    run(name, _scan, (columns, call.heads, call.cut.segments), args, BV=call.block, OUTPUTS=o is not None)


def walk_back(
    run: Run,
    basis: Basis,
    grad: Tensor,
    grad_state: Tensor | None,
    dfirst: Tensor,
    dstates: Tensor,
    errors: Tensor,
) -> None:
    """Backwards through all segments: the gradients of first states, of the state after each chunk, and of T's results."""
    call = run.call
    begins = call.states(call.cut.segments) if call.cut.split else dfirst
    given = dfirst if grad_state is None else grad_state
    tiles = tokens(grad, call.block)
    for find in (True, False) if call.cut.split else (False,):
        args = (
            *(tiles, run.q, run.k, *basis.chunks, given, begins, dfirst, dstates, errors),
            *(call.segment_table, call.length, call.heads, call.cut.size, int(grad_state is not None), int(find)),
        )
        run("back", _scan_back, (call.values // call.block, call.heads, call.cut.segments), args, BV=call.block)
        if find:
            join_segments(run, begins, basis, back=True)


def join_segments(run: Run, states: Tensor | None, basis: Basis, *, back: bool) -> None:
    call = run.call
    block = min(call.values, 32)
    roomy = _holds_maps(call.q.device)
    whole = roomy and call.keys <= 128 and call.q.dtype != torch.float32
    rows = call.keys if whole else 64 if roomy or call.keys <= 128 else 32
    move = basis.turned if back else basis.move
    args = (states, move, basis.moves, call.first_segments, call.length, call.heads, call.cut.size, int(back))
    run(
        "join",
        _join,
        (call.values // block, call.heads, call.cut.docs),
        args,
        BV=block,
        BR=rows,
        num_stages=3 if whole else 1,
    )


def _holds_maps(device: torch.device) -> bool:
    """Whether a processor's shared memory holds three maps of 128 x 128 and a state, 224 KB: Hopper's and larger Blackwells'."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] in (9, 10)


@triton.jit
def _remembered(reach, chunk, chunks, heads, head, BACK: tl.constexpr):
    """How many chunks, from the last one back (or from the first one on), change the result in fp32; `chunks + 1` if all do,
    and the state that they start from too."""
    found = chunks + 1
    total = 0.0
    for block in range(0, tl.cdiv(chunks, 64)):
        n = block * 64 + tl.arange(0, 64)
        at = chunk + (n if BACK else chunks - 1 - n)
        bounds = tl.load(reach + at.to(tl.int64) * heads + head, mask=n < chunks, other=0.0)
        sums = total + tl.cumsum(bounds, 0)
        found = tl.minimum(found, tl.min(tl.where((sums < _FORGOTTEN) & (n < chunks), n + 1, chunks + 1), 0))
        total += tl.sum(bounds, 0)
    return found


@triton.jit(do_not_specialize=["length", "heads", "size", "has_state", "has_final", "find", "turns"])
def _scan(
    q,
    k,
    v,
    solve,
    total,
    rows_q,
    rows_k,
    writes,
    reach,
    state,
    ends,
    final,
    move,
    turned,
    moves,
    o,
    states,
    updates,
    table,
    length,
    heads,
    size,
    has_state,
    has_final,
    find,
    turns,
    BV: tl.constexpr,
    OUTPUTS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    VARLEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A segment, a head and BV columns of S [K, BV], chunk by chunk.

    `find`: the segment's map; columns from V on are those of M. Otherwise from the true first state: to outputs, or to the state
    before each chunk and its updates U.
    """
    column, head, segment = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    doc, start, stop, chunk, first, last = _piece(table, segment, length, size, VARLEN)
    of_map = column >= V // BV
    of_values = column < V // BV
    # A document's first segment needs no M, its last neither M nor R.
    if (doc < 0) | ((find != 0) & ((last != 0) | (of_map & (first != 0)))):
        return
    dtype = q.dtype
    chunks = (stop - start + _C - 1) // _C
    used = chunks + 1
    if find != 0:
        used = _remembered(reach, chunk, chunks, heads, head, False)
    whole = used > chunks
    begin = tl.maximum(chunks - used, 0)
    begin = tl.where(of_map & (used <= chunks), chunks, begin)  # M = 0: nothing to walk.
    rows, channels = tl.arange(0, _C), tl.arange(0, K)
    columns = tl.where(of_map, column - V // BV, column) * BV + tl.arange(0, BV)
    given = columns < tl.where(of_values & (has_state != 0) & (first != 0) & whole, V, 0)
    found = columns < tl.where((find == 0) & (first == 0), V, 0)
    cell = channels[:, None] * V + columns[None, :]
    here = (doc.to(tl.int64) * heads + head) * K * V
    before = ((segment - 1).to(tl.int64) * heads + head) * K * V
    s = tl.load(state + here + cell, mask=given[None, :], other=0.0).to(tl.float32)
    s += tl.load(ends + before + cell, mask=found[None, :], other=0.0)
    s += tl.where(channels[:, None] == columns[None, :], tl.where(of_map & whole, 1.0, 0.0), 0.0)

    if (not OUTPUTS) & (find == 0) & (chunks > 0):
        tl.store(states + (chunk.to(tl.int64) * heads + head) * K * V + cell, s.to(dtype))
    first_column = tl.where(of_values, column * BV, 0)  # For M, v is 0.
    for c in range(begin, chunks):
        at = start + c * _C
        valid = rows < stop - at
        item = (chunk + c).to(tl.int64) * heads + head
        line = ((chunk + c) * heads + head) * _C
        kt = _tile(k, doc, head, at, 0, VARLEN)
        vt = _tile(v, doc, head, at, first_column, VARLEN)
        tt = solve.load([line, 0])
        g = tl.load(total + item * _C + rows)
        g_end = tl.load(total + item * _C + _C - 1)
        factor_k = tl.load(rows_k + item * _C + rows)
        write = tl.load(writes + item * _C + rows)
        held = s.to(dtype)
        x = tl.dot(kt, held, input_precision=PRECISION)
        if OUTPUTS:
            qt = _tile(q, doc, head, at, 0, VARLEN)
            factor_q = tl.load(rows_q + item * _C + rows)
            y = tl.dot(qt, held, input_precision=PRECISION)
            scores = tl.dot(qt, tl.trans(kt), input_precision=PRECISION)
            scores *= tl.exp2(tl.where(rows[:, None] >= rows[None, :], g[:, None] - g[None, :], float("-inf")))
            scores = scores.to(dtype)
        written = write * tl.where(of_values, 1.0, 0.0)
        x = written[:, None] * vt.to(tl.float32) - (write * factor_k * tl.exp2(g))[:, None] * x
        u = tl.dot(tt, x.to(dtype), input_precision=PRECISION)
        added = u * factor_k[:, None]
        falling = (added * tl.exp2(g_end - g)[:, None]).to(dtype)
        s = tl.dot(tl.trans(kt), falling, s * tl.exp2(g_end), input_precision=PRECISION)
        # Stores come last: a product waits for those before it.
        if OUTPUTS:
            y *= tl.exp2(g)[:, None]
            y = tl.dot(scores, added.to(dtype), y, input_precision=PRECISION) * factor_q[:, None]
            token = at.to(tl.int64)
            if not VARLEN:
                token += doc.to(tl.int64) * length
            out = o + (token * heads + head) * V + rows[:, None] * (heads * V) + columns[None, :]
            tl.store(out, y.to(o.dtype.element_ty), mask=valid[:, None])
        elif find == 0:
            tl.store(updates + item * _C * V + rows[:, None] * V + columns[None, :], u.to(dtype))
            if c + 1 < chunks:
                tl.store(states + (item + heads) * K * V + cell, s.to(dtype))

    item = segment.to(tl.int64) * heads + head
    if find == 0:
        if (has_final != 0) & (last != 0):
            tl.store(final + here + cell, s)
    elif of_map:
        of_keys = (columns < K)[None, :]
        tl.store(move + item * K * K + channels[:, None] * K + columns[None, :], s, mask=of_keys)
        if turns != 0:
            tl.store(turned + item * K * K + columns[None, :] * K + channels[:, None], s, mask=of_keys)
        if column == V // BV:
            tl.store(moves + item, whole.to(tl.int32))
    else:
        tl.store(ends + item * K * V + cell, s)


@triton.jit(do_not_specialize=["length", "heads", "size", "has_state", "find"])
def _scan_back(
    grad,
    q,
    k,
    solve,
    total,
    rows_q,
    rows_k,
    writes,
    reach,
    grad_state,
    begins,
    dfirst,
    dstates,
    errors,
    table,
    length,
    heads,
    size,
    has_state,
    find,
    BV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    VARLEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A segment from its last chunk to its first, with the gradient of the state dS [K, BV]:

        dU = A^T do + (k e^{G_C - G}) dS',    Z = T^T dU,    dS = e^{G_C} dS' + (q e^G)^T do - (k e^G)^T (beta Z)

    `find`: from 0 (a document's last segment: from the final state's gradient), to learn what the segment adds. Otherwise from
    the true gradient, and dS' and Z of each chunk are kept.
    """
    column, head, segment = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    doc, start, stop, chunk, first, last = _piece(table, segment, length, size, VARLEN)
    if (doc < 0) | ((find != 0) & (first != 0)):
        return
    dtype = q.dtype
    chunks = (stop - start + _C - 1) // _C
    used = chunks + 1
    if find != 0:
        used = _remembered(reach, chunk, chunks, heads, head, True)
    whole = used > chunks
    used = tl.minimum(used, chunks)
    rows, channels = tl.arange(0, _C), tl.arange(0, K)
    columns = column * BV + tl.arange(0, BV)
    cell = channels[:, None] * V + columns[None, :]
    given = columns < tl.where((has_state != 0) & (last != 0) & whole, V, 0)
    found = columns < tl.where((find == 0) & (last == 0), V, 0)
    here = (doc.to(tl.int64) * heads + head) * K * V
    after = ((segment + 1).to(tl.int64) * heads + head) * K * V
    ds = tl.load(grad_state + here + cell, mask=given[None, :], other=0.0).to(tl.float32)
    ds += tl.load(begins + after + cell, mask=found[None, :], other=0.0)

    if (find == 0) & (chunks > 0):
        tl.store(dstates + ((chunk + chunks - 1).to(tl.int64) * heads + head) * K * V + cell, ds.to(dtype))
    for n in range(0, used):
        c = used - 1 - n
        at = start + c * _C
        item = (chunk + c).to(tl.int64) * heads + head
        line = ((chunk + c) * heads + head) * _C
        qt = _tile(q, doc, head, at, 0, VARLEN)
        kt = _tile(k, doc, head, at, 0, VARLEN)
        do = _tile(grad, doc, head, at, column * BV, VARLEN)
        tt = solve.load([line, 0])
        g = tl.load(total + item * _C + rows)
        g_end = tl.load(total + item * _C + _C - 1)
        factor_q = tl.load(rows_q + item * _C + rows)
        factor_k = tl.load(rows_k + item * _C + rows)
        write = tl.load(writes + item * _C + rows)
        held = ds.to(dtype)
        # Rows are keys here: A^T is a product of its own.
        scores = tl.dot(kt, tl.trans(qt), input_precision=PRECISION)
        between = tl.exp2(tl.minimum(g[None, :] - g[:, None], 0.0)) * (factor_q[None, :] * factor_k[:, None])
        scores = tl.where(rows[None, :] >= rows[:, None], scores * between, 0.0)
        fall = factor_k * tl.exp2(tl.minimum(g_end - g, 0.0))
        du = tl.dot(kt, held, input_precision=PRECISION) * fall[:, None]
        du = tl.dot(scores.to(dtype), do, du, input_precision=PRECISION)
        z = tl.dot(tl.trans(tt), du.to(dtype), input_precision=PRECISION)
        rise = tl.exp2(g)
        read = do.to(tl.float32) * (factor_q * rise)[:, None]
        ds = tl.dot(tl.trans(qt), read.to(dtype), ds * tl.exp2(g_end), input_precision=PRECISION)
        erased = z * (-write * factor_k * rise)[:, None]
        ds = tl.dot(tl.trans(kt), erased.to(dtype), ds, input_precision=PRECISION)
        if find == 0:
            tl.store(errors + item * _C * V + rows[:, None] * V + columns[None, :], z.to(dtype))
            if c > 0:
                tl.store(dstates + (item - heads) * K * V + cell, ds.to(dtype))

    if find != 0:
        tl.store(begins + (segment.to(tl.int64) * heads + head) * K * V + cell, ds)
    elif first != 0:
        tl.store(dfirst + here + cell, ds)


@triton.jit(do_not_specialize=["length", "heads", "size", "back"])
def _join(
    states,
    move,
    moves,
    first_segments,
    length,
    heads,
    size,
    back,
    BV: tl.constexpr,
    BR: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    VARLEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A document's segments in order, in place: states[n] += M_n states[n - 1].

    Backwards, with M^T for M: states[n] += M_n^T states[n + 1].

    Where M is too large for a processor its rows go in blocks of BR, and S passes through memory.
    """
    column, head, doc = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if VARLEN:
        begin = tl.load(first_segments + doc)
        count = tl.load(first_segments + doc + 1) - begin
    else:
        count = (length + size - 1) // size
        begin = doc * count
    channels = tl.arange(0, K)
    columns = column * BV + tl.arange(0, BV)
    cell = channels[:, None] * V + columns[None, :]
    # First and last segment have no map, and without any map nothing is to be done.
    some = 0
    for block in range(0, tl.cdiv(count, 64)):
        n = block * 64 + tl.arange(0, 64)
        inner = (n > 0) & (n < count - 1)
        some += tl.max(tl.load(moves + (begin + n).to(tl.int64) * heads + head, mask=inner, other=0), 0)
    if some == 0:
        return
    item = (begin + tl.where(back != 0, count - 1, 0)).to(tl.int64) * heads + head
    step = tl.where(back != 0, -heads, heads)
    s = tl.load(states + item * K * V + cell)
    for _ in range(1, count - 1):
        item += step
        if BR < K:
            s = tl.load(states + (item - step) * K * V + cell)
        for row in tl.static_range(0, K, BR):
            r = row + tl.arange(0, BR)
            m = tl.load(move + item * K * K + r[:, None] * K + channels[None, :])
            own = states + item * K * V + r[:, None] * V + columns[None, :]
            found = tl.dot(m, s, tl.load(own), input_precision=PRECISION)
            tl.store(own, found)
        if BR < K:
            tl.debug_barrier()  # The next step reads what other threads of this program have written.
        else:
            s = found

"""Linear attention in Triton: rule "gated_delta" with one decay a head, chunked, forward and backward.

The algebra is `reference.py`'s, with T = (I + diag(beta) P)^-1. A chunk of 64 tokens costs one chain of products

    U = T diag(beta) (v - (k e^G) S),    o = (q e^G) S + A U,    S' = e^{G_C} S + k^T (e^{G_C - G} U)

so that per-chunk states never leave the chip in the forward pass. `_prepare` finds T and G of all chunks at once; `_scan` then
walks the chunks with S in registers. A hybrid has few heads, too few to fill a card, so a sequence is walked in segments:

1. Every segment is a map S -> M S + R. All are found at once by the same walk: R from a zero state, M from the identity with v = 0.
2. `_join` puts the few maps in order and finds the state between segments, summed in fp32.
3. Every segment is walked again from its true first state.

Step 1 walks only as far as memory reaches. |M| is at most prod_t e^{g_t} max(1, |1 - beta_t |k_t|^2|), a bound that `_prepare`
sums up; where it is under e^-200, what lies before is multiplied by less than the smallest float over the largest, exactly 0 in
fp32. Weak decays keep M, strong ones make step 1 nearly free, and neither is a guess. Packed documents are segments too: a
document has one or more, and M is never asked for across a start.

The backward pass is the same walk once forwards, to keep the states, and once backwards for their gradients (its maps are M^T);
`_gradients` then treats all chunks at once. A row's norm and decays are factors of rows of products, so tiles of q and k go from
memory to the matrix units as they are.

Results are the same bits in every run: no atomics, and the work is cut by shapes, dtype and processors alone. Two patterns that
Triton 3.4 to 3.7 turns into wrong code for Hopper are avoided throughout: a computed tile transposed to be the left factor of a
product (its transpose is computed as a product of its own), and more than four warps (`_launch` says why).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

CHUNK = 64
SIZES = (64, 128, 256)  # heads of other sizes are filled up with zeros
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
EPS = 1e-6

_C = tl.constexpr(64)
# exp(-110) is 0 in fp32: a stronger decay means the same and would cost the sums their low bits.
_STRONGEST = tl.constexpr(-110.0)
_LOG2E = tl.constexpr(1.4426950408889634)
# e^-200 times the largest fp32 number, over 256 channels, rounds to 0 in fp32.
_FORGOTTEN = tl.constexpr(-200.0)


def refusal(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None, *, rule: str) -> str | None:
    """Why these kernels cannot take a call, in words for the user; None if they can."""
    if rule != "gated_delta" or decay is None or beta is None:
        return f"rule {rule!r}: only gated_delta is written in Triton"
    if decay.dim() != 3:
        return "a decay a key channel: only one decay a head is written in Triton"
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        return f"dtypes {q.dtype}, {k.dtype}, {v.dtype}: q, k and v must share one of bfloat16, float16 and float32"
    if max(q.shape[-1], v.shape[-1]) > SIZES[-1]:
        return f"head sizes {q.shape[-1]} and {v.shape[-1]}: both must be at most {SIZES[-1]}"
    if q.shape[-1] > 128 and q.dtype == torch.float32:
        return "float32 heads of more than 128: their tiles do not fit a processor"
    if q.numel() == 0:
        return "no tokens"
    return None


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor,
    state: Tensor | None,
    *,
    rule: str = "gated_delta",
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    l2_norm: bool = False,
    segment: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(o [B, T, H, V] in v's dtype, final state fp32 [B, H, K, V]); arguments as in `hydrasurgery.ops.linear_attention`, and

    Args:
        cu_seqlens: [N + 1] int32 or int64 on the device, rising from 0 to T: with B = 1, where the N documents of a packed
            sequence start and end. States are then [N, H, K, V]. A document may be empty.
        l2_norm: take x / sqrt(sum x^2 + 1e-6) for the rows x of q and k.
        segment: tokens in a segment, a multiple of 64; chosen from the shapes if None.
    """
    call = _Call.of(q, k, v, decay, beta, rule, scale, cu_seqlens, l2_norm, segment)
    return _forward(call, state, q.shape[-1], v.shape[-1], keep=False)[:2]


def forward_keeping(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor,
    state: Tensor | None,
    *,
    rule: str = "gated_delta",
    scale: float | None = None,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """`forward`, and what `backward` need not compute again: 64 numbers a token and head in q's dtype and 4 in fp32, and the maps
    of segments."""
    call = _Call.of(q, k, v, decay, beta, rule, scale, None, False, None)
    return _forward(call, state, q.shape[-1], v.shape[-1], keep=True)


def _forward(
    call: _Call, state: Tensor | None, keys: int, values: int, *, keep: bool
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    state = call.filled(state)
    o, final = torch.empty_like(call.v, memory_format=torch.contiguous_format), call.states(call.docs)
    with _Run(call, back=False, kept=keep) as run:
        basis = _find_basis(run, state)
        _walk(run, basis, state, final, o=o)
    return _cut(o, values), _cut(final, keys, values), tuple(x for x in basis if x is not None)


def backward(
    grad: Tensor,
    grad_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor,
    state: Tensor | None,
    *,
    rule: str = "gated_delta",
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    l2_norm: bool = False,
    segment: int | None = None,
    kept: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v, decay, beta and state (None without one), each in its input's dtype, from those of o and of the
    final state. The states of chunks are computed again, and so is what `forward_keeping` gives if it is not in `kept`."""
    call = _Call.of(q, k, v, decay, beta, rule, scale, cu_seqlens, l2_norm, segment)
    state, grad_state = call.filled(state), call.filled(grad_state)
    grad = _rows(_fill(grad.to(q.dtype), call.values))
    states = q.new_empty(call.chunks, call.heads, call.keys, call.values)
    updates = q.new_empty(call.chunks, call.heads, CHUNK, call.values)
    dstates, errors, dfirst = torch.empty_like(states), torch.empty_like(updates), call.states(call.docs)
    with _Run(call, back=True, kept=bool(kept)) as run:
        basis = _Basis(*kept) if kept else _find_basis(run, state)
        _walk(run, basis, state, None, states=states, updates=updates)
        _walk_back(run, basis, grad, grad_state, dfirst, dstates, errors)
        dq, dk, dv, ddecay, dbeta = _chunk_gradients(run, basis, grad, states, dstates, updates, errors)
    keys, values = q.shape[-1], v.shape[-1]
    first = None if state is None else _cut(dfirst, keys, values).to(state.dtype)
    return _cut(dq, keys), _cut(dk, keys), _cut(dv, values), ddecay, dbeta, first


# --- the host's side ---------------------------------------------------------------------------------------------------------


class _Launch(NamedTuple):
    """A kernel, its grid of three, its arguments in order, and its constants and compiler's options by name."""

    kernel: triton.JITFunction
    grid: tuple[int, int, int]
    args: tuple
    options: dict


_compiled: dict[tuple, list] = {}
_thread = threading.local()


class _Run:
    """A call's kernels, launched in order.

    Triton's own launch looks at every argument to find the compiled kernel, which takes longer than the kernels of a short
    sequence. Here nothing of an argument but its type is compiled in, so the kind of a call finds all its kernels at once; for
    a kind that is new to this process they are compiled first, when all are known.
    """

    def __init__(self, call: _Call, *, back: bool, kept: bool) -> None:
        self.call = call
        self.turns = back or kept  # whether M^T is wanted
        self.q, self.k = _tokens(call.q, call.keys), _tokens(call.k, call.keys)
        self.v = _tokens(call.v, call.block)
        types = (call.q.device, call.q.dtype, call.decay.dtype, call.beta.dtype)
        wide = max(*call.decay.stride(), *call.beta.stride()) >= 1 << 31  # such a number has another type
        self.kind = (
            back,
            kept,
            *types,
            call.keys,
            call.values,
            call.l2_norm,
            call.split,
            call.chunk_table is None,
            wide,
        )
        self.compiled = iter(_compiled[self.kind]) if self.kind in _compiled else None
        self.plan: list[_Launch] = []
        self.device = torch.cuda.device_of(call.q)

    def __call__(self, name: str, kernel: triton.JITFunction, grid: tuple, args: tuple, **constants: object) -> None:
        """`name` as `_launch` knows it."""
        if self.compiled is not None:
            ready, values = next(self.compiled)
            ready[grid](*args, *values)
        else:
            self.plan.append(_Launch(kernel, grid, args, self.call.options(name) | constants))

    def __enter__(self) -> _Run:
        self.device.__enter__()
        if self.call.q.is_cuda and not hasattr(_thread, "bound"):
            # Tensor descriptors need the card's context, which a new thread (autograd's) has from its first launch on.
            torch.zeros(1, device=self.call.q.device)
            _thread.bound = True
        return self

    def __exit__(self, error: object, *rest: object) -> None:
        try:
            if error is None and self.plan:
                self._launch_new()
        finally:
            self.device.__exit__(error, *rest)

    def _launch_new(self) -> None:
        if not self.call.q.is_cuda:  # Triton's interpreter
            for kernel, grid, args, options in self.plan:
                kernel[grid](*args, **options)
            return
        _compiled[self.kind] = _compile(self.plan)
        for (ready, values), (_, grid, args, _) in zip(_compiled[self.kind], self.plan, strict=True):
            ready[grid](*args, *values)


def _compile(plan: list[_Launch]) -> list[tuple]:
    """The compiled kernel and the constants of each launch. Side by side: a cold call waits for the slowest, not for the sum."""
    new = {(x.kernel, *x.options.items()): x for x in plan}.values()
    with ThreadPoolExecutor(len(new)) as pool, triton.AsyncCompileMode(pool):
        for kernel, grid, args, options in new:
            kernel.warmup(*args, grid=grid, **options)
    found = []
    for kernel, grid, args, options in plan:
        values = tuple(options[name] for name in kernel.arg_names[len(args) :])
        found.append((kernel.warmup(*args, grid=grid, **options), values))
    return found


class _Call(NamedTuple):
    """The inputs of a call, and how its tokens are cut; tables only for packed documents, else arithmetic finds the pieces."""

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor
    beta: Tensor
    scale: float
    l2_norm: bool
    docs: int
    chunks: int
    segments: int
    size: int
    chunk_table: Tensor | None
    segment_table: Tensor | None
    first_segments: Tensor | None

    @classmethod
    def of(cls, q, k, v, decay, beta, rule, scale, cu_seqlens, l2_norm, segment) -> _Call:
        scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
        if reason := refusal(q, k, v, decay, beta, rule=rule):
            raise ValueError(f"linear attention in Triton cannot take {reason}")
        keys, values = (next(size for size in SIZES if size >= x.shape[-1]) for x in (q, v))
        q, k, v = _rows(_fill(q, keys)), _rows(_fill(k, keys)), _rows(_fill(v, values))
        batch, length, heads, _ = q.shape
        if segment is None:
            programs = heads * (values // _value_block(values, q.dtype))
            segment = _segment_tokens(length, batch, programs, _processors(q.device))
        if cu_seqlens is None:
            segments = batch * _cdiv(length, segment)
            chunks = batch * _cdiv(length, CHUNK)
            return cls(q, k, v, decay, beta, scale, l2_norm, batch, chunks, segments, segment, None, None, None)
        if batch != 1:
            raise ValueError(f"cu_seqlens needs one packed sequence, B = 1; found B = {batch}")
        docs = cu_seqlens.numel() - 1
        chunks, segments = length // CHUNK + docs, length // segment + docs
        tables = _tables(cu_seqlens, chunks, segments, segment)
        return cls(q, k, v, decay, beta, scale, l2_norm, docs, chunks, segments, segment, *tables)

    @property
    def length(self) -> int:
        return self.q.shape[1]

    @property
    def heads(self) -> int:
        return self.q.shape[2]

    @property
    def keys(self) -> int:
        return self.q.shape[3]

    @property
    def values(self) -> int:
        return self.v.shape[3]

    @property
    def block(self) -> int:
        """Columns of S that a program holds. 64: S [128, 64] takes 64 of a thread's 255 registers, and two programs share a
        processor. fp32 products are three each and their tiles twice as large: half the columns."""
        return _value_block(self.values, self.q.dtype)

    @property
    def split(self) -> bool:
        """May a document have several segments? (Known on the host; whether one has is known on the device.)"""
        return self.segments > self.docs

    def filled(self, state: Tensor | None) -> Tensor | None:
        if state is None:
            return None
        state = _fill(state.float(), self.keys, self.values).contiguous()
        return state.clone() if state.data_ptr() % 16 else state

    def states(self, count: int) -> Tensor:
        return self.q.new_empty(count, self.heads, self.keys, self.values, dtype=torch.float32)

    def options(self, name: str) -> dict:
        """What every kernel takes: sizes, and the fixed choice of warps and stages."""
        sizes = {
            "K": self.keys,
            "V": self.values,
            "VARLEN": self.chunk_table is not None,
            "PRECISION": "tf32x3" if self.q.dtype == torch.float32 else "tf32",
        }
        return sizes | _launch(name, self.keys, self.q.dtype)


class _Basis(NamedTuple):
    """What outputs and gradients both need. Of a chunk and head: T, the vectors G / ln 2, factors of rows of q and of k, and beta,
    and the log of |M|'s bound. Of a segment, where documents are split: the state after it, M, M^T for the way back, and whether
    M is anything but 0.

    All but T in fp32: loads of fewer than 4 bytes are not fetched ahead, and waiting for one costs as much as two products.
    """

    solve: Tensor
    vectors: Tensor
    reach: Tensor
    ends: Tensor | None = None
    move: Tensor | None = None
    turned: Tensor | None = None
    moves: Tensor | None = None

    @property
    def chunks(self) -> tuple:
        """As kernels take them."""
        return _tiles(self.solve, CHUNK), *self.vectors.unbind(), self.reach


def _fill(x: Tensor, *sizes: int) -> Tensor:
    """With zeros up to `sizes` in the last dimensions: channels that change nothing."""
    short = [size - have for size, have in zip(sizes, x.shape[-len(sizes) :], strict=True)]
    return torch.nn.functional.pad(x, [n for size in reversed(short) for n in (0, size)]) if any(short) else x


def _cut(x: Tensor, *sizes: int) -> Tensor:
    """`_fill` undone."""
    if x.shape[-len(sizes) :] == sizes:
        return x
    for dim, size in zip(range(-len(sizes), 0), sizes, strict=True):
        x = x.narrow(dim, 0, size)
    return x.contiguous()


def _rows(x: Tensor) -> Tensor:
    """As bulk copies want it: rows of neighbours, everything at a multiple of 16 bytes."""
    places = (x.data_ptr(), *(stride * x.element_size() for stride in x.stride()[:-1]))
    fits = x.stride(-1) == 1 and all(x.stride()) and not any(place % 16 for place in places)
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def _tokens(x: Tensor, width: int) -> TensorDescriptor:
    """x [B, T, H, D], read in tiles of a head's [64, width]: one bulk copy each, which takes no registers."""
    x = x.transpose(1, 2)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, CHUNK, width])


def _tiles(x: Tensor, width: int) -> TensorDescriptor:
    """x [chunks, heads, rows, D], read in tiles of [rows, width] at ((chunk heads + head) rows, column)."""
    rows, channels = x.shape[-2:]
    return TensorDescriptor(x, [x.numel() // channels, channels], [channels, 1], [rows, width])


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _holds_maps(device: torch.device) -> bool:
    """Whether a processor's shared memory holds three maps of 128 x 128 and a state, 224 KB: Hopper's and larger Blackwells'."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] in (9, 10)


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _segment_tokens(length: int, batch: int, programs: int, processors: int) -> int:
    """As many segments as give each processor a program, none shorter than four chunks; or two, which wait for each other in
    part, where no segment is shorter than ten."""
    chunks, places = _cdiv(length, CHUNK), processors // (programs * batch)
    pieces = max(1, min(places, chunks // 4), min(2 * processors // (programs * batch), chunks // 10))
    return CHUNK * _cdiv(chunks, pieces)


def _value_block(values: int, dtype: torch.dtype) -> int:
    return min(values, 32 if dtype == torch.float32 else 64)


def _launch(name: str, keys: int, dtype: torch.dtype) -> dict[str, int]:
    """The fixed choice of a kernel's stages and registers.

    Always four warps, one group of Hopper's matrix units: with two groups results were seen to change from run to run (a group's
    wait covers its own products only, and tiles that the other still reads are overwritten).
    """
    narrow = keys <= 128 and dtype != torch.float32
    if not narrow:  # Their tiles leave no room to fetch ahead.
        return {"num_warps": 4, "num_stages": 1}
    if name == "prepare":  # One long chain and no loop: with 168 registers three programs share a processor.
        return {"num_warps": 4, "num_stages": 1, "maxnreg": 168}
    # With two stages Triton orders the next tiles after these ones' products, with three in time; but three of the tiles of the
    # walks to outputs and back leave room for one program a processor.
    return {"num_warps": 4, "num_stages": 2 if name in ("outputs", "back") else 3}


def _tables(cu_seqlens: Tensor, chunks: int, segments: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The pieces of packed documents, made on the device: rows (document, start, stop, first chunk, is first, is last) for chunks
    and segments, unused rows with document -1; and each document's first segment."""
    starts, stops = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    lengths = stops - starts
    chunk_ends = ((lengths + CHUNK - 1) // CHUNK).cumsum(0)
    segment_ends = ((lengths + size - 1) // size).clamp(min=1).cumsum(0)
    chunk_firsts = torch.nn.functional.pad(chunk_ends, (1, 0))
    segment_firsts = torch.nn.functional.pad(segment_ends, (1, 0))

    def cut(ends: Tensor, firsts: Tensor, count: int, length: int) -> Tensor:
        index = torch.arange(count, device=ends.device)
        doc = torch.searchsorted(ends, index, right=True)
        used = doc < len(ends)
        doc = doc.clamp(max=len(ends) - 1)
        offset = (index - firsts[doc]) * length
        start = starts[doc] + offset
        stop = torch.minimum(start + length, stops[doc])
        columns = (
            torch.where(used, doc, -1),
            start,
            stop,
            chunk_firsts[doc] + offset // CHUNK,
            index == firsts[doc],
            index + 1 == ends[doc],
        )
        return torch.stack([x.int() for x in columns], dim=1)

    return (
        cut(chunk_ends, chunk_firsts, chunks, CHUNK),
        cut(segment_ends, segment_firsts, segments, size),
        segment_firsts.int(),
    )


def _find_basis(run: _Run, state: Tensor | None) -> _Basis:
    call = run.call
    shape = (call.chunks, call.heads)
    solve = call.q.new_empty(*shape, CHUNK, CHUNK)
    vectors = call.q.new_empty(4, *shape, CHUNK, dtype=torch.float32)
    reach = call.q.new_empty(shape, dtype=torch.float32)
    args = (
        *(run.q, run.k, call.decay, call.beta, solve, *vectors.unbind(), reach, call.chunk_table),
        *(*call.decay.stride(), *call.beta.stride()),
        *(call.length, call.heads, call.scale, EPS),
    )
    run("prepare", _prepare, (call.heads * call.chunks, 1, 1), args, L2=call.l2_norm)
    if not call.split:
        return _Basis(solve, vectors, reach)
    move = vectors.new_empty(call.segments, call.heads, call.keys, call.keys)
    turned = torch.empty_like(move) if run.turns else None
    moves = move.new_empty(call.segments, call.heads, dtype=torch.int32)
    basis = _Basis(solve, vectors, reach, call.states(call.segments), move, turned, moves)
    _walk(run, basis, state, None, maps=True)
    _join_segments(run, basis.ends, basis, back=False)
    return basis


def _walk(
    run: _Run,
    basis: _Basis,
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
    columns = call.values // call.block + (_cdiv(call.keys, call.block) if maps else 0)
    # Where a kernel reads and writes nothing stands something of the same type: one compiled kernel for all.
    number, flag, tile = basis.reach, basis.reach.view(torch.int32), basis.solve
    args = (
        *(run.q, run.k, run.v, *basis.chunks),
        *(number if x is None else x for x in (state, basis.ends, final, basis.move, basis.turned)),
        flag if basis.moves is None else basis.moves,
        *(tile if x is None else x for x in (o, states, updates)),
        *(call.segment_table, call.length, call.heads, call.size),
        *(int(x) for x in (state is not None, final is not None, maps, basis.turned is not None)),
    )
    name = "scan" if o is None else "outputs"
    run(name, _scan, (columns, call.heads, call.segments), args, BV=call.block, OUTPUTS=o is not None)


def _walk_back(
    run: _Run,
    basis: _Basis,
    grad: Tensor,
    grad_state: Tensor | None,
    dfirst: Tensor,
    dstates: Tensor,
    errors: Tensor,
) -> None:
    """Backwards through all segments: the gradients of first states, of the state after each chunk, and of T's results."""
    call = run.call
    begins = call.states(call.segments) if call.split else dfirst
    given = dfirst if grad_state is None else grad_state
    tiles = _tokens(grad, call.block)
    for find in (True, False) if call.split else (False,):
        args = (
            *(tiles, run.q, run.k, *basis.chunks, given, begins, dfirst, dstates, errors),
            *(call.segment_table, call.length, call.heads, call.size, int(grad_state is not None), int(find)),
        )
        run("back", _scan_back, (call.values // call.block, call.heads, call.segments), args, BV=call.block)
        if find:
            _join_segments(run, begins, basis, back=True)


def _join_segments(run: _Run, states: Tensor | None, basis: _Basis, *, back: bool) -> None:
    call = run.call
    block = min(call.values, 32)
    roomy = _holds_maps(call.q.device)
    whole = roomy and call.keys <= 128 and call.q.dtype != torch.float32
    rows = call.keys if whole else 64 if roomy or call.keys <= 128 else 32
    move = basis.turned if back else basis.move
    args = (states, move, basis.moves, call.first_segments, call.length, call.heads, call.size, int(back))
    run(
        "join",
        _join,
        (call.values // block, call.heads, call.docs),
        args,
        BV=block,
        BR=rows,
        num_stages=3 if whole else 1,
    )


def _chunk_gradients(
    run: _Run, basis: _Basis, grad: Tensor, states: Tensor, dstates: Tensor, updates: Tensor, errors: Tensor
) -> tuple[Tensor, ...]:
    call = run.call
    inputs = (call.q, call.k, call.v, call.decay, call.beta)
    grads = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs)
    block = min(call.values, 32)  # A tile of S passes through registers, which the sums need.
    args = (
        *(_tokens(grad, block), run.q, run.k, _tokens(call.v, block), *basis.vectors.unbind()),
        *(_tiles(x, block) for x in (states, dstates, updates, errors)),
        # k's sum is in units of the scale; a small one would overflow float16.
        *(*grads, call.chunk_table, call.length, call.heads, call.scale, call.scale if abs(call.scale) > 0.01 else 1.0),
    )
    run("gradients", _gradients, (call.heads * call.chunks, 1, 1), args, L2=call.l2_norm, BV=block)
    return grads


# --- pieces ------------------------------------------------------------------------------------------------------------------


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


# --- the walks ---------------------------------------------------------------------------------------------------------------


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


# --- gradients of a chunk ----------------------------------------------------------------------------------------------------


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

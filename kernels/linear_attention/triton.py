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
product (its transpose is computed as a product of its own), and more than four warps (`triton_launch.py` says why).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hydrasurgery.kernels.linear_attention.triton_call import (
    CHUNK,
    SIZES,
    Basis,
    Call,
    Cut,
    cut_off,
    fill,
    filled_size,
    rows,
)
from hydrasurgery.kernels.linear_attention.triton_gradients import chunk_gradients
from hydrasurgery.kernels.linear_attention.triton_launch import Run
from hydrasurgery.kernels.linear_attention.triton_prepare import prepare
from hydrasurgery.kernels.linear_attention.triton_walks import join_segments, walk, walk_back

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


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
    call = _call(q, k, v, decay, beta, rule, scale, cu_seqlens, l2_norm, segment)
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
    call = _call(q, k, v, decay, beta, rule, scale, None, False, None)
    return _forward(call, state, q.shape[-1], v.shape[-1], keep=True)


def kept_like(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor,
    state: Tensor | None,
    *,
    rule: str = "gated_delta",
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    """Unfilled tensors of the shapes and dtypes that `forward_keeping` keeps, found from those of q and v only."""
    keys, values = filled_size(q), filled_size(v)
    return Basis.empty(q, q.shape[2], keys, values, Cut.of(q, values), turned=True).given


def _call(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, rule: str, *options: Any) -> Call:
    """A call that these kernels take; `options` as in `Call.of`."""
    if reason := refusal(q, k, v, decay, beta, rule=rule):
        raise ValueError(f"linear attention in Triton cannot take {reason}")
    return Call.of(q, k, v, decay, beta, *options)


def _forward(
    call: Call, state: Tensor | None, keys: int, values: int, *, keep: bool
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    state = call.filled(state)
    o, final = torch.empty_like(call.v, memory_format=torch.contiguous_format), call.states(call.cut.docs)
    with Run(call, back=False, kept=keep) as run:
        basis = _find_basis(run, state)
        walk(run, basis, state, final, o=o)
    return cut_off(o, values), cut_off(final, keys, values), basis.given


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
    call = _call(q, k, v, decay, beta, rule, scale, cu_seqlens, l2_norm, segment)
    state, grad_state = call.filled(state), call.filled(grad_state)
    grad = rows(fill(grad.to(q.dtype), call.values))
    states = q.new_empty(call.cut.chunks, call.heads, call.keys, call.values)
    updates = q.new_empty(call.cut.chunks, call.heads, CHUNK, call.values)
    dstates, errors, dfirst = torch.empty_like(states), torch.empty_like(updates), call.states(call.cut.docs)
    with Run(call, back=True, kept=bool(kept)) as run:
        basis = Basis(*kept) if kept else _find_basis(run, state)
        walk(run, basis, state, None, states=states, updates=updates)
        walk_back(run, basis, grad, grad_state, dfirst, dstates, errors)
        dq, dk, dv, ddecay, dbeta = chunk_gradients(run, basis, grad, states, dstates, updates, errors)
    keys, values = q.shape[-1], v.shape[-1]
    first = None if state is None else cut_off(dfirst, keys, values).to(state.dtype)
    return cut_off(dq, keys), cut_off(dk, keys), cut_off(dv, values), ddecay, dbeta, first


def _find_basis(run: Run, state: Tensor | None) -> Basis:
    call = run.call
    basis = Basis.empty(call.q, call.heads, call.keys, call.values, call.cut, turned=run.turns)
    prepare(run, basis)
    if call.cut.split:
        walk(run, basis, state, None, maps=True)
        join_segments(run, basis.ends, basis, back=False)
    return basis

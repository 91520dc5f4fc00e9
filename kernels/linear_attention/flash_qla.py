"""Gated DeltaNet by FlashQLA on Hopper: K = V = 128, half precision; its first call compiles, half a minute a direction."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CHUNK = 64  # FlashQLA's on Hopper


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor,
    state: Tensor | None,
    *,
    rule: str,
    scale: float | None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `reference.forward` for rule gated_delta."""
    return _forward(q, k, v, decay, beta, state, scale, cu_seqlens, trains=False)[:2]


def forward_keeping(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor,
    state: Tensor | None,
    *,
    rule: str,
    scale: float | None,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """`forward`, and what `backward` need not compute again: sums of decays, and T.

    FlashQLA may split a sequence over the card's processors. What it finds of the parts is not kept: their number is FlashQLA's own
    choice, and the outputs of an operator have shapes that are known before it runs.
    """
    return _forward(q, k, v, decay, beta, state, scale, None, trains=True)


def kept_like(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor,
    state: Tensor | None,
    *,
    rule: str,
    scale: float | None,
) -> tuple[Tensor, ...]:
    """Unfilled tensors of the shapes and dtypes that `forward_keeping` keeps."""
    return q.new_empty(decay.shape, dtype=torch.float32), k.new_empty(*beta.shape, CHUNK)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor,
    state: Tensor | None,
    scale: float | None,
    cu_seqlens: Tensor | None,
    *,
    trains: bool,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    from flash_qla import chunk_gated_delta_rule_fwd

    sums, solve, o, _, final, _ = chunk_gated_delta_rule_fwd(
        *(x.contiguous() for x in (q, k, v)),
        g=decay.to(torch.float32).contiguous(),
        beta=beta.to(torch.float32).contiguous(),
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        initial_state=None if state is None else state.contiguous(),
        cu_seqlens=cu_seqlens,
        is_train=trains,  # the backward splits a sequence as a forward that trains does
    )
    return o.to(q.dtype), final.to(torch.float32), (sums, solve)


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
    rule: str,
    scale: float | None,
    cu_seqlens: Tensor | None = None,
    kept: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """As `reference.backward`; what `forward_keeping` gives is computed again if it is not in `kept`."""
    from flash_qla import chunk_gated_delta_rule_bwd
    from flash_qla.ops.gated_delta_rule.chunk import kkt_solve
    from flash_qla.ops.utils import chunk_local_cumsum

    heads = [x.contiguous() for x in (q, k, v)]
    writes = beta.to(torch.float32).contiguous()
    if kept:
        sums, solve = kept
    else:
        chunks = {"chunk_size": CHUNK, "cu_seqlens": cu_seqlens}
        sums = chunk_local_cumsum(decay.to(torch.float32).contiguous(), **chunks)
        solve = kkt_solve(k=heads[1], b=writes, **chunks)
    dq, dk, dv, dbeta, ddecay, dstate = chunk_gated_delta_rule_bwd(
        *heads,
        g=sums,
        beta=writes,
        A=solve,
        do=grad.to(q.dtype).contiguous(),
        dht=None if grad_state is None else grad_state.contiguous(),
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        initial_state=None if state is None else state.contiguous(),
        cu_seqlens=cu_seqlens,
    )
    found = zip((dq, dk, dv, ddecay, dbeta), (q, k, v, decay, beta), strict=True)
    first = None if state is None else dstate.to(state.dtype)
    return (*(x.to(given.dtype) for x, given in found), first)

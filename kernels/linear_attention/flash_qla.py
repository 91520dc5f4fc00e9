"""Gated DeltaNet by FlashQLA on Hopper: K = V = 128, half precision; its first call compiles, half a minute a direction."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CACHE = ("h0", "mt", "fallback_bwd", "num_warmup_bwd")  # fields of FlashQLA's CPCache


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
    return _forward(q, k, v, decay, beta, state, scale, cu_seqlens, keeping=False)[:2]


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
    """`forward`, and what `backward` need not compute again: sums of decays, T, and where FlashQLA splits a sequence over the
    card's processors, what it finds of the parts."""
    return _forward(q, k, v, decay, beta, state, scale, None, keeping=True)


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
    keeping: bool,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    from flash_qla import chunk_gated_delta_rule_fwd

    sums, solve, o, _, final, cache = chunk_gated_delta_rule_fwd(
        *(x.contiguous() for x in (q, k, v)),
        g=decay.to(torch.float32).contiguous(),
        beta=beta.to(torch.float32).contiguous(),
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        initial_state=None if state is None else state.contiguous(),
        cu_seqlens=cu_seqlens,
        enable_fwd_cp_cache=keeping,
    )
    kept = (sums, solve) if cache is None else (sums, solve, *(getattr(cache, name) for name in CACHE))
    return o.to(q.dtype), final.to(torch.float32), kept


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
    from flash_qla.ops.gated_delta_rule.chunk import CHUNK_SIZE, kkt_solve
    from flash_qla.ops.gated_delta_rule.chunk.cp import CPCache
    from flash_qla.ops.utils import chunk_local_cumsum

    heads = [x.contiguous() for x in (q, k, v)]
    writes = beta.to(torch.float32).contiguous()
    if kept:
        sums, solve, *cached = kept
    else:
        chunks = {"chunk_size": CHUNK_SIZE, "cu_seqlens": cu_seqlens}
        sums = chunk_local_cumsum(decay.to(torch.float32).contiguous(), **chunks)
        solve, cached = kkt_solve(k=heads[1], b=writes, **chunks), []
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
        cp_cache=CPCache(**dict(zip(CACHE, cached, strict=True))) if cached else None,
    )
    found = zip((dq, dk, dv, ddecay, dbeta), (q, k, v, decay, beta), strict=True)
    first = None if state is None else dstate.to(state.dtype)
    return (*(x.to(given.dtype) for x, given in found), first)

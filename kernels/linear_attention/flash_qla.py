"""Gated DeltaNet by FlashQLA on Hopper: K = V = 128, half precision. Its first call compiles, half a minute a direction."""

from __future__ import annotations

import torch
from torch import Tensor


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
    from flash_qla import chunk_gated_delta_rule

    o, final = chunk_gated_delta_rule(
        *(x.contiguous() for x in (q, k, v)),
        g=decay.to(torch.float32).contiguous(),
        beta=beta.to(torch.float32).contiguous(),
        scale=scale,
        initial_state=state,
        output_final_state=True,
        cu_seqlens=cu_seqlens,
    )
    return o, final.to(torch.float32)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """As `reference.backward`: what FlashQLA's own forward would have kept, the sums of decays and T, is computed again."""
    from flash_qla import chunk_gated_delta_rule_bwd
    from flash_qla.ops.gated_delta_rule.chunk import CHUNK_SIZE, kkt_solve
    from flash_qla.ops.utils import chunk_local_cumsum

    heads = [x.contiguous() for x in (q, k, v)]
    writes = beta.to(torch.float32).contiguous()
    chunks = {"chunk_size": CHUNK_SIZE, "cu_seqlens": cu_seqlens}
    dq, dk, dv, dbeta, ddecay, dstate = chunk_gated_delta_rule_bwd(
        *heads,
        g=chunk_local_cumsum(decay.to(torch.float32).contiguous(), **chunks),
        beta=writes,
        A=kkt_solve(k=heads[1], b=writes, **chunks),
        do=grad.to(q.dtype).contiguous(),
        dht=None if grad_state is None else grad_state.contiguous(),
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        initial_state=None if state is None else state.contiguous(),
        cu_seqlens=cu_seqlens,
    )
    found = zip((dq, dk, dv, ddecay, dbeta), (q, k, v, decay, beta), strict=True)
    first = None if state is None else dstate.to(state.dtype)
    return (*(x.to(given.dtype) for x, given in found), first)

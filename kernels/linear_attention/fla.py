"""Gated DeltaNet by flash-linear-attention, forward only: its backward refuses Hopper with Triton 3.4 to 3.7.0."""

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
    """As `reference.forward` for rule gated_delta; one token takes the recurrent kernel, more the chunked one."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule

    run = fused_recurrent_gated_delta_rule if q.shape[1] == 1 else chunk_gated_delta_rule
    return run(
        *(x.contiguous() for x in (q, k, v)),
        g=decay.to(torch.float32).contiguous(),
        beta=beta.contiguous(),
        scale=scale,
        initial_state=state,
        output_final_state=True,
        cu_seqlens=cu_seqlens,
    )

"""Gated DeltaNet by FlashQLA on Hopper, forward only: K = V = 128, half precision."""

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
    """As `reference.forward` for rule gated_delta. FlashQLA compiles itself when it is first called, which takes half a minute."""
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

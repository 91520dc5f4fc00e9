"""FlashAttention-3 on Hopper, forward only (package fa3-fwd, which is built without float16 and windows)."""

from __future__ import annotations

from torch import Tensor


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    *,
    scale: float | None,
    causal: bool,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """As `reference.forward`, without mask, sinks and a window that bites."""
    from fa3_fwd_interface import flash_attn_func

    out = flash_attn_func(
        *(x.transpose(1, 2) for x in (q, k, v)),
        softmax_scale=scale,
        causal=causal,
        softcap=softcap or 0.0,
        num_splits=0,  # FA3 splits keys where the queries of few heads do not fill the card.
    )
    return out[0] if isinstance(out, tuple) else out

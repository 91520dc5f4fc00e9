"""FlashAttention-2, forward only (package flash-attn); unlike SDPA it takes windows and soft caps without building a mask."""

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
    """As `reference.forward`, without mask and sinks."""
    from flash_attn import flash_attn_func

    return flash_attn_func(
        *(x.transpose(1, 2) for x in (q, k, v)),
        softmax_scale=scale,
        causal=causal,
        window_size=(-1 if window is None else window - 1, 0 if causal else -1),
        softcap=softcap or 0.0,
    )

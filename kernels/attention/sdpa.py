"""Softmax attention on CUDA through PyTorch's own fused kernels: cuDNN's on Hopper and later, else FlashAttention-2.

The forward is the reference with a say in which kernel runs. The backward is what is gained: the reference's is matrix products
in fp32, a block of queries at a time. It runs the fused forward once more, for the operator keeps no statistics of the softmax.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hydrasurgery.kernels.attention import reference

ORDER = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
aten = torch.ops.aten


def forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None, **options: Any) -> Tensor:
    """As `reference.forward`, without softcap and sinks."""
    # cuDNN builds a plan for every new number of keys, which takes a millisecond: too long for one token.
    order = ORDER if q.shape[2] > 1 and _has_cudnn(q) else ORDER[1:]
    with sdpa_kernel(order, set_priority=True):
        return reference.forward(q, k, v, mask, sinks, **options)


def backward(
    grad: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor, None]:
    """As `reference.backward`, for calls without mask, sinks, softcap, a window that bites, or more keys than queries."""
    grad, causal = grad.to(q.dtype).contiguous().transpose(1, 2), causal and q.shape[2] > 1
    if _has_cudnn(q):
        out, lse, *lengths, seed, offset, _ = aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, causal, scale=scale
        )
        return *aten._scaled_dot_product_cudnn_attention_backward(
            grad, q, k, v, out, lse, seed, offset, None, *lengths, 0.0, causal, scale=scale
        ), None
    out, lse, *lengths, seed, offset, _ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)
    return *aten._scaled_dot_product_flash_attention_backward(
        grad, q, k, v, out, lse, *lengths, 0.0, causal, seed, offset, scale=scale
    ), None


def _has_cudnn(q: Tensor) -> bool:
    """cuDNN's kernels are the faster ones from Hopper on; their backward takes heads of at most 128 numbers."""
    return q.shape[-1] <= 128 and torch.cuda.get_device_capability(q.device) >= (9, 0)

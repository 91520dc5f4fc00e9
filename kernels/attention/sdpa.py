"""Softmax attention on CUDA through PyTorch's own fused kernels: cuDNN's on Hopper and later, else FlashAttention-2.

The forward is the reference with a say in which kernel runs. The backward is what is gained: the reference's is matrix products
in fp32, a block of queries at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
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


def forward_keeping(
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
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """`forward`, and of cuDNN's softmax what `backward` need not compute again: a number a query and head."""
    out, lse, _ = _statistics(q, k, v, scale, causal)
    return out.transpose(1, 2), (lse.view(q.shape[:3]),) if _has_cudnn(q) else ()


def kept_like(q: Tensor) -> tuple[Tensor, ...]:
    """Unfilled tensors of the shapes and dtypes that `forward_keeping` keeps."""
    return (q.new_empty(q.shape[:3], dtype=torch.float32),) if _has_cudnn(q) else ()


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
    kept: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor, Tensor, None]:
    """As `reference.backward`, for calls without mask, sinks, softcap, a window that bites, or more keys than queries.

    `kept`: the output [B, T, H, D], and what `forward_keeping` keeps; without it the forward runs once more.
    """
    grad = grad.to(q.dtype).contiguous().transpose(1, 2)
    if kept:
        nothing = kept[1].new_empty(0, dtype=torch.int64)  # seeds of a dropout that there is not
        out, lse, rest = kept[0].transpose(1, 2), kept[1], (None, None, q.shape[2], k.shape[2], nothing, nothing)
    else:
        out, lse, rest = _statistics(q, k, v, scale, causal)
    *lengths, seed, offset = rest
    causal = causal and q.shape[2] > 1
    if _has_cudnn(q):
        lse = lse.view(*q.shape[:3], 1)
        return *aten._scaled_dot_product_cudnn_attention_backward(
            grad, q, k, v, out, lse, seed, offset, None, *lengths, 0.0, causal, scale=scale
        ), None
    return *aten._scaled_dot_product_flash_attention_backward(
        grad, q, k, v, out, lse, *lengths, 0.0, causal, seed, offset, scale=scale
    ), None


def _statistics(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool
) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
    """Outputs [B, H, T, D], logarithms of sums, and what else a backward is given."""
    causal = causal and q.shape[2] > 1
    if _has_cudnn(q):
        found = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, scale=scale)
    else:
        found = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)
    out, lse, *rest = found[:-1]
    return out, lse, tuple(rest)


def _has_cudnn(q: Tensor) -> bool:
    """cuDNN's kernels are the faster ones from Hopper on; their backward takes heads of at most 128 numbers."""
    return q.shape[-1] <= 128 and torch.cuda.get_device_capability(q.device) >= (9, 0)

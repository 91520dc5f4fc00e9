"""Gradients of masked softmax attention through PyTorch's memory-efficient kernels, which take any mask as numbers to add.

Windows and more keys than queries are masks to them. Queries go in blocks, so that such a mask is never made whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hydrasurgery.kernels.attention.reach import densely
from hydrasurgery.kernels.attention.reference import block_mask, blocks, repeat_heads

ADDED = 1 << 27  # numbers of a block's mask
aten = torch.ops.aten


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
    """As `reference.backward`, without softcap and sinks. Sums differ in the last bits from run to run, unless
    `torch.use_deterministic_algorithms(True)`: PyTorch's kernel adds where it splits the keys."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    mask = densely(mask, q.shape[2])
    groups, times = k.shape[1], q.shape[1] // k.shape[1]
    keys, values = repeat_heads(k, times), repeat_heads(v, times)
    grad = grad.to(q.dtype).transpose(1, 2)
    dq = torch.zeros_like(q)
    dk, dv = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (keys, values))
    shared = q.shape[0] * q.shape[1] // (1 if mask is None else mask.shape[0] * mask.shape[1])
    for rows, cols in blocks(q, k, mask, causal, window, ADDED * shared):
        seen = block_mask(rows, cols, q, k, mask, causal, window)
        shape = rows.stop - rows.start, cols.stop - cols.start
        if seen is None:
            seen = torch.ones(1, 1, *shape, dtype=torch.bool, device=q.device)
        bias, blind = _bias(seen, q.dtype)
        bias = bias.expand(*q.shape[:2], *shape)
        inputs = q[:, :, rows], keys[:, :, cols], values[:, :, cols]
        out, lse, seed, offset = aten._scaled_dot_product_efficient_attention(*inputs, bias, True, scale=scale)
        part = grad[:, :, rows].masked_fill(blind, 0)
        dq[:, :, rows], dk_part, dv_part, _ = aten._scaled_dot_product_efficient_attention_backward(
            part, *inputs, bias, out, lse, seed, offset, 0.0, [True, True, True, False], scale=scale
        )
        dk[:, :, cols] += dk_part
        dv[:, :, cols] += dv_part
    dk, dv = (x.unflatten(1, (groups, times)).sum(2) for x in (dk, dv))
    return dq, dk.to(k.dtype), dv.to(v.dtype), None


def _bias(seen: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A mask as numbers to add, its rows 16 bytes apart, and which queries may attend to nothing: those are shown all keys."""
    added = torch.zeros_like(seen, dtype=dtype) if seen.dtype == torch.bool else seen.to(dtype)
    hidden = ~seen if seen.dtype == torch.bool else added <= torch.finfo(dtype).min / 2
    blind = hidden.all(-1, keepdim=True)
    added = added.masked_fill(hidden, -torch.inf).masked_fill(blind, 0)
    return torch.nn.functional.pad(added, (0, -added.shape[-1] % 8))[..., : added.shape[-1]], blind

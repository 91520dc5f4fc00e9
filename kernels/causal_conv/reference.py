"""Depthwise causal convolution with a carried state, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(x: Tensor, weight: Tensor, state: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    """y_t = sum_j weight[:, W-1-j] x_{t-j} over the taps of t's own document; shapes as in `hydrasurgery.ops.causal_conv`."""
    padded, document = _history(x, weight, state, reset)
    width, length = weight.shape[1], x.shape[1]
    taps = weight.to(padded.dtype)
    y = torch.zeros(x.shape, dtype=padded.dtype, device=x.device)
    for tap in range(width):
        y += _own(padded[:, tap : tap + length] * taps[:, tap], document, tap, width)
    return y.to(x.dtype), _tail(padded, document, width).mT.to(x.dtype)


def backward(
    grad: Tensor, grad_state: Tensor, x: Tensor, weight: Tensor, state: Tensor | None, reset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of x, weight and state: the transposed convolution, the correlation of x with `grad`, and the carried tail."""
    padded, document = _history(x, weight, state, reset)
    width, length = weight.shape[1], x.shape[1]
    taps, grad = weight.to(padded.dtype), grad.to(padded.dtype)
    dpadded, dweight = torch.zeros_like(padded), torch.zeros_like(taps)
    for tap in range(width):
        own = _own(grad, document, tap, width)
        dpadded[:, tap : tap + length] += own * taps[:, tap]
        dweight[:, tap] = (own * padded[:, tap : tap + length]).sum((0, 1))
    dpadded[:, length:] += _tail(grad_state.to(padded.dtype).mT, document, width)
    dstate = None if state is None else dpadded[:, : width - 1].mT.to(state.dtype)
    return dpadded[:, width - 1 :].to(x.dtype), dweight.to(weight.dtype), dstate


def _history(x: Tensor, weight: Tensor, state: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The state and x as one sequence [B, W-1+T, C], and the number of each position's document (None: only one)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    before = weight.shape[1] - 1
    past = x.new_zeros(x.shape[0], before, x.shape[2]) if state is None else state.mT
    padded = torch.cat([past.to(dtype), x.to(dtype)], dim=1)
    if reset is None:
        return padded, None
    # What the state holds precedes every document that starts in x, so it is number 0.
    number = reset.to(torch.int32).cumsum(1)
    return padded, torch.cat([number.new_zeros(x.shape[0], before), number], dim=1)


def _own(values: Tensor, document: Tensor | None, tap: int, width: int) -> Tensor:
    """`values` [B, T, C] with 0 where this tap reaches into another document than that of its token."""
    if document is None or tap == width - 1:
        return values
    length = values.shape[1]
    other = document[:, tap : tap + length] != document[:, width - 1 :]
    return values.masked_fill(other[..., None], 0)


def _tail(values: Tensor, document: Tensor | None, width: int) -> Tensor:
    """The last W-1 positions, with 0 for those of a document that has ended: a later call must not see them."""
    tail = values[:, values.shape[1] - (width - 1) :]
    if document is None:
        return tail
    ended = document[:, document.shape[1] - (width - 1) :] != document[:, -1:]
    return tail.masked_fill(ended[..., None], 0)

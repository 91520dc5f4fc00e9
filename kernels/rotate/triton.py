"""The rotary embedding of one token's queries and keys in Triton: one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from hydrasurgery.kernels.launching import launch, power_of_2
from hydrasurgery.kernels.rotary import TURNS


@triton.jit
def _kernel(
    x, other_x, cos, sin, y, other_y, stride_b, other_b, stride_h, other_h, stride_t, other_t, turn_b, heads, other_heads,
    D: tl.constexpr, R: tl.constexpr, TURN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """All heads of one token of one of two tensors; each channel meets its partner, which is loaded once more."""
    token, batch, length = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.num_programs(0)
    other = tl.program_id(2) == 1
    if other:
        x, y = other_x, other_y
    heads = tl.where(other, other_heads, heads)  # numbers that are 1 are constants, which a branch cannot change
    stride_b = tl.where(other, other_b, stride_b)
    stride_h = tl.where(other, other_h, stride_h)
    stride_t = tl.where(other, other_t, stride_t)
    head, channel = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    turned = channel < R
    if TURN == 2:  # pairs of neighbours
        partner, sign = channel ^ 1, tl.where(channel % 2 == 0, -1.0, 1.0)
    else:
        lower = channel < R // 2
        partner = tl.where(lower, channel + R // 2, channel - R // 2)
        sign = tl.where(lower, -1.0, 1.0) if TURN == 0 else tl.where(lower, 1.0, -1.0)
    inside = (head < heads)[:, None] & (channel < D)[None, :]
    x += batch * stride_b + token * stride_t + head.to(tl.int64)[:, None] * stride_h
    own = tl.load(x + channel[None, :], mask=inside, other=0).to(tl.float32)
    partners = tl.load(x + tl.where(turned, partner, 0)[None, :], mask=inside & turned[None, :], other=0).to(tl.float32)
    at = batch * turn_b + token * R + channel
    own *= tl.load(cos + at, mask=turned, other=1).to(tl.float32)[None, :]
    own += partners * (sign * tl.load(sin + at, mask=turned, other=0).to(tl.float32))[None, :]
    place = ((batch * heads + head)[:, None] * length + token) * D + channel[None, :]
    tl.store(y + place, own.to(y.dtype.element_ty), mask=inside)


def forward(xs: Sequence[Tensor], cos: Tensor, sin: Tensor, *, turn: str) -> list[Tensor]:
    """As `reference.forward`, contiguous; two tensors at most."""
    ys = [torch.empty(x.shape, dtype=torch.promote_types(x.dtype, cos.dtype), device=x.device) for x in xs]
    batch, _, length, dim = xs[0].shape
    if batch and length:
        xs = [x if x.stride(3) == 1 else x.contiguous() for x in xs]
        cos, sin, width = cos.contiguous(), sin.contiguous(), cos.shape[-1]
        (x, other_x), (y, other_y) = (xs[0], xs[-1]), (ys[0], ys[-1])
        strides = (x.stride(0), other_x.stride(0), x.stride(1), other_x.stride(1), x.stride(2), other_x.stride(2))
        launch(
            _kernel, (length, batch, len(xs)), x, other_x, cos, sin, y, other_y, *strides,
            0 if cos.shape[0] == 1 else length * width, x.shape[1], other_x.shape[1],
            D=dim, R=width, TURN=list(TURNS).index(turn), ROWS=power_of_2(max(x.shape[1], other_x.shape[1])),
            BLOCK=power_of_2(dim), num_warps=4,
        )  # fmt: skip
    return ys

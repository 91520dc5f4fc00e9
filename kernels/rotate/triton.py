"""The rotary embedding of one token's heads in Triton: one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hydrasurgery.kernels.launching import launch
from hydrasurgery.kernels.rotary import TURNS


@triton.jit
def _kernel(
    x, cos, sin, y, stride_b, stride_h, stride_t, turn_b,
    HEADS: tl.constexpr, D: tl.constexpr, R: tl.constexpr, TURN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """All heads of one token; each channel meets its partner, which is loaded once more."""
    token, batch, length = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.num_programs(0)
    head, channel = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    turned = channel < R
    if TURN == 2:  # pairs of neighbours
        partner, sign = channel ^ 1, tl.where(channel % 2 == 0, -1.0, 1.0)
    else:
        lower = channel < R // 2
        partner = tl.where(lower, channel + R // 2, channel - R // 2)
        sign = tl.where(lower, -1.0, 1.0) if TURN == 0 else tl.where(lower, 1.0, -1.0)
    inside = (head < HEADS)[:, None] & (channel < D)[None, :]
    x += batch * stride_b + token * stride_t + head.to(tl.int64)[:, None] * stride_h
    own = tl.load(x + channel[None, :], mask=inside, other=0).to(tl.float32)
    other = tl.load(x + tl.where(turned, partner, 0)[None, :], mask=inside & turned[None, :], other=0).to(tl.float32)
    at = batch * turn_b + token * R + channel
    own *= tl.load(cos + at, mask=turned, other=1).to(tl.float32)[None, :]
    own += other * (sign * tl.load(sin + at, mask=turned, other=0).to(tl.float32))[None, :]
    place = ((batch * HEADS + head)[:, None] * length + token) * D + channel[None, :]
    tl.store(y + place, own.to(y.dtype.element_ty), mask=inside)


def forward(x: Tensor, cos: Tensor, sin: Tensor, *, turn: str) -> Tensor:
    """As `reference.forward`, contiguous."""
    batch, heads, length, dim = x.shape
    y = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, cos.dtype), device=x.device)
    if y.numel():
        x = x if x.stride(3) == 1 else x.contiguous()
        cos, sin = cos.contiguous(), sin.contiguous()
        width = cos.shape[-1]
        launch(
            _kernel, (length, batch, 1), x, cos, sin, y, *x.stride()[:3], 0 if cos.shape[0] == 1 else length * width,
            HEADS=heads, D=dim, R=width, TURN=list(TURNS).index(turn), ROWS=triton.next_power_of_2(heads),
            BLOCK=triton.next_power_of_2(dim), num_warps=4,
        )  # fmt: skip
    return y

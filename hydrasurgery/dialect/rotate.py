"""`hydra::rotate`: the rotary embedding of one token's heads, in one launch; inference only."""

from __future__ import annotations

import torch

from hydrasurgery.dialect.checks import exact, full_precision, refuse_tangents
from hydrasurgery.dialect.operators import operator
from hydrasurgery.kernels import registry


@operator("rotate", "(Tensor x, Tensor cos, Tensor sin, str turn) -> Tensor")
def _rotate(x, cos, sin, turn):
    """x cos + turn(x) sin for the first R channels of x [B, H, T, D], with cos and sin [B or 1, 1, T, R]."""
    refuse_tangents(x, cos, sin)
    case = registry.rotate_case(x)
    with full_precision(x):
        return exact(registry.kernel("rotate", case, x.device).forward(x, cos, sin, turn=turn))


@_rotate.register_fake
def _(x, cos, sin, turn):
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, cos.dtype))

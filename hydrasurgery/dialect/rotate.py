"""`hydra::rotate`: the rotary embedding of one token's queries and keys, in one launch; inference only."""

from __future__ import annotations

import torch

from hydrasurgery.dialect.checks import exact, full_precision, refuse_tangents
from hydrasurgery.dialect.operators import operator
from hydrasurgery.kernels import registry


@operator("rotate", "(Tensor[] xs, Tensor cos, Tensor sin, str turn) -> Tensor[]")
def _rotate(xs, cos, sin, turn):
    """x cos + turn(x) sin for the first R channels of each x [B, H, T, D] (one or two), with cos and sin [B or 1, 1, T, R]."""
    refuse_tangents(*xs, cos, sin)
    case = registry.rotate_case(xs)
    with full_precision(cos):
        return [exact(y) for y in registry.kernel("rotate", case, cos.device).forward(xs, cos, sin, turn=turn)]


@_rotate.register_fake
def _(xs, cos, sin, turn):
    return [x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, cos.dtype)) for x in xs]

"""The rotary embedding of one token's queries and keys, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hydrasurgery.kernels.rotary import rotate


def forward(xs: Sequence[Tensor], cos: Tensor, sin: Tensor, *, turn: str) -> list[Tensor]:
    """x cos + turn(x) sin for the first R channels of each x [B, H, T, D], cos and sin [B or 1, 1, T, R]; the others pass."""
    return [rotate(x, cos, sin, turn) for x in xs]

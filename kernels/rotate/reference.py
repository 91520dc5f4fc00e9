"""The rotary embedding of one token's heads, in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from hydrasurgery.kernels.rotary import rotate


def forward(x: Tensor, cos: Tensor, sin: Tensor, *, turn: str) -> Tensor:
    """x cos + turn(x) sin for the first R channels of x [B, H, T, D], cos and sin [B or 1, 1, T, R]; the others pass."""
    return rotate(x, cos, sin, turn)

"""Rotary embeddings in plain PyTorch, by how they pair channels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def _turn_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def _turn_half_back(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([second, -first], dim=-1)


def _turn_pairs(x: Tensor) -> Tensor:
    return torch.stack([-x[..., 1::2], x[..., 0::2]], dim=-1).flatten(-2)


# How a rotary embedding pairs the channels: first with second half (clockwise too), or each with its neighbour.
TURNS: dict[str, Callable[[Tensor], Tensor]] = {"half": _turn_half, "half-back": _turn_half_back, "pairs": _turn_pairs}


def rotate(x: Tensor, cos: Tensor, sin: Tensor, turn: str) -> Tensor:
    """Rotary embedding `x * cos + turn(x) * sin` of the first R channels; the others pass.

    Args:
        x: [B, H, T, D].
        cos, sin: [B or 1, 1, T, R], R at most D.
        turn: which of TURNS.
    """
    width = cos.shape[-1]
    first = x[..., :width]
    turned = first * cos + TURNS[turn](first) * sin
    return turned if width == x.shape[-1] else torch.cat([turned, x[..., width:]], dim=-1)

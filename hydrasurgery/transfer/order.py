"""Randomness that needs no saving: seeds of steps, and the order in which an epoch comes."""

from __future__ import annotations

import functools
import hashlib

import torch
from torch import Tensor


def mix_seed(*parts: object) -> int:
    """A 63-bit seed from `parts`, the same on every machine and in every process."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@functools.lru_cache(maxsize=2)
def epoch_order(seed: int, count: int, total: int, width: int) -> tuple[int, Tensor]:
    """Of `total` tokens in `count` windows of `width`: where an epoch's first window starts, and the windows' order [count]."""
    generator = torch.Generator().manual_seed(seed)
    phase = int(torch.randint(total - count * width + 1, (), generator=generator))
    return phase, torch.randperm(count, generator=generator)

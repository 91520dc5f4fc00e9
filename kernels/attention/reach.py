"""Masks of one number a key: the place of the first query that no longer sees it.

Query t stands at place p = n + t among the keys, and sees key s if `s <= p < reach_s`. So a mask [B, 1, 1, S + 1] int32, the
reaches and then n, says in O(S) numbers what a dense one says in O(T S): causality, a window (reach s + w), documents (the next
one's start), padding and keys that are not written yet (0).
"""

from __future__ import annotations

import torch
from torch import Tensor

OPEN = 1 << 30  # the reach of a key that every later query sees


def is_reach(mask: Tensor | None) -> bool:
    """Whether a mask is of this form; dense masks are bool or float."""
    return mask is not None and mask.dtype == torch.int32 and mask.dim() == 4 and mask.shape[1] == mask.shape[2] == 1


def parts(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The reaches [B, S], and the first query's place [B, 1]."""
    keys = mask.shape[3] - 1
    return mask[:, 0, 0].narrow(1, 0, keys), mask[:, 0, 0].narrow(1, keys, 1)


def dense(mask: Tensor, queries: int) -> Tensor:
    """The mask [B, 1, T, S] bool that a reach mask stands for."""
    reach, first = parts(mask)
    place = (first + torch.arange(queries, device=mask.device, dtype=mask.dtype))[:, :, None]
    key = torch.arange(reach.shape[1], device=mask.device, dtype=mask.dtype)
    return ((key <= place) & (place < reach[:, None]))[:, None]


def densely(mask: Tensor | None, queries: int) -> Tensor | None:
    """A mask as kernels without an idea of reaches take it."""
    return dense(mask, queries) if mask is not None and is_reach(mask) else mask

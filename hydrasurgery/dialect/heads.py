"""Slices of heads in any order, as graphs hold them."""

from __future__ import annotations

import torch
from torch import Tensor


def select_heads(x: Tensor, heads: tuple[int, ...], dim: int) -> Tensor:
    """The slices `heads` of x along `dim`, in that order, a head any number of times: (0, 0, 1, 1) repeats each of two.

    Built of slices and not by an index tensor, so that a graph holds no constant and exports as it is. All heads in order are x
    itself, and consecutive heads a view of it.

    Args:
        x: any tensor.
        heads: numbers along `dim`, at least one.
        dim: the dimension of the heads.

    Raises:
        ValueError: no head is named, or one that x does not have.

    Example:
        >>> select_heads(torch.tensor([[5, 6, 7]]), (2, 2, 0), 1).tolist()
        [[7, 7, 5]]
    """
    dim %= x.dim()
    size = x.shape[dim]
    if not heads or min(heads) < 0 or max(heads) >= size:
        raise ValueError(f"heads must name at least one of the {size} along dimension {dim}, found {tuple(heads)}")
    if tuple(heads) == tuple(range(size)):
        return x
    times = heads.count(heads[0])
    once = tuple(heads[::times])
    if times > 1 and tuple(heads) == tuple(h for h in once for _ in range(times)):  # each KV head for its query heads
        own = select_heads(x, once, dim).unsqueeze(dim + 1)
        repeated = own.expand(*own.shape[: dim + 1], times, *own.shape[dim + 2 :])
        # Cloned, not left to flatten: an exported graph would exclude a length of 1.
        return repeated.clone(memory_format=torch.contiguous_format).flatten(dim, dim + 1)
    parts, first = [], 0
    for last in range(1, len(heads) + 1):
        if last == len(heads) or heads[last] != heads[last - 1] + 1:
            parts.append(x.narrow(dim, heads[first], last - first))
            first = last
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)

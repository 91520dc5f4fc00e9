"""Slices of heads in any order, as graphs hold them."""

from __future__ import annotations

import functools

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
    found = _runs if torch.compiler.is_compiling() else _known_runs  # dynamo looks through caches, and says so
    times, runs = found(tuple(heads), int(x.shape[dim]), dim)
    if times > 1:  # each KV head for its query heads
        own = select_heads(x, tuple(heads[::times]), dim).unsqueeze(dim + 1)
        repeated = own.expand(*own.shape[: dim + 1], times, *own.shape[dim + 2 :])
        # Cloned, not left to flatten: an exported graph would exclude a length of 1.
        return repeated.clone(memory_format=torch.contiguous_format).flatten(dim, dim + 1)
    parts = [x.narrow(dim, first, count) for first, count in runs]
    return torch.cat(parts, dim=dim) if len(parts) > 1 else parts[0] if parts else x


def _runs(heads: tuple[int, ...], size: int, dim: int) -> tuple[int, tuple[tuple[int, int], ...]]:
    """How many times each head is named in a row, and, if once, the runs of neighbours (first, count); none: all of `size`."""
    if not heads or min(heads) < 0 or max(heads) >= size:
        raise ValueError(f"heads must name at least one of the {size} along dimension {dim}, found {heads}")
    if heads == tuple(range(size)):
        return 1, ()
    times = heads.count(heads[0])
    if times > 1 and heads == tuple(h for h in heads[::times] for _ in range(times)):
        return times, ()
    runs, first = [], 0
    for last in range(1, len(heads) + 1):
        if last == len(heads) or heads[last] != heads[last - 1] + 1:
            runs.append((heads[first], last - first))
            first = last
    return 1, tuple(runs)


_known_runs = functools.cache(_runs)

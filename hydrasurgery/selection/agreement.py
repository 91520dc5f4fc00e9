"""How far plans or scores agree: overlap of their full heads and rank correlation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from hydrasurgery.dialect.names import FULL
from hydrasurgery.errors import PlanError
from hydrasurgery.plan import Plan
from hydrasurgery.selection.ranks import jaccard, spearman, top
from hydrasurgery.selection.scores import HeadScores


@dataclass(frozen=True)
class Comparison:
    """Agreement of each two of several plans or scores; `print` shows the table.

    Attributes:
        jaccard: (name, name) -> |A and B| / |A or B| of the heads that are full; of scores, their top eighth.
        spearman: (name, name) -> rank correlation over all heads; a plan's heads have two ranks, full and linear.
    """

    jaccard: dict[tuple[str, str], float]
    spearman: dict[tuple[str, str], float]

    def __str__(self) -> str:
        names = [f"{a} / {b}" for a, b in self.jaccard]
        width = max(map(len, names), default=0)
        rows = [f"{'':<{width}}  Jaccard  Spearman"]
        for name, overlap, rank in zip(names, self.jaccard.values(), self.spearman.values(), strict=True):
            rows.append(f"{name:<{width}}  {overlap:>7.3f}  {rank:>8.3f}")
        return "\n".join(rows)


def compare(items: Mapping[str, Plan | HeadScores]) -> Comparison:
    """Compare plans, scores, or both, each two of them.

    Args:
        items: Name -> plan or scores, two at least.

    Returns:
        Overlap and rank correlation of each two; `print` shows them.

    Raises:
        PlanError: fewer than two, or of models with other heads.

    Example:
        >>> import hydrasurgery as hs
        >>> from hydrasurgery.demo.teacher import load_teacher
        >>> teacher, _ = load_teacher()
        >>> print(compare({s: hs.plan_heads(teacher, strategy=s) for s in ("random", "layerwise", "fixed")}))
                            Jaccard  Spearman
        random / layerwise    0.143     0.143
        random / fixed        0.067     0.000
        layerwise / fixed     0.067     0.000
    """
    if len(items) < 2:
        raise PlanError(f"compare needs at least two plans or scores, but got {len(items)}.")
    shapes = {name: [layer.num_heads for layer in item.layers] for name, item in items.items()}
    first = next(iter(shapes))
    for name, shape in shapes.items():
        if shape != shapes[first]:
            raise PlanError(f"{name} has {sum(shape)} heads in {len(shape)} layers, {first} has {sum(shapes[first])}.")
    values = {name: _values(item) for name, item in items.items()}
    chosen = {name: _chosen(item, values[name]) for name, item in items.items()}
    pairs = list(combinations(items, 2))
    return Comparison(
        {(a, b): jaccard(chosen[a], chosen[b]) for a, b in pairs},
        {(a, b): spearman(values[a], values[b]) for a, b in pairs},
    )


def _values(item: Plan | HeadScores) -> np.ndarray:
    if isinstance(item, Plan):
        return np.array([kind == FULL for layer in item.layers for kind in layer.kinds], dtype=float)
    return np.array([value for layer in item.layers for value in layer.importance])


def _chosen(item: Plan | HeadScores, values: np.ndarray) -> set[int]:
    if isinstance(item, Plan):
        return set(np.flatnonzero(values).tolist())
    return top(values)

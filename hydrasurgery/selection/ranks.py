"""How far two rankings agree."""

from __future__ import annotations

import math

import numpy as np

SHARE = 1 / 8  # of the heads, that scores are taken to choose


def jaccard(a: set[int], b: set[int]) -> float:
    """|A and B| / |A or B|; 1 for two empty sets."""
    return len(a & b) / len(a | b) if a | b else 1.0


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation of the ranks [N], equal values sharing their mean rank; NaN where one has a single rank."""
    x, y = _ranks(a), _ranks(b)
    if not x.std() or not y.std():
        return math.nan
    return float(np.corrcoef(x, y)[0, 1])


def top(values: np.ndarray, share: float = SHARE) -> set[int]:
    """The places of the greatest `share` of values [N], rounded up; the first of equal ones."""
    return set(np.argsort(-values, kind="stable")[: math.ceil(share * len(values))].tolist())


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]

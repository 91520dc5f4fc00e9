"""How much a ranking of heads changes with the pairs, the lengths and the seeds that it was measured on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from hydrasurgery.selection.ranks import SHARE, jaccard, spearman, top

DRAWS = 100  # of two halves, for each number of pairs


@dataclass(frozen=True)
class Agreement:
    """How far rankings of one kind agree, over all that were compared.

    Attributes:
        what: which two are compared, in words.
        compared: how many times two were.
        spearman: their rank correlation over all heads, mean and standard deviation.
        jaccard: |A and B| / |A or B| of their top heads, mean and standard deviation.
    """

    what: str
    compared: int
    spearman: tuple[float, float]
    jaccard: tuple[float, float]


@dataclass(frozen=True)
class Stability:
    """Agreement of scores with themselves; `print` shows the table.

    Attributes:
        share: of the heads, that are the top ones.
        rows: by number of pairs, by length and by seed, as far as there are several.
    """

    share: float
    rows: tuple[Agreement, ...]

    def __str__(self) -> str:
        width = max([len(row.what) for row in self.rows], default=0)
        title = f"Jaccard of the top {self.share:.1%}"
        lines = [f"{'':<{width}}  rank correlation  {title}"]
        for row in self.rows:
            ranks, tops = (f"{mean:.3f} +- {spread:.3f}" for mean, spread in (row.spearman, row.jaccard))
            lines.append(f"{row.what:<{width}}  {ranks:>16}  {tops:>{len(title)}}")
        return "\n".join(lines)


def stability(
    samples: np.ndarray,
    lengths: Sequence[int],
    others: Sequence[np.ndarray],
    *,
    share: float = SHARE,
    seed: int = 0,
) -> Stability:
    """See `HeadScores.stability`.

    Args:
        samples: [P, N], each pair's score of each head.
        lengths: [P], tokens of each pair's prompts.
        others: importance [N] each, by other seeds.
    """
    rows, whole = [], samples.mean(0) if len(samples) else None
    generator = np.random.default_rng(seed)
    for count in _counts(len(samples)):
        draws = [generator.permutation(len(samples)) for _ in range(DRAWS)]
        halves = [(samples[order[:count]].mean(0), samples[order[count : 2 * count]].mean(0)) for order in draws]
        rows.append(_agreement(f"{count} pairs / {count} others", halves, share))
    means = {
        length: samples[[place for place, n in enumerate(lengths) if n == length]].mean(0) for length in set(lengths)
    }
    for short, long in combinations(sorted(means), 2):
        rows.append(_agreement(f"{short:,} / {long:,} tokens", [(means[short], means[long])], share))
    if whole is not None and len(others):
        every = [whole, *others]
        rows.append(_agreement(f"{len(every)} seeds, each two", list(combinations(every, 2)), share))
    return Stability(share, tuple(rows))


def _counts(pairs: int) -> list[int]:
    """Powers of two up to half of the pairs, and that half."""
    half = pairs // 2
    return sorted(
        {1 << power for power in range(half.bit_length()) if 1 << power <= half} | ({half} if half else set())
    )


def _agreement(what: str, compared: Sequence[tuple[np.ndarray, np.ndarray]], share: float) -> Agreement:
    ranks = [spearman(a, b) for a, b in compared]
    tops = [jaccard(top(a, share), top(b, share)) for a, b in compared]
    return Agreement(what, len(compared), _spread([r for r in ranks if not math.isnan(r)]), _spread(tops))


def _spread(values: Sequence[float]) -> tuple[float, float]:
    return (float(np.mean(values)), float(np.std(values))) if values else (math.nan, math.nan)

"""One score from several (paper section 2, eq. 12), and how far to trust it: resampled pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from hydrasurgery.errors import ProbeError
from hydrasurgery.selection.scores import CRITICAL, HeadScores

DRAWS = 200

Capabilities = Mapping[str, HeadScores | Sequence[HeadScores]]


def fuse_scores(
    capabilities: Capabilities,
    *,
    weights: Mapping[str, float] | None = None,
    how: str = "mean",
    threshold: float = CRITICAL,
    draws: int = DRAWS,
    seed: int = 0,
) -> HeadScores:
    """Fuse scores of several capabilities into one, with its spread.

    In a capability (eq. 12): s = max(scores) * kappa, the maximum over its scores (receiver and sender, measured on the
    same pairs), kappa the share of its sub-probes (`tasks`) in which that maximum is above `threshold`; then min-max
    to [0, 1]. Over capabilities: the weighted mean, or the weighted maximum (weights scaled to a largest of 1).

    Each head's spread is the standard deviation of its fused score over `draws` resamples (with replacement) of the
    pairs within each sub-probe; all scores of a capability are resampled alike.

    Args:
        capabilities: Name -> scores with samples (of any method but `reconstruction`); controls among them lift heads
            that retrieval by itself would let go.
        weights: Name -> weight, 1 where none is given.
        how: "mean" or "max" over capabilities.
        threshold: Above which a mean effect counts, in the scores' own unit.
        draws: Resamples for the spread; 0 leaves it 0.
        seed: Of the resamples.

    Raises:
        ProbeError: nothing to fuse, scores of other models or pairs, scores without samples, an unknown name or `how`.

    Example:
        >>> import hydrasurgery as hs
        >>> from hydrasurgery.demo.teacher import load_teacher
        >>> given = {"length": 48, "count": 2, "progress": False}
        >>> receiver, copying = (
        ...     hs.score_heads(*load_teacher(), method=m, **given) for m in ("activation-patching", "retrieval")
        ... )
        >>> fused = fuse_scores({"retrieval": receiver, "copying": copying}, weights={"copying": 0.5})
        >>> fused.method
        'mean of retrieval (activation-patching), copying (retrieval)'
    """
    if how not in ("mean", "max"):
        raise ProbeError(f"how={how!r} is not one of mean, max.")
    grouped = {name: [s] if isinstance(s, HeadScores) else list(s) for name, s in capabilities.items()}
    _check(grouped, weights or {})
    importance = _fused(grouped, weights or {}, how, threshold, None)
    rng = np.random.default_rng(seed)
    drawn = [_fused(grouped, weights or {}, how, threshold, rng) for _ in range(draws)]
    spread = np.std(drawn, axis=0) if drawn else np.zeros_like(importance)
    everyone = [scores for group in grouped.values() for scores in group]
    first = everyone[0]
    layers, start = [], 0
    for layer in first.layers:
        here = slice(start, start := start + layer.num_heads)
        values = tuple(importance[here].tolist()), tuple(spread[here].tolist())
        layers.append(replace(layer, importance=values[0], spread=values[1], samples=()))
    return replace(
        first,
        layers=tuple(layers),
        method=f"{how} of " + ", ".join(f"{n} ({'|'.join(s.method for s in group)})" for n, group in grouped.items()),
        seed=seed,
        length=tuple(sorted({length for scores in everyone for length in scores.length})),
        pairs=sum(group[0].pairs for group in grouped.values()),
        dropped=tuple(reason for group in grouped.values() for reason in group[0].dropped),
        tasks=tuple(task for group in grouped.values() for task in group[0].tasks),
    )


def confidence(scores: HeadScores, top: int, *, draws: int = DRAWS, seed: int = 0) -> list[list[float]]:
    """[layer][head]: the share of resamples of the pairs in which the head is among the `top` most important.

    Args:
        scores: With samples of at least one pair.
        top: How many heads.
        draws: Resamples.
        seed: Of the resamples.

    Raises:
        ProbeError: the scores have no samples.

    Example:
        >>> import hydrasurgery as hs
        >>> from hydrasurgery.demo.teacher import load_teacher
        >>> scores = hs.score_heads(*load_teacher(), length=48, count=2, progress=False)
        >>> layer, head = scores.ranking[0]
        >>> confidence(scores, top=16)[layer][head]
        1.0
    """
    samples, rng = _samples(scores), np.random.default_rng(seed)
    counts = np.zeros(samples.shape[1])
    for _ in range(draws):
        mean = samples[_resample(scores.tasks, rng)].mean(0)
        counts[np.argsort(-mean, kind="stable")[:top]] += 1
    cuts = np.cumsum([layer.num_heads for layer in scores.layers])[:-1]
    return [part.tolist() for part in np.split(counts / draws, cuts)]


def split_half(scores: HeadScores, *, draws: int = DRAWS, seed: int = 0) -> float:
    """How well two halves of the pairs agree: the mean correlation of the scores of random halves.

    Args:
        scores: With samples of at least two pairs.
        draws: Divisions into halves.
        seed: Of the divisions.

    Raises:
        ProbeError: the scores have no samples, or there are fewer than two pairs.

    Example:
        >>> import hydrasurgery as hs
        >>> from hydrasurgery.demo.teacher import load_teacher
        >>> scores = hs.score_heads(*load_teacher(), length=48, count=4, progress=False)
        >>> split_half(scores, draws=20) > 0.5
        True
    """
    samples, rng = _samples(scores), np.random.default_rng(seed)
    if len(samples) < 2:
        raise ProbeError(f"split_half needs two pairs, but {scores.method} was measured on {len(samples)}; count=...")
    found = []
    for _ in range(draws):
        order, half = rng.permutation(len(samples)), len(samples) // 2
        found.append(_correlation(samples[order[:half]].mean(0), samples[order[half:]].mean(0)))
    return float(np.mean(found))


def _fused(
    grouped: Mapping[str, list[HeadScores]],
    weights: Mapping[str, float],
    how: str,
    threshold: float,
    rng: np.random.Generator | None,
) -> np.ndarray:
    """The fused score of every head, [heads]; of resampled pairs with `rng`."""
    each = np.stack([_capability(group, threshold, rng) for group in grouped.values()])
    share = np.array([weights.get(name, 1.0) for name in grouped])[:, None]
    return (each * share).sum(0) / share.sum() if how == "mean" else (each * share / share.max()).max(0)


def _capability(group: list[HeadScores], threshold: float, rng: np.random.Generator | None) -> np.ndarray:
    """max * kappa, scaled to [0, 1]: [heads]."""
    tasks = group[0].tasks
    rows = np.arange(len(tasks)) if rng is None else _resample(tasks, rng)
    samples = [_samples(scores)[rows] for scores in group]
    parts = [np.flatnonzero(np.array(tasks)[rows] == task) for task in dict.fromkeys(tasks)]
    probes = np.stack([np.max([values[part].mean(0) for values in samples], axis=0) for part in parts])
    whole = np.max([values.mean(0) for values in samples], axis=0)
    score = whole * (probes > threshold).mean(0)
    low, high = score.min(), score.max()
    return (score - low) / (high - low) if high > low else np.zeros_like(score)


def _resample(tasks: Sequence[str], rng: np.random.Generator) -> np.ndarray:
    """Numbers of pairs drawn with replacement, as many of each sub-probe as there are."""

    def draw() -> Iterator[np.ndarray]:
        for task in dict.fromkeys(tasks):
            members = np.flatnonzero(np.array(tasks) == task)
            yield rng.choice(members, len(members))

    return np.concatenate(list(draw()))


def _samples(scores: HeadScores) -> np.ndarray:
    """[P, heads], layer after layer."""
    if not all(layer.samples for layer in scores.layers):
        raise ProbeError(f"these scores ({scores.method}) have no samples of single pairs; score with another method.")
    return np.concatenate([np.array(layer.samples) for layer in scores.layers], axis=1)


def _check(grouped: Mapping[str, list[HeadScores]], weights: Mapping[str, float]) -> None:
    if not grouped or not all(grouped.values()):
        raise ProbeError("fuse_scores needs at least one capability, each with scores.")
    unknown = sorted(weights.keys() - grouped.keys())
    if unknown:
        raise ProbeError(f"weights names {unknown[0]!r}, but the capabilities are {', '.join(grouped)}.")
    if min(weights.values(), default=1.0) < 0 or not any(weights.get(name, 1.0) for name in grouped):
        raise ProbeError("weights must not be negative, and one at least must be above 0.")
    shape: Callable[[HeadScores], list[tuple[str, int]]] = lambda s: [(x.name, x.num_heads) for x in s.layers]  # noqa: E731
    first = next(iter(grouped.values()))[0]
    for name, group in grouped.items():
        for scores in group:
            if shape(scores) != shape(first):
                raise ProbeError(
                    f"{name}: these scores are of another model than the first ones; score the same model."
                )
            if scores.tasks != group[0].tasks:
                raise ProbeError(f"{name}: scores of one capability must be measured on the same pairs and seed.")
            _samples(scores)


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    if not a.std() or not b.std():
        return float(np.array_equal(a, b))
    return float(np.corrcoef(a, b)[0, 1])

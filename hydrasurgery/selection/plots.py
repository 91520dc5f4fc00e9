"""Pictures of scores and of what ablation does; each is one PNG, whole or absent."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydrasurgery.errors import DataError

if TYPE_CHECKING:
    from hydrasurgery.plan import Plan
    from hydrasurgery.selection.ablation import AblationCurve
    from hydrasurgery.selection.scores import HeadScores

Target = str | os.PathLike[str]


def draw_scores(scores: HeadScores, path: Target) -> Path:
    """Rows are layers, columns are heads, colour is importance; a second panel is reconstruction error."""
    panels = [(f"importance ({scores.method})", [layer.importance for layer in scores.layers])]
    if all(layer.error is not None for layer in scores.layers):
        panels.append(("reconstruction error", [layer.error for layer in scores.layers if layer.error]))
    return _heat_maps(panels, f"{scores.model.architecture or 'model'}, {scores.pairs} pairs", "head", path)


def draw_groups(scores: HeadScores, path: Target) -> Path:
    """Rows are layers, columns are KV heads, colour is the greatest importance of a KV head's query heads."""
    from hydrasurgery.plan import layer_shape

    values = [[max(x.importance[h] for h in heads) for heads in layer_shape(x).groups] for x in scores.layers]
    title = f"{scores.model.architecture or 'model'}, {scores.pairs} pairs"
    return _heat_maps([(f"importance ({scores.method}), max of a group", values)], title, "KV head", path)


def draw_histogram(scores: HeadScores, path: Target) -> Path:
    """How many heads have which importance, on a logarithmic count."""
    values = [value for layer in scores.layers for value in layer.importance]

    def draw(axes: Any) -> None:
        axes.hist(values, bins=40, log=True)
        axes.set(xlabel=f"importance ({scores.method})", ylabel="heads")

    return _plain(draw, path)


def draw_coverage(scores: HeadScores, path: Target) -> Path:
    """The share of all positive importance that the top heads hold, against their number; KV groups too."""
    from hydrasurgery.plan import layer_shape

    heads = [value for layer in scores.layers for value in layer.importance]
    groups = [sum(x.importance[h] for h in g) for x in scores.layers for g in layer_shape(x).groups]

    def draw(axes: Any) -> None:
        for label, values in (("heads", heads), ("KV groups", groups)):
            axes.plot([i / len(values) for i in range(len(values) + 1)], coverage(values), label=label)
        axes.plot([0, 1], [0, 1], ":", color="grey")
        axes.set(xlabel="share kept, best first", ylabel=f"share of importance ({scores.method})")
        axes.legend()

    return _plain(draw, path)


def coverage(values: Sequence[float]) -> list[float]:
    """[N + 1]: the share of the positive values' sum that the largest 0, 1, ... N values hold."""
    positive = sorted((max(value, 0.0) for value in values), reverse=True)
    total = sum(positive) or 1.0
    return [sum(positive[:count]) / total for count in range(len(positive) + 1)]


def draw_plan(plan: Plan, path: Target) -> Path:
    """Rows are layers, columns are heads, dark is full."""
    values = [[float(kind == "full") for kind in layer.kinds] for layer in plan.layers]
    title = f"{plan.model.architecture or 'model'}, {plan.num_full} of {plan.num_heads} heads full"
    return _heat_maps([(f"{plan.strategy}, unit {plan.unit}", values)], title, "head", path)


def draw_ablation(curve: AblationCurve, path: Target) -> Path:
    """Accuracy against the number of ablated heads: top, bottom and random arms, the latter with its spread."""

    def draw(axes: Any) -> None:
        for arm, values in curve.accuracy.items():
            axes.errorbar(curve.counts, values, yerr=curve.spread if arm == "random" else None, marker="o", label=arm)
        axes.set(xlabel="ablated heads", ylabel="pairs answered", ylim=(-0.03, 1.03))
        axes.legend()

    return _plain(draw, path)


KINDS: dict[str, Callable[[HeadScores, Target], Path]] = {
    "map": draw_scores,
    "groups": draw_groups,
    "histogram": draw_histogram,
    "coverage": draw_coverage,
}


def draw(scores: HeadScores, path: Target, kind: str) -> Path:
    """Draw scores as one of `KINDS`; DataError for another name."""
    if kind not in KINDS:
        raise DataError(f"kind={kind!r} is not one of {', '.join(KINDS)}.")
    return KINDS[kind](scores, path)


def _plain(draw: Callable[[Any], None], path: Target) -> Path:
    figure = _figure((6, 4))
    draw(figure.add_subplot())
    return _save(figure, Path(path))


def _heat_maps(panels: Sequence[tuple[str, Sequence[Sequence[float]]]], title: str, unit: str, path: Target) -> Path:
    columns, rows = max(len(row) for row in panels[0][1]), len(panels[0][1])
    figure = _figure((len(panels) * (2.2 + 0.28 * columns), 1.6 + 0.24 * rows))
    for number, (name, values) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), number)
        table = [[*row, *[float("nan")] * (columns - len(row))] for row in values]
        image = axes.imshow(table, aspect="auto", interpolation="nearest", cmap="viridis")
        axes.set(title=name, xlabel=unit, ylabel="layer")
        axes.set_xticks(range(0, columns, max(1, columns // 16)))
        axes.set_yticks(range(0, rows, max(1, rows // 16)))
        figure.colorbar(image, ax=axes)
    figure.suptitle(title)
    return _save(figure, Path(path))


def _figure(size: tuple[float, float]) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "plotting scores needs matplotlib, which is not installed: pip install 'hydrasurgery[plot]'"
        ) from error
    return Figure(figsize=size, layout="constrained")


def _save(figure: Any, target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.part")
    try:
        figure.savefig(temporary, format="png", dpi=120)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return target

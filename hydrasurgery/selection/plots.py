"""Pictures of scores."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hydrasurgery.selection.scores import HeadScores


def draw_scores(scores: HeadScores, path: str | os.PathLike[str]) -> Path:
    """Write a PNG: rows are layers, columns are heads, colour is importance; a second panel is reconstruction error."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "plotting scores needs matplotlib, which is not installed: pip install 'hydrasurgery[plot]'"
        ) from error
    panels: list[tuple[str, list[Any]]] = [(f"importance ({scores.method})", [la.importance for la in scores.layers])]
    if all(layer.error is not None for layer in scores.layers):
        panels.append(("reconstruction error", [layer.error for layer in scores.layers]))
    columns, rows = max(layer.num_heads for layer in scores.layers), len(scores.layers)
    figure = Figure(figsize=(len(panels) * (2.2 + 0.28 * columns), 1.6 + 0.24 * rows), layout="constrained")
    for number, (title, values) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), number)
        _heat_map(figure, axes, title, values, columns)
    figure.suptitle(f"{scores.model.architecture or 'model'}, {scores.pairs} pairs")
    return _save(figure, Path(path))


def _heat_map(figure: Any, axes: Any, title: str, values: list[Any], columns: int) -> None:
    table = [[*row, *[float("nan")] * (columns - len(row))] for row in values]
    image = axes.imshow(table, aspect="auto", interpolation="nearest", cmap="viridis")
    axes.set(title=title, xlabel="head", ylabel="layer")
    axes.set_xticks(range(0, columns, max(1, columns // 16)))
    axes.set_yticks(range(0, len(values), max(1, len(values) // 16)))
    figure.colorbar(image, ax=axes)


def _save(figure: Any, target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.part")
    try:
        figure.savefig(temporary, format="png", dpi=120)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return target

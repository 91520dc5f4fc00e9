"""Pictures of heads: maps, histograms, coverage, plans and ablation; each is one PNG, whole or absent."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydrasurgery.errors import OutputError
from hydrasurgery.files import atomic_write_bytes
from hydrasurgery.plan import Plan

Target = str | os.PathLike[str]
Panel = tuple[str, Sequence[Sequence[float]]]  # its name, and a row of values a layer


def draw_heat_maps(panels: Sequence[Panel], title: str, unit: str, path: Target) -> Path:
    """Panels side by side: rows are layers, columns are heads or KV heads (`unit`), colour is the value.

    Raises:
        ImportError: matplotlib is missing; the message names the extra.
    """
    columns, rows = max(len(row) for row in panels[0][1]), len(panels[0][1])
    figure = new_figure((len(panels) * (2.2 + 0.28 * columns), 1.6 + 0.24 * rows))
    for number, (name, values) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), number)
        table = [[*row, *[float("nan")] * (columns - len(row))] for row in values]
        image = axes.imshow(table, aspect="auto", interpolation="nearest", cmap="viridis")
        axes.set(title=name, xlabel=unit, ylabel="layer")
        axes.set_xticks(range(0, columns, max(1, columns // 16)))
        axes.set_yticks(range(0, rows, max(1, rows // 16)))
        figure.colorbar(image, ax=axes)
    figure.suptitle(title)
    return save_figure(figure, path)


def draw_histogram(values: Sequence[float], label: str, path: Target) -> Path:
    """How many heads have which of the `values`, on a logarithmic count; errors as in `draw_heat_maps`."""

    def draw(axes: Any) -> None:
        axes.hist(values, bins=40, log=True)
        axes.set(xlabel=label, ylabel="heads")

    return _plain(draw, path)


def draw_coverage(lines: Mapping[str, Sequence[float]], label: str, path: Target) -> Path:
    """Of each line's values, the share that the largest hold, against their number; errors as in `draw_heat_maps`."""

    def draw(axes: Any) -> None:
        for name, values in lines.items():
            axes.plot([i / len(values) for i in range(len(values) + 1)], coverage(values), label=name)
        axes.plot([0, 1], [0, 1], ":", color="grey")
        axes.set(xlabel="share kept, best first", ylabel=label)
        axes.legend()

    return _plain(draw, path)


def coverage(values: Sequence[float]) -> list[float]:
    """[N + 1]: the share of the positive values' sum that the largest 0, 1, ... N values hold."""
    positive = sorted((max(value, 0.0) for value in values), reverse=True)
    total = sum(positive) or 1.0
    return [sum(positive[:count]) / total for count in range(len(positive) + 1)]


def draw_plan(plan: Plan, path: Target) -> Path:
    """Rows are layers, columns are heads, dark is full; errors as in `draw_heat_maps`.

    Example:
        >>> import tempfile
        >>> from hydrasurgery.choose import plan_heads
        >>> from hydrasurgery.demo.teacher import load_teacher
        >>> plan = plan_heads(load_teacher()[0], strategy="random")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     draw_plan(plan, f"{folder}/plan.png").name
        'plan.png'
    """
    values = [[float(kind == "full") for kind in layer.kinds] for layer in plan.layers]
    title = f"{plan.model.architecture or 'model'}, {plan.num_full} of {plan.num_heads} heads full"
    return draw_heat_maps([(f"{plan.strategy}, unit {plan.unit}", values)], title, "head", path)


def draw_arms(
    counts: Sequence[int],
    accuracy: Mapping[str, Sequence[float]],
    spread: Mapping[str, Sequence[float]],
    path: Target,
) -> Path:
    """Accuracy against the number of ablated heads, a line per arm, with the arm's `spread` where it has one.

    Raises:
        ImportError: as in `draw_heat_maps`.
    """

    def draw(axes: Any) -> None:
        for arm, values in accuracy.items():
            axes.errorbar(counts, values, yerr=spread.get(arm), marker="o", label=arm)
        axes.set(xlabel="ablated heads", ylabel="pairs answered", ylim=(-0.03, 1.03))
        axes.legend()

    return _plain(draw, path)


def _plain(draw: Callable[[Any], None], path: Target) -> Path:
    figure = new_figure((6, 4))
    draw(figure.add_subplot())
    return save_figure(figure, path)


def new_figure(size: tuple[float, float]) -> Any:
    """An empty figure of `size` inches, which no window shows.

    Raises:
        ImportError: matplotlib is missing; the message names the extra.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "drawing needs matplotlib, which is not installed: pip install 'hydrasurgery[plot]'"
        ) from error
    return Figure(figsize=size, layout="constrained")


def check_picture(path: Target) -> None:
    """Refuse a name that says another kind of picture than PNG; one that says none is good.

    Raises:
        OutputError: it is one that matplotlib would draw.
    """
    from matplotlib.backend_bases import FigureCanvasBase

    suffix = Path(path).suffix.removeprefix(".").lower()
    if suffix != "png" and suffix in FigureCanvasBase.get_supported_filetypes():
        raise OutputError(f"{os.fspath(path)}: pictures are drawn as PNG, not {suffix.upper()}; give a name in .png")


def save_figure(figure: Any, path: Target) -> Path:
    """Write a figure as PNG, whole or not at all.

    Raises:
        OutputError: it cannot be written there, or the name is that of another kind of picture.
    """
    check_picture(path)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    return atomic_write_bytes(path, picture.getvalue())

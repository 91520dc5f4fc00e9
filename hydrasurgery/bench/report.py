"""What was measured, and what would run, as tables and a plot."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from hydrasurgery.kernels.registry import BACKWARD, DECODE, FORWARD, Case, Choice, Machine, choose

Row = dict[str, Any]

# Of each operator: what is shown, its modes, and what the call is like besides its head dim.
TYPICAL: tuple[tuple[str, str, tuple[str, ...], frozenset[str]], ...] = (
    ("attention", "attention", (FORWARD, BACKWARD, DECODE), frozenset()),
    ("attention, padded or packed", "attention", (FORWARD, BACKWARD, DECODE), frozenset({"reach"})),
    ("attention with a dense mask", "attention", (FORWARD, BACKWARD, DECODE), frozenset({"mask"})),
    ("attention with a window", "attention", (FORWARD, BACKWARD), frozenset({"window"})),
    ("attention with a soft cap", "attention", (FORWARD, BACKWARD, DECODE), frozenset({"softcap"})),
    ("linear_attention", "linear_attention", (FORWARD, BACKWARD, DECODE), frozenset({"gated_delta", "state"})),
    (
        "linear_attention of few tokens",
        "linear_attention",
        (FORWARD,),
        frozenset({"gated_delta", "state", "few tokens"}),
    ),
    ("head_inputs", "head_inputs", (FORWARD, BACKWARD), frozenset()),
    ("head_gates", "head_gates", (FORWARD, BACKWARD), frozenset()),
    ("causal_conv", "causal_conv", (FORWARD, BACKWARD), frozenset({"state", "reset", "padding"})),
    ("scale_norm_fusion", "scale_norm_fusion", (FORWARD, BACKWARD), frozenset()),
    ("decode_step", "decode_step", (DECODE,), frozenset()),
)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def kernels_table(machine: Machine, head_dim: int = 128) -> Table:
    """Operator by mode by dtype: the implementation that runs on `machine`, and why each other one does not."""
    table = Table(title=f"{machine.device}, head dim {head_dim}", show_lines=True)
    for heading in ("operator", "mode", "dtype", "runs", "does not run"):
        table.add_column(heading, overflow="fold")
    sizes = tuple((name, head_dim) for name in ("D", "K", "V")) + (("W", 4), ("H", 16))
    for label, op, modes, features in TYPICAL:
        for mode in modes:
            found = {dtype: choose(op, Case(mode, dtype, sizes, features), machine) for dtype in DTYPES}
            for dtypes, choice in _grouped(found):
                reasons = "\n".join(f"{other.name}: {reason}" for other, reason in choice.others)
                table.add_row(label, mode, dtypes, choice.implementation.name, reasons)
    return table


def bench_table(rows: Sequence[Row]) -> Table:
    """Milliseconds, their ratio to those of each suite's first contender, and the fraction of the floor reached."""
    machine = next(row for row in rows if row["suite"] == "machine")
    title = (
        f"{machine['device']}: copies {machine['copy_TBs']:.3g} TB/s, multiplies {machine['matmul_TFLOPs']:.3g} TFLOP/s"
    )
    table = Table(title=title)
    for heading in ("suite", "size", "contender", "ms", "times the first", "of the floor"):
        table.add_column(heading, justify="left" if heading in ("suite", "contender") else "right")
    first: dict[tuple[str, int], float] = {}
    for row in rows:
        place = (row["suite"], row.get("size", 0))
        if row["suite"] == "model":
            continue
        if "why" in row:
            table.add_row(row["suite"], _size(row), row["contender"], f"[dim]{row['why']}[/dim]", "", "")
        elif "ms" in row:
            ratio = row["ms"] / first.setdefault(place, row["ms"])
            share = f"{row['floor_ms'] / row['ms']:.0%}"
            table.add_row(row["suite"], _size(row), row["contender"], f"{row['ms']:.4g}", f"{ratio:.2f}", share)
        elif "first_call_s" in row:
            table.add_row(row["suite"], _size(row), row["contender"], f"{1e3 * row['first_call_s']:.0f}", "", "")
    return table


def model_table(rows: Sequence[Row]) -> Table:
    """What calls of whole models take, hybrid beside teacher."""
    table = Table(title="whole models")
    for heading in ("case", "size", "model", "ms", "tokens/s", "peak GiB", "first call s", "other"):
        table.add_column(heading, justify="left" if heading in ("case", "model", "other") else "right")
    known = {"suite", "case", "size", "contender", "ms", "tokens_s", "peak_GiB", "first_call_s", "how", "why"}
    for row in rows:
        if row["suite"] == "model":
            numbers = [f"{row[key]:,.{places}f}" if key in row else "" for key, places in MODEL_COLUMNS]
            other = [row.get("how") or "", row.get("why") or ""]
            other += [f"{key} {value:.4g}" for key, value in row.items() if key not in known and value is not None]
            label = ", ".join(filter(None, other))
            table.add_row(row["case"], f"{row['size']:,}", row["contender"], *numbers, label)
    return table


MODEL_COLUMNS = (("ms", 2), ("tokens_s", 0), ("peak_GiB", 2), ("first_call_s", 1))


def plot(rows: Iterable[Row], path: Path) -> None:
    """Milliseconds over size, one panel per suite, the floor dashed. Needs matplotlib (`pip install 'hydrasurgery[plot]'`)."""
    from hydrasurgery.selection.plots import new_figure, save_figure

    timed = [row for row in rows if "ms" in row and "floor_ms" in row]
    suites = list(dict.fromkeys(row["suite"] for row in timed))
    figure = new_figure((4.5 * max(1, len(suites)), 4))
    for axes, suite in zip(figure.subplots(1, max(1, len(suites)), squeeze=False)[0], suites, strict=False):
        own = [row for row in timed if row["suite"] == suite]
        for contender in dict.fromkeys(row["contender"] for row in own):
            points = [(row["size"], row["ms"]) for row in own if row["contender"] == contender]
            axes.plot(*zip(*points, strict=True), marker="o", label=contender)
        floor = sorted({(row["size"], row["floor_ms"]) for row in own})
        axes.plot(*zip(*floor, strict=True), "k--", marker="_", label="floor")
        axes.set(title=suite, xlabel="size", ylabel="ms", xscale="log", yscale="log")
        axes.legend(fontsize="small")
    save_figure(figure, path)


def _grouped(choices: dict[torch.dtype, Choice]) -> list[tuple[str, Choice]]:
    """Dtypes with the same outcome, for the same reasons, together."""
    groups: dict[Choice, list[str]] = {}
    for dtype, choice in choices.items():
        groups.setdefault(choice, []).append(str(dtype).removeprefix("torch."))
    return [(", ".join(names), choice) for choice, names in groups.items()]


def _size(row: Row) -> str:
    return f"{row['size']:,}" if "size" in row else ""

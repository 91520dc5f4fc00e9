"""Commands on the machine: which kernels it runs, and how fast."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated, Any

import typer

from hydrasurgery.cli.outputs import check_outputs, shown_if_lost
from hydrasurgery.cli.shared import AUTO, LONGEST, Device, wide_console
from hydrasurgery.files import atomic_write_json, is_stream, json_text
from hydrasurgery.json_files import shown


def kernels(
    device: Device = AUTO,
    head_dim: Annotated[int, typer.Option(min=1, max=2**20, help="Width of a head.")] = 128,
) -> None:
    """Show which kernel runs each operator on this machine, and why each other one does not.

    Example: hydrasurgery kernels --head-dim 64
    """
    from hydrasurgery.bench.report import kernels_table
    from hydrasurgery.kernels.registry import machine_of

    wide_console().print(kernels_table(machine_of(device), head_dim))


def bench(
    suites: Annotated[
        list[str] | None, typer.Argument(metavar="[SUITE]...", help="Suites; all if none is named.")
    ] = None,
    device: Device = AUTO,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    size: Annotated[
        list[int] | None, typer.Option(min=1, max=LONGEST, help="Tokens or sequences, instead of the suite's own.")
    ] = None,
    skip: Annotated[list[str] | None, typer.Option(help="A contender to leave out, such as fla or teacher.")] = None,
    model: Annotated[
        str, typer.Option(help="Of suite `model`: a model's folder, or the shape qwen3-1.7b, smollm2-135m or tiny.")
    ] = "qwen3-1.7b",
    case: Annotated[
        list[str] | None,
        typer.Option(help="Of suite `model`: prefill, decode, generate, train, ...; all if none is named."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, max=4096, help="Of suite `model`: sequences of a training step.")] = 8,
    layers: Annotated[
        int | None, typer.Option(min=1, max=1000, help="Of suite `model`: layers of a shape, instead of its own.")
    ] = None,
    cold: Annotated[bool, typer.Option("--cold", help="Also time first calls in fresh processes (CUDA).")] = False,
    out: Annotated[Path | None, typer.Option(help="A JSON file of all that was measured.")] = None,
    plot: Annotated[Path | None, typer.Option(help="A PNG of times over sizes.")] = None,
) -> None:
    """Time the kernels against their peers and against the floor of this machine; each is checked before it is timed.

    A CPU runs sizes of at most 1024 unless --size says otherwise. The suite `model`, which runs if it is named, times a user's own
    calls of a whole model, hybrid and teacher in one run.

    Example: hydrasurgery bench fusion-forward decode --out bench.json --plot bench.png
    """
    from hydrasurgery.bench import SUITES
    from hydrasurgery.bench import bench as measure
    from hydrasurgery.bench.model import CASES, SHAPES, Request, bench_model, check_model
    from hydrasurgery.bench.report import bench_table, model_table
    from hydrasurgery.bench.report import plot as draw
    from hydrasurgery.bench.run import TOLERANCE
    from hydrasurgery.bench.run import cold as first_calls

    names = suites or list(SUITES)
    whole, names = "model" in names, [name for name in names if name != "model"]
    unknown = [name for name in names if name not in SUITES]
    if unknown:
        raise typer.BadParameter(f"no suite is called {shown(unknown[0])}; there are model, {', '.join(SUITES)}")
    strange = [name for name in case or () if name not in CASES]
    if strange:
        raise typer.BadParameter(f"--case {shown(strange[0])}: give one of {', '.join(CASES)}")
    if case and not whole:
        raise typer.BadParameter("--case is of suite model: name it")
    contenders = sorted(
        {contender.name for name in names for contender in SUITES[name].contenders}
        | ({"hybrid", "teacher"} if whole else set())
    )
    strange = [name for name in skip or () if name not in contenders]
    if strange:
        raise typer.BadParameter(f"--skip {shown(strange[0])}: the suites' contenders are {', '.join(contenders)}")
    if cold and device.type != "cuda":
        raise typer.BadParameter(f"--cold times first calls on CUDA, not on {device}")
    types = {str(known).removeprefix("torch."): known for known in TOLERANCE}
    if dtype not in types:
        raise typer.BadParameter(f"--dtype {shown(dtype)}: give one of {', '.join(types)}")
    check_outputs([model] if whole and model not in SHAPES else [], files=[out], pictures=[plot])
    if whole:
        check_model(model)
    console = wide_console()
    rows: list[dict[str, Any]] = []
    kept = None if out is None or is_stream(out) else out  # measuring takes long, so a file has each row at once

    def keep(row: dict[str, Any]) -> None:
        rows.append(row)
        if kept is not None and row["suite"] != "machine":  # which is no result yet for which to lose an earlier file
            atomic_write_json(kept, rows)

    with shown_if_lost(lambda: json_text(rows)):
        with console.status("measuring") as status:
            found = measure(names, device, dtype=types[dtype], sizes=size, skip=skip or ())
            if whole:
                both = tuple(name for name in ("teacher", "hybrid") if name not in (skip or ()))
                request = Request(model, tuple(case or ()), tuple(size or ()), types[dtype], layers, batch, both)
                found = itertools.chain(found, bench_model(request, device))
            for row in found:
                keep(row)
                status.update(f"{row['suite']} {row.get('case', '')} {row.get('size', '')} {row.get('contender', '')}")
            if cold:
                for name in names:
                    if name != "layer":
                        keep(first_calls(name, "hydra"))
        if out is not None:
            atomic_write_json(out, rows)
    if names:
        console.print(bench_table(rows))
    if whole:
        console.print(model_table(rows))
    if plot is not None:
        draw(rows, plot)

"""Commands on heads: score them, plan which stay full, compare plans and scores, draw them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from hydrasurgery.choose import EVEN, NEEDS_SCORES, STRATEGIES, plan_heads
from hydrasurgery.cli.outputs import check_outputs, shown_if_lost
from hydrasurgery.cli.shared import AUTO, LAYER, Count, Device, Length, Model, Seed, on_device, refuse
from hydrasurgery.errors import DataError
from hydrasurgery.json_files import load_json, shown
from hydrasurgery.loading import load_model, load_tokenizer
from hydrasurgery.plan import FORMAT, Plan

# The options of `plan` that only some strategies read.
COUNTS = {
    tuple(name for name in STRATEGIES if not name.startswith("all-")): ["ratio", "budget"],
    ("constrained", "random", *EVEN): ["min_full"],
    ("random", "fixed"): ["seed"],
    NEEDS_SCORES: ["group_score", "tie"],
}


def score(
    model: Model,
    out: Annotated[Path, typer.Option(help="The score file to write.")],
    plot: Annotated[Path | None, typer.Option(help="A PNG of the scores, layers by heads.")] = None,
    length: Length = None,
    count: Count = 12,
    seed: Seed = 0,
    method: Annotated[
        str, typer.Option(help="activation-patching, attribution-patching, path-patching, mean-ablation, swap, ...")
    ] = "activation-patching",
    probes: Annotated[str, typer.Option(help="needle-1, needle-4, variables, facts, sums.")] = "needle-1,needle-4",
    stability: Annotated[
        bool, typer.Option("--stability", help="Also print how far the ranking depends on the number of pairs.")
    ] = False,
    device: Device = AUTO,
) -> None:
    """Measure how much each head matters, by default for retrieval.

    Example: hydrasurgery score Qwen/Qwen3-0.6B --out scores.json --plot heads.png --length 2048
    """
    from hydrasurgery.selection import score_heads

    check_outputs([model], files=[out], pictures=[plot])
    decoder = on_device(load_model(model), device)
    tokenizer = load_tokenizer(model, decoder)
    names = [name.strip() for name in probes.split(",")]
    scores = score_heads(decoder, tokenizer, method=method, probes=names, length=length, count=count, seed=seed)
    with shown_if_lost(scores.to_json):
        scores.save(out)
    typer.echo(str(scores))
    if stability:
        typer.echo(f"\n{scores.stability()}")
    if plot is not None:
        scores.plot(plot)


def plan(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="The plan file to write.")],
    scores: Annotated[Path | None, typer.Option(help="Scores to choose by.")] = None,
    model: Annotated[str | None, typer.Option(help="Instead of scores, for strategies that need none.")] = None,
    ratio: Annotated[str, typer.Option(help="Linear to full heads.")] = "7:1",
    unit: Annotated[str, typer.Option(help="head or kv-group.")] = "head",
    strategy: Annotated[
        str, typer.Option(help="constrained, global, per-layer, random, fixed, layerwise, all-linear or all-full.")
    ] = "constrained",
    min_full: Annotated[
        int, typer.Option("--min-full", min=0, max=2048, help="Full units that a layer has at least.")
    ] = 1,
    group_score: Annotated[str, typer.Option(help="A KV group's score: max, mean or sum of its heads'.")] = "max",
    tie: Annotated[
        float, typer.Option(min=0, help="Scores this near are equal; finer for small ones (swap-kl).")
    ] = 1e-3,
    budget: Annotated[str, typer.Option(help="What the ratio counts: heads, kv-bytes or flops.")] = "heads",
    seed: Seed = 0,
    keep: Annotated[list[str] | None, typer.Option(metavar="L:H", help="A layer's head that stays full.")] = None,
    never: Annotated[list[str] | None, typer.Option(metavar="L:H", help="A layer's head that becomes linear.")] = None,
    length: Annotated[
        int, typer.Option(min=1, max=10**15, help="Tokens that the forecast and the budget are for.")
    ] = 32768,
    layer: Annotated[str, typer.Option(help=LAYER)] = "default",
    plot: Annotated[Path | None, typer.Option(help="A PNG of the plan, layers by heads.")] = None,
) -> None:
    """Decide which heads stay full; prints the plan and a forecast of its cache and arithmetic.

    Example: hydrasurgery plan --scores scores.json --ratio 7:1 --keep 3:0 --out plan.json
    """
    from hydrasurgery.costs import forecast
    from hydrasurgery.selection import HeadScores

    if (scores is None) == (model is None):
        raise typer.BadParameter("give either --scores or --model")
    for strategies, options in COUNTS.items():
        if strategy in STRATEGIES and strategy not in strategies:
            refuse(context, options, f"only counts with the strategies {', '.join(strategies)}, not with {strategy}")
    if unit == "head":
        refuse(context, ["group_score"], "only counts with --unit kv-group")
    check_outputs([scores, model], files=[out], pictures=[plot])
    kept, left = ([_head(text, name) for text in given or ()] for given, name in ((keep, "--keep"), (never, "--never")))
    source: Any = HeadScores.load(scores) if scores is not None else load_model(str(model))
    made = plan_heads(
        source,
        ratio=ratio,
        unit=unit,
        strategy=strategy,
        min_full_per_layer=min_full,
        keep=kept,
        never=left,
        budget=budget,
        length=length,
        seed=seed,
        group_score=group_score,
        tie=tie,
        layer=layer,
    )
    with shown_if_lost(made.to_json):
        made.save(out)
    typer.echo(f"{made}\n\n{forecast(made, length=length)}")
    if plot is not None:
        from hydrasurgery.selection.plots import draw_plan

        draw_plan(made, plot)


def compare(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Plan or score files, two at least.")],
) -> None:
    """Print how far plans or scores agree: overlap of their full heads and rank correlation.

    Example: hydrasurgery compare plan.json other.json scores.json
    """
    from hydrasurgery.selection import HeadScores
    from hydrasurgery.selection import compare as measure
    from hydrasurgery.selection.scores import FILE_BYTES

    def load(file: Path) -> Any:
        value = load_json(file, DataError, FILE_BYTES)
        is_plan = isinstance(value, dict) and value.get("format") == FORMAT
        return Plan.from_dict(value, str(file)) if is_plan else HeadScores.from_dict(value, str(file))

    typer.echo(str(measure({str(file): load(file) for file in files})))


def audit(
    model: Model,
    plan: Annotated[Path, typer.Option(help="The plan that is audited.")],
    probes: Annotated[str, typer.Option(help="Capabilities: needle-1, needle-4, variables, facts, sums.")] = "",
    randoms: Annotated[int, typer.Option(min=0, max=1000, help="Random plans of the same size to compare with.")] = 3,
    length: Length = None,
    count: Count = 8,
    seed: Seed = 0,
    device: Device = AUTO,
) -> None:
    """Tell what a plan drops, before any training: what is left of each capability with its linear heads as stand-ins.

    Example: hydrasurgery audit Qwen/Qwen3-0.6B --plan plan.json --length 1024
    """
    from hydrasurgery.evaluation.probes import PROBES
    from hydrasurgery.selection.auditing import audit as measure

    chosen = Plan.load(plan)
    names = [name.strip() for name in probes.split(",") if name.strip()] or list(PROBES)
    teacher = on_device(load_model(model), device)
    tokenizer = load_tokenizer(model, teacher)
    options: Any = {"length": length, "count": count, "seed": seed}
    typer.echo(str(measure(teacher, chosen, tokenizer, probes=names, randoms=randoms, **options)))


def plot(
    context: typer.Context,
    scores: Annotated[Path, typer.Argument(metavar="SCORES", help="A score file.")],
    out: Annotated[Path, typer.Option(help="The PNG to write.")],
    kind: Annotated[str, typer.Option(help="map, groups, histogram, coverage or ablation.")] = "map",
    model: Annotated[str | None, typer.Option(help="The scored model, which ablation runs.")] = None,
    length: Length = None,
    count: Count = 12,
    seed: Seed = 0,
    device: Device = AUTO,
) -> None:
    """Draw scores; ablation runs the model with its top, bottom and random heads ablated.

    Example: hydrasurgery plot scores.json --kind coverage --out coverage.png
    """
    from hydrasurgery.selection import HeadScores, ablation_curve, probe_pairs

    if kind != "ablation":
        refuse(context, ["model", "length", "count", "seed", "device"], "only counts with --kind ablation")
    check_outputs([scores, model], pictures=[out])
    loaded = HeadScores.load(scores)
    if kind != "ablation":
        loaded.plot(out, kind)
        return
    if model is None:
        raise typer.BadParameter("--kind ablation runs the model; give --model")
    decoder = on_device(load_model(model), device)
    pairs = probe_pairs(decoder, load_tokenizer(model, decoder), length=length, count=count, seed=seed)
    curve = ablation_curve(decoder, loaded, pairs, seed=seed)
    typer.echo(str(curve))
    curve.plot(out)


def _head(text: str, option: str) -> tuple[int, int]:
    found = re.fullmatch(r"([0-9]{1,4}):([0-9]{1,4})", text)
    if found is None:
        raise typer.BadParameter(f"{option} {shown(text)}: give layer:head, such as 3:0")
    return int(found[1]), int(found[2])

"""The command line: look at a model, score its heads, plan, rewrite, distil, evaluate, generate, export, time the kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from typer.core import TyperGroup

from hydrasurgery.choose import plan_heads
from hydrasurgery.errors import CheckpointError, DataError, HydraError, PlanError, UnsupportedModelError
from hydrasurgery.files import atomic_directory, atomic_write_json
from hydrasurgery.loading import load_model, load_tokenizer, share_parameters
from hydrasurgery.plan import Plan

if TYPE_CHECKING:
    from torch import Tensor

    from hydrasurgery.ir.region import Region

CALIBRATION_ROWS, CALIBRATION_LENGTH = 4, 512  # sequences and tokens each


class _Group(TyperGroup):
    """Commands whose expected errors are one red line on standard error and exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (HydraError, OSError, ImportError) as error:
            typer.secho(f"error: {' '.join(str(error).split())}", fg="red", err=True)
            raise typer.Exit(1) from error


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Turn a pretrained decoder into a long-context hybrid of softmax and linear attention heads.",
)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A folder with a model, or its name on the hub.")]
Length = Annotated[int | None, typer.Option(min=1, help="Tokens a probe; by default 4096 or the model's limit.")]
Count = Annotated[int, typer.Option(min=1, help="Sequences.")]
Seed = Annotated[int, typer.Option(help="The same seed gives the same result.")]
LAYER = "How layers are built: default, hydrahead (the paper's), and/or changes, as in hydrahead,conv=none."
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU where there is one.")]


@app.callback()
def _quiet() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@app.command()
def inspect(model: Model) -> None:
    """Show each attention layer's heads and variant, and whether its heads can become linear.

    Example: hydrasurgery inspect Qwen/Qwen3-0.6B
    """
    from rich.console import Console
    from rich.table import Table

    from hydrasurgery.conversion import share_copy
    from hydrasurgery.ir.capture import capture
    from hydrasurgery.ir.stitch import region_modules
    from hydrasurgery.surgery import hybrid_pipeline

    decoder = load_model(model)
    surgery = getattr(decoder.config, "quantization_config", None)
    if region_modules(decoder) and surgery is not None:
        made = Plan.from_dict(surgery.plan, model)
        own = "" if surgery.pipeline == hybrid_pipeline(made.layer) else f"\npasses {surgery.pipeline}"
        typer.echo(f"{type(decoder).__name__}, a hybrid already\n\n{made}{own}")
        return
    regions = capture(share_copy(decoder))
    table = Table(title=f"{type(decoder).__name__}: {len(regions)} attention layers")
    for heading in ("layer", "module", "heads", "KV groups", "head dim", "variant", "verdict"):
        table.add_column(heading, overflow="fold")
    verdicts = []
    for number, region in enumerate(regions):
        shape = [number, region.name, region.num_heads, region.num_key_value_heads, region.head_dim]
        variant = ", ".join(_variant(region)) or "plain"
        verdicts.append(_verdict(region))
        table.add_row(*map(str, shape), variant, verdicts[-1] or "supported")
    _console(Console).print(table)
    refused = [f"{region.name}: {why}" for region, why in zip(regions, verdicts, strict=True) if why]
    if refused:
        raise UnsupportedModelError(refused[0])


@app.command()
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
    device: Device = "auto",
) -> None:
    """Measure how much each head matters, by default for retrieval.

    Example: hydrasurgery score Qwen/Qwen3-0.6B --out scores.json --plot heads.png --length 2048
    """
    from hydrasurgery.selection import score_heads

    decoder = _on(load_model(model), device)
    tokenizer = load_tokenizer(model, decoder)
    names = [name.strip() for name in probes.split(",")]
    scores = score_heads(decoder, tokenizer, method=method, probes=names, length=length, count=count, seed=seed)
    scores.save(out)
    typer.echo(str(scores))
    if plot is not None:
        scores.plot(plot)


@app.command()
def plan(
    out: Annotated[Path, typer.Option(help="The plan file to write.")],
    scores: Annotated[Path | None, typer.Option(help="Scores to choose by.")] = None,
    model: Annotated[str | None, typer.Option(help="Instead of scores, for strategies that need none.")] = None,
    ratio: Annotated[str, typer.Option(help="Linear to full heads.")] = "7:1",
    unit: Annotated[str, typer.Option(help="head or kv-group.")] = "head",
    strategy: Annotated[
        str, typer.Option(help="constrained, global, per-layer, random, fixed, layerwise, all-linear or all-full.")
    ] = "constrained",
    min_full: Annotated[int, typer.Option("--min-full", min=0, help="Full units that a layer has at least.")] = 1,
    group_score: Annotated[str, typer.Option(help="A KV group's score: max, mean or sum of its heads'.")] = "max",
    tie: Annotated[
        float, typer.Option(min=0, help="Scores this near are equal; finer for small ones (swap-kl).")
    ] = 1e-3,
    budget: Annotated[str, typer.Option(help="What the ratio counts: heads, kv-bytes or flops.")] = "heads",
    seed: Seed = 0,
    keep: Annotated[list[str] | None, typer.Option(metavar="L:H", help="A layer's head that stays full.")] = None,
    never: Annotated[list[str] | None, typer.Option(metavar="L:H", help="A layer's head that becomes linear.")] = None,
    length: Annotated[int, typer.Option(min=1, help="Tokens that the forecast and the budget are for.")] = 32768,
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
    made.save(out)
    typer.echo(f"{made}\n\n{forecast(made, length=length)}")
    if plot is not None:
        from hydrasurgery.selection.plots import draw_plan

        draw_plan(made, plot)


@app.command()
def compare(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Plan or score files, two at least.")],
) -> None:
    """Print how far plans or scores agree: overlap of their full heads and rank correlation.

    Example: hydrasurgery compare plan.json other.json scores.json
    """
    from hydrasurgery.selection import HeadScores
    from hydrasurgery.selection import compare as measure

    def load(file: Path) -> Any:
        is_plan = file.is_file() and '"hydrasurgery-plan"' in file.read_text(encoding="utf-8", errors="replace")
        return Plan.load(file) if is_plan else HeadScores.load(file)

    typer.echo(str(measure({str(file): load(file) for file in files})))


@app.command()
def plot(
    scores: Annotated[Path, typer.Argument(metavar="SCORES", help="A score file.")],
    out: Annotated[Path, typer.Option(help="The PNG to write.")],
    kind: Annotated[str, typer.Option(help="map, groups, histogram, coverage or ablation.")] = "map",
    model: Annotated[str | None, typer.Option(help="The scored model, which ablation runs.")] = None,
    length: Length = None,
    count: Count = 12,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Draw scores; ablation runs the model with its top, bottom and random heads ablated.

    Example: hydrasurgery plot scores.json --kind coverage --out coverage.png
    """
    from hydrasurgery.selection import HeadScores, ablation_curve, probe_pairs

    loaded = HeadScores.load(scores)
    if kind != "ablation":
        loaded.plot(out, kind)
        return
    if model is None:
        raise typer.BadParameter("--kind ablation runs the model; give --model")
    decoder = _on(load_model(model), device)
    pairs = probe_pairs(decoder, load_tokenizer(model, decoder), length=length, count=count, seed=seed)
    curve = ablation_curve(decoder, loaded, pairs, seed=seed)
    curve.plot(out)
    typer.echo(str(curve))


@app.command()
def rewrite(
    model: Model,
    plan: Annotated[Path, typer.Option(help="A plan file.")],
    out: Annotated[Path, typer.Option(help="The folder of the hybrid.")],
    layer: Annotated[str | None, typer.Option(help=f"{LAYER} By default what the plan says.")] = None,
    calibrate_text: Annotated[Path | None, typer.Option(help="Text to fit the linear heads to the teacher on.")] = None,
) -> None:
    """Turn the heads that a plan calls linear into linear attention, and save the untrained hybrid.

    Example: hydrasurgery rewrite Qwen/Qwen3-0.6B --plan plan.json --out hybrid --calibrate-text book.txt
    """
    from hydrasurgery.conversion import rewrite as rewrite_heads
    from hydrasurgery.evaluation import load_text

    chosen = Plan.load(plan)
    text = None if calibrate_text is None else load_text(calibrate_text)
    _check_target(out, model)
    teacher = load_model(model)
    tokenizer = load_tokenizer(model, teacher)
    try:
        hybrid = rewrite_heads(teacher, chosen, layer=layer)
    except PlanError as error:
        raise PlanError(f"{plan}: {error}") from error
    if text is not None:
        from hydrasurgery.transfer.start import calibrate

        calibrate(hybrid, teacher, _rows(tokenizer, text, teacher, calibrate_text))
    _save(hybrid, tokenizer, out)
    typer.echo(f"{out}: {chosen.num_linear} of {chosen.num_heads} heads are linear")


@app.command()
def distill(
    hybrid: Annotated[str, typer.Argument(metavar="HYBRID", help="What rewrite saved.")],
    teacher: Annotated[str, typer.Option(help="The model it was rewritten from: a folder or a hub name.")],
    data: Annotated[Path, typer.Option(help="A UTF-8 text file, or a .npy file of tokens.")],
    out: Annotated[Path, typer.Option(help="The folder of the run; the model is saved under OUT/model.")],
    recipe: Annotated[str, typer.Option(help="hydrahead, demo, or a recipe's JSON file.")] = "hydrahead",
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in OUT.")] = False,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Train a hybrid to follow its teacher; the weights are trained and saved in float32.

    Example: hydrasurgery distill hybrid --teacher Qwen/Qwen3-0.6B --data book.txt --recipe demo --out run
    """
    from hydrasurgery.transfer import distill as train
    from hydrasurgery.transfer import get_recipe

    steps = get_recipe(recipe)
    _check_data(data)
    _check_target(out / "model", hybrid, teacher)
    if not resume and any((out / "checkpoints").glob("*")):
        raise CheckpointError(
            f"{out / 'checkpoints'}: holds an earlier run; add --resume to go on, or give another --out"
        )
    followed = _on(load_model(teacher, dtype=torch.float32), device)
    student = _on(load_model(hybrid, dtype=torch.float32), device)
    tokenizer = load_tokenizer(hybrid, student)
    share_parameters(student, followed)
    with _named(data):
        result = train(student, followed, data, recipe=steps, out=out, resume=resume, seed=seed, tokenizer=tokenizer)
    _save(student, tokenizer, out / "model")
    last = result.history[-1] if result.history else {"loss": float("nan")}
    typer.echo(f"{out / 'model'}: {len(result.history)} steps, last loss {last['loss']:.4g}")


@app.command("eval")
def evaluate(
    model: Model,
    out: Annotated[Path, typer.Option(help="The result file to write (JSON).")],
    teacher: Annotated[str | None, typer.Option(help="A model to measure the divergence from.")] = None,
    lengths: Annotated[str, typer.Option(help="Tokens a sequence, separated by commas.")] = "256,512,1024",
    count: Count = 32,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Measure exact recall, perplexity and, with a teacher, the divergence from it, at several lengths.

    Example: hydrasurgery eval run/model --teacher Qwen/Qwen3-0.6B --lengths 1024,4096 --out result.json
    """
    from hydrasurgery.evaluation import evaluate as measure

    sizes = _lengths(lengths)
    decoder = _on(load_model(model), device)
    tokenizer = load_tokenizer(model, decoder)
    reference = None if teacher is None else _on(load_model(teacher), device)
    results = measure(decoder, tokenizer, sizes, count=count, seed=seed, teacher=reference)
    settings = {"model": model, "teacher": teacher, "lengths": sizes, "count": count, "seed": seed}
    atomic_write_json(out, {**settings, "results": results})
    for name, values in results.items():
        typer.echo(f"{name:<12}" + "".join(f"{at:>10} {value:<10.4g}" for at, value in values.items()))


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="The text to go on from.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to add at most.")] = 64,
    onnx: Annotated[
        Path | None, typer.Option(help="Run this export in ONNX Runtime; MODEL gives the tokenizer.")
    ] = None,
    device: Device = "auto",
) -> None:
    """Continue a prompt, always with the likeliest token.

    Example: hydrasurgery generate run/model --prompt "The for statement is used to" --max-new-tokens 32
    """
    from hydrasurgery.evaluation.metrics import check_length

    if onnx is not None:
        typer.echo(_generate_onnx(onnx, load_tokenizer(model), prompt, max_new_tokens))
        return
    decoder = _on(load_model(model), device)
    tokenizer = load_tokenizer(model, decoder)
    inputs = _encode(tokenizer, prompt).to(decoder.device)
    check_length([decoder], inputs["input_ids"].shape[1] + max_new_tokens)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    tokens = decoder.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=padding)
    typer.echo(tokenizer.decode(tokens[0], skip_special_tokens=True))


@app.command()
def export(
    model: Model,
    out: Annotated[Path, typer.Option(help="The file to write: *.onnx or *.pt2. It must not exist.")],
    target: Annotated[str, typer.Option(help="Of ONNX: onnxruntime or opset27.")] = "onnxruntime",
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16; auto takes the checkpoint's own.")] = "auto",
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Whole sequences to logits, without states.")] = False,
) -> None:
    """Write a model, hybrid or not, for another runtime, with its cache as named inputs and outputs.

    Example: hydrasurgery export run/model --out model.onnx --target onnxruntime
    """
    from hydrasurgery.export import export_onnx, export_pt2

    if out.suffix not in (".onnx", ".pt2"):
        raise typer.BadParameter(f"--out {out}: the name must end in .onnx or .pt2")
    if dtype not in ("auto", "float32", "float16", "bfloat16"):
        raise typer.BadParameter(f"--dtype {dtype}: give auto, float32, float16 or bfloat16")
    decoder = load_model(model, dtype=dtype if dtype == "auto" else getattr(torch, dtype))
    if out.suffix == ".pt2":
        export_pt2(decoder, out, cache=not no_cache)
    else:
        export_onnx(decoder, out, target=target, cache=not no_cache)


@app.command()
def kernels(
    device: Device = "auto",
    head_dim: Annotated[int, typer.Option(min=1, help="Width of a head.")] = 128,
) -> None:
    """Show which kernel runs each operator on this machine, and for each other one why it does not.

    Example: hydrasurgery kernels --head-dim 64
    """
    from rich.console import Console

    from hydrasurgery.bench.report import kernels_table
    from hydrasurgery.kernels.registry import machine_of

    _console(Console).print(kernels_table(machine_of(_device(device)), head_dim))


@app.command()
def bench(
    suites: Annotated[
        list[str] | None, typer.Argument(metavar="[SUITE]...", help="Suites; all if none is named.")
    ] = None,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    size: Annotated[
        list[int] | None, typer.Option(min=1, help="Tokens or sequences, instead of the suite's own.")
    ] = None,
    skip: Annotated[list[str] | None, typer.Option(help="A contender to leave out, such as fla.")] = None,
    cold: Annotated[bool, typer.Option("--cold", help="Also time first calls in fresh processes (CUDA).")] = False,
    out: Annotated[Path | None, typer.Option(help="A JSON file of all that was measured.")] = None,
    plot: Annotated[Path | None, typer.Option(help="A PNG of times over sizes.")] = None,
) -> None:
    """Time the kernels against their peers and against the floor of this machine; each is checked before it is timed.

    A CPU runs sizes of at most 1024 unless --size says otherwise.

    Example: hydrasurgery bench fusion-forward decode --out bench.json --plot bench.png
    """
    from rich.console import Console

    from hydrasurgery.bench import SUITES
    from hydrasurgery.bench import bench as measure
    from hydrasurgery.bench.report import bench_table
    from hydrasurgery.bench.report import plot as draw
    from hydrasurgery.bench.run import TOLERANCE
    from hydrasurgery.bench.run import cold as first_calls

    names = suites or list(SUITES)
    unknown = [name for name in names if name not in SUITES]
    if unknown:
        raise typer.BadParameter(f"no suite is called {unknown[0]!r}; there are {', '.join(SUITES)}")
    types = {str(known).removeprefix("torch."): known for known in TOLERANCE}
    if dtype not in types:
        raise typer.BadParameter(f"--dtype {dtype}: give one of {', '.join(types)}")
    console, place = _console(Console), _device(device)
    rows = []

    def keep(row: dict[str, Any]) -> None:
        """Measuring takes long: what is there is on disk."""
        rows.append(row)
        if out is not None:
            atomic_write_json(out, rows)

    with console.status("measuring") as status:
        for row in measure(names, place, dtype=types[dtype], sizes=size, skip=skip or ()):
            keep(row)
            status.update(f"{row['suite']} {row.get('size', '')} {row.get('contender', '')}")
        if cold and place.type == "cuda":
            for name in names:
                if name != "layer":
                    keep(first_calls(name, "hydra"))
    console.print(bench_table(rows))
    if plot is not None:
        draw(rows, plot)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="The folder of everything the demo writes.")] = Path("runs/demo"),
    quick: Annotated[bool, typer.Option("--quick", help="Only the chosen heads and the all-linear hybrid.")] = False,
) -> None:
    """Run the whole surgery on the small teacher that comes with the package.

    Example: hydrasurgery demo --out runs/demo --quick
    """
    from hydrasurgery.demo.run import run_demo

    run_demo(out, quick)


def main() -> None:
    """Entry point: expected errors are one red line on standard error, and exit code 1."""
    app(prog_name="hydrasurgery")


# --- what the commands share ------------------------------------------------------------------------------------------


def _variant(region: Region) -> Iterator[str]:
    """Words for what is special about a region's attention; "rope" where it is recognised, so that heads can do without."""
    from hydrasurgery.passes import run_pipeline

    children = dict(region.module.named_children())
    if run_pipeline([region], "analyze")[0].options["rotary"]:
        yield "rope"
    if {"q_norm", "k_norm"} <= children.keys():
        yield "qk-norm"
    if region.window is not None:
        yield f"window {region.window}"
    if region.softcap is not None:
        yield f"softcap {region.softcap:g}"
    if region.sinks:
        yield "sinks"


def _verdict(region: Region) -> str:
    """Why the region's heads cannot become linear; empty if they can, which is tried on all heads but the first."""
    from hydrasurgery.passes import run_pipeline
    from hydrasurgery.surgery import hybrid_pipeline

    heads = region.num_heads
    region.kinds = ("full",) * (heads > 1) + ("linear",) * (heads - (heads > 1))
    try:
        run_pipeline([region], hybrid_pipeline())
    except HydraError as error:
        return str(error)
    return ""


def _console(kind: Any) -> Any:
    """Wide enough for the tables where the output is no terminal."""
    return kind(width=None if kind().is_terminal else 140)


def _device(name: str) -> torch.device:
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def _on(model: Any, device: str) -> Any:
    try:
        return model.to(_device(device))
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise typer.BadParameter(f"--device {device}: {error}") from error


def _encode(tokenizer: Any, prompt: str) -> Any:
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    if not inputs["input_ids"].numel():
        raise DataError("--prompt: the prompt encodes to no token; give some text")
    return inputs


def _generate_onnx(path: Path, tokenizer: Any, prompt: str, max_new_tokens: int) -> str:
    from hydrasurgery.export import OnnxDecoder

    inputs = _encode(tokenizer, prompt)
    tokens = OnnxDecoder(path).generate(inputs["input_ids"].numpy(), max_new_tokens=max_new_tokens)
    return str(tokenizer.decode(tokens[0], skip_special_tokens=True))


def _head(text: str, option: str) -> tuple[int, int]:
    layer, _, head = text.partition(":")
    if not (layer.isdecimal() and head.isdecimal()):
        raise typer.BadParameter(f"{option} {text}: give layer:head, such as 3:0")
    return int(layer), int(head)


def _lengths(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise typer.BadParameter(f"--lengths {text}: give positive numbers separated by commas, such as 256,512")
    return [int(part) for part in parts]


def _rows(tokenizer: Any, text: str, model: Any, path: Path | None) -> Tensor:
    """The text's first tokens as up to four equal rows [B, T]."""
    from hydrasurgery.evaluation import encode_text

    with _named(path):
        ids = encode_text(tokenizer, text)
    limit = getattr(model.config, "max_position_embeddings", None) or CALIBRATION_LENGTH
    length = min(CALIBRATION_LENGTH, limit, len(ids))
    rows = min(CALIBRATION_ROWS, len(ids) // length)
    return ids[: rows * length].view(rows, length)


@contextmanager
def _named(path: Path | None) -> Iterator[None]:
    """Data errors of the block begin with the file's name."""
    try:
        yield
    except DataError as error:
        raise error if str(path) in str(error) else DataError(f"{path}: {error}") from error


def _check_data(path: Path) -> None:
    """Say before any model is loaded that there is nothing to train on."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; give a UTF-8 text file, or a .npy file of tokens")
    if not path.stat().st_size:
        raise DataError(f"{path}: the file is empty; give a file with some text")


def _check_target(out: Path, *inputs: str) -> None:
    """A saved model takes its folder's place, so that folder must be new, empty or an earlier model, and no input."""
    for name in inputs:
        if out.resolve() == Path(name).resolve():
            raise CheckpointError(f"{out}: is also the model that is read; give another --out")
    if out.exists() and not (out / "config.json").is_file() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out}: exists and holds no model; give an empty or a new folder as --out")


def _save(model: Any, tokenizer: Any, out: Path) -> None:
    with atomic_directory(out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()

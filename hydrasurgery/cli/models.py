"""Commands on models: look at one, rewrite, distil and evaluate it, let it generate, export it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from hydrasurgery.cli.outputs import check_outputs, shown_if_lost
from hydrasurgery.cli.shared import (
    AUTO,
    LAYER,
    LONGEST,
    TOKENS,
    Count,
    Device,
    Model,
    Seed,
    on_device,
    refuse,
    wide_console,
)
from hydrasurgery.cli.signals import hinting
from hydrasurgery.decoders import check_length, end_tokens, position_limit
from hydrasurgery.errors import CheckpointError, DataError, HydraError, PlanError, UnsupportedModelError
from hydrasurgery.files import atomic_write_json, check_new, is_utf8, json_text, real_path
from hydrasurgery.folders import owned_folder
from hydrasurgery.json_files import shown
from hydrasurgery.loading import load_model, load_tokenizer
from hydrasurgery.plan import Plan

if TYPE_CHECKING:
    from torch import Tensor

    from hydrasurgery.ir.region import Region

CALIBRATION_ROWS, CALIBRATION_LENGTH = 4, 512  # sequences and tokens each


def inspect(model: Model) -> None:
    """Show each attention layer's heads and variant, and whether its heads can become linear.

    Example: hydrasurgery inspect Qwen/Qwen3-0.6B
    """
    from rich.table import Table

    from hydrasurgery.ir.capture import capture
    from hydrasurgery.ir.stitch import region_modules
    from hydrasurgery.passes import parse
    from hydrasurgery.sharing import share_copy
    from hydrasurgery.surgery import hybrid_pipeline

    decoder = load_model(model)
    surgery = getattr(decoder.config, "hydrasurgery", None)
    if region_modules(decoder) and surgery is not None:
        made, passes = Plan.from_dict(surgery["plan"], model), surgery["pipeline"]
        own = "" if parse(passes) == parse(hybrid_pipeline(made.layer)) else f"\npasses {passes}"
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
    wide_console().print(table)
    refused = [f"{region.name}: {why}" for region, why in zip(regions, verdicts, strict=True) if why]
    if refused:
        raise UnsupportedModelError(refused[0])


def rewrite(
    model: Model,
    plan: Annotated[Path, typer.Option(help="A plan file.")],
    out: Annotated[Path, typer.Option(help="The folder of the hybrid.")],
    layer: Annotated[str | None, typer.Option(help=f"{LAYER} By default what the plan says.")] = None,
    calibrate_text: Annotated[
        Path | None, typer.Option(help="Text on which linear heads are fitted to the teacher's.")
    ] = None,
) -> None:
    """Turn the heads that a plan calls linear into linear attention, and save the untrained hybrid.

    Example: hydrasurgery rewrite Qwen/Qwen3-0.6B --plan plan.json --out hybrid --calibrate-text book.txt
    """
    from hydrasurgery.conversion import rewrite as rewrite_heads
    from hydrasurgery.evaluation import load_text

    check_outputs([model, plan, calibrate_text], owned=[out])
    chosen = Plan.load(plan)
    text = None if calibrate_text is None else load_text(calibrate_text)
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


def distill(
    hybrid: Annotated[str, typer.Argument(metavar="HYBRID", help="What rewrite saved.")],
    teacher: Annotated[str, typer.Option(help="The model it was rewritten from: a folder or a hub name.")],
    data: Annotated[Path, typer.Option(help="A UTF-8 text file, or a .npy file of tokens.")],
    out: Annotated[Path, typer.Option(help="The folder of the run; the model is saved under OUT/model.")],
    recipe: Annotated[str, typer.Option(help="hydrahead, demo, or a recipe's JSON file.")] = "hydrahead",
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in OUT.")] = False,
    seed: Seed = 0,
    device: Device = AUTO,
) -> None:
    """Train a hybrid to follow its teacher; the weights are trained and saved in float32.

    Example: hydrasurgery distill hybrid --teacher Qwen/Qwen3-0.6B --data book.txt --recipe demo --out run
    """
    from hydrasurgery.sharing import share_parameters
    from hydrasurgery.transfer import distill as train
    from hydrasurgery.transfer import get_recipe
    from hydrasurgery.transfer.data import check_file

    steps = get_recipe(recipe)
    check_file(data)
    written = [out / "recipe.json", out / "metrics.jsonl"]
    check_outputs([hybrid, teacher, data], files=written, owned=[out / "model"], folders=[out])
    if real_path(hybrid) == real_path(teacher):
        raise CheckpointError(f"{hybrid}: is hybrid and teacher in one; give --teacher the model it was rewritten from")
    if not resume and any((out / "checkpoints").glob("*")):
        raise CheckpointError(
            f"{out / 'checkpoints'}: holds an earlier run; add --resume to go on, or give another --out"
        )
    followed = on_device(load_model(teacher, dtype=torch.float32), device)
    student = on_device(load_model(hybrid, dtype=torch.float32), device)
    tokenizer = load_tokenizer(hybrid, student)
    share_parameters(student, followed)
    with (
        _named(data),
        hinting(f"add --resume to go on from the last checkpoint in {out / 'checkpoints'}, if there is one"),
    ):
        result = train(student, followed, data, recipe=steps, out=out, resume=resume, seed=seed, tokenizer=tokenizer)
    _save(student, tokenizer, out / "model")
    last = result.history[-1] if result.history else {"loss": float("nan")}
    typer.echo(f"{out / 'model'}: {len(result.history)} steps, last loss {last['loss']:.4g}")


def evaluate(
    context: typer.Context,
    model: Model,
    out: Annotated[Path, typer.Option(help="The result file to write (JSON).")],
    teacher: Annotated[str | None, typer.Option(help="A model to measure too, or the divergence from it.")] = None,
    suite: Annotated[str, typer.Option(help="own (recall, perplexity, divergence) or ruler (RULER's tasks).")] = "own",
    lengths: Annotated[
        str | None,
        typer.Option(help="Tokens a sequence, separated by commas; by default 256,512,1024, and 4096 of ruler."),
    ] = None,
    count: Count = 32,
    seed: Seed = 0,
    text: Annotated[Path | None, typer.Option(help="Text to hide things in; by default Python's reference.")] = None,
    tasks: Annotated[str, typer.Option(help="Of ruler: names separated by commas, or all.")] = "all",
    chat: Annotated[bool, typer.Option("--chat", help="Of ruler: use the tokenizer's chat template.")] = False,
    batch_size: Annotated[
        int | None, typer.Option(min=1, max=100_000, help="Of ruler: prompts at once; by default 65,536 tokens.")
    ] = None,
    device: Device = AUTO,
) -> None:
    """Measure exact recall, perplexity and, with a teacher, the divergence from it; or RULER's tasks; at several lengths.

    Example: hydrasurgery eval run/model --teacher Qwen/Qwen3-0.6B --lengths 1024,4096 --out result.json
    """
    from hydrasurgery.evaluation import encode_text, evaluate_ruler, load_text
    from hydrasurgery.evaluation import evaluate as measure

    if suite not in ("own", "ruler"):
        raise typer.BadParameter(f"--suite {shown(suite)}: give own or ruler")
    ruler = suite == "ruler"
    if not ruler:
        refuse(context, ["tasks", "chat", "batch_size"], "only counts with --suite ruler")
    chosen = _tasks(tasks)
    sizes = _lengths(lengths or ("4096" if ruler else "256,512,1024"), count)
    check_outputs([model, teacher, text], files=[out])
    words = None if text is None else load_text(text)
    decoder = on_device(load_model(model), device)
    tokenizer = load_tokenizer(model, decoder)
    reference = None if teacher is None else on_device(load_model(teacher), device)
    settings: dict[str, Any] = {"model": model, "teacher": teacher, "lengths": sizes, "count": count, "seed": seed}
    if text is not None:
        settings["text"] = str(text)
    results: dict[str, Any]
    if ruler:
        settings |= {"suite": suite, "tasks": chosen, "chat": chat}
        models = {"model": decoder} | ({} if reference is None else {"teacher": reference})
        options: dict[str, Any] = {"tasks": chosen, "count": count, "seed": seed, "text": words, "chat": chat}
        results = evaluate_ruler(models, tokenizer, sizes, batch_size=batch_size, **options)
    else:
        ids = None if words is None else encode_text(tokenizer, words)
        results = measure(decoder, tokenizer, sizes, count=count, seed=seed, text_ids=ids, teacher=reference)
    found = {**settings, "results": results}
    with shown_if_lost(lambda: json_text(found)):
        atomic_write_json(out, found)
    if ruler:
        _print_ruler(results, chosen, sizes, count)
        return
    for name, values in results.items():
        typer.echo(f"{name:<12}" + "".join(f"{at:>10} {value:<10.4g}" for at, value in values.items()))


def generate(
    context: typer.Context,
    model: Model,
    prompt: Annotated[str, typer.Option(help="The text to go on from.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, max=LONGEST, help="Tokens to add at most.")] = 64,
    onnx: Annotated[
        Path | None, typer.Option(help="Run this export in ONNX Runtime; MODEL gives the tokenizer.")
    ] = None,
    device: Device = AUTO,
) -> None:
    """Continue a prompt, always with the likeliest token.

    Example: hydrasurgery generate run/model --prompt "The for statement is used to" --max-new-tokens 32
    """
    from transformers import GenerationConfig

    if onnx is not None:
        refuse(context, ["device"], "only counts without --onnx")
        typer.echo(_generate_onnx(onnx, load_tokenizer(model), prompt, max_new_tokens))
        return
    decoder = on_device(load_model(model), device)
    tokenizer = load_tokenizer(model, decoder)
    inputs = _encode(tokenizer, prompt).to(decoder.device)
    check_length([decoder], inputs["input_ids"].shape[1] + max_new_tokens)
    # All else that a checkpoint's generation_config.json may say would choose other tokens than the likeliest.
    decoder.generation_config = GenerationConfig(eos_token_id=list(end_tokens(decoder)) or None)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    tokens = decoder.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=padding)
    typer.echo(tokenizer.decode(tokens[0], skip_special_tokens=True))


def export(
    context: typer.Context,
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
    if out.suffix == ".pt2":
        refuse(context, ["target"], "only counts for *.onnx")
    if dtype not in ("auto", "float32", "float16", "bfloat16"):
        raise typer.BadParameter(f"--dtype {shown(dtype)}: give auto, float32, float16 or bfloat16")
    check_new(out)
    decoder = load_model(model, dtype=dtype if dtype == "auto" else getattr(torch, dtype))
    if out.suffix == ".pt2":
        export_pt2(decoder, out, cache=not no_cache)
    else:
        export_onnx(decoder, out, target=target, cache=not no_cache)


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


def _encode(tokenizer: Any, prompt: str) -> Any:
    if not is_utf8(prompt):
        raise DataError("--prompt: is not UTF-8 text; give it in UTF-8")
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    if not inputs["input_ids"].numel():
        raise DataError("--prompt: the prompt encodes to no token; give some text")
    return inputs


def _generate_onnx(path: Path, tokenizer: Any, prompt: str, max_new_tokens: int) -> str:
    from hydrasurgery.export import OnnxDecoder

    inputs = _encode(tokenizer, prompt)
    tokens = OnnxDecoder(path).generate(inputs["input_ids"].numpy(), max_new_tokens=max_new_tokens)
    return str(tokenizer.decode(tokens[0], skip_special_tokens=True))


def _lengths(text: str, count: int) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"[0-9]{1,9}", part) and 1 <= int(part) <= LONGEST for part in parts):
        raise typer.BadParameter(
            f"--lengths {shown(text)}: give positive numbers up to {LONGEST:,} separated by commas, such as 256,512"
        )
    sizes = [int(part) for part in parts]
    if len(set(sizes)) < len(sizes):
        raise typer.BadParameter(f"--lengths {shown(text)}: a length stands there twice")
    if max(sizes) * count > TOKENS:
        raise typer.BadParameter(
            f"--lengths {shown(text)}: {count:,} sequences of {max(sizes):,} tokens are more than {TOKENS:,} tokens; give fewer"
        )
    return sizes


def _tasks(text: str) -> list[str]:
    from hydrasurgery.evaluation import RULER

    names = list(RULER) if text == "all" else [part.strip() for part in text.split(",")]
    for name in names:
        if name not in RULER:
            raise typer.BadParameter(f"--tasks {shown(name)}: is no task; give all, or some of {', '.join(RULER)}")
    if len(set(names)) < len(names):
        raise typer.BadParameter(f"--tasks {shown(text)}: a task stands there twice")
    return names


def _print_ruler(results: dict[str, Any], tasks: list[str], sizes: list[int], count: int) -> None:
    from rich.table import Table

    table = Table(title="RULER: share of the references that an answer holds, mean over samples")
    for heading in ("task", "tokens", "samples", *results):
        table.add_column(heading, justify="left" if heading == "task" else "right")
    for task in tasks:
        for size in sizes:
            scores = (f"{found[task][str(size)]:.3f}" for found in results.values())
            table.add_row(task, f"{size:,}", f"{count:,}", *scores)
    wide_console().print(table)


def _rows(tokenizer: Any, text: str, model: Any, path: Path | None) -> Tensor:
    """The text's first tokens as up to four equal rows [B, T]."""
    from hydrasurgery.evaluation import encode_text

    with _named(path):
        ids = encode_text(tokenizer, text)
    length = min(CALIBRATION_LENGTH, position_limit(model) or CALIBRATION_LENGTH, len(ids))
    rows = min(CALIBRATION_ROWS, len(ids) // length)
    return ids[: rows * length].view(rows, length)


@contextmanager
def _named(path: Path | None) -> Iterator[None]:
    """Data errors of the block begin with the file's name."""
    try:
        yield
    except DataError as error:
        raise error if str(path) in str(error) else DataError(f"{path}: {error}") from error


def _save(model: Any, tokenizer: Any, out: Path) -> None:
    with owned_folder(out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

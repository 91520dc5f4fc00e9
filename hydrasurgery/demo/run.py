"""The demo: from the shipped teacher to trained, saved, reloaded and exported hybrids, and a report that compares them."""

from __future__ import annotations

import os
import time
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from transformers import AutoModelForCausalLM

from hydrasurgery.choose import plan_heads
from hydrasurgery.costs import forecast, format_bytes
from hydrasurgery.demo.arms import (
    CONTINUATION,
    LENGTHS,
    PROMPT,
    SEED,
    TRAINING_LENGTH,
    Arm,
    continuation,
    run_arms,
)
from hydrasurgery.demo.teacher import load_teacher
from hydrasurgery.errors import DemoError, OutputError
from hydrasurgery.evaluation import encode_text, library_text
from hydrasurgery.export import OnnxDecoder, export_onnx
from hydrasurgery.files import atomic_write_json, atomic_write_text, check_folder
from hydrasurgery.selection import score_heads
from hydrasurgery.selection.plots import new_figure, save_figure
from hydrasurgery.transfer import RECIPES, Recipe

LONG = 524288  # tokens of the forecast
TASKS = ("needles", "dense")
MARK = "demo.json"  # a file that says that the folder is a demo's


def run_demo(out: str | Path, quick: bool = False, recipe: Recipe | None = None) -> Path:
    """Score, plan 7:1, rewrite, transfer, evaluate, save, reload, generate and export; returns the report's path.

    The arms run in processes of their own, so a script that calls this does so under `if __name__ == "__main__"`. A run
    that was interrupted goes on from its checkpoints.

    Args:
        out: the folder of `report.md`, the pictures, `plan.json` and the checkpoint.
        quick: only the chosen heads and the all-linear hybrid.
        recipe: the transfer's stages; by default the preset "demo".

    Raises:
        OutputError: `out` cannot be written into, or holds something else than an earlier demo.
        DemoError: a process was killed, or a saved hybrid gives other tokens than before.
    """
    out, console, begun = Path(out), Console(stderr=True), time.monotonic()
    _claim(out)
    recipe = recipe or RECIPES["demo"]
    teacher, tokenizer = load_teacher()
    scores = score_heads(teacher, tokenizer, length=256, count=8, seed=SEED)
    scores.save(out / "scores.json")
    scores.plot(out / "heads.png")
    plan = plan_heads(scores, ratio="7:1")
    plan.save(out / "plan.json")
    console.print(str(plan), highlight=False, soft_wrap=True)

    rivals = {"all linear": plan_heads(teacher, strategy="all-linear")}
    if not quick:
        rivals["random heads"] = plan_heads(teacher, ratio="7:1", strategy="random", seed=SEED)
        rivals["layer-wise"] = plan_heads(teacher, ratio="7:1", strategy="layerwise")
    arms = [
        Arm("chosen heads", plan, recipe, save=out / "hybrid"),
        *(Arm(name, rival, recipe) for name, rival in rivals.items()),
        Arm("rewritten, untrained", plan),
        Arm("teacher", plan_heads(teacher, strategy="all-full")),
    ]
    found = {arm.name: arm for arm in run_arms(arms, out / "runs", console)}
    arms = [found.pop("teacher"), found.pop("rewritten, untrained"), *found.values()]

    chosen = found["chosen heads"].continuation
    sample = str(tokenizer.decode(_reload(out / "hybrid", chosen)))
    exported = _export(out / "hybrid", out / "hybrid.onnx", chosen)
    draw_recall(arms, out / "recall.png")
    atomic_write_json(out / "results.json", [{"arm": a.name, "seconds": a.seconds, **a.result} for a in arms])
    minutes = (time.monotonic() - begun) / 60
    written = atomic_write_text(out / "report.md", report(arms, recipe, sample, exported, minutes))
    console.print(f"[bold]{written}[/bold]")
    return written


def _claim(out: Path) -> None:
    """Mark the folder as the demo's, which may overwrite what is in it.

    Raises:
        OutputError: see `run_demo`.
    """
    new_figure((1, 1))  # the report has pictures
    check_folder(out)
    if out.is_dir() and os.listdir(out) and not (out / MARK).is_file():
        raise OutputError(f"{out}: holds other things than a demo; give the name of a new or an empty folder")
    atomic_write_json(out / MARK, {"format": "hydrasurgery-demo", "version": 1})


def _reload(folder: Path, expected: tuple[int, ...]) -> list[int]:
    """Load the saved hybrid as a user would, and return what it generates: the tokens it gave before it was saved."""
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    _, tokenizer = load_teacher()
    tokens = continuation(loaded, encode_text(tokenizer, library_text("held-out")))
    if tokens != expected:
        raise DemoError(f"{folder}: the reloaded hybrid generates other tokens than the one that was saved")
    return list(tokens)


def _export(folder: Path, file: Path, expected: tuple[int, ...]) -> str:
    """Export the saved hybrid to ONNX and let ONNX Runtime generate the same tokens; returns a sentence for the report."""
    if find_spec("onnxruntime") is None or find_spec("onnxscript") is None:
        return "It was not exported to ONNX: the extra onnx is not installed."
    file.unlink(missing_ok=True)
    written = export_onnx(AutoModelForCausalLM.from_pretrained(folder), file, verbose=False)
    _check_export(file, expected)
    return f"Exported to ONNX ({file.name}, {format_bytes(written.bytes)}), it gives the same text in ONNX Runtime."


def _check_export(file: Path, expected: tuple[int, ...]) -> None:
    """Let ONNX Runtime continue the held-out text, and raise if it gives other tokens."""
    _, tokenizer = load_teacher()
    prompt = encode_text(tokenizer, library_text("held-out"))[None, :PROMPT].numpy()
    tokens = OnnxDecoder(file).generate(prompt, max_new_tokens=CONTINUATION)[0, PROMPT:]
    if tuple(tokens.tolist()) != expected:
        raise DemoError(f"{file}: ONNX Runtime generates other tokens than PyTorch")


def report(arms: list[Arm], recipe: Recipe, sample: str, exported: str, minutes: float) -> str:
    """The report's text: one row per arm, then what the table says, a sample, and what became of the export."""
    stages = ", ".join(f"{s.num_steps} steps {s.name}" for s in recipe.stages)
    tokens = recipe.stages[0].batch_size * recipe.stages[0].length
    lengths = " / ".join(map(str, LENGTHS))
    lines = [
        "# From a softmax teacher to a 7:1 hybrid",
        "",
        f"Made by `hydrasurgery demo` in {minutes:.1f} minutes. Every arm saw the same tokens: {stages} of {tokens:,} "
        f"tokens each, data seed {SEED}; all were measured on the same sequences, evaluation seed {SEED + 1}. Recall is "
        f"exact match of a two-token value; the training length is {TRAINING_LENGTH}. The KL is that of the next token to "
        f"the teacher's, at {TRAINING_LENGTH} tokens over all three tasks, the perplexity that of held-out text. Caches "
        "are in fp32.",
        "",
        f"| arm (full heads) | KL | needles {lengths} | dense recall {lengths} | perplexity | cache at {TRAINING_LENGTH} "
        f"| cache at {LONG:,} | training |",
        "|---|---|---|---|---|---|---|---|",
        *map(_row, arms),
        "",
        *findings(arms),
        "",
        "![scores](heads.png) ![recall](recall.png)",
        "",
        "The chosen hybrid, saved and reloaded, continues held-out text with:",
        "",
        f"> {sample!r}",
        "",
        exported,
        "",
    ]
    return "\n".join(lines)


def _row(arm: Arm) -> str:
    needles, dense = (" / ".join(f"{arm.result[task][str(n)]:.2f}" for n in LENGTHS) for task in TASKS)
    caches = [forecast(arm.plan, length=n, bytes_per_element=4).hybrid_bytes for n in (TRAINING_LENGTH, LONG)]
    kl, perplexity = (arm.result[key][str(TRAINING_LENGTH)] for key in ("kl", "perplexity"))
    return (
        f"| {arm.name} ({arm.plan.num_full}) | {kl:.3f} | {needles} | {dense} | {perplexity:.1f} | "
        f"{format_bytes(caches[0])} | {format_bytes(caches[1])} | {arm.seconds:.0f} s |"
    )


def findings(arms: list[Arm]) -> list[str]:
    """What the table shows, in sentences computed from it."""
    by_name = {arm.name: arm for arm in arms}

    def kept(name: str) -> dict[str, float]:
        """The share of the teacher's recall at training length that an arm keeps, by task, to a hundredth."""
        at = str(TRAINING_LENGTH)
        whole = by_name["teacher"].result
        return {task: round(by_name[name].result[task][at] / max(whole[task][at], 1e-9), 2) for task in TASKS}

    def says(name: str) -> str:
        return " and ".join(f"{share:.0%} ({task})" for task, share in kept(name).items())

    lines = [
        f"At training length the chosen heads keep {says('chosen heads')} of the teacher's recall, all-linear keeps "
        f"{says('all linear')}."
    ]
    chosen = by_name["chosen heads"]
    for rival in ("random heads", "layer-wise"):
        if rival not in by_name:
            continue
        arm = by_name[rival]
        as_good = all(kept(rival)[task] >= kept("chosen heads")[task] for task in TASKS)
        verdict = "does as well as the chosen heads there" if as_good else "does worse than the chosen heads there"
        divergence = [a.result["kl"][str(TRAINING_LENGTH)] for a in (arm, chosen)]
        lines.append(
            f"The {rival} plan ({arm.plan.num_full} full heads) {verdict}: {says(rival)}; its KL to the teacher is "
            f"{divergence[0]:.3f} against {divergence[1]:.3f}."
        )
    return lines


def draw_recall(arms: list[Arm], path: Path) -> None:
    """Recall against length, one line per arm, needles beside dense recall."""
    figure = new_figure((9, 3.6))
    for axes, task in zip(figure.subplots(1, 2, sharey=True), TASKS, strict=True):
        for arm in arms:
            axes.plot(LENGTHS, [arm.result[task][str(n)] for n in LENGTHS], marker="o", label=arm.name)
        axes.axvline(TRAINING_LENGTH, color="0.8", zorder=0)
        axes.set(title=task, xlabel="tokens", xscale="log", xticks=LENGTHS, xticklabels=LENGTHS, ylim=(-0.03, 1.03))
    figure.axes[0].set_ylabel("recall")
    figure.axes[1].legend(fontsize=8)
    save_figure(figure, path)


__all__ = ["findings", "report", "run_demo"]

"""The demo: from the shipped teacher to trained, saved and reloaded hybrids, and a report that compares them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from hydrasurgery.demo.corpus import training_batch
from hydrasurgery.demo.teacher import load_teacher
from hydrasurgery.evaluation import encode_text, evaluate, library_text
from hydrasurgery.files import atomic_directory, atomic_write_json, atomic_write_text
from hydrasurgery.forecast import forecast
from hydrasurgery.plan import Plan, plan_heads
from hydrasurgery.rewrite import rewrite
from hydrasurgery.selection import score_heads
from hydrasurgery.transfer import RECIPES, Recipe, Stage, distill
from hydrasurgery.transfer.start import calibrate

SEED = 0
LENGTHS = (256, 512, 1024)
TRAINING_LENGTH = 512
COUNT = 16  # sequences a task and length


@dataclass(frozen=True)
class Mixture:
    """The teacher's own mixture of needles, dense recall and text; a batch depends on nothing but (seed, stage, step)."""

    tokenizer: PreTrainedTokenizerBase
    text_ids: Tensor

    def batch(self, step: int, stage: Stage, generator: torch.Generator) -> Mapping[str, Tensor]:
        """Batch `step` of `stage`; see `hydrasurgery.transfer.BatchSource`."""
        seed = int(torch.randint(2**31, (1,), generator=generator))
        ids, labels = training_batch(
            self.tokenizer, self.text_ids, stage.length, stage.batch_size * stage.length, (seed,)
        )
        return {"input_ids": ids, "labels": labels}


@dataclass
class Arm:
    """One row of the report."""

    name: str
    plan: Plan
    result: dict[str, dict[str, float]]
    seconds: float = 0.0


def run_demo(out: str | Path, quick: bool = False, recipe: Recipe | None = None) -> Path:
    """Score, plan 7:1, rewrite, transfer, evaluate, save, reload and generate; returns the report's path.

    Args:
        out: the folder of `report.md`, the pictures, `plan.json` and the checkpoint.
        quick: only the chosen heads and the all-linear hybrid.
        recipe: the transfer's stages; by default the preset "demo".
    """
    out, console, begun = Path(out), Console(stderr=True), time.monotonic()
    recipe = recipe or RECIPES["demo"]
    teacher, tokenizer = load_teacher()
    train_text, held_out = (encode_text(tokenizer, library_text(part)) for part in ("train", "held-out"))
    data = Mixture(tokenizer, train_text)

    def measure(model: nn.Module) -> dict[str, dict[str, float]]:
        return evaluate(model, tokenizer, LENGTHS, count=COUNT, seed=SEED + 1, text_ids=held_out, teacher=teacher)

    console.rule("scores")
    scores = score_heads(teacher, tokenizer, length=256, count=8, seed=SEED)
    scores.save(out / "scores.json")
    scores.plot(out / "heads.png")
    plan = plan_heads(scores, ratio="7:1")
    plan.save(out / "plan.json")
    console.print(str(plan), highlight=False)

    plans = {"chosen heads": plan, "all linear": plan_heads(teacher, strategy="all-linear")}
    if not quick:
        plans |= {
            "random heads": plan_heads(teacher, ratio="7:1", strategy="random", seed=SEED),
            "layer-wise": plan_heads(teacher, ratio="7:1", strategy="layerwise"),
        }
    everything = plan_heads(teacher, strategy="all-full")
    arms = [Arm("teacher", everything, measure(teacher))]
    batch = data.batch(0, replace(recipe.stages[0], name="align"), torch.Generator().manual_seed(SEED))
    for name, arm_plan in plans.items():
        console.rule(name)
        start = time.monotonic()
        hybrid = rewrite(teacher, arm_plan)
        calibrate(hybrid, teacher, batch["input_ids"])
        if name == "chosen heads":
            arms.append(Arm("rewritten, untrained", arm_plan, measure(hybrid)))
        folder = out / "runs" / name.replace(" ", "-")
        distill(hybrid, teacher, data, recipe=recipe, out=folder, seed=SEED)
        arms.append(Arm(name, arm_plan, measure(hybrid), time.monotonic() - start))
        if name == "chosen heads":
            sample = _save_and_reload(hybrid, tokenizer, out / "hybrid", held_out)
    draw_recall(arms, out / "recall.png")
    atomic_write_json(out / "results.json", [{"arm": a.name, "seconds": a.seconds, **a.result} for a in arms])
    text = report(arms, recipe, sample, time.monotonic() - begun)
    console.print(f"[bold]{out / 'report.md'}[/bold]")
    return atomic_write_text(out / "report.md", text)


def _save_and_reload(hybrid: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path, text: Tensor) -> str:
    """Save the hybrid, load it as a user would, check that it says the same, and return what it generates."""
    with atomic_directory(folder) as temporary:
        hybrid.save_pretrained(temporary)  # type: ignore[operator]
        tokenizer.save_pretrained(temporary)
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    prompt = text[None, :48]
    settings: dict[str, Any] = {"max_new_tokens": 32, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    models: tuple[Any, Any] = hybrid, loaded
    before, after = (m.eval().generate(prompt, **settings) for m in models)
    if not torch.equal(before, after):
        raise RuntimeError(f"{folder}: the reloaded hybrid generates other tokens than the one that was saved")
    return str(tokenizer.decode(after[0, 48:]))


def report(arms: list[Arm], recipe: Recipe, sample: str, seconds: float) -> str:
    """The report's text: one row an arm, then what the table says."""
    lines = [
        "# From a softmax teacher to a 7:1 hybrid",
        "",
        f"Made by `hydrasurgery demo` in {seconds / 60:.1f} minutes. Every arm saw the same tokens (data seed {SEED}, "
        f"evaluation seed {SEED + 1}): " + ", ".join(f"{s.num_steps} steps {s.name}" for s in recipe.stages) + f" of "
        f"{recipe.stages[0].batch_size * recipe.stages[0].length:,} tokens. Recall is exact match of a two-token value; "
        f"the training length is {TRAINING_LENGTH}.",
        "",
        "| arm (full heads) | KL | needles "
        + " / ".join(map(str, LENGTHS))
        + " | dense recall "
        + " / ".join(map(str, LENGTHS))
        + f" | perplexity | cache at {TRAINING_LENGTH} | cache at 512K |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm in arms:
        result = arm.result

        def row(key: str, result: dict[str, dict[str, float]] = result) -> str:
            return " / ".join(f"{result[key][str(n)]:.2f}" for n in LENGTHS)

        cost = [forecast(arm.plan, length=n, bytes_per_element=4).hybrid_bytes for n in (TRAINING_LENGTH, 524288)]
        kl = result["kl"][str(TRAINING_LENGTH)]
        ppl = result["perplexity"][str(TRAINING_LENGTH)]
        lines.append(
            f"| {arm.name} ({arm.plan.num_full}) | {kl:.3f} | {row('needles')} | {row('dense')} | {ppl:.1f} | "
            f"{cost[0] / 2**10:,.0f} KiB | {cost[1] / 2**20:,.0f} MiB |"
        )
    lines += [
        "",
        *findings(arms),
        "",
        "The chosen hybrid, saved and reloaded, continues held-out text with:",
        "",
        f"> {sample!r}",
        "",
    ]
    return "\n".join(lines)


def findings(arms: list[Arm]) -> list[str]:
    """What the table shows, in sentences computed from it."""
    by_name = {arm.name: arm for arm in arms}

    def kept(name: str) -> float:
        """The smaller of the two shares of the teacher's recall at training length that an arm keeps."""
        at = str(TRAINING_LENGTH)
        return min(
            by_name[name].result[task][at] / max(by_name["teacher"].result[task][at], 1e-9)
            for task in ("needles", "dense")
        )

    lines = [
        f"Chosen heads keep {kept('chosen heads'):.0%} of the teacher's recall at training length (the worse of the two "
        f"tasks), all-linear {kept('all linear'):.0%}."
    ]
    for rival in ("random heads", "layer-wise"):
        if rival in by_name:
            verdict = "as well as or better than" if kept(rival) >= kept("chosen heads") else "worse than"
            lines.append(f"The {rival} plan does {verdict} the chosen heads: {kept(rival):.0%}.")
    return lines


def draw_recall(arms: list[Arm], path: Path) -> None:
    """Recall against length, one line an arm, needles beside dense recall."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, task in zip(figure.subplots(1, 2, sharey=True), ("needles", "dense"), strict=True):
        for arm in arms:
            axes.plot(LENGTHS, [arm.result[task][str(n)] for n in LENGTHS], marker="o", label=arm.name)
        axes.axvline(TRAINING_LENGTH, color="0.8", zorder=0)
        axes.set(title=task, xlabel="tokens", xscale="log", xticks=LENGTHS, xticklabels=LENGTHS, ylim=(-0.03, 1.03))
    figure.axes[0].set_ylabel("recall")
    figure.axes[1].legend(fontsize=8)
    temporary = path.with_name(f".{path.name}.tmp.png")
    figure.savefig(temporary, dpi=150)
    temporary.replace(path)


__all__ = ["Arm", "Mixture", "findings", "report", "run_demo"]

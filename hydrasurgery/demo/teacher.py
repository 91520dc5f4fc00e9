"""The demo's teacher: a Qwen3 of one to two million parameters that has learned to retrieve.

`python -m hydrasurgery.demo.teacher --out runs/teacher` trains it again. Matrices are trained by Muon, everything else
by AdamW, over sequences that grow from 16 to 512 tokens: retrieval forms early where few facts compete, and is then
stretched.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

from hydrasurgery.demo.corpus import TEXT_PIECES, build_tokenizer, training_batch
from hydrasurgery.errors import DivergedError
from hydrasurgery.evaluation.metrics import evaluate
from hydrasurgery.evaluation.text import encode_text, library_text
from hydrasurgery.files import atomic_write_json
from hydrasurgery.folders import check_owned, owned_folder

SHIPPED = Path(__file__).with_name("teacher")


@dataclass(frozen=True)
class Phase:
    """One length of the curriculum.

    Attributes:
        length: tokens per sequence.
        end: share of the run's steps at which the phase is over at the latest.
        learned: the phase is over sooner once the running mean of its answer loss is below this.
    """

    length: int
    end: float
    learned: float = 0.0


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the teacher's weights, on one machine and one version of torch.

    Attributes:
        layers, hidden, heads, kv_heads, head_dim, feed_forward: the shape of the Qwen3.
        tokens: tokens per step.
        curriculum: the lengths, in order.
        muon_rate: peak learning rate of the matrices; the other two are AdamW's.
        text_weight: weight of the text's loss beside that of the answers.
        warmup, cooldown: shares of the steps over which the rates rise from 0 and fall to 0.
    """

    seed: int = 0
    layers: int = 8
    hidden: int = 128
    heads: int = 16
    kv_heads: int = 8
    head_dim: int = 16
    feed_forward: int = 256
    rope_theta: float = 1e6
    steps: int = 1200
    tokens: int = 2048
    curriculum: tuple[Phase, ...] = (
        Phase(16, 0.3, 0.4),
        Phase(32, 0.45, 0.4),
        Phase(64, 0.55, 0.4),
        Phase(128, 0.65, 0.4),
        Phase(256, 0.75, 0.4),
        Phase(512, 1.0),
    )
    muon_rate: float = 0.02
    embedding_rate: float = 0.02
    norm_rate: float = 1e-2
    text_weight: float = 0.3
    warmup: float = 0.025
    cooldown: float = 0.35

    def advances(self, phase: int, steps: int, step: int, answer_loss: float) -> bool:
        """Whether phase `phase` of the curriculum is over, `steps` steps after its start and `step` after the run's."""
        if phase + 1 == len(self.curriculum):
            return False
        learned = steps >= 20 and answer_loss < self.curriculum[phase].learned  # a few steps say little
        return learned or step >= self.curriculum[phase].end * self.steps

    def rate(self, step: int) -> float:
        """Factor of the learning rates at `step`: up, flat, down."""
        left = (self.steps - step) / (self.cooldown * self.steps)
        return min(1.0, (step + 1) / max(1.0, self.warmup * self.steps), left)


def load_teacher(folder: str | Path = SHIPPED) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerBase]:
    """The shipped teacher (or another of its kind) in fp32 and eval mode, with its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def build_teacher(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Qwen3ForCausalLM:
    """An untrained teacher, its weights drawn from the recipe's seed.

    Embeddings start at unit size and every block at zero, so that a token's identity, which look-up needs, is not
    drowned by random layers; the final norm starts small, so that the tied head says nothing yet. All embeddings share
    a direction (which no softmax sees): without it a head has nothing constant by which to attend to a position.
    """
    torch.manual_seed(recipe.seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        intermediate_size=recipe.feed_forward,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=recipe.head_dim,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": recipe.rope_theta},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model: Any = Qwen3ForCausalLM(config)
    embeddings = nn.init.normal_(model.get_input_embeddings().weight)
    embeddings.data += torch.randn(recipe.hidden)
    nn.init.constant_(model.model.norm.weight, 0.05)
    for layer in model.model.layers:
        nn.init.zeros_(layer.self_attn.o_proj.weight)
        nn.init.zeros_(layer.mlp.down_proj.weight)
    return model


def train(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    metrics: Path,
    *,
    minutes: float | None = None,
    console: Console | None = None,
) -> tuple[Qwen3ForCausalLM, dict[str, Any]]:
    """Train a teacher.

    Args:
        metrics: JSONL file, one line every 20 steps: step, tokens, length, text and answer loss, seconds. Overwritten.
        minutes: stop after this long even if steps remain; a run that was cut so is not reproducible.

    Returns:
        the model and {"steps", "tokens", "minutes", "text_loss", "answer_loss"} as reached.

    Raises:
        DivergedError: a loss is no longer finite.
    """
    model, text_ids = build_teacher(recipe, tokenizer).train(), encode_text(tokenizer, library_text("train"))
    optimizers = _optimizers(model, recipe)
    start, seen, phase, begun = time.monotonic(), 0, 0, 0
    state: dict[str, float] = {}
    metrics.parent.mkdir(parents=True, exist_ok=True)
    with metrics.open("w", encoding="utf-8") as log, _progress(console) as progress:
        bar = progress.add_task("train", total=recipe.steps, note="")
        for step in range(recipe.steps):
            length = recipe.curriculum[phase].length
            input_ids, labels = training_batch(tokenizer, text_ids, length, recipe.tokens, (recipe.seed, step))
            losses = _step(model, optimizers, recipe, step, input_ids, labels)
            seen += input_ids.numel()
            state = {name: 0.95 * state.get(name, loss) + 0.05 * loss for name, loss in losses.items()}
            elapsed = time.monotonic() - start
            if step % 20 == 19:
                line = {"step": step + 1, "tokens": seen, "length": length, **state, "seconds": round(elapsed, 1)}
                log.write(json.dumps(line) + "\n")
                log.flush()
            progress.update(bar, advance=1, note=f"length {length} answers {state['answer_loss']:.3f}")
            if minutes is not None and elapsed > 60 * minutes:
                break
            if recipe.advances(phase, step + 1 - begun, step + 1, state["answer_loss"]):
                phase, begun, state = phase + 1, step + 1, {"text_loss": state["text_loss"]}
    reached = {"steps": step + 1, "tokens": seen, "minutes": round(elapsed / 60, 1), **state}
    return model.eval(), reached


def _step(
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    recipe: Recipe,
    step: int,
    input_ids: Tensor,
    labels: Tensor,
) -> dict[str, float]:
    text_loss, answer_loss = _losses(model(input_ids=input_ids, use_cache=False).logits, input_ids, labels)
    if not torch.isfinite(text_loss + answer_loss):
        raise DivergedError(f"demo teacher: the loss is not finite at step {step}; lower the rates or change the seed")
    (recipe.text_weight * text_loss + answer_loss).backward()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * recipe.rate(step)
        optimizer.step()
        optimizer.zero_grad()
    return {"text_loss": text_loss.item(), "answer_loss": answer_loss.item()}


def _losses(logits: Tensor, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross entropy of the text's tokens and of the answers'; stated keys and values are noise, so not learned."""
    targets = input_ids[:, 1:]
    each = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    text, answers = targets < TEXT_PIECES, labels[:, 1:] != -100
    return (each * text).sum() / text.sum().clamp(min=1), (each * answers).sum() / answers.sum().clamp(min=1)


def _optimizers(model: Any, recipe: Recipe) -> list[torch.optim.Optimizer]:
    embedding = model.get_input_embeddings().weight
    norms = [p for p in model.parameters() if p.ndim == 1]
    matrices = [p for p in model.parameters() if p.ndim == 2 and p is not embedding]
    groups = [{"params": [embedding], "lr": recipe.embedding_rate}, {"params": norms, "lr": recipe.norm_rate}]
    optimizers = [
        torch.optim.Muon(matrices, lr=recipe.muon_rate, weight_decay=0.0),
        torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def round_to_half(model: nn.Module) -> None:
    """Round every parameter to a value that fp16 holds; dtypes stay, and so do buffers (the rotary frequencies)."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half())


def save_teacher(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: str | Path, training: dict[str, Any]
) -> None:
    """Write the teacher in fp16, its tokenizer and `training.json`; the folder appears whole or not at all."""
    with owned_folder(folder) as temporary:
        copy.deepcopy(model).half().save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        atomic_write_json(temporary / "training.json", training)
        temporary.chmod(0o755)  # temporary files are private; an installed package is for every user
        for file in temporary.iterdir():
            file.chmod(0o644)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: train, measure, save."""
    options = _parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    shape = {k: getattr(options, k) for k in ("layers", "heads", "kv_heads")}
    recipe = Recipe(seed=options.seed, steps=options.steps, **shape)
    console, out = Console(stderr=True), Path(options.out)
    check_owned(out)
    tokenizer = build_tokenizer()
    model, reached = train(
        recipe, tokenizer, out.with_name(out.name + ".jsonl"), minutes=options.minutes, console=console
    )
    round_to_half(model)  # so that what is measured is what is saved
    results = evaluate(model, tokenizer, lengths=(256, 512, 1024), count=32, seed=1)
    training = {
        "command": "python -m hydrasurgery.demo.teacher "
        f"--seed {recipe.seed} --steps {recipe.steps} --layers {recipe.layers} --heads {recipe.heads} "
        f"--kv-heads {recipe.kv_heads} --threads {torch.get_num_threads()}",
        "recipe": asdict(recipe),
        "training_length": recipe.curriculum[-1].length,
        "parameters": sum(p.numel() for p in model.parameters()),
        **reached,
        "threads": torch.get_num_threads(),
        "evaluation": results,
        "versions": dict(_versions()),
    }
    save_teacher(model, tokenizer, out, training)
    console.print(f"saved {out}: {json.dumps(results)}")


def _versions() -> Iterator[tuple[str, str]]:
    yield "python", platform.python_version()
    for name in ("torch", "transformers", "tokenizers", "numpy"):
        yield name, importlib.metadata.version(name)


def _progress(console: Console | None) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} {task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console or Console(stderr=True),
    )


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    defaults = Recipe()
    parser = argparse.ArgumentParser(
        prog="python -m hydrasurgery.demo.teacher", description="Train the demo's teacher.", allow_abbrev=False
    )
    parser.add_argument("--out", default="runs/teacher", help="folder to write; its metrics go to OUT.jsonl")
    parser.add_argument("--minutes", type=float, help="stop after this long even if steps remain (not reproducible)")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--layers", type=int, default=defaults.layers)
    parser.add_argument("--heads", type=int, default=defaults.heads, help="query heads per layer")
    parser.add_argument("--kv-heads", type=int, default=defaults.kv_heads)
    parser.add_argument("--threads", type=int, help="CPU threads; by default torch's choice")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()

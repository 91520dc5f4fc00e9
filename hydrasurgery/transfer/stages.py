"""`distill`: the three stages of the transfer, one loop for all of them."""

from __future__ import annotations

import contextlib
import functools
import math
import operator
import os
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hydrasurgery.decoders import evaluating, vocabulary_size
from hydrasurgery.errors import DataError, DivergedError, RecipeError
from hydrasurgery.transfer.checkpoints import Position, RunFolder
from hydrasurgery.transfer.checks import autocast, check_models, check_run
from hydrasurgery.transfer.compiling import Compiler
from hydrasurgery.transfer.data import Ahead, Batch, BatchSource, as_source, check_tokens, draw
from hydrasurgery.transfer.identity import identity
from hydrasurgery.transfer.lock import only_run
from hydrasurgery.transfer.lowering import lowered
from hydrasurgery.transfer.objectives import Objective, objective
from hydrasurgery.transfer.order import mix_seed
from hydrasurgery.transfer.progress import peak_tokens, progress_bar
from hydrasurgery.transfer.recipe import Recipe, Stage, get_recipe
from hydrasurgery.transfer.trainable import trainable_names

Record = dict[str, Any]


@dataclass(frozen=True)
class TransferResult:
    """What `distill` returns.

    Attributes:
        history: one record per step, of earlier sessions of the run too: `stage`, `stage_index`, `step` (from 1), `loss`
            (with `kl` and `ce` where they apply), `lr`, `grad_norm`, `tokens`, `seconds`.
        checkpoint: the last checkpoint, or None if nothing was written.

    Example: see `distill`.
    """

    history: list[Record]
    checkpoint: Path | None

    def losses(self, stage: str) -> list[float]:
        """The loss of every step of the stages called `stage`."""
        return [record["loss"] for record in self.history if record["stage"] == stage]


def distill(
    hybrid: nn.Module,
    teacher: nn.Module | None,
    data: Any,
    *,
    recipe: str | os.PathLike[str] | Recipe = "hydrahead",
    out: str | os.PathLike[str] | None = None,
    resume: bool = True,
    seed: int = 0,
    tokenizer: Any = None,
    progress: bool = True,
    callback: Callable[[Record], None] | None = None,
) -> TransferResult:
    """Train a hybrid to follow its teacher (paper section 4); the teacher comes out bit for bit as it went in.

    `align`: every hybrid attention layer runs on the hidden states that the teacher's layer sees; the loss is the mean
    over layers of |y^ - y|^2 / |y|^2. `distil`: KL(teacher || student) + ce_weight * cross entropy on the logits.
    `lengthen`: cross entropy. What is trained moves to memory of its own; the rest stays where `rewrite` left it.

    On a CUDA device the decoder layers of both models and the losses run compiled; the recipe's `compile` says otherwise. In each
    step the modules run them in the place of their `forward`, which is back before the callback is called.

    A run goes on only as what it was: a checkpoint in `out` is refused if its plan, layers, teacher (all bytes of its weights),
    data, seed or recipe differ. Of the recipe may change: `name`, `checkpoint_every`, `micro_batch`, `recompute`, `compile`, stages
    that have not begun, and the steps of the current stage, if the learning rates of steps that are done stay what they were.
    What is resumed gives the bits of a run that was not interrupted, unless it is compiled and its batches vary in size or padding.

    Args:
        hybrid: what `rewrite(teacher, plan)` gave; trained in place, on the device it is on.
        teacher: the model it follows, in any dtype and on any device; None if no stage needs one (only `lengthen`).
        data: a source of batches or tokens; see `hydrasurgery.transfer.as_source`.
        recipe: a preset's name ("hydrahead", "demo"), a `Recipe`, or the path of one saved as JSON.
        out: a folder for metrics and checkpoints, held by one run at a time; None writes nothing.
        resume: go on from the last checkpoint in `out`, to the very bits of a run that nobody disturbed if the machine and the
            number of threads are the same. False removes the metrics and checkpoints of an earlier run.
        seed: decides the data's order and dropout; runs with equal seeds see equal tokens.
        tokenizer: needed if `data` is a text file.
        progress: show a progress bar with the loss, the rate, tokens per second and, of cards whose peak is known, the share of it
            (`hydrasurgery.transfer.progress`).
        callback: called with the record of every step.

    Returns:
        The record of every step, and the last checkpoint.

    Raises:
        DivergedError: a loss or gradient is not finite; the last good checkpoint is kept and named.
        CompileError: layers cannot be compiled.
        DataError, RecipeError, CheckpointError, PlanError: naming what does not fit.

    Example:
        >>> import hydrasurgery as hs
        >>> from hydrasurgery.demo.teacher import load_teacher
        >>> teacher, _ = load_teacher()
        >>> hybrid = hs.rewrite(teacher, hs.plan_heads(teacher, strategy="all-linear"))
        >>> recipe = Recipe("short", [Stage("align", batch_size=1, length=64, steps=1, lr=1e-3, lr_end=1e-3, warmup=0)])
        >>> result = hs.distill(hybrid, teacher, torch.arange(512), recipe=recipe, progress=False)
        >>> len(result.losses("align")), result.history[0]["tokens"]
        (1, 64)
    """
    recipe, seed = get_recipe(recipe), _whole(seed)
    check_models(hybrid, teacher, recipe)
    source = as_source(data, tokenizer=tokenizer, seed=seed)
    check_tokens(source, vocabulary_size(hybrid))
    run = _Run(hybrid, teacher, _followed(teacher, recipe), source, recipe, seed, callback)
    first = [run.batch(index, 0) for index in range(len(recipe.stages))]  # bad data is found before a file is written
    check_run(hybrid, run.followed, recipe, first[0].inputs)
    with contextlib.ExitStack() as block:
        begin = Position()
        if out is not None:
            block.enter_context(only_run(Path(out)))
            known = identity(hybrid, teacher, source, [{**b.inputs, "labels": b.labels, "mask": b.mask} for b in first])
            begin = run.open(RunFolder(out, recipe, seed, known), resume)
        block.enter_context(_left_as_found(hybrid, run.followed))
        show = block.enter_context(progress_bar(progress))
        for index in range(begin.stage, len(recipe.stages)):
            run.stage(index, begin.step if index == begin.stage else 0, show)
    return TransferResult(run.history, run.checkpoint)


def _whole(seed: Any) -> int:
    try:
        return operator.index(seed)
    except TypeError as error:
        raise RecipeError(f"seed must be a whole number, not {seed!r}") from error


def _followed(teacher: nn.Module | None, recipe: Recipe) -> nn.Module | None:
    """The teacher, or the copy of it that the recipe asks for, if a stage follows it."""
    followed = any(stage.name != "lengthen" for stage in recipe.stages)
    if teacher is None or recipe.teacher_dtype is None or not followed:
        return teacher
    return lowered(teacher, getattr(torch, recipe.teacher_dtype))


@dataclass
class _Run:
    """One call of `distill`: what stays the same over its stages, and what it has done so far.

    The hybrid follows `followed`, the teacher itself or a copy of it; weights are compared with the teacher's.
    """

    hybrid: nn.Module
    teacher: nn.Module | None
    followed: nn.Module | None
    source: BatchSource
    recipe: Recipe
    seed: int
    callback: Callable[[Record], None] | None

    def __post_init__(self) -> None:
        self.folder: RunFolder | None = None
        self.history: list[Record] = []
        self.checkpoint: Path | None = None

    def open(self, folder: RunFolder, resume: bool) -> Position:
        """Write to `folder` from now on, after its last checkpoint if there is one and it is wanted."""
        self.folder = folder
        self.checkpoint = folder.latest() if resume else None
        if self.checkpoint is None:
            folder.start()
            folder.check_free(Position())
            return Position()
        position = folder.restore(self.checkpoint, self.hybrid, self.teacher)
        folder.check_free(position)
        self.history = folder.history(position)
        self.recipe.save(folder.path / "recipe.json")
        return position

    def batch(self, index: int, step: int) -> Batch:
        """The batch of `step` in stage number `index`, its tokens known to the models (whose vocabularies are of one size)."""
        stage = self.recipe.stages[index]
        batch = draw(self.source, step, stage, self.seed, index)
        ids, known = batch.inputs["input_ids"], vocabulary_size(self.hybrid)
        if known is not None and not (ids.min() >= 0 and ids.max() < known):
            raise DataError(
                f"the batch of stage {stage.name!r}, step {step}: token ids from {ids.min()} to {ids.max()}, but the model "
                f"embeds 0 to {known - 1}; tokenize the data with the model's own tokenizer"
            )
        return batch

    def stage(self, index: int, first: int, show: Callable[..., None]) -> None:
        """Run stage number `index` from step `first` to its end."""
        stage = self.recipe.stages[index]
        if first == stage.num_steps:
            return
        optimizer = _optimizer(self.hybrid, stage)
        if first and self.folder is not None and self.checkpoint is not None:
            self.folder.restore_optimizer(self.checkpoint, self.hybrid, optimizer, first)
        compiler = Compiler(self.recipe.compile, stage)
        losses = objective(self.hybrid, self.followed, stage, compiler)
        fastest = peak_tokens(self.hybrid, self.followed, stage)
        batches = Ahead(functools.partial(self.batch, index), first, stage.num_steps)
        self._rehearse(Position(index, first), optimizer, losses, compiler)
        for step in range(first, stage.num_steps):
            record = self._step(Position(index, step), batches, optimizer, losses, compiler)
            show(stage, record, fastest)
            self.history.append(record)
            if self.folder is not None:
                self.folder.append(record)
                self._save(Position(index, step + 1), optimizer)
            if self.callback is not None:
                self.callback(record)
        optimizer.zero_grad(set_to_none=True)

    def _rehearse(self, at: Position, optimizer: torch.optim.Optimizer, losses: Objective, compiler: Compiler) -> None:
        """Have graphs recorded by two passes that train nothing, so that each step replays them: a resumed run's first one too."""
        if not compiler.records:
            return
        batch = self.batch(at.stage, at.step)
        for _ in range(2):
            with self._running(at, losses, compiler):
                losses(batch)
            optimizer.zero_grad(set_to_none=True)

    def _save(self, at: Position, optimizer: torch.optim.Optimizer) -> None:
        stage = self.recipe.stages[at.stage]
        done = at.step == stage.num_steps
        if self.folder is None or not (done or at.step % self.recipe.checkpoint_every == 0):
            return
        if not all(parameter.isfinite().all() for group in optimizer.param_groups for parameter in group["params"]):
            raise DivergedError(self._diverged(stage, at.step, "a parameter is not finite"))
        ended = done and at.stage + 1 < len(self.recipe.stages)  # a next stage begins with an optimiser of its own
        self.checkpoint = self.folder.save(at, self.hybrid, self.teacher, None if ended else optimizer)

    def _step(
        self, at: Position, batches: Ahead, optimizer: torch.optim.Optimizer, losses: Objective, compiler: Compiler
    ) -> Record:
        """One step. The host waits for the device once, for losses and the gradient's norm, when all but the update is queued."""
        stage, started = self.recipe.stages[at.stage], time.perf_counter()
        batch = batches.take()
        optimizer.zero_grad(set_to_none=True)
        with self._running(at, losses, compiler):
            found = losses(batch)
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        found["grad_norm"] = nn.utils.clip_grad_norm_(trained, math.inf if stage.clip is None else stage.clip)
        batches.fetch()
        numbers = dict(zip(found, torch.stack([*found.values()]).tolist(), strict=True))
        norm = numbers.pop("grad_norm")
        if not (math.isfinite(numbers["loss"]) and math.isfinite(norm)):
            raise DivergedError(self._diverged(stage, at.step + 1, f"loss {numbers['loss']}, gradient norm {norm}"))
        for group in optimizer.param_groups:
            group["lr"] = stage.rate(at.step) * group["factor"]
        optimizer.step()
        place = {"stage": stage.name, "stage_index": at.stage, "step": at.step + 1}
        pace = {"tokens": int(batch.mask.sum()), "seconds": round(time.perf_counter() - started, 4)}
        return {**place, **numbers, "lr": stage.rate(at.step), "grad_norm": norm, **pace}

    @contextlib.contextmanager
    def _running(self, at: Position, losses: Objective, compiler: Compiler) -> Iterator[None]:
        """Randomness, autocast and forwards of a step."""
        device = next(self.hybrid.parameters()).device
        seed = mix_seed(self.seed, "step", at.stage, at.step)
        with _randomness(seed, device), autocast(self.recipe.autocast, device), compiler.active(losses.forwards):
            yield

    def _diverged(self, stage: Stage, step: int, what: str) -> str:
        kept = f"the last good checkpoint is {self.checkpoint}" if self.checkpoint else "no checkpoint was written"
        return (
            f"stage {stage.name!r}, step {step}: {what}; {kept}. Lower the stage's lr or its clip, or check the data, "
            "and call distill again with a hybrid rewritten afresh"
        )


def _optimizer(hybrid: nn.Module, stage: Stage) -> torch.optim.Optimizer:
    """AdamW over what the stage trains; nothing else of the hybrid asks for a gradient."""
    regions, body = trainable_names(hybrid, stage)
    groups: list[dict[str, Any]] = [
        {"params": [], "lr": 0.0, "factor": 1.0},
        {"params": [], "lr": 0.0, "factor": stage.body_lr},
    ]
    for name, parameter in hybrid.named_parameters():
        parameter.requires_grad_(name in regions or name in body)
        if parameter.requires_grad:
            groups[name in body]["params"].append(parameter)
    trained = [parameter for group in groups for parameter in group["params"]]
    if any(parameter.dtype == torch.bfloat16 for parameter in trained):
        warnings.warn(
            f"stage {stage.name!r} trains half-precision parameters, which lose updates smaller than about 1/256 of a "
            "weight; load the model in float32 and set the recipe's autocast instead",
            stacklevel=5,
        )
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        betas=stage.betas,
        weight_decay=stage.weight_decay,
        fused=True if all(parameter.is_cuda for parameter in trained) else None,
    )


@contextlib.contextmanager
def _randomness(seed: int, device: torch.device) -> Iterator[None]:
    """Dropout of one step from `seed`, so that it needs no saving; the caller's generators stay as they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def _left_as_found(hybrid: nn.Module, teacher: nn.Module | None) -> Iterator[None]:
    """Train and eval modes for the block; afterwards modes and `requires_grad` are what they were, the hybrid's gradients gone."""
    flags = {name: parameter.requires_grad for name, parameter in hybrid.named_parameters()}
    with evaluating(*(model for model in (hybrid, teacher) if model is not None)):
        hybrid.train()
        try:
            yield
        finally:
            for name, parameter in hybrid.named_parameters():
                parameter.requires_grad_(flags[name])
                parameter.grad = None

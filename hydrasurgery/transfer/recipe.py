"""Recipes of the transfer as data: which stages run, on how many tokens, at which learning rates."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from hydrasurgery.errors import RecipeError
from hydrasurgery.files import atomic_write_json
from hydrasurgery.json_files import load_json, shown
from hydrasurgery.records import Bounds, Name, Positive, check_record, read_record

StageName = Literal["align", "distil", "lengthen"]
Steps = Annotated[int, Bounds(1, 10**9)]
Rate = Annotated[float, Bounds(0, 1000)]
Share = Annotated[float, Bounds(0, 1, "[)")]
WARMUP = 50  # steps


@dataclass(frozen=True)
class Stage:
    """One stage of the transfer (paper section 4).

    Attributes:
        name: `align` fits each hybrid attention layer to the teacher's on the teacher's own hidden states, `distil`
            minimises KL(teacher || student) + `ce_weight` * cross entropy, `lengthen` minimises the cross entropy.
        batch_size: sequences per optimiser step.
        length: tokens per sequence.
        lr: learning rate after the warm-up; it falls to `lr_end` along half a cosine (equal values: constant).
        lr_end: learning rate of the last step.
        steps: optimiser steps. Give either this or `tokens`.
        tokens: tokens of the whole stage, rounded up to whole steps.
        warmup: steps in which the rate rises linearly to `lr`.
        betas: AdamW's averaging factors.
        weight_decay: AdamW's decoupled weight decay.
        clip: the gradient's largest 2-norm; None leaves it as it is.
        ce_weight: weight of the cross entropy beside the KL in `distil`.
        body_lr: factor on the rate for parameters outside the attention regions; 0 freezes them.
        trainable: `all`, or `additions`: what the surgery put under the regions' `hydra`, while the rest stays as the
            teacher has it. If None, `align` trains the additions and other stages train all. In `align` `all` means all of the
            attention regions, projections too; full heads that lose their RoPE need it.
        freeze_full_qk: leave the query and key projections of full heads as they are (QK-Restore).
        micro_batch: sequences per forward pass, the gradient being accumulated over the batch; None takes all at once.
        recompute: keep only what goes into each decoder layer of the hybrid, and run the layer again in the backward pass: memory
            for a layer instead of all, for a third more work. `align`, where one layer lives at a time, does not need it.

    Raises:
        RecipeError: a field is out of range.

    Example:
        >>> stage = Stage("distil", batch_size=4, length=512, tokens=10_000, lr=1e-3, lr_end=1e-5, warmup=1)
        >>> stage.num_steps, stage.rate(0), stage.rate(4)
        (5, 0.001, 1e-05)
    """

    name: StageName
    batch_size: Annotated[int, Bounds(1, 10**6)]
    length: Annotated[int, Bounds(1, 10**8)]
    lr: Annotated[float, Bounds(0, 1000, "(]")]
    lr_end: Rate
    steps: Steps | None = None
    tokens: Positive | None = None
    warmup: Annotated[int, Bounds(0, 10**9)] = WARMUP
    betas: tuple[Share, Share] = (0.9, 0.95)
    weight_decay: Rate = 0.0
    clip: Annotated[float, Bounds(0, 10**9, "(]")] | None = 1.0
    ce_weight: Annotated[float, Bounds(0, 10**6)] = 0.0
    body_lr: Annotated[float, Bounds(0, 10**6)] = 1.0
    trainable: Literal["additions", "all"] | None = None
    freeze_full_qk: bool = False
    micro_batch: Annotated[int, Bounds(1, 10**6)] | None = None
    recompute: bool = False

    def __post_init__(self) -> None:
        check_record(self, RecipeError, f"stage {shown(self.name)}")
        if self.trainable is None:
            object.__setattr__(self, "trainable", "additions" if self.name == "align" else "all")
        if (self.steps is None) == (self.tokens is None):
            raise RecipeError(f"stage {self.name!r}: give either steps or tokens")
        if self.warmup > max(self.num_steps, WARMUP):
            raise RecipeError(
                f"stage {self.name!r}: warmup {self.warmup} is longer than the stage's {self.num_steps} steps, which would all "
                "run at a rate near 0"
            )

    @property
    def num_steps(self) -> int:
        """Optimiser steps of the stage."""
        if self.steps is not None:
            return self.steps
        assert self.tokens is not None
        return math.ceil(self.tokens / (self.batch_size * self.length))

    def rate(self, step: int) -> float:
        """Learning rate of step `step` (from 0): linear warm-up, then half a cosine from `lr` to `lr_end`."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.num_steps - 1 - self.warmup)
        return self.lr_end + (self.lr - self.lr_end) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))


@dataclass(frozen=True)
class Recipe:
    """Stages in the order in which they run, and what they have in common.

    Attributes:
        name: a label for the user.
        stages: the stages.
        autocast: `bfloat16` runs the forward passes under autocast; weights and optimiser state keep the parameters'
            own dtype. None computes in that dtype throughout.
        checkpoint_every: steps between checkpoints; the end of a stage always has one.
        compile: run the decoder layers and the losses as compiled by `torch.compile` (Inductor). None does so for models on a CUDA
            device, True everywhere, False nowhere. On CUDA devices the layers are recorded as CUDA graphs too, unless the stage
            recomputes them. It takes a minute or more at the start of a stage. Compiled and eager runs, and runs compiled for
            batches of other shapes, differ by rounding.
        teacher_dtype: `bfloat16` follows a copy of the teacher in that dtype, made for the run, with 2 bytes more for each
            parameter that is not in it already; the teacher stays as it is. None follows the teacher itself.

    Raises:
        RecipeError: there is no stage, or a field is out of range.

    Example:
        >>> recipe = Recipe("short", [Stage("align", batch_size=1, length=64, steps=1, lr=1e-3, lr_end=1e-3)])
        >>> Recipe.from_json(recipe.to_json()) == recipe
        True
    """

    name: Name
    stages: Annotated[tuple[Stage, ...], Bounds(0, 1000)]
    autocast: Literal["bfloat16"] | None = None
    checkpoint_every: Steps = 500
    compile: bool | None = None
    teacher_dtype: Literal["bfloat16"] | None = None

    def __post_init__(self) -> None:
        check_record(self, RecipeError, f"recipe {shown(self.name)}")
        if not self.stages:
            raise RecipeError(f"recipe {self.name!r} has no stage")

    def to_json(self) -> dict[str, Any]:
        """The recipe as JSON-ready data; `from_json` reads it back."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_json(cls, data: Mapping[str, Any], source: str = "recipe") -> Recipe:
        """Build a recipe from `data`, which `to_json` gave.

        Args:
            data: the recipe.
            source: the file's name, with which errors begin.

        Raises:
            RecipeError: a field is missing, unknown, of another type or out of range; the message names it.
        """
        return read_record(cls, dict(data) if isinstance(data, Mapping) else data, source, RecipeError)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the recipe to `path` as JSON."""
        return atomic_write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recipe:
        """Read the recipe that `save` wrote to `path`.

        Raises:
            RecipeError: the file is missing or holds no recipe.
        """
        return cls.from_json(load_json(path, RecipeError), os.fspath(path))


RECIPES: dict[str, Recipe] = {
    "hydrahead": Recipe(
        "hydrahead",
        (
            Stage("align", batch_size=32, length=512, tokens=300_000_000, lr=1e-3, lr_end=1e-5),
            Stage("distil", batch_size=96, length=512, tokens=1_000_000_000, lr=1e-4, lr_end=1e-5, micro_batch=16),
            Stage("lengthen", batch_size=128, length=16384, tokens=1_000_000_000, lr=1e-5, lr_end=1e-5, micro_batch=1),
        ),
        autocast="bfloat16",
    ),
    "demo": Recipe(
        "demo",
        (
            Stage("align", batch_size=2, length=512, steps=40, lr=1e-2, lr_end=1e-3, warmup=5),
            Stage("distil", batch_size=2, length=512, steps=80, lr=4e-3, lr_end=2e-4, warmup=10),
        ),
        checkpoint_every=50,
        compile=False,  # would take longer than the steps
    ),
}


def get_recipe(recipe: str | os.PathLike[str] | Recipe) -> Recipe:
    """Return `recipe` itself, the preset of that name, or the recipe in the JSON file of that path.

    Raises:
        RecipeError: there is neither a preset nor a file of that name.

    Example:
        >>> [stage.name for stage in get_recipe("hydrahead").stages]
        ['align', 'distil', 'lengthen']
    """
    if isinstance(recipe, Recipe):
        return recipe
    name = os.fspath(recipe)
    if name in RECIPES:
        return RECIPES[name]
    if not Path(name).is_file():
        raise RecipeError(f"no recipe {name!r}: give one of {', '.join(RECIPES)}, or the path of a recipe's JSON file")
    return Recipe.load(name)

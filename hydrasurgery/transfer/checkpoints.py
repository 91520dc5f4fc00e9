"""The folder of a run: its recipe, a line of metrics per step, and checkpoints that a run resumes from bit for bit.

    recipe.json                              the recipe that was run
    metrics.jsonl                            one JSON object per step
    checkpoints/<stage>-<name>-<step>/       model.safetensors, optimizer.safetensors, state.json

A checkpoint holds the hybrid's parameters that are not the teacher's, never the teacher, and no pickle. Randomness is
derived from (seed, stage, step), so the seed and the position are all there is to save of it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hydrasurgery.errors import CheckpointError
from hydrasurgery.files import atomic_directory, atomic_write_text
from hydrasurgery.transfer.recipe import Recipe
from hydrasurgery.transfer.trainable import shared_names, unshare

_FOLDER = re.compile(r"(?P<partial>\.?)(?P<stage>\d+)-(align|distil|lengthen)-(?P<step>\d{8})(\..+)?")
FORMAT, VERSION = "hydrasurgery-transfer", 1


@dataclass(frozen=True)
class Position:
    """How far a run has come: `step` optimiser steps of stage number `stage` (from 0) are done."""

    stage: int = 0
    step: int = 0


class RunFolder:
    """Reads and writes the folder of one run.

    Args:
        path: the folder; it is made when first written to.
        recipe: what is run.
        seed: decides the data's order and all other randomness.
    """

    def __init__(self, path: str | os.PathLike[str], recipe: Recipe, seed: int) -> None:
        self.path, self.recipe, self.seed = Path(path), recipe, seed
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"

    def start(self) -> None:
        """Begin afresh: earlier metrics and checkpoints of this folder are removed, nothing else in it."""
        self._remove(lambda at: True)
        self.metrics.unlink(missing_ok=True)
        self.recipe.save(self.path / "recipe.json")

    def latest(self) -> Path | None:
        """The checkpoint that is furthest along, or None."""
        whole = [(at.stage, at.step, path) for path, at in self._found() if at is not None]
        return max(whole)[2] if whole else None

    def append(self, record: dict[str, Any]) -> None:
        """Add one line to the metrics."""
        with self.metrics.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")

    def history(self, until: Position) -> list[dict[str, Any]]:
        """Cut the metrics after `until`, half-written lines included, and return what is left."""
        text = self.metrics.read_text(encoding="utf-8") if self.metrics.is_file() else ""
        records = []
        for line in text.splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue  # the line that a crash cut short
            if (record["stage_index"], record["step"]) <= (until.stage, until.step):
                records.append(record)
        atomic_write_text(self.metrics, "".join(json.dumps(record) + "\n" for record in records))
        return records

    def save(
        self, at: Position, hybrid: nn.Module, teacher: nn.Module | None, optimizer: torch.optim.Optimizer | None
    ) -> Path:
        """Write a checkpoint, whole or not at all; earlier ones of the same stage go once it is there.

        Pass no optimiser at a stage's end: the next stage begins with a new one.
        """
        target = self.checkpoints / f"{at.stage}-{self.recipe.stages[at.stage].name}-{at.step:08d}"
        state = {"format": FORMAT, "version": VERSION, "seed": self.seed, **asdict(at), "recipe": self.recipe.to_json()}
        shared = shared_names(hybrid, teacher)
        own = {name: parameter for name, parameter in hybrid.named_parameters() if name not in shared}
        with atomic_directory(target) as folder:
            _write(own, folder / "model.safetensors")
            if optimizer is not None:
                _write(_optimizer_tensors(hybrid, optimizer), folder / "optimizer.safetensors")
            atomic_write_text(folder / "state.json", json.dumps(state, indent=2) + "\n")
        self._remove(lambda other: other is None or (other.stage == at.stage and other.step < at.step))
        return target

    def restore(self, checkpoint: Path, hybrid: nn.Module, teacher: nn.Module | None) -> Position:
        """Load a checkpoint's weights into `hybrid` and return where it stands.

        If the checkpoint holds parameters that the hybrid still shares, the hybrid is unshared first.

        Raises:
            CheckpointError: a file is missing or truncated, or the checkpoint is of another model, plan or seed.
        """
        state = self._state(checkpoint)
        weights = _read(checkpoint / "model.safetensors")
        if teacher is not None and weights.keys() & shared_names(hybrid, teacher):
            unshare(hybrid, teacher)
        shared = shared_names(hybrid, teacher)
        own = {name: parameter for name, parameter in hybrid.named_parameters() if name not in shared}
        differing = sorted(own.keys() ^ weights.keys()) or [
            name for name in own if own[name].shape != weights[name].shape or own[name].dtype != weights[name].dtype
        ]
        if differing:
            raise CheckpointError(
                f"{checkpoint} is of another model or plan: {differing[0]} differs (of {len(differing)}); rewrite the "
                "teacher with the plan the run was started with, or choose another folder"
            )
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(weights[name])
        return Position(state["stage"], state["step"])

    def restore_optimizer(self, checkpoint: Path, hybrid: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Load a checkpoint's optimiser state.

        Raises:
            CheckpointError: the file is missing or truncated, or another set of parameters was trained.
        """
        tensors = _read(checkpoint / "optimizer.safetensors")
        parameters = dict(hybrid.named_parameters())
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        saved = {name.rpartition(":")[0] for name in tensors}
        if saved != {name for name, parameter in parameters.items() if id(parameter) in trained}:
            raise CheckpointError(
                f"{checkpoint / 'optimizer.safetensors'} is of a run that trained other parameters: use the recipe in "
                f"{self.path / 'recipe.json'}, or choose another folder"
            )
        for name, value in tensors.items():
            path, _, key = name.rpartition(":")
            parameter = parameters[path]
            optimizer.state[parameter][key] = value if key == "step" else value.to(parameter.device)

    def _found(self) -> Iterator[tuple[Path, Position | None]]:
        """The folders that this class wrote; those that a crash left half-written have no position."""
        for path in sorted(self.checkpoints.iterdir()) if self.checkpoints.is_dir() else ():
            if match := _FOLDER.fullmatch(path.name):
                yield path, None if match["partial"] else Position(int(match["stage"]), int(match["step"]))

    def _remove(self, where: Callable[[Position | None], bool]) -> None:
        for path, at in self._found():
            if where(at):
                shutil.rmtree(path)

    def _state(self, checkpoint: Path) -> dict[str, Any]:
        path = checkpoint / "state.json"
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            if (state["format"], state["version"]) != (FORMAT, VERSION):
                raise KeyError(f"format {state['format']!r}, version {state['version']!r}")
            seed, recipe, stage, step = state["seed"], state["recipe"], state["stage"], state["step"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(_unreadable(path, error)) from error
        if seed != self.seed:
            raise CheckpointError(f"{checkpoint} was trained with seed {seed}, not {self.seed}: pass seed={seed}")
        stages = self.recipe.stages
        if stage >= len(stages) or recipe["stages"][stage]["name"] != stages[stage].name:
            raise CheckpointError(f"{checkpoint}: recipe {self.recipe.name!r} has no such stage; choose another folder")
        if step > stages[stage].num_steps:
            raise CheckpointError(f"{checkpoint}: the stage has only {stages[stage].num_steps} steps in the recipe")
        if recipe != self.recipe.to_json():
            warnings.warn(f"{checkpoint} was trained with another recipe; it goes on with the new one", stacklevel=4)
        return state


def _optimizer_tensors(hybrid: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    names = {id(parameter): name for name, parameter in hybrid.named_parameters()}
    return {f"{names[id(p)]}:{key}": value for p, state in optimizer.state.items() for key, value in state.items()}


def _write(tensors: dict[str, Any], path: Path) -> None:
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(_unreadable(path, error)) from error


def _unreadable(path: Path, error: Exception) -> str:
    return (
        f"{path} is missing, truncated or not of this format ({error}); remove the folder {path.parent.name} to go on "
        "from the checkpoint before it, or pass resume=False to begin afresh"
    )

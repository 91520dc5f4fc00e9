"""The folder of a run: its recipe, a line of metrics per step, and checkpoints that a run resumes from bit for bit.

    recipe.json                              the recipe that was run
    run.lock                                 held while a run writes here
    metrics.jsonl                            one JSON object per step
    checkpoints/<stage>-<name>-<step>/       model.safetensors, optimizer.safetensors, state.json

Bit for bit, if the machine and the number of threads are the same: with others, sums add up in another order.

A checkpoint holds the hybrid's parameters that are not the teacher's bit for bit, never the teacher, and no pickle. What it
does not hold is the teacher's. Randomness is derived from (seed, stage, step), so the seed and the position are all there is
to save of it. `state.json` says also what run it is of (see `hydrasurgery.transfer.identity`).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hydrasurgery.errors import CheckpointError, RecipeError
from hydrasurgery.files import atomic_directory, atomic_write_text
from hydrasurgery.json_files import load_json, shown
from hydrasurgery.records import Count, Positive, read_record
from hydrasurgery.sharing import same_bits, unchanged_names
from hydrasurgery.transfer.identity import difference, recipe_difference
from hydrasurgery.transfer.metrics import read_records
from hydrasurgery.transfer.recipe import Recipe

_NAME = re.compile(r"(?P<stage>0|[1-9]\d*)-(align|distil|lengthen)-(?P<step>\d{8,})")
_FILES = ("state.json", "model.safetensors", "optimizer.safetensors")
_MOMENTS = ("exp_avg", "exp_avg_sq")  # what AdamW keeps of a parameter, beside "step"
FORMAT, VERSION = "hydrasurgery-transfer", 2


@dataclass(frozen=True)
class Position:
    """How far a run has come: `step` optimiser steps of stage number `stage` (from 0) are done."""

    stage: int = 0
    step: int = 0


@dataclass(frozen=True)
class _State:
    """What `state.json` holds."""

    format: str
    version: int
    stage: Count
    step: Positive
    seed: int
    recipe: Recipe
    identity: dict[str, Any]


class RunFolder:
    """Reads and writes the folder of one run.

    Args:
        path: the folder; it is made when first written to.
        recipe: what is run.
        seed: decides the data's order and all other randomness.
        identity: what else makes the run what it is; see `hydrasurgery.transfer.identity`.
    """

    def __init__(self, path: str | os.PathLike[str], recipe: Recipe, seed: int, identity: dict[str, Any]) -> None:
        self.path, self.recipe, self.seed, self.identity = Path(path), recipe, seed, identity
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"

    def start(self) -> None:
        """Begin afresh: earlier metrics and checkpoints of this folder are removed, nothing else in it.

        Raises:
            CheckpointError: a file of the names that a run writes is none that a run has written.
        """
        read_records(self.metrics)
        recipe = self.path / "recipe.json"
        if recipe.exists():
            try:
                Recipe.load(recipe)
            except RecipeError as error:
                raise CheckpointError(
                    f"{recipe} would be overwritten, but no run has written it ({error}); move it, or give another folder"
                ) from error
        self._remove(lambda at: True)
        self.metrics.unlink(missing_ok=True)
        self.recipe.save(recipe)

    def check_free(self, begin: Position) -> None:
        """See that nothing is where checkpoints after `begin` will be written.

        Raises:
            CheckpointError: something there has a checkpoint's name, but is none.
        """
        own = {path for path, _ in self._found()}
        for path in self.checkpoints.iterdir() if self.checkpoints.is_dir() else ():
            at = _named(path)
            if at is not None and path not in own and (at.stage, at.step) > (begin.stage, begin.step):
                raise CheckpointError(
                    f"{path}: is named like a checkpoint, but is no folder that holds its files; move it, or give another folder"
                )

    def latest(self) -> Path | None:
        """The checkpoint that is furthest along, or None."""
        found = [(at.stage, at.step, path) for path, at in self._found()]
        return max(found)[2] if found else None

    def append(self, record: dict[str, Any]) -> None:
        """Add one line to the metrics."""
        with self.metrics.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")

    def history(self, until: Position) -> list[dict[str, Any]]:
        """Cut the metrics after `until`, a last line that is half-written included, and return what is left.

        Raises:
            CheckpointError: a line is no record of a step.
        """
        last = (until.stage, until.step)
        records = [record for record in read_records(self.metrics) if (record["stage_index"], record["step"]) <= last]
        atomic_write_text(self.metrics, "".join(json.dumps(record) + "\n" for record in records))
        return records

    def save(
        self, at: Position, hybrid: nn.Module, teacher: nn.Module | None, optimizer: torch.optim.Optimizer | None
    ) -> Path:
        """Write a checkpoint, whole or not at all; earlier ones of the same stage go once it is there.

        Pass no optimiser at the end of a stage that another follows: that one begins with a new one.
        """
        target = self.checkpoints / f"{at.stage}-{self.recipe.stages[at.stage].name}-{at.step:08d}"
        run = {"seed": self.seed, "recipe": self.recipe.to_json(), "identity": self.identity}
        state = {"format": FORMAT, "version": VERSION, **asdict(at), **run}
        unchanged = unchanged_names(hybrid, teacher)
        own = {name: parameter for name, parameter in hybrid.named_parameters() if name not in unchanged}
        with atomic_directory(target) as folder:
            _write(own, folder / "model.safetensors")
            if optimizer is not None:
                _write(_optimizer_tensors(hybrid, optimizer), folder / "optimizer.safetensors")
            (folder / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        self._remove(lambda other: other.stage == at.stage and other.step < at.step)
        return target

    def restore(self, checkpoint: Path, hybrid: nn.Module, teacher: nn.Module | None) -> Position:
        """Load a checkpoint's weights into `hybrid`, the teacher's for those that it does not hold, and return where it stands.

        Raises:
            CheckpointError: a file is missing, truncated or has values that a run does not write, or the checkpoint is of
                another run; the message says which part differs, and what it was.
        """
        position = self._position(checkpoint)
        weights = _read(checkpoint / "model.safetensors")
        saved = {**({} if teacher is None else dict(teacher.named_parameters(remove_duplicate=False))), **weights}
        own = dict(hybrid.named_parameters())
        differing = sorted(weights.keys() - own.keys()) + [
            name
            for name, parameter in own.items()
            if name not in saved or saved[name].shape != parameter.shape or saved[name].dtype != parameter.dtype
        ]
        if differing:
            raise CheckpointError(
                f"{checkpoint} is of another model or plan: {differing[0]} differs (of {len(differing)}); rewrite the "
                "teacher with the plan the run was started with, or choose another folder"
            )
        with torch.no_grad():
            for name, parameter in own.items():
                if not same_bits(parameter, saved[name]):  # a lazy copy of the teacher's stays one
                    parameter.copy_(saved[name])
        return position

    def restore_optimizer(
        self, checkpoint: Path, hybrid: nn.Module, optimizer: torch.optim.Optimizer, steps: int
    ) -> None:
        """Load a checkpoint's optimiser state, of `steps` steps.

        Raises:
            CheckpointError: the file is missing or truncated, another set of parameters was trained, or a tensor is not what
                the optimiser would have written.
        """
        path = checkpoint / "optimizer.safetensors"
        tensors = _read(path)
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        parameters = {name: p for name, p in hybrid.named_parameters() if id(p) in trained}
        expected = {f"{name}:{key}" for name in parameters for key in (*_MOMENTS, "step")}
        if odd := sorted(expected ^ tensors.keys()):
            raise CheckpointError(
                f"{path} is of a run that trained other parameters ({odd[0]}, of {len(odd)}): use the recipe in "
                f"{self.path / 'recipe.json'}, or choose another folder"
            )
        for entry, value in tensors.items():
            name, _, key = entry.rpartition(":")
            parameter = parameters[name]
            if wrong := _wrong_state(key, value, parameter, steps):
                raise CheckpointError(_unreadable(path, f"{entry} {wrong}"))
            stays = key == "step" and not optimizer.defaults["fused"]
            optimizer.state[parameter][key] = value if stays else value.to(parameter.device)

    def _found(self) -> Iterator[tuple[Path, Position]]:
        """The folders that this class wrote."""
        for path in sorted(self.checkpoints.iterdir()) if self.checkpoints.is_dir() else ():
            at = _named(path)
            real = path.is_dir() and not path.is_symlink()
            if at is not None and real and any((path / file).is_file() for file in _FILES):
                yield path, at

    def _remove(self, where: Callable[[Position], bool]) -> None:
        """Delete the checkpoints at some positions: their files, and the folders unless something else is in them."""
        for path in [path for path, at in self._found() if where(at)]:
            for file in _FILES:
                (path / file).unlink(missing_ok=True)
            if not any(path.iterdir()):
                path.rmdir()

    def _position(self, checkpoint: Path) -> Position:
        """Where a checkpoint of this run stands; see `restore`."""
        path = checkpoint / "state.json"
        try:
            state = load_json(path, CheckpointError)
        except CheckpointError as error:
            raise CheckpointError(_unreadable(path, error)) from error
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise CheckpointError(_unreadable(path, f"its format is not {FORMAT!r}"))
        if shown(state.get("version")) != str(VERSION):
            raise CheckpointError(
                f"{path} has version {shown(state.get('version'))}, not {VERSION}: another version of hydrasurgery wrote it, which "
                "did not note what run it is of; go on with that version, or choose another folder"
            )
        found = read_record(_State, state, os.fspath(path), CheckpointError)
        if Position(found.stage, found.step) != _named(checkpoint):
            raise CheckpointError(
                _unreadable(path, f"stage {found.stage}, step {found.step} in a folder named {checkpoint.name}")
            )
        self._check_run(path, found)
        return Position(found.stage, found.step)

    def _check_run(self, path: Path, state: _State) -> None:
        """Refuse the state of another run."""
        stages = state.recipe.stages
        whole = state.stage < len(stages) and state.step <= stages[state.stage].num_steps
        if not whole or not path.parent.name.startswith(f"{state.stage}-{stages[state.stage].name}-"):
            raise CheckpointError(
                _unreadable(path, f"its recipe has no step {state.step} of such a stage {state.stage}")
            )
        if state.seed != self.seed:
            raise CheckpointError(f"{path} is of a run with seed {state.seed}, not {self.seed}: pass seed={state.seed}")
        found = recipe_difference(state.recipe, self.recipe, state.stage, state.step)
        if found:
            raise CheckpointError(
                f"{path} is of a run with another recipe: {found}. Use the recipe in {self.path / 'recipe.json'}, or choose "
                "another folder"
            )
        found = difference(_as_begun(state.identity, state.stage), _as_begun(self.identity, state.stage), "")
        if found:
            raise CheckpointError(
                f"{path} is of another run: {found}. Give the plan, teacher and data that the run was started with, or choose "
                "another folder"
            )


def _named(path: Path) -> Position | None:
    """The position in the name of a checkpoint's folder; None for any other name."""
    match = _NAME.fullmatch(path.name)
    return None if match is None else Position(int(match["stage"]), int(match["step"]))


def _as_begun(identity: dict[str, Any], stage: int) -> dict[str, Any]:
    """An identity without the first batches of stages that have not begun."""
    data = identity.get("data")
    batches = data.get("first_batches") if isinstance(data, dict) else None
    if not isinstance(data, dict) or not isinstance(batches, list):
        return identity
    return {**identity, "data": {**data, "first_batches": batches[: stage + 1]}}


def _wrong_state(key: str, value: Tensor, parameter: Tensor, steps: int) -> str | None:
    """What is wrong with one tensor of AdamW's state after `steps` steps, in words; None if nothing is."""
    if key == "step":
        fits = value.shape == () and value.is_floating_point() and value.item() == steps
        return None if fits else f"is not the number {steps}"
    if value.shape != parameter.shape or value.dtype != parameter.dtype:
        return f"is {value.dtype} {list(value.shape)}, its parameter {parameter.dtype} {list(parameter.shape)}"
    if not value.isfinite().all() or (key == "exp_avg_sq" and (value < 0).any()):
        return "has values that no gradient gives"
    return None


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


def _unreadable(path: Path, error: object) -> str:
    return (
        f"{path} is missing, truncated or not of this format ({error}); remove the folder {path.parent.name} to go on "
        "from the checkpoint before it, or pass resume=False to begin afresh"
    )

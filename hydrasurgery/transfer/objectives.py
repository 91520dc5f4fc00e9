"""What a step of each stage computes: the losses on logits, or the error of each layer; gradients are added up on the way."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hydrasurgery.ir.outline import CACHE_ARGUMENTS
from hydrasurgery.ir.region import RegionModule
from hydrasurgery.ir.stitch import region_modules
from hydrasurgery.transfer.compiling import Compiler, Forward, layer_forwards, part_forwards
from hydrasurgery.transfer.data import Batch
from hydrasurgery.transfer.losses import (
    SplitModel,
    beside,
    language_loss,
    loss_totals,
    relative_error,
    token_sums,
)
from hydrasurgery.transfer.recipe import Stage


class Objective(Protocol):
    """Adds to the gradients and returns a step's losses on the device, "loss" among them.

    Attributes:
        forwards: what modules run in the place of their `forward` when it is called.
    """

    forwards: dict[nn.Module, Forward]

    def __call__(self, batch: Batch) -> dict[str, Tensor]: ...


def objective(hybrid: nn.Module, teacher: nn.Module | None, stage: Stage, compiler: Compiler) -> Objective:
    """What the steps of `stage` compute.

    Args:
        hybrid: what is trained.
        teacher: the model it follows, where the stage needs one.
        stage: gives the losses and the size of a micro-batch.
        compiler: compiles layers and losses.
    """
    if stage.name == "align":
        assert teacher is not None
        return _Align(hybrid, teacher, stage, compiler)
    return _Follow(hybrid, teacher if stage.name == "distil" else None, stage, compiler)


class _Follow:
    """Stages two and three: the loss on logits, over the micro-batches of a step."""

    def __init__(self, hybrid: nn.Module, teacher: nn.Module | None, stage: Stage, compiler: Compiler) -> None:
        self.student, self.teacher = SplitModel(hybrid), None if teacher is None else SplitModel(teacher)
        self.compiler = compiler
        self.ce_weight = 1.0 if teacher is None else stage.ce_weight
        names = list(region_modules(hybrid))
        self.forwards = layer_forwards(hybrid, names, compiler, recompute=stage.recompute)
        if teacher is not None:
            self.forwards |= layer_forwards(teacher, names, compiler)
        self.sums = compiler.compiled_by_rows(token_sums, _device(hybrid))

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        totals = loss_totals(batch)
        sums: dict[str, Tensor] = {}
        for piece in self.compiler.pieces(batch, self.student.model):
            loss, parts = language_loss(
                self.student, self.teacher, piece, ce_weight=self.ce_weight, totals=totals, sums=self.sums
            )
            loss.backward()
            _add(sums, {"loss": loss.detach(), **parts})
        return sums


class _Align:
    """Stage one: the teacher's backbone runs once, and each hybrid layer learns from what passes the teacher's layer.

    A layer's backward pass follows its forward pass at once, so only one layer's activations live at a time, and the
    hybrid's own backbone never runs.
    """

    def __init__(self, hybrid: nn.Module, teacher: nn.Module, stage: Stage, compiler: Compiler) -> None:
        self.hybrid, self.teacher, self.device = hybrid, SplitModel(teacher), _device(hybrid)
        self.compiler = compiler
        found = region_modules(hybrid)
        self.regions = {n: region for n, region in found.items() if any(p.requires_grad for p in region.parameters())}
        self.forwards = part_forwards(teacher, list(found), compiler)
        self.error = compiler.compiled(_layer_error, self.device)

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        total = int(batch.mask.sum())
        sums: dict[str, Tensor] = {}
        for piece in self.compiler.pieces(batch, self.hybrid):
            _add(sums, {"loss": self._layers(piece, int(piece.mask.sum()) / total)})
        return sums

    def _layers(self, batch: Batch, share: float) -> Tensor:
        losses: list[Tensor] = []
        mask = beside(batch.mask, self.device)

        def follow(region: RegionModule) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
                args, kwargs = _given((args, _uncached(kwargs)), module, region)
                target = _first(output).to(self.device)
                with torch.enable_grad():
                    loss = self.error(region, args, kwargs, target, mask) * (share / len(self.regions))
                    loss.backward()
                losses.append(loss.detach())

            return hook

        with contextlib.ExitStack() as hooks, torch.no_grad():
            for name, region in self.regions.items():
                handle = self.teacher.model.get_submodule(name).register_forward_hook(follow(region), with_kwargs=True)
                hooks.callback(handle.remove)
            self.teacher.hidden(batch.inputs)
        return torch.stack(losses).sum()


def _layer_error(
    region: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], target: Tensor, mask: Tensor
) -> Tensor:
    return relative_error(_first(region(*args, **kwargs)), target, mask)


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _given(call: Any, module: nn.Module, region: nn.Module) -> Any:
    """What the teacher's module was called with, on the region's device, and in its dtype if the modules' dtypes differ."""
    theirs, ours = (
        min(m.parameters(), key=lambda p: p.ndim < 2) for m in (module, region)
    )  # vectors may be kept in fp32
    if (theirs.device, theirs.dtype) == (ours.device, ours.dtype):
        return call

    def placed(tensor: Tensor) -> Tensor:
        cast = tensor.is_floating_point() and theirs.dtype != ours.dtype
        return tensor.to(ours.device, ours.dtype if cast else tensor.dtype)

    return pytree.tree_map_only(Tensor, placed, call)


def _uncached(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: None if name in CACHE_ARGUMENTS else value for name, value in kwargs.items()}


def _add(sums: dict[str, Tensor], parts: dict[str, Tensor]) -> None:
    for name, value in parts.items():
        sums[name] = sums[name] + value if name in sums else value


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device

"""Logit contribution: what a head writes towards the answer by itself, without any later layer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from hydrasurgery.errors import ProbeError
from hydrasurgery.evaluation.tasks import Pair
from hydrasurgery.ir.stitch import region_modules
from hydrasurgery.selection.effects import readout
from hydrasurgery.selection.measuring import HeadMeter
from hydrasurgery.selection.recording import Run
from hydrasurgery.selection.replay import frozen


def logit_contribution(meter: HeadMeter) -> dict[str, Tensor]:
    """<dm / dr, w_lh> / m(x): a head's write w_lh into the final residual r, projected on answer minus distractor, [P, H].

    w_lh is what the attention module gives with the head's output less what it gives without (so that its output
    projection, gates and biases are taken as they are); the slope of the readout is that of unembedding and final norm
    at the clean run. What MLPs and later heads make of the write is left out, and so is a norm after the attention.

    Raises:
        ProbeError: the model's last module is no unembedding.
    """
    return meter.measure(lambda pair, run: _contributions(meter, pair, run))


def _contributions(meter: HeadMeter, pair: Pair, run: Run) -> dict[str, Tensor]:
    slope = _slope(meter, pair, run)
    lead = readout(run.clean_logits, pair)
    found = {name: torch.zeros(run.clean[name].shape[1]) for name in meter.taps}
    for name in meter.taps:
        without = run.clean[name].shape[1]
        written = _written(meter, run, name, without)
        parts = written[:1] - written[1:]
        found[name] = (parts.float() * slope).sum((1, 2)) / lead
    return found


def _written(meter: HeadMeter, run: Run, layer: str, heads: int) -> Tensor:
    """The attention module's output at the answer's positions, whole and without each head: [1 + H, A, C]."""
    kept: list[Tensor] = []
    hold = frozen(run, 1 + heads)

    def edit(name: str, output: Tensor) -> Tensor:
        out = hold(name, output)
        if name == layer:
            out[torch.arange(1, 1 + heads), :, torch.arange(heads)] = 0
        return out

    def keep(_module: nn.Module, _args: object, output: Any) -> None:
        kept.append((output[0] if isinstance(output, tuple) else output)[:, run.asked])

    with ExitStack() as stack:
        stack.callback(region_modules(meter.model)[layer].register_forward_hook(keep).remove)
        meter.replayer.replay(run, 1 + heads, edit)
    return kept[0]


def _slope(meter: HeadMeter, pair: Pair, run: Run) -> Tensor:
    """dm / dr at the answer's positions, [A, C] in fp32."""
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []

    def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            calls.append((module, args[0], output))

    inside = {module for region in region_modules(meter.model).values() for module in region.modules()}
    with ExitStack() as stack:
        for module in meter.model.modules():
            if module not in inside and not any(True for _ in module.children()):
                stack.callback(module.register_forward_hook(keep).remove)
        meter.replayer.replay(run, 1, frozen(run, 1))
    unembed, given, logits = calls[-1]
    if logits.shape[-1] != run.clean_logits.shape[-1]:
        raise ProbeError(
            f"{type(meter.model).__name__}: its last module, a {type(unembed).__name__}, gives {logits.shape[-1]} numbers and "
            f"not the {run.clean_logits.shape[-1]} logits, so logit-contribution cannot find the unembedding; use a causal method."
        )
    tail: list[Callable[[Tensor], Tensor]] = [unembed]
    if len(calls) > 1 and torch.equal(_at(calls[-2][2], run), _at(given, run)):
        tail, given = [calls[-2][0], unembed], calls[-2][1]
    with torch.enable_grad():
        start = value = _at(given, run).detach().clone().requires_grad_()
        for step in tail:
            value = step(value)
        (slope,) = torch.autograd.grad(readout(value[0], pair), start)
    return slope[0].float()


def _at(x: Tensor, run: Run) -> Tensor:
    """The answer's positions of x [1, T, C], unless it was cut to them already."""
    return x if x.shape[1] == len(run.asked) else x[:, run.asked]

"""Path patching (paper section 2, eq. 11): heads that matter through the heads that reach the answer."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from hydrasurgery.evaluation.tasks import Pair
from hydrasurgery.selection.effects import readout, whole_effect
from hydrasurgery.selection.measuring import HeadMeter
from hydrasurgery.selection.patching import activation_patching
from hydrasurgery.selection.recording import Head, Run
from hydrasurgery.selection.replay import frozen
from hydrasurgery.selection.scores import CRITICAL

Chosen = dict[str, list[int]]  # a layer's chosen heads


def path_patching(meter: HeadMeter) -> dict[str, Tensor]:
    """max(receiver, sender) of eq. 12 before its factor kappa, [P, H]."""
    receiver = activation_patching(meter)
    sender = _converge(meter, receiver)
    return {name: torch.maximum(receiver[name], sender[name]) for name in receiver}


def sender_patching(meter: HeadMeter) -> dict[str, Tensor]:
    """What a head's corrupted output does to the answer by way of chosen heads only, [P, H].

    Chosen at first are the receivers with a mean effect above 0.01. A sender's output reaches the chosen heads of later
    layers, which run, while all others are held at their clean outputs; then only the chosen heads' outputs are
    patched into the clean run (eq. 11). Senders above 0.01 are chosen too, until there is no new one.
    """
    return _converge(meter, activation_patching(meter))


def _converge(meter: HeadMeter, receiver: dict[str, Tensor]) -> dict[str, Tensor]:
    chosen, found = _critical(receiver), {name: torch.zeros_like(values) for name, values in receiver.items()}
    while any(chosen.values()):
        found = meter.measure(partial(_send, meter, chosen), whole=True)
        grown = {name: sorted({*chosen[name], *heads}) for name, heads in _critical(found).items()}
        if grown == chosen:
            break
        chosen = grown
    return found


def _critical(values: dict[str, Tensor]) -> Chosen:
    return {name: (rows.mean(0) > CRITICAL).nonzero().flatten().tolist() for name, rows in values.items()}


def _send(meter: HeadMeter, chosen: Chosen, pair: Pair, run: Run) -> dict[str, Tensor]:
    """Sender scores of one pair, layer name -> [H]; heads with no chosen one after them score 0."""
    layers = list(meter.taps)
    last = max(number for number, name in enumerate(layers) if chosen[name])
    senders = [(name, head) for name, head in meter.heads(run) if layers.index(name) < last]
    found = {name: torch.zeros(run.clean[name].shape[1]) for name in layers}
    direct = run.at_answer() if meter.replayer.local else run
    whole, size = whole_effect(pair, run), min(meter.rows, meter.batch_size)
    for start in range(0, len(senders), size):
        batch = senders[start : start + size]
        scores = readout(_arrive(meter, direct, _carry(meter, run, batch, chosen), chosen), pair)
        for (name, head), effect in zip(batch, ((scores[0] - scores[1:]) / whole).cpu(), strict=True):
            found[name][head] = effect
    return found


def _carry(meter: HeadMeter, run: Run, senders: list[Head], chosen: Chosen) -> dict[str, Tensor]:
    """What the chosen heads give when row r + 1's sender is corrupt and all others are held: layer name -> [R, T, N, D]."""
    hold, carried = frozen(run, 1 + len(senders)), {}

    def edit(name: str, output: Tensor) -> Tensor:
        out = hold(name, output)
        carried[name] = out[:, :, chosen[name]] = output[:, :, chosen[name]]
        for row, (layer, head) in enumerate(senders, start=1):
            if layer == name:
                out[row, :, head] = run.corrupt[name][:, head]
        return out

    meter.replayer.replay(run, 1 + len(senders), edit)
    return carried


def _arrive(meter: HeadMeter, run: Run, carried: dict[str, Tensor], chosen: Chosen) -> Tensor:
    """Logits [R, A, V] of the clean run with nothing but the chosen heads' outputs replaced."""
    count = len(next(iter(carried.values())))
    hold, places = frozen(run, count), run.positions

    def edit(name: str, output: Tensor) -> Tensor:
        out = hold(name, output)
        out[:, :, chosen[name]] = carried[name][:, places]
        return out

    return meter.replayer.replay(run, count, edit)

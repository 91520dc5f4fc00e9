"""Path patching (paper section 2, eq. 11): heads that matter through the heads that reach the answer."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from hydrasurgery.evaluation.tasks import Pair
from hydrasurgery.selection.bench import Bench, Head, Run, frozen
from hydrasurgery.selection.effects import readout, whole_effect
from hydrasurgery.selection.patching import activation_patching
from hydrasurgery.selection.scores import CRITICAL

Chosen = dict[str, list[int]]  # a layer's chosen heads


def path_patching(bench: Bench) -> dict[str, Tensor]:
    """max(receiver, sender) of eq. 12 before its factor kappa, [P, H]."""
    receiver = activation_patching(bench)
    sender = _converge(bench, receiver)
    return {name: torch.maximum(receiver[name], sender[name]) for name in receiver}


def sender_patching(bench: Bench) -> dict[str, Tensor]:
    """What a head's corrupted output does to the answer through chosen heads alone, [P, H].

    Chosen at first are the receivers with a mean effect above 0.01. A sender's output reaches the chosen heads of later
    layers, which run, while all others are held at their clean outputs; then only the chosen heads' outputs are
    patched into the clean run (eq. 11). Senders above 0.01 are chosen too, until there is no new one.
    """
    return _converge(bench, activation_patching(bench))


def _converge(bench: Bench, receiver: dict[str, Tensor]) -> dict[str, Tensor]:
    chosen, found = _critical(receiver), {name: torch.zeros_like(values) for name, values in receiver.items()}
    while any(chosen.values()):
        found = bench.measure(partial(_send, bench, chosen), whole=True)
        grown = {name: sorted({*chosen[name], *heads}) for name, heads in _critical(found).items()}
        if grown == chosen:
            break
        chosen = grown
    return found


def _critical(values: dict[str, Tensor]) -> Chosen:
    return {name: (rows.mean(0) > CRITICAL).nonzero().flatten().tolist() for name, rows in values.items()}


def _send(bench: Bench, chosen: Chosen, pair: Pair, run: Run) -> dict[str, Tensor]:
    """Sender scores of one pair, layer name -> [H]; heads with no chosen one behind them score 0."""
    layers = list(bench.taps)
    last = max(number for number, name in enumerate(layers) if chosen[name])
    senders = [(name, head) for name, head in bench.heads(run) if layers.index(name) < last]
    found = {name: torch.zeros(run.clean[name].shape[1]) for name in layers}
    direct = run.at_answer() if bench.local else run
    whole, size = whole_effect(pair, run), min(bench.rows, bench.batch_size)
    for start in range(0, len(senders), size):
        batch = senders[start : start + size]
        scores = readout(_arrive(bench, direct, _carry(bench, run, batch, chosen), chosen), pair)
        for (name, head), effect in zip(batch, ((scores[0] - scores[1:]) / whole).cpu(), strict=True):
            found[name][head] = effect
    return found


def _carry(bench: Bench, run: Run, senders: list[Head], chosen: Chosen) -> dict[str, Tensor]:
    """What the chosen heads give when row r + 1's sender is corrupt and all others are held: layer name -> [R, T, N, D]."""
    hold, carried = frozen(run, 1 + len(senders)), {}

    def edit(name: str, output: Tensor) -> Tensor:
        out = hold(name, output)
        carried[name] = out[:, :, chosen[name]] = output[:, :, chosen[name]]
        for row, (layer, head) in enumerate(senders, start=1):
            if layer == name:
                out[row, :, head] = run.corrupt[name][:, head]
        return out

    bench.replay(run, 1 + len(senders), edit)
    return carried


def _arrive(bench: Bench, run: Run, carried: dict[str, Tensor], chosen: Chosen) -> Tensor:
    """Logits [R, A, V] of the clean run with nothing but the chosen heads' outputs replaced."""
    count = len(next(iter(carried.values())))
    hold, places = frozen(run, count), run.positions

    def edit(name: str, output: Tensor) -> Tensor:
        out = hold(name, output)
        out[:, :, chosen[name]] = carried[name][:, places]
        return out

    return bench.replay(run, count, edit)

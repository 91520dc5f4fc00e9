"""Scores read off attention patterns: copying the answer, induction and echo; correlates, not causes."""

from __future__ import annotations

import torch
from torch import Tensor

from hydrasurgery.errors import ProbeError
from hydrasurgery.evaluation.tasks import Pair
from hydrasurgery.selection.measuring import HeadMeter
from hydrasurgery.selection.recording import Run
from hydrasurgery.selection.watching import LastAttention, watch_taps

REPEATED = 128  # tokens of the sequence that is repeated, at most


def retrieval(meter: HeadMeter) -> dict[str, Tensor]:
    """Copy attention: the share of the answer's tokens that a head looks at when they are predicted, [P, H].

    A head looks at a stated token if its largest attention weight at the position that predicts it is there.

    Raises:
        ProbeError: a pair's prompt does not state its answer, so there is nothing to copy.
    """
    return meter.measure(lambda pair, run: _copied(meter, pair, run))


def induction(meter: HeadMeter) -> dict[str, Tensor]:
    """Mean attention from a token of a repeated sequence to the one after its earlier occurrence, [P, H].

    Each pair's sequence is drawn from the tokens of its prompt, so that any vocabulary does.
    """
    return meter.measure(lambda pair, run: _repeat(meter, run, after=1))


def echo(meter: HeadMeter) -> dict[str, Tensor]:
    """Mean attention from a token of a repeated sequence to its own earlier occurrence, [P, H]."""
    return meter.measure(lambda pair, run: _repeat(meter, run, after=0))


def _copied(meter: HeadMeter, pair: Pair, run: Run) -> dict[str, Tensor]:
    if not pair.stated:
        raise ProbeError(
            f"method='retrieval' follows the copying of stated answers, but a {pair.task or 'given'} pair does not state "
            "its own; leave such probes out (probes=...) or choose a causal method."
        )
    weights = attention_at(meter, run.ids, pair.answer_positions)
    return {
        name: (rows.argmax(-1) == pair.value_positions.to(rows.device)).float().mean(-1)
        for name, rows in weights.items()
    }


def _repeat(meter: HeadMeter, run: Run, after: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(meter.seed)
    tokens = run.ids.cpu().unique()
    size = min(REPEATED, len(run.ids) // 2)
    sequence = tokens[torch.randperm(len(tokens), generator=generator)][:size]
    size = len(sequence)
    asked = torch.arange(size, 2 * size - 1)  # the last token has none after its earlier occurrence but itself
    weights = attention_at(meter, sequence.repeat(2).to(run.ids.device), asked)
    return {name: rows[:, torch.arange(size - 1), asked - size + after].mean(-1) for name, rows in weights.items()}


def attention_at(meter: HeadMeter, ids: Tensor, positions: Tensor) -> dict[str, Tensor]:
    """Attention weights of the queries at `positions` [P] of a prompt [T]: layer name -> [H, P, T]."""
    found: dict[str, Tensor] = {}

    def visit(name: str, last: LastAttention, _output: Tensor) -> None:
        found[name] = last.weights(positions)[0]

    with watch_taps(meter.taps, visit):
        meter.forward(ids[None])
    return found

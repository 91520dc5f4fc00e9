"""The meter that scorers take: what a model's heads do to its answers, pair after pair."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import Tensor, nn

from hydrasurgery.calibration import LinearFit, fit_linear_heads
from hydrasurgery.decoders import evaluating, logits_at
from hydrasurgery.errors import ProbeError
from hydrasurgery.evaluation.tasks import Pair
from hydrasurgery.ir.region import Region
from hydrasurgery.ir.stitch import regions
from hydrasurgery.ir.taps import head_taps
from hydrasurgery.selection.effects import readout, whole_effect
from hydrasurgery.selection.recording import Head, Run, record
from hydrasurgery.selection.replay import Change, Replayer, changed
from hydrasurgery.selection.watching import LastAttention, Taps, watch_taps

FIT_TOKENS, FIT_SEQUENCES = 2048, 4  # what the linear stand-ins are fitted on

Advance = Callable[[int, int], None]  # pairs just finished, pairs that were added to the work


class HeadMeter:
    """A tapped model in evaluation mode and the pairs to measure its heads on; made by `open_meter`.

    Attributes:
        model: The decoder.
        regions: Its attention layers.
        taps: A tap on each layer's heads, by the layer's name.
        pairs: All that were given, usable or not.
        batch_size: Prompts run together, twice (clean and corrupt).
        rows: Changed heads that are replayed together (on whole prompts at most `batch_size`; from a later token on a few more).
        seed: For scorers that draw.
        replayer: Replays the runs that `runs` gives.
        dropped: A sentence for each pair that cannot be used, by its number; known after the first `runs`.
    """

    def __init__(
        self,
        model: nn.Module,
        regions: Sequence[Region],
        taps: Taps,
        pairs: Sequence[Pair],
        *,
        batch_size: int,
        rows: int,
        seed: int,
        advance: Advance,
    ) -> None:
        self.model, self.regions, self.taps, self.pairs = model, regions, taps, pairs
        self.batch_size, self.rows, self.seed, self.advance = batch_size, rows, seed, advance
        self.replayer = Replayer(model, taps, pairs)
        self.dropped: dict[int, str] = {} if pairs else {0: "none was given"}
        self._passes = 0

    @cached_property
    def fits(self) -> dict[str, LinearFit]:
        """The best linear stand-in of every head, by layer, fitted on a few clean prompts."""
        found: dict[str, LinearFit] = {}

        def visit(name: str, last: LastAttention, output: Tensor) -> None:
            found[name] = fit_linear_heads(last.q, last.k, last.v, output)

        with watch_taps(self.taps, visit):
            self.forward(_calibration_ids(self.pairs))
        return found

    @property
    def used(self) -> list[int]:
        """Numbers of the pairs that `measure` has given scores of."""
        return [number for number in range(len(self.pairs)) if number not in self.dropped]

    def runs(self, *, whole: bool = False, live: bool = False) -> Iterator[tuple[Pair, Run]]:
        """Each usable pair with its recorded run.

        Args:
            whole: Recorded at every position; otherwise where a frozen replay needs it.
            live: With what shortens live replays, at every position.
        """
        if self._passes:
            self.advance(0, len(self.pairs))
        whole = whole or not self.replayer.local
        for start, group in _batches(self.pairs, self.batch_size):
            recorded = record(self.model, self.taps, group, whole=whole, live=live)
            for number, (pair, run) in enumerate(zip(group, recorded, strict=True), start):
                reason = _unusable(pair, run)
                if reason:
                    self.dropped[number] = f"pair {number}: {reason}"
                else:
                    yield pair, run
            self.advance(len(group), 0)
        self._passes += 1

    def measure(
        self, score: Callable[[Pair, Run], Mapping[str, Tensor]], *, whole: bool = False, live: bool = False
    ) -> dict[str, Tensor]:
        """Stack each usable pair's scores.

        Args:
            score: Gives layer name -> [H] (or another shape, the same for every pair).
            whole, live: As in `runs`.

        Returns:
            Layer name -> [P, H] fp32 on the CPU, for the P usable pairs.

        Raises:
            ProbeError: no pair can be used.

        Example: the norm of what each head gives where the answer is predicted.
            >>> from hydrasurgery.demo.teacher import load_teacher
            >>> from hydrasurgery.selection import probe_pairs
            >>> model, tokenizer = load_teacher()
            >>> with open_meter(model, probe_pairs(model, tokenizer, length=48, count=2)) as meter:
            ...     norms = meter.measure(lambda pair, run: {name: x.norm(dim=(0, 2)) for name, x in run.clean.items()})
            >>> norms["model.layers.0.self_attn"].shape
            torch.Size([2, 16])
        """
        found: dict[str, list[Tensor]] = {}
        for pair, run in self.runs(whole=whole, live=live):
            for name, values in score(pair, run).items():
                found.setdefault(name, []).append(values.detach().float().cpu())
        if not found:
            raise ProbeError(
                f"{type(self.model).__name__}: none of {len(self.pairs)} pairs can be scored "
                f"({'; '.join(list(self.dropped.values())[:1])}). Use a model that has learned retrieval, shorter "
                "prompts (length=...) or pairs it can answer (pairs=...)."
            )
        return {name: torch.stack(values) for name, values in found.items()}

    def heads(self, run: Run) -> list[Head]:
        """Every head, layer by layer."""
        return [(name, head) for name in self.taps for head in range(run.clean[name].shape[1])]

    def effects(
        self,
        pair: Pair,
        run: Run,
        change: Change,
        *,
        live: bool,
        heads: Sequence[Head] | None = None,
        lost: Callable[[Tensor, Pair], Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """What each changed head costs, layer name -> [H]; 0 for heads that are not in `heads`.

        Args:
            change: What a head gives instead.
            live: Other heads run; otherwise they are held at their clean outputs.
            heads: In the layers' order; by default all.
            lost: `lost(logits [1 + N, A, vocabulary], pair)` -> [N] says what a change costs against row 0; by default eq. 10,
                the share of the corruption's whole effect on the readout.
        """
        whole = whole_effect(pair, run)

        def share(logits: Tensor, pair: Pair) -> Tensor:
            scores = readout(logits, pair)
            return (scores[0] - scores[1:]) / whole

        found = {name: torch.zeros(run.clean[name].shape[1]) for name in self.taps}
        for batch, logits in self._sweep(run, change, self.heads(run) if heads is None else heads, live):
            for (name, head), effect in zip(batch, (lost or share)(logits, pair).float().cpu(), strict=True):
                found[name][head] = effect
        return found

    def forward(self, ids: Tensor) -> Tensor:
        """Logits [B, 1, vocabulary] after prompts [B, T], taps running."""
        return logits_at(self.model, ids, torch.tensor([ids.shape[1] - 1]))

    def _sweep(
        self, run: Run, change: Change, heads: Sequence[Head], live: bool
    ) -> Iterator[tuple[Sequence[Head], Tensor]]:
        """Replay with one head changed at a time: some of `heads`, in the layers' order, and logits [1 + N, A, vocabulary].

        Row 0 is unchanged and stands in the same batch, so that a head without effect scores exactly 0 in low
        precision too.
        """
        size = self.rows if len(run.positions) == len(run.asked) else min(self.rows, self.batch_size)
        if run.start:  # a row holds keys and values of the whole prompt, and all else of the tokens that run
            size = 2 * size * len(run.ids) // (len(run.ids) + len(run.positions))
        joined = live and self.replayer.joins
        for start in range(0, len(heads), size):
            batch = heads[start : start + size]
            edit = changed(run, batch, change, live=live)
            if joined:
                yield batch, self.replayer.replay_joined(run, batch, edit)
            else:
                yield batch, self.replayer.replay(run, 1 + len(batch), edit)


@contextmanager
def open_meter(
    model: nn.Module,
    pairs: Sequence[Pair],
    *,
    batch_size: int = 4,
    rows: int = 64,
    seed: int = 0,
    advance: Advance = lambda done, more: None,
) -> Iterator[HeadMeter]:
    """Inside the block `model` has taps on its heads and is in evaluation mode, without gradients.

    Arguments are the attributes of `HeadMeter`; `advance(done, more)` is told of progress, in pairs.

    Example: see `HeadMeter.measure`.
    """
    with torch.no_grad(), evaluating(model), head_taps(model) as taps:
        yield HeadMeter(
            model, regions(model), taps, pairs, batch_size=batch_size, rows=rows, seed=seed, advance=advance
        )


def _unusable(pair: Pair, run: Run) -> str | None:
    guess = run.clean_logits.argmax(-1).cpu()
    if not torch.equal(guess, pair.answer_ids.cpu()):
        return f"the clean model answers {guess.tolist()} instead of {pair.answer_ids.tolist()}"
    effect = whole_effect(pair, run)
    return None if effect > 0 else f"the corrupt prompt does not weaken the answer (effect {effect:.3g})"


def _calibration_ids(pairs: Sequence[Pair]) -> Tensor:
    """A few clean prompts cut to one length, [B, T]; spread over the pairs so that each sub-probe is in."""
    chosen = pairs[:: max(1, len(pairs) // FIT_SEQUENCES)][:FIT_SEQUENCES]
    tokens = min(FIT_TOKENS, *(len(pair.clean_ids) for pair in chosen))
    return torch.stack([pair.clean_ids[:tokens] for pair in chosen])


def _batches(pairs: Sequence[Pair], size: int) -> Iterator[tuple[int, Sequence[Pair]]]:
    """Runs of up to `size` neighbours of one shape, with the first one's number."""
    start = 0
    for end in range(1, len(pairs) + 1):
        if end == len(pairs) or end - start == size or _shape(pairs[end]) != _shape(pairs[start]):
            yield start, pairs[start:end]
            start = end


def _shape(pair: Pair) -> tuple[int, int]:
    return len(pair.clean_ids), len(pair.answer_ids)

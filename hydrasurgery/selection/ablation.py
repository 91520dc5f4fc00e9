"""Mean ablation: what is lost when a head says the same thing everywhere, and how fast as more heads do."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from hydrasurgery.errors import ProbeError
from hydrasurgery.evaluation.tasks import Pair
from hydrasurgery.selection.measuring import HeadMeter, open_meter
from hydrasurgery.selection.plots import draw_arms
from hydrasurgery.selection.recording import Run
from hydrasurgery.selection.replay import Edit
from hydrasurgery.selection.scores import HeadScores


def mean_ablation(meter: HeadMeter) -> dict[str, Tensor]:
    """Share of the corruption's effect that is lost when the head's output is its mean, other heads running, [P, H].

    A corruption turns the readout's lead over; an ablation that leaves answer and distractor equal therefore scores
    about 0.5, not 1.
    """
    means = mean_outputs(meter)

    def change(name: str, heads: list[int]) -> Tensor:
        return means[name][heads][:, None]

    return meter.measure(lambda pair, run: meter.effects(pair, run, change, live=True), live=True)


def mean_outputs(meter: HeadMeter) -> dict[str, Tensor]:
    """Each head's mean output over all tokens of the clean prompts that can be used: layer name -> [H, D]."""
    device = next(meter.model.parameters()).device
    rows = meter.measure(lambda pair, run: {name: x.float().mean(0) for name, x in run.clean.items()}, whole=True)
    return {name: means.mean(0).to(device) for name, means in rows.items()}


@dataclass(frozen=True)
class AblationCurve:
    """Accuracy against the number of ablated heads; `print` shows it, `plot` draws it.

    Attributes:
        counts: Numbers of heads that are ablated together.
        accuracy: Arm ("top", "bottom", "random") -> share of pairs answered, one per count; the random arm is a mean.
        spread: Of the random arm, standard deviation between its draws, one per count.
    """

    counts: tuple[int, ...]
    accuracy: dict[str, tuple[float, ...]]
    spread: tuple[float, ...]

    def __str__(self) -> str:
        rows = ["ablated  " + "".join(f"{arm:>8}" for arm in self.accuracy)]
        for i, count in enumerate(self.counts):
            rows.append(f"{count:>7}  " + "".join(f"{values[i]:>8.3f}" for values in self.accuracy.values()))
        return "\n".join(rows)

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Draw the arms (PNG); ImportError names the extra where matplotlib is missing."""
        return draw_arms(self.counts, self.accuracy, {"random": self.spread}, path)


def ablation_curve(
    model: nn.Module,
    scores: HeadScores,
    pairs: Sequence[Pair],
    *,
    counts: Sequence[int] | None = None,
    draws: int = 5,
    seed: int = 0,
    batch_size: int = 4,
    rows: int = 64,
) -> AblationCurve:
    """The positive and the negative control of scores: mean-ablate their top heads, their bottom heads, and random ones.

    Only pairs that the clean model answers are asked, so that the accuracy without ablation is 1.

    Args:
        model: The decoder that was scored.
        scores: Of its heads.
        pairs: Prompts to answer, best others than those that were scored.
        counts: How many heads to ablate together; by default nine steps from none to all.
        draws: Random sets a count.
        seed: Of the random sets.
        batch_size: Prompts run together, twice.
        rows: Sets of heads that are replayed together, each on a whole prompt: the bound on memory.

    Returns:
        The accuracies; `print` shows them, `plot` draws them.

    Raises:
        ProbeError: no pair that the clean model answers, a count above the number of heads.

    Example:
        >>> import hydrasurgery as hs
        >>> from hydrasurgery.demo.teacher import load_teacher
        >>> from hydrasurgery.selection import probe_pairs
        >>> model, tokenizer = load_teacher()
        >>> scores = hs.score_heads(model, tokenizer, length=48, count=2, progress=False)
        >>> pairs = probe_pairs(model, tokenizer, length=48, count=2, seed=1)
        >>> print(ablation_curve(model, scores, pairs, counts=(0, 16), draws=1))
        ablated       top  bottom  random
              0     1.000   1.000   1.000
             16     0.000   1.000   1.000
    """
    ranking = [(scores.layers[layer].name, head) for layer, head in scores.ranking]
    counts = tuple(counts) if counts is not None else tuple(round(i * len(ranking) / 8) for i in range(9))
    if not counts or not 0 <= min(counts) <= max(counts) <= len(ranking):
        raise ProbeError(f"counts={list(counts)} must lie between 0 and the model's {len(ranking)} heads.")
    rng = random.Random(seed)
    orders = [ranking, ranking[::-1], *(sorted(ranking, key=lambda _: rng.random()) for _ in range(draws))]
    sets = [set(order[:count]) for order in orders for count in counts]
    with open_meter(model, pairs, batch_size=batch_size, rows=rows, seed=seed) as meter:
        means = mean_outputs(meter)

        def right(pair: Pair, run: Run) -> dict[str, Tensor]:
            parts = []
            for start in range(0, len(sets), rows):
                chosen = sets[start : start + rows]
                guesses = meter.replayer.replay(run, len(chosen), _ablated(means, chosen)).argmax(-1).cpu()
                parts.append((guesses == pair.answer_ids).all(-1).float())
            return {"all": torch.cat(parts)}

        found = meter.measure(right, whole=True)["all"].mean(0).view(len(orders), len(counts))
    arms = {"top": found[0], "bottom": found[1]} | ({"random": found[2:].mean(0)} if draws else {})
    spread = found[2:].std(0, correction=0) if draws else torch.zeros(len(counts))
    return AblationCurve(counts, {arm: tuple(v.tolist()) for arm, v in arms.items()}, tuple(spread.tolist()))


def _ablated(means: dict[str, Tensor], sets: Sequence[set[tuple[str, int]]]) -> Edit:
    """The edit that ablates set r in row r."""

    def edit(name: str, output: Tensor) -> Tensor:
        at = [(row, head) for row, chosen in enumerate(sets) for layer, head in chosen if layer == name]
        out = output.clone()
        if at:
            rows, heads = map(list, zip(*at, strict=True))
            out[rows, :, heads] = means[name][heads][:, None].to(out.dtype)
        return out

    return edit

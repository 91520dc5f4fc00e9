"""Activation patching (paper section 2, eq. 9-10): what a head's corrupted output does to the answer."""

from __future__ import annotations

from torch import Tensor

from hydrasurgery.evaluation.tasks import Pair
from hydrasurgery.selection.measuring import HeadMeter
from hydrasurgery.selection.recording import Run
from hydrasurgery.selection.replay import Change


def activation_patching(meter: HeadMeter) -> dict[str, Tensor]:
    """Receiver score: later attention outputs held at their clean values, layer name -> [P, H].

    IE(l, h) = (m(x) - m(x; O_lh <- O_lh(x'))) / (m(x) - m(x')): 1 is the whole effect of the corruption; nothing is
    clamped. Only heads whose output at the answer's positions matters directly score; those that prepare the ground
    for later heads are found by `path_patching` or `unfrozen_patching`.
    """
    return meter.measure(lambda pair, run: meter.effects(pair, run, corrupt_output(run), live=False))


def unfrozen_patching(meter: HeadMeter) -> dict[str, Tensor]:
    """The same with later attention running: every path from the head to the answer counts, [P, H].

    Replayed from the first changed token on, after the clean run's keys and values.
    """

    def score(pair: Pair, run: Run) -> dict[str, Tensor]:
        run = meter.replayer.from_change(pair, run)
        return meter.effects(pair, run, corrupt_output(run), live=True)

    return meter.measure(score, live=True)


def corrupt_output(run: Run) -> Change:
    """The change that puts a head's output in the corrupt run in place of its clean one, at every position."""
    return lambda name, heads: run.corrupt[name][:, heads].transpose(0, 1)

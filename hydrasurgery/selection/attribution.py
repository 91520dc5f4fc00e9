"""Attribution patching: every head's effect from one backward pass, the top share checked by real patches."""

from __future__ import annotations

import torch
from torch import Tensor

from hydrasurgery.evaluation.tasks import Pair
from hydrasurgery.selection.effects import readout, top_heads, whole_effect
from hydrasurgery.selection.measuring import HeadMeter
from hydrasurgery.selection.patching import corrupt_output
from hydrasurgery.selection.recording import Run

VERIFIED = 1 / 8  # of all heads


def attribution_patching(meter: HeadMeter) -> dict[str, Tensor]:
    """The first order of the receiver score for all heads, and its exact value for the top eighth, [P, H].

    IE(l, h) ~ <dm / dO_lh, O_lh(x) - O_lh(x')> / (m(x) - m(x')). The estimate misses what a non-linear readout (the final
    norm, MLPs) does to a large change, so the heads with the largest mean |estimate| are patched for real.
    """
    found = attribution(meter)
    top = top_heads({name: values.abs().mean(0) for name, values in found.items()}, VERIFIED)
    exact = meter.measure(lambda pair, run: meter.effects(pair, run, corrupt_output(run), live=False, heads=top))
    for name, head in top:
        found[name][:, head] = exact[name][:, head]
    return found


def attribution(meter: HeadMeter) -> dict[str, Tensor]:
    """The estimate for every head, nothing checked, [P, H]."""
    return meter.measure(lambda pair, run: _estimate(meter, pair, run))


def _estimate(meter: HeadMeter, pair: Pair, run: Run) -> dict[str, Tensor]:
    with torch.enable_grad():
        leaves = {name: output.detach().clone().requires_grad_() for name, output in run.clean.items()}
        lead = readout(meter.replayer.replay(run, 1, lambda name, _output: leaves[name][None])[0], pair)
        slopes = torch.autograd.grad(lead, list(leaves.values()))
    whole = whole_effect(pair, run)
    return {
        name: (slope.float() * (run.clean[name] - run.corrupt[name]).float()).sum((0, 2)) / whole
        for name, slope in zip(leaves, slopes, strict=True)
    }

"""The swap check: a head gives way to its calibrated linear stand-in, and the answer is measured again.

This is the confirming measurement: it asks for sensitivity to conversion, which is not the same as importance.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hydrasurgery.calibration import LastAttention, LinearFit, linear_head
from hydrasurgery.layers import l2_norm
from hydrasurgery.selection.bench import Bench, divergence, effects


def swap(bench: Bench) -> dict[str, Tensor]:
    """Share of the corruption's effect on the readout that is lost by the stand-in, other heads running, [P, H]."""
    return _swap(bench)


def swap_divergence(bench: Bench) -> dict[str, Tensor]:
    """KL(clean || swapped) of the answer's tokens in nats, [P, H]; it sees harm that leaves the readout's lead alone."""
    return _swap(bench, lost=divergence)


def _swap(bench: Bench, **options) -> dict[str, Tensor]:  # type: ignore[no-untyped-def]
    fits = bench.fits
    with LastAttention() as last:

        def change(name: str, rows: list[int], heads: list[int]) -> Tensor:
            return stand_in(last, fits[name], rows, heads)

        return bench.measure(lambda pair, run: effects(bench, pair, run, change, live=True, **options), whole=True)


def stand_in(last: LastAttention, fit: LinearFit, rows: list[int], heads: list[int]) -> Tensor:
    """gamma * RMSNorm(linear attention) of some heads in some rows of the latest attention: [N, T, V]."""
    shared = [head * last.k.shape[1] // last.q.shape[1] for head in heads]
    q, k, v = last.q[rows, heads], last.k[rows, shared], last.v[rows, shared]
    q, k, v = (x.transpose(0, 1)[None].float() for x in (l2_norm(q), l2_norm(k), v))  # [1, T, N, K]
    out = linear_head(q, k, v, fit.half_life[heads], fit.beta[heads]) * fit.gamma[heads, None]
    return torch.movedim(out[0], 1, 0)

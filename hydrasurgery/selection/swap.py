"""The swap check: calibrated linear stand-ins take the place of heads, and the answer is measured again.

This confirms a choice: it measures sensitivity to conversion, which is not the same as importance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hydrasurgery.calibration import LinearFit, linear_head
from hydrasurgery.evaluation.tasks import Pair
from hydrasurgery.layers import l2_norm
from hydrasurgery.plan import Plan
from hydrasurgery.selection.effects import divergence, readout
from hydrasurgery.selection.measuring import HeadMeter, open_meter
from hydrasurgery.selection.recording import Run
from hydrasurgery.selection.replay import Edit
from hydrasurgery.selection.watching import LastAttention


def swap(meter: HeadMeter) -> dict[str, Tensor]:
    """Share of the corruption's effect on the readout that is lost by the stand-in, other heads running, [P, H]."""
    return _swap(meter, None)


def swap_divergence(meter: HeadMeter) -> dict[str, Tensor]:
    """KL(clean || swapped) of the answer's tokens in nats, [P, H]; it sees harm that the readout's lead does not show."""
    return _swap(meter, divergence)


def _swap(meter: HeadMeter, lost: Callable[[Tensor, Pair], Tensor] | None) -> dict[str, Tensor]:
    fits = meter.fits
    with LastAttention(meter.taps) as last:

        def change(name: str, heads: list[int]) -> Tensor:  # before its change every row is row 0
            return stand_in(last, fits[name], [0] * len(heads), heads)

        return meter.measure(lambda pair, run: meter.effects(pair, run, change, live=True, lost=lost), live=True)


def stand_in(last: LastAttention, fit: LinearFit, rows: list[int], heads: list[int]) -> Tensor:
    """gamma * RMSNorm(linear attention) of some heads in some rows of the latest attention: [N, T, V] of its queries."""
    shared = [head * last.k.shape[1] // last.q.shape[1] for head in heads]
    q, k, v = last.q[rows, heads], last.k[rows, shared], last.v[rows, shared]
    q, k, v = (x.transpose(0, 1)[None].float() for x in (l2_norm(q), l2_norm(k), v))  # [1, T, N, K]
    q = F.pad(q, (0, 0, 0, 0, k.shape[1] - q.shape[1], 0))
    out = linear_head(q, k, v, fit.half_life[heads], fit.beta[heads]) * fit.gamma[heads, None]
    return torch.movedim(out[0, -last.q.shape[2] :], 1, 0)


@dataclass(frozen=True)
class SwapCheck:
    """What is left of a plan's answers when its linear heads are stand-ins, before any training.

    Attributes:
        accuracy: Share of the pairs that the clean model answers whose whole answer is still right.
        lead: Mean of m(swapped) / m(clean) of the readout (eq. 9): at 1 nothing is lost, at 0 answer and distractor are equal.
        divergence: KL(clean || swapped) at the answer's tokens, nats.
    """

    accuracy: float
    lead: float
    divergence: float


def swap_check(
    model: nn.Module, plans: Mapping[str, Plan], pairs: Sequence[Pair], *, batch_size: int = 4, rows: int = 64
) -> dict[str, SwapCheck]:
    """Measure plans on a teacher without rewriting it: what calibrated hybrids answer before any training.

    Args:
        model: The teacher.
        plans: Name -> plan.
        pairs: Prompts to answer.
        batch_size: Prompts run together, twice.
        rows: Plans that are replayed together, each on a whole prompt: the bound on memory.

    Returns:
        The result of each plan, by its name.

    Raises:
        ProbeError: no pair that the clean model answers.
        PlanError: a plan is for another model.

    Example:
        >>> import hydrasurgery as hs
        >>> from hydrasurgery.demo.teacher import load_teacher
        >>> from hydrasurgery.selection import probe_pairs
        >>> model, tokenizer = load_teacher()
        >>> plans = {s: hs.plan_heads(model, strategy=s) for s in ("all-full", "all-linear")}
        >>> found = swap_check(model, plans, probe_pairs(model, tokenizer, length=48, count=2))
        >>> found["all-full"].accuracy, found["all-linear"].accuracy
        (1.0, 0.0)
    """
    with open_meter(model, pairs, batch_size=batch_size, rows=rows) as meter:
        for plan in plans.values():
            plan.validate(meter.regions)
        linear = {
            name: torch.tensor([[kind != "full" for kind in plan.layers[number].kinds] for plan in plans.values()])
            for number, name in enumerate(meter.taps)
        }
        with LastAttention(meter.taps) as last:
            found = meter.measure(lambda pair, run: {"all": _answers(meter, pair, run, linear, last)}, whole=True)[
                "all"
            ]
    return {name: SwapCheck(*row) for name, row in zip(plans, found.double().mean(0).tolist(), strict=True)}


def _answers(meter: HeadMeter, pair: Pair, run: Run, linear: dict[str, Tensor], last: LastAttention) -> Tensor:
    """Right or wrong, lead and divergence of every plan on one pair, [N, 3]; `linear` is [N, H] a layer."""

    def parts() -> Iterator[Tensor]:
        for start in range(0, len(next(iter(linear.values()))), meter.rows):
            masks = {name: mask[start : start + meter.rows] for name, mask in linear.items()}
            count = len(next(iter(masks.values())))
            logits = meter.replayer.replay(run, count, _swapped(meter, masks, last))
            right = (logits.argmax(-1).cpu() == pair.answer_ids).all(-1).float()
            lead = readout(logits, pair) / readout(run.clean_logits, pair)
            lost = divergence(torch.cat([run.clean_logits[None], logits]), pair)
            yield torch.stack([right, lead.cpu(), lost.cpu()], 1)

    return torch.cat(list(parts()))


def _swapped(meter: HeadMeter, masks: dict[str, Tensor], last: LastAttention) -> Edit:
    fits = meter.fits

    def edit(name: str, output: Tensor) -> Tensor:
        rows, heads = (at.tolist() for at in masks[name].nonzero(as_tuple=True))
        out = output.clone()
        if rows:
            out[rows, :, heads] = stand_in(last, fits[name], rows, heads).to(out.dtype)
        return out

    return edit

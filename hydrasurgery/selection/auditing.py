"""What a plan drops, before any training: each capability with the plan's linear heads as stand-ins, against random plans.

The stand-ins are those of the swap check: an audit tells what distillation has to make good, and which heads would spare it that.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from hydrasurgery.dialect.names import FULL, LINEAR
from hydrasurgery.errors import DataError, PlanError, ProbeError, TokenizerError
from hydrasurgery.evaluation.probes import PROBES
from hydrasurgery.evaluation.tasks import Pair
from hydrasurgery.plan import LayerPlan, Plan, units
from hydrasurgery.selection.scores import CRITICAL, HeadScores
from hydrasurgery.selection.scoring import probe_pairs, score_heads
from hydrasurgery.selection.swap import SwapCheck, swap_check

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_KEPT = 4  # heads that a keep-list names for a capability
Head = tuple[int, int]  # layer and head


@dataclass(frozen=True)
class Capability:
    """One capability under a plan.

    Attributes:
        name: of its probe.
        pairs: prompts that were asked.
        plan: what the plan leaves of the answers.
        randoms: what each random plan of the same size does.
        dropped: heads that the capability needs and the plan makes linear, the most needed first, each with its importance.
        kept: what the plan leaves with those heads full; None if there are none.
        why: the reason why nothing was measured; empty if it was.
    """

    name: str
    pairs: int = 0
    plan: SwapCheck | None = None
    randoms: tuple[SwapCheck, ...] = ()
    dropped: tuple[tuple[Head, float], ...] = ()
    kept: SwapCheck | None = None
    why: str = ""


@dataclass(frozen=True)
class Audit:
    """What a plan drops; `print` shows the table.

    Attributes:
        capabilities: One a probe, in order.
    """

    capabilities: tuple[Capability, ...]

    @property
    def keep(self) -> list[Head]:
        """The heads to keep full, as `plan_heads(keep=...)` takes them: all that some capability needs and the plan drops."""
        return sorted({head for capability in self.capabilities for head, _ in capability.dropped})

    def __str__(self) -> str:
        rows = [("capability", "pairs", "plan", "random plans", "needed and dropped (layer:head)", "with these full")]
        for each in self.capabilities:
            if each.plan is None:
                why = each.why.partition(". ")[0].partition(" (")[0]
                rows.append((each.name, str(each.pairs), f"not measured: {why}", "", "", ""))
                continue
            leads = [check.lead for check in each.randoms]
            spread = f"{statistics.mean(leads):.2f} +- {statistics.pstdev(leads):.2f}" if leads else "-"
            heads = " ".join(f"{layer}:{head}" for (layer, head), _ in each.dropped) or "-"
            kept = "-" if each.kept is None else f"{each.kept.lead:.2f}"
            rows.append((each.name, str(each.pairs), f"{each.plan.lead:.2f}", spread, heads, kept))
        widths = [max(len(row[place]) for row in rows if row[3] or not place) for place in range(len(rows[0]))]
        table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        said = " ".join(f"{layer}:{head}" for layer, head in self.keep)
        last = f"keep {said}" if said else "no head that a capability needs is dropped"
        return "\n".join(["share of the answer's lead that is left, heads as stand-ins:", *table, last])


def audit(
    model: nn.Module,
    plan: Plan,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    probes: Sequence[str] = tuple(PROBES),
    pairs: Mapping[str, Sequence[Pair]] | None = None,
    length: int | None = None,
    count: int = 8,
    randoms: int = 3,
    method: str = "activation-patching",
    seed: int = 0,
    batch_size: int = 4,
    rows: int = 64,
    progress: bool = True,
) -> Audit:
    """Measure what a plan's linear heads cost each capability before any training, and name the heads to keep.

    Args:
        model: The teacher.
        plan: What is audited.
        tokenizer: Writes the probes; not needed with `pairs`.
        probes: Capabilities, of `hydrasurgery.evaluation.PROBES`.
        pairs: Name -> counterfactual prompts of your own instead.
        length: Tokens a prompt; default 4096 or the model's position limit.
        count: Prompts of each capability.
        randoms: Random plans with as many full heads (KV groups, for a plan by group) that the plan is compared with.
        method: The scorer that says which heads a capability needs: those above 0.01, at most four.
        seed: Of prompts and random plans.
        batch_size, rows: As in `score_heads`.
        progress: Show bars.

    Returns:
        A row a capability; what the teacher cannot answer is told and not measured.

    Raises:
        PlanError: the plan is for another model, or `randoms` is negative.
        ProbeError: neither tokenizer nor pairs, or an unknown probe.

    Example:
        >>> import hydrasurgery as hs
        >>> from hydrasurgery.demo.teacher import load_teacher
        >>> model, tokenizer = load_teacher()
        >>> plan = hs.plan_heads(model, strategy="all-linear")
        >>> found = audit(model, plan, tokenizer, probes=("needle-1",), length=48, count=2, progress=False)
        >>> found.capabilities[0].plan.lead < 0.5, len(found.keep)
        (True, 4)
    """
    if randoms < 0:
        raise PlanError(f"randoms={randoms}: give the number of random plans, 0 or more.")
    if pairs is None and tokenizer is None:
        raise ProbeError("audit needs a tokenizer to write its probes, or pairs=... of your own.")
    unknown = [name for name in probes if name not in PROBES]
    if pairs is None and unknown:
        raise ProbeError(f"probe {unknown[0]!r} is not one of {', '.join(PROBES)}.")
    plans = {"plan": plan, **{f"random {n}": _shuffled(plan, seed + n) for n in range(randoms)}}
    memory: dict[str, Any] = {"batch_size": batch_size, "rows": rows}
    found = []
    for name in probes if pairs is None else pairs:
        asked: Sequence[Pair] = ()
        try:
            if pairs is None:
                asked = probe_pairs(model, tokenizer, probes=(name,), length=length, count=count, seed=seed)
            else:
                asked = pairs[name]
            checks = swap_check(model, plans, asked, **memory)
            scores = score_heads(model, pairs=asked, method=method, seed=seed, progress=progress, **memory)
        except (
            ProbeError,
            TokenizerError,
            DataError,
        ) as error:  # too hard for the teacher, or for the tokenizer or length
            found.append(Capability(name, len(asked), why=str(error)))
            continue
        dropped, kept = _dropped(scores, plan), None
        if dropped:
            kept = swap_check(model, {"": with_full(plan, [head for head, _ in dropped])}, asked, **memory)[""]
        others = tuple(check for key, check in checks.items() if key != "plan")
        found.append(Capability(name, len(asked), checks["plan"], others, dropped, kept))
    return Audit(tuple(found))


def with_full(plan: Plan, heads: Sequence[Head]) -> Plan:
    """The plan with some heads full, and all of their unit (a KV group, for a plan by group)."""
    layers = list(plan.layers)
    for place, head in heads:
        layer = layers[place]
        unit = next(unit for unit in units(layer, plan.unit) if head in unit)
        layers[place] = _with(layer, {*layer.full_heads, *unit})
    return replace(plan, layers=tuple(layers))


def _dropped(scores: HeadScores, plan: Plan) -> tuple[tuple[Head, float], ...]:
    """Heads of an importance above CRITICAL which the plan makes linear."""
    needed = []
    for layer, head in scores.ranking:
        value = scores.layers[layer].importance[head]
        if value > CRITICAL and plan.layers[layer].kinds[head] == LINEAR:
            needed.append(((layer, head), value))
    return tuple(needed[:MOST_KEPT])


def _shuffled(plan: Plan, seed: int) -> Plan:
    """A plan whose full units are as many, drawn anywhere; heads, where the plan has groups of both kinds."""
    groups = [(number, unit) for number, layer in enumerate(plan.layers) for unit in units(layer, plan.unit)]
    whole = [{plan.layers[number].kinds[head] for head in unit} for number, unit in groups]
    if any(len(kinds) > 1 for kinds in whole):
        return _shuffled(replace(plan, unit="head"), seed)
    order = np.random.default_rng(seed).permutation(len(groups))
    full: list[set[int]] = [set() for _ in plan.layers]
    for place, kinds in zip(order, whole, strict=True):
        if FULL in kinds:
            number, unit = groups[place]
            full[number].update(unit)
    layers = tuple(_with(layer, heads) for layer, heads in zip(plan.layers, full, strict=True))
    return replace(plan, layers=layers, min_full_per_layer=0, keep=(), never=())


def _with(layer: LayerPlan, full: set[int]) -> LayerPlan:
    return replace(layer, kinds=tuple(FULL if head in full else LINEAR for head in range(layer.num_heads)))

"""Choosing: which heads stay full, by strategy, ratio and budget."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

from torch import nn

from hydrasurgery.costs import attention_flops, kept_tokens
from hydrasurgery.dialect.names import FULL, LINEAR
from hydrasurgery.errors import PlanError
from hydrasurgery.ir.capture import capture
from hydrasurgery.json_files import shown
from hydrasurgery.options import LayerOptions
from hydrasurgery.plan import (
    UNITS,
    Heads,
    LayerPlan,
    ModelInfo,
    Places,
    Plan,
    layer_shape,
    model_info,
    package_versions,
    units,
)
from hydrasurgery.records import Bounds, Positive, Seed, read_value

STRATEGIES = ("constrained", "global", "per-layer", "random", "fixed", "layerwise", "all-linear", "all-full")
NEEDS_SCORES = ("constrained", "global", "per-layer")
EVEN = ("fixed", "per-layer")  # the same number of full units in each layer
BUDGETS = ("heads", "kv-bytes", "flops")
REDUCTIONS: dict[str, Callable[[Sequence[float]], float]] = {
    "max": max,
    "sum": math.fsum,
    "mean": lambda values: math.fsum(values) / len(values),
}
Unit = tuple[int, int]  # (layer, number of the head or KV group in it)


def plan_heads(
    source: Any,
    *,
    ratio: str = "7:1",
    unit: str = "head",
    strategy: str = "constrained",
    min_full_per_layer: int = 1,
    keep: Iterable[tuple[int, int]] = (),
    never: Iterable[tuple[int, int]] = (),
    budget: str = "heads",
    length: int = 32768,
    seed: int = 0,
    group_score: str = "max",
    tie: float = 1e-3,
    layer: LayerOptions | str = "default",
) -> Plan:
    """Decide which heads stay full.

    Strategies: `constrained` keeps the highest scores of the whole model with at least `min_full_per_layer` units in
    each layer; `global` is the same without that floor; `per-layer` keeps the highest scores of each layer, as many in
    each; `random` draws instead of scoring, floor kept; `fixed` draws the same heads for each layer; `layerwise` keeps
    whole layers, the last of each equal stretch, as few as hold no fewer units than the ratio asks for; `all-linear`
    and `all-full` keep none and all.

    Scores that round to the same multiple of `tie` are equal; then the higher reconstruction error stays full (it
    converts worst), then the lower layer and head.

    The ratio L:F lets full heads spend F / (L + F) of what the teacher's do. By budget `heads` that is a number of
    units, round(total * F / (L + F)). By `kv-bytes` it is the cache of the KV heads that full heads read: query heads
    that share a KV head which is kept anyway cost nothing. By `flops` it is their attention arithmetic, in which a
    window makes heads cheap. Both are filled in the order of the ranks; a unit that does not fit is passed over.
    More is spent only where the floor or `keep` needs it; `Plan.notes` says so.

    Args:
        source: HeadScores (required by constrained, global and per-layer), or a model, or what `capture(model)` gives.
        ratio: "L:F", linear to full.
        strategy: One of those above.
        unit: "head", or "kv-group": the query heads of a KV head share one kind, so that its cache can go.
        min_full_per_layer: Full units a layer has at least (constrained, random, fixed, per-layer).
        keep: (layer, head) numbers that stay full whatever the strategy; they count towards the ratio.
        never: (layer, head) numbers that become linear whatever the strategy.
        budget: "heads", "kv-bytes" or "flops"; the last two for constrained, global and random.
        length: Tokens that bytes and FLOPs are counted at.
        seed: Of random and fixed.
        group_score: "max", "mean" or "sum" of the heads' scores in a KV group.
        tie: Resolution of the scores, in the scores' own unit (1 is the whole effect of an answer; `swap-kl` scores are
            nats and far smaller, so give 0 or their resolution).
        layer: How the hybrid layers are built: LayerOptions, or text such as "hydrahead" or "conv=none" (`LayerOptions.of`).

    Returns:
        The plan; printing it draws a map of the heads.

    Raises:
        PlanError: an unknown option, a keep or never entry that is no head, a head that is both, a floor above a
            layer's units, missing or non-finite scores.

    Example:
        >>> import hydrasurgery as hs
        >>> from hydrasurgery.demo.teacher import load_teacher
        >>> plan = hs.plan_heads(load_teacher()[0], ratio="7:1", strategy="random", keep=[(3, 0)])
        >>> plan.num_full, plan.num_heads, plan.layers[3].kinds[0]
        (16, 128, 'full')
    """
    _check_options(unit, strategy, group_score, budget)
    for name, kind, value in (
        ("min_full_per_layer", Heads, min_full_per_layer),
        ("length", Positive, length),
        ("seed", Seed, seed),
        ("tie", Annotated[float, Bounds(0, 10**9)], tie),
    ):
        read_value(kind, value, name, PlanError)
    keep, never = (read_value(Places, tuple(x), name, PlanError) for name, x in (("keep", keep), ("never", never)))
    options = LayerOptions.of(layer)
    share = _full_share(ratio)
    shapes, model = model_shapes(source)
    groups = [units(shape, unit) for shape in shapes]
    forced = _named_units("keep", keep := tuple(sorted(set(keep))), shapes, groups)
    banned = _named_units("never", never := tuple(sorted(set(never))), shapes, groups)
    if forced & banned:
        index, u = min(forced & banned)
        raise PlanError(f"keep and never both name {unit} {u} of {shapes[index].name}; leave it out of one of them.")
    floor = min_full_per_layer if strategy in ("constrained", "random", *EVEN) else 0
    for index, (shape, members) in enumerate(zip(shapes, groups, strict=True)):
        left = len(members) - sum(1 for layer, _ in banned if layer == index)
        if floor > left:
            raise PlanError(f"min_full_per_layer={floor}, but {shape.name} has only {left} units of {unit}.")

    ranks = _ranks(source, strategy, groups, seed, REDUCTIONS[group_score], tie)
    choice = _Choice(strategy, shapes, groups, ranks, forced, banned, floor, share, unit)
    chosen, notes = _choose(choice) if budget == "heads" else _fill(choice, *_costs(choice, budget, length))
    ties = sum(ranks[place][0] >= 0 for place in chosen - forced) if strategy in NEEDS_SCORES else 0
    if ties:
        notes.append(f"{ties} of {len(chosen)} full units score below tie={tie:g}: reconstruction error chose them")
    layers = tuple(
        replace(shape, kinds=_kinds(shape.num_heads, [heads for u, heads in enumerate(layer) if (index, u) in chosen]))
        for index, (shape, layer) in enumerate(zip(shapes, groups, strict=True))
    )
    versions = package_versions()
    return Plan(layers, unit, strategy, ratio, floor, keep, never, budget, seed, model, versions, tuple(notes), options)


@dataclass(frozen=True)
class _Choice:
    """What a choice is made from; `ranks` are sort keys, the smallest stays full first."""

    strategy: str
    shapes: list[LayerPlan]
    groups: list[list[range]]
    ranks: dict[Unit, tuple[float, ...]]
    forced: set[Unit]
    banned: set[Unit]
    floor: int
    share: float
    unit: str

    @property
    def free(self) -> list[Unit]:
        """Units that may become full, best first."""
        return sorted(self.ranks.keys() - self.banned, key=lambda unit: self.ranks[unit])

    def floored(self) -> set[Unit]:
        """The forced units, and the best of each layer that has fewer than the floor."""
        chosen = set(self.forced)
        for layer in range(len(self.groups)):
            have = sum(1 for at in chosen if at[0] == layer)
            best = [at for at in self.free if at[0] == layer and at not in chosen]
            chosen.update(best[: max(0, self.floor - have)])
        return chosen


def _choose(choice: _Choice) -> tuple[set[Unit], list[str]]:
    """The full units by number, and what there is to say about it."""
    total = len(choice.ranks)
    if choice.strategy == "all-full":
        return choice.ranks.keys() - choice.banned, []
    if choice.strategy == "all-linear":
        return set(choice.forced), []
    if choice.strategy in EVEN:
        wanted = [_round(len(members) * choice.share) for members in choice.groups]
        chosen = set(choice.forced)
        for layer, count in enumerate(wanted):
            chosen.update([at for at in choice.free if at[0] == layer][: max(count, choice.floor)])
        return chosen, _count_notes(total * choice.share, sum(wanted), len(chosen), choice.unit)
    target = _round(total * choice.share)
    if choice.strategy == "layerwise":
        chosen = choice.forced | (_spaced_layers(choice.groups, target) - choice.banned)
        return chosen, _count_notes(total * choice.share, target, len(chosen), choice.unit, "whole layers, rounded up")
    chosen = choice.floored()
    free = [at for at in choice.free if at not in chosen]
    chosen.update(free[: max(0, target - len(chosen))])
    return chosen, _count_notes(total * choice.share, target, len(chosen), choice.unit)


def _fill(
    choice: _Choice, cost: Callable[[Unit, set[Unit]], float], total: float, what: str
) -> tuple[set[Unit], list[str]]:
    """The full units that a budget of `choice.share * total` pays for; `cost(unit, chosen)` is what one more costs."""
    chosen: set[Unit] = set()
    spent, allowed = 0.0, choice.share * total
    for at in sorted(choice.floored()):
        spent += cost(at, chosen)
        chosen.add(at)
    for at in choice.free:
        if at not in chosen and spent + cost(at, chosen) <= allowed * (1 + 1e-9):
            spent += cost(at, chosen)
            chosen.add(at)
    over = " (min_full_per_layer or keep)" if spent > allowed * (1 + 1e-9) else ""
    return chosen, [f"full heads spend {spent / total:.2%} of the teacher's {what}, {choice.share:.2%} asked{over}"]


def _costs(choice: _Choice, budget: str, length: int) -> tuple[Callable[[Unit, set[Unit]], float], float, str]:
    """What a unit more costs, what all cost, and what it is."""
    if budget == "flops":
        per_head = [attention_flops(shape, length) for shape in choice.shapes]
        total = sum(shape.num_heads * flops for shape, flops in zip(choice.shapes, per_head, strict=True))
        return lambda at, _: len(choice.groups[at[0]][at[1]]) * per_head[at[0]], total, "attention FLOPs"
    size = [kept_tokens(shape, length) * (shape.head_dim + shape.value_dim) for shape in choice.shapes]

    def shared(at: Unit) -> set[int]:
        """KV heads that a unit reads."""
        layer, members = at[0], choice.groups[at[0]][at[1]]
        return {g for g, heads in enumerate(choice.shapes[layer].groups) if set(heads) & set(members)}

    def cost(at: Unit, chosen: set[Unit]) -> float:
        kept = {g for other in chosen if other[0] == at[0] for g in shared(other)}
        return size[at[0]] * len(shared(at) - kept)

    total = sum(shape.num_key_value_heads * each for shape, each in zip(choice.shapes, size, strict=True))
    return cost, total, "KV bytes"


def _ranks(
    source: Any,
    strategy: str,
    groups: list[list[range]],
    seed: int,
    reduce: Callable[[Sequence[float]], float],
    tie: float,
) -> dict[Unit, tuple[float, ...]]:
    """Sort keys of the units: the smallest stays full first."""
    # Random.random() is the one draw whose values Python promises to keep between its versions.
    draw = random.Random(seed).random
    if strategy == "fixed":
        draws = [draw() for _ in range(max(len(members) for members in groups))]
        return {(layer, u): (draws[u],) for layer, members in enumerate(groups) for u in range(len(members))}
    if strategy not in NEEDS_SCORES:
        return {(layer, u): (draw(),) for layer, members in enumerate(groups) for u in range(len(members))}
    if not hasattr(source, "layers") or isinstance(source, nn.Module):
        raise PlanError(
            f"strategy={strategy!r} needs scores: give plan_heads the result of score_heads, or choose a strategy that "
            f"needs none ({', '.join(name for name in STRATEGIES if name not in NEEDS_SCORES)})."
        )
    ranks: dict[Unit, tuple[float, ...]] = {}
    for layer, (scores, members) in enumerate(zip(source.layers, groups, strict=True)):
        importance = _finite(scores.importance, scores.name, "importance", scores.num_heads)
        error = _finite(scores.error or (0.0,) * scores.num_heads, scores.name, "error", scores.num_heads)
        for u, heads in enumerate(members):
            score = reduce([importance[head] for head in heads])
            score = _round(score / tie) if tie else score
            ranks[layer, u] = (-score, -reduce([error[head] for head in heads]), layer, u)
    return ranks


def _spaced_layers(groups: list[list[range]], target: int) -> set[Unit]:
    """The fewest evenly spaced layers with no fewer than `target` units; each is the last of its stretch."""
    for count in range(len(groups) + 1):
        layers = [-(-(i + 1) * len(groups) // count) - 1 for i in range(count)]
        chosen = {(layer, u) for layer in layers for u in range(len(groups[layer]))}
        if len(chosen) >= target:
            break
    return chosen


def _count_notes(exact: float, target: int, got: int, unit: str, why: str = "") -> list[str]:
    notes, units = [], {"head": "heads", "kv-group": "KV groups"}[unit]
    if not math.isclose(exact, target):
        notes.append(f"the ratio asks for {exact:.4g} full {units}, rounded to {target}")
    if got != target:
        why = why or ("min_full_per_layer or keep" if got > target else "never")
        notes.append(f"{got} full {units} instead of {target} ({why})")
    return notes


def _named_units(
    what: str, heads: Sequence[tuple[int, int]], shapes: list[LayerPlan], groups: list[list[range]]
) -> set[Unit]:
    """The units that the user's list `what` names by their heads."""
    units = set()
    for layer, head in heads:
        if not 0 <= layer < len(shapes):
            raise PlanError(f"{what} names layer {layer}, but the model has layers 0 to {len(shapes) - 1}.")
        if not 0 <= head < shapes[layer].num_heads:
            last = shapes[layer].num_heads - 1
            raise PlanError(f"{what} names head {head} of {shapes[layer].name}, which has heads 0 to {last}.")
        units.add((layer, next(u for u, members in enumerate(groups[layer]) if head in members)))
    return units


def _kinds(num_heads: int, full: list[range]) -> tuple[str, ...]:
    heads = {head for members in full for head in members}
    return tuple(FULL if head in heads else LINEAR for head in range(num_heads))


def model_shapes(source: Any) -> tuple[list[LayerPlan], ModelInfo]:
    """The layers of scores, a model or regions, every head full."""
    if isinstance(source, nn.Module):
        regions = capture(source)
        model = model_info(source, len(regions))
    elif hasattr(source, "layers"):
        regions, model = source.layers, source.model
    else:
        regions = list(source)
        model = ModelInfo(num_layers=len(regions))
    if not regions:
        raise PlanError("there is no attention layer to plan: give scores, a model or the regions of one.")
    return [layer_shape(region) for region in regions], model


def _check_options(unit: str, strategy: str, group_score: str, budget: str) -> None:
    for name, value, known in (
        ("unit", unit, UNITS),
        ("strategy", strategy, STRATEGIES),
        ("group_score", group_score, tuple(REDUCTIONS)),
        ("budget", budget, BUDGETS),
    ):
        if value not in known:
            raise PlanError(f"{name}={shown(value)} is not one of {', '.join(known)}.")
    if budget != "heads" and strategy not in ("constrained", "global", "random"):
        raise PlanError(f"budget={budget!r} needs the strategy constrained, global or random, not {strategy!r}.")


def _full_share(ratio: str) -> float:
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?):([0-9]{1,9}(?:\.[0-9]{1,9})?)", str(ratio))
    linear, full = (float(match[1]), float(match[2])) if match else (0.0, 0.0)
    if linear + full == 0:
        raise PlanError(f"ratio={shown(ratio)} is not 'L:F', linear heads to full heads, for example '7:1' or '3:1'.")
    return full / (linear + full)


def _finite(values: Sequence[float], name: str, what: str, num_heads: int) -> list[float]:
    numbers = [float(value) for value in values]
    if len(numbers) != num_heads or not all(math.isfinite(number) for number in numbers):
        raise PlanError(
            f"{name}: {what} must be {num_heads} finite numbers, one per head; got {len(numbers)}, of which "
            f"{sum(math.isfinite(number) for number in numbers)} are finite. Score the model again."
        )
    return numbers


def _round(value: float) -> int:
    """Half goes up, so that a plan never depends on whether a count is even."""
    return math.floor(value + 0.5)

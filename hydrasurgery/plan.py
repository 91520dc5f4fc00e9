"""A plan: which heads stay full and which become linear, as data, as JSON and as a picture."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

from torch import nn

from hydrasurgery.dialect.names import FULL, LINEAR
from hydrasurgery.errors import PlanError
from hydrasurgery.files import atomic_write_text, json_lines
from hydrasurgery.json_files import load_json, parse_json, shown
from hydrasurgery.options import LayerOptions
from hydrasurgery.records import Bounds, Count, Name, Positive, Seed, check_record, read_record, read_value

UNITS = ("head", "kv-group")
FORMAT, VERSION = "hydrasurgery-plan", 1
LATER = ("never", "budget", "layer")  # fields that the first plans lack
MOST = Bounds(0, 2048)  # layers, and heads of a layer: several times those of the largest decoders
Heads = Annotated[int, MOST]
Width = Annotated[int, Bounds(1, 2**20)]
Places = Annotated[tuple[tuple[Heads, Heads], ...], Bounds(0, 2048 * 2048)]
Words = Annotated[tuple[Annotated[str, Bounds(0, 10_000)], ...], Bounds(0, 10_000)]


@dataclass(frozen=True)
class LayerPlan:
    """One attention layer: the kind of each query head and the shape that a forecast needs.

    Query heads of KV head g are `g * num_heads // num_key_value_heads` up to the next group's first.

    Attributes:
        name: The attention module's path in the model.
        kinds: "full" or "linear", one per query head.
        num_key_value_heads: KV heads.
        head_dim, value_dim: Widths of a head's keys and values.
        window: Tokens that a query sees at most; None for all.
    """

    name: Name
    kinds: Annotated[tuple[Name, ...], MOST]
    num_key_value_heads: Heads
    head_dim: Width
    value_dim: Width
    window: Positive | None = None

    def __post_init__(self) -> None:
        check_record(self, PlanError, f"layer {shown(self.name)}")

    @property
    def num_heads(self) -> int:
        """Query heads."""
        return len(self.kinds)

    @property
    def full_heads(self) -> tuple[int, ...]:
        """Numbers of the heads that stay full."""
        return tuple(head for head, kind in enumerate(self.kinds) if kind == FULL)

    @property
    def linear_heads(self) -> tuple[int, ...]:
        """Numbers of the heads that become linear."""
        return tuple(head for head, kind in enumerate(self.kinds) if kind == LINEAR)

    @property
    def groups(self) -> tuple[range, ...]:
        """The query heads of each KV head."""
        heads, shared = self.num_heads, self.num_key_value_heads
        return tuple(range(g * heads // shared, (g + 1) * heads // shared) for g in range(shared))

    @property
    def kept_key_value_heads(self) -> tuple[int, ...]:
        """KV heads that at least one full head reads, so that their cache has to stay."""
        return tuple(g for g, heads in enumerate(self.groups) if any(self.kinds[head] == FULL for head in heads))


@dataclass(frozen=True)
class ModelInfo:
    """The model a plan was made for.

    Attributes:
        architecture: Name of its class; empty where a plan was made from bare regions.
        model_type: As its config says; empty without one.
        num_layers: Attention layers.
    """

    architecture: Name = ""
    model_type: Name = ""
    num_layers: Count = 0

    def __post_init__(self) -> None:
        check_record(self, PlanError, "model")


@dataclass(frozen=True)
class Plan:
    """The kind of every query head of a model, with what is needed to make the same plan again.

    `print(plan)` draws the map, `save`/`load` keep it as JSON whose bytes depend on nothing but the plan.

    Attributes:
        layers: One a layer, in order: what each of its heads becomes, and its shape.
        unit: "head" or "kv-group": what was kept or converted as one.
        strategy, ratio, min_full_per_layer, keep, never, budget, seed: What `plan_heads` was told.
        model: The model that the plan was made for.
        versions: Package -> version, of when the plan was made.
        notes: Sentences on where the plan differs from what was asked.
        layer: How the hybrid layers are built.

    Raises:
        PlanError: a field is of another type or out of range.

    Example:
        >>> import hydrasurgery as hs
        >>> from hydrasurgery.demo.teacher import load_teacher
        >>> plan = hs.plan_heads(load_teacher()[0], ratio="7:1", strategy="layerwise")
        >>> print(plan)
        Plan for Qwen3ForCausalLM: 8 layers (model.layers.0.self_attn ...), 128 query heads
        full 16 of 128 heads (linear:full 7:1, asked 7:1), KV heads kept 8 of 64 (12.5%)
        strategy layerwise, unit head, budget heads, seed 0
        layer default
        <BLANKLINE>
        layer  █ full  · linear         full   KV kept
            0  ·· ·· ·· ·· ·· ·· ·· ··  0/16   0/8
            1  ·· ·· ·· ·· ·· ·· ·· ··  0/16   0/8
            2  ·· ·· ·· ·· ·· ·· ·· ··  0/16   0/8
            3  ·· ·· ·· ·· ·· ·· ·· ··  0/16   0/8
            4  ·· ·· ·· ·· ·· ·· ·· ··  0/16   0/8
            5  ·· ·· ·· ·· ·· ·· ·· ··  0/16   0/8
            6  ·· ·· ·· ·· ·· ·· ·· ··  0/16   0/8
            7  ██ ██ ██ ██ ██ ██ ██ ██  16/16  8/8
        >>> hs.Plan.from_json(plan.to_json()) == plan
        True
    """

    layers: Annotated[tuple[LayerPlan, ...], MOST]
    unit: Name = "head"
    strategy: Name = "constrained"
    ratio: Name = "7:1"
    min_full_per_layer: Heads = 1
    keep: Places = ()
    never: Places = ()
    budget: Name = "heads"
    seed: Seed = 0
    model: ModelInfo = ModelInfo()
    versions: Annotated[dict[str, Name], Bounds(0, 1000)] = field(default_factory=dict)
    notes: Words = ()
    layer: LayerOptions = LayerOptions()

    def __post_init__(self) -> None:
        check_record(self, PlanError, "plan")

    @property
    def num_heads(self) -> int:
        """Query heads of all layers."""
        return sum(layer.num_heads for layer in self.layers)

    @property
    def num_full(self) -> int:
        """Heads that stay full."""
        return sum(len(layer.full_heads) for layer in self.layers)

    @property
    def num_linear(self) -> int:
        """Heads that become linear."""
        return self.num_heads - self.num_full

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain JSON values; `from_dict` is the inverse."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "model": dict(vars(self.model)),
            "unit": self.unit,
            "strategy": self.strategy,
            "ratio": self.ratio,
            "min_full_per_layer": self.min_full_per_layer,
            "keep": [list(head) for head in self.keep],
            "never": [list(head) for head in self.never],
            "budget": self.budget,
            "seed": self.seed,
            "versions": dict(sorted(self.versions.items())),
            "notes": list(self.notes),
            "layer": asdict(self.layer),
            "layers": [_layer_to_dict(layer) for layer in self.layers],
        }

    @classmethod
    def from_dict(cls, value: Any, source: str = "plan") -> Plan:
        """The plan of `value`, what `to_dict` gave. `source` names the file in a PlanError."""
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise PlanError(f"{source}: not a plan (its format is not {FORMAT}). Give a file written by Plan.save.")
        if shown(value.get("version")) != str(VERSION):
            raise PlanError(
                f"{source}: plan version {shown(value.get('version'))}, this hydrasurgery reads version {VERSION}. "
                "Make the plan again with plan_heads, or install the version that wrote it."
            )
        rest = {key: item for key, item in value.items() if key not in ("format", "version")}
        if "layers" in rest:
            saved = read_value(Annotated[tuple[_SavedLayer, ...], MOST], rest["layers"], f"{source}: layers", PlanError)
            rest["layers"] = tuple(layer.plan() for layer in saved)
        plan = read_record(cls, rest, source, PlanError, optional=LATER)
        plan._check_itself(source)
        return plan

    def to_json(self) -> str:
        """The plan as JSON text, one layer a line: the same plan gives the same bytes."""
        head = self.to_dict()
        return json_lines(head, "layers", head.pop("layers"))

    @classmethod
    def from_json(cls, text: str, source: str = "plan") -> Plan:
        """Read `text`, which `to_json` gave. PlanError names `source` if it is not JSON, not a plan, or of another version."""
        return cls.from_dict(parse_json(text, source, PlanError), source)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the plan to `path`, whole or not at all."""
        return atomic_write_text(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read the plan that `save` wrote to `path`; PlanError if the file is missing or is not a plan."""
        return cls.from_dict(load_json(path, PlanError), os.fspath(path))

    def validate(self, regions: Sequence[Any]) -> None:
        """Raise PlanError unless every layer and head of the plan is one of `regions` and the other way round.

        Args:
            regions: What `capture(model)` gives: objects with name, num_heads, num_key_value_heads and head_dim.
        """
        self._check_itself("plan")
        here, there = [layer.name for layer in self.layers], [region.name for region in regions]
        made_for = f" (made for {self.model.architecture})" if self.model.architecture else ""
        if here != there:
            differing = [pair for pair in zip(here, there, strict=False) if pair[0] != pair[1]]
            where = f"{differing[0][0]} where the model has {differing[0][1]}" if differing else "the others are equal"
            raise PlanError(
                f"plan{made_for} is for another architecture: {len(here)} layers, the model has {len(there)}; {where}. "
                "Make a plan for this model with plan_heads."
            )
        for layer, region in zip(self.layers, regions, strict=True):
            _check_layer(layer, region, made_for)

    def _check_itself(self, source: str) -> None:
        if not self.layers:
            raise PlanError(f"{source}: no layers. Make the plan again with plan_heads.")
        if self.unit not in UNITS:
            raise PlanError(f"{source}: unit {shown(self.unit)} is not one of {', '.join(UNITS)}.")
        for layer in self.layers:
            if not layer.kinds:
                raise PlanError(f"{source}: layer {layer.name} lists no heads. Every layer needs a kind for each head.")
            unknown = sorted(set(layer.kinds) - {FULL, LINEAR})
            if unknown:
                raise PlanError(f"{source}: layer {layer.name} has the unknown head kind {shown(unknown[0])}.")
            if not 1 <= layer.num_key_value_heads <= layer.num_heads:
                raise PlanError(
                    f"{source}: layer {layer.name} has {layer.num_key_value_heads} KV heads for {layer.num_heads} "
                    "query heads. Make the plan again with plan_heads."
                )
            split = [g for g, heads in enumerate(layer.groups) if len({layer.kinds[head] for head in heads}) > 1]
            if self.unit == "kv-group" and split:
                heads = layer.groups[split[0]]
                raise PlanError(
                    f"{source}: layer {layer.name} splits KV group {split[0]} (heads {heads[0]}-{heads[-1]}) although "
                    "the unit is kv-group. Give the heads of a group one kind, or set the unit to head."
                )
            full = [{layer.kinds[head] for head in heads} == {FULL} for heads in units(layer, self.unit)]
            if sum(full) < self.min_full_per_layer:
                raise PlanError(
                    f"{source}: layer {layer.name} keeps {sum(full)} full units of {self.unit}, but the plan promises "
                    f"{self.min_full_per_layer} a layer. Add a full head, or set min_full_per_layer to 0."
                )

    def __str__(self) -> str:
        header = _header(self)
        rows = [_row(number, layer) for number, layer in enumerate(self.layers)]
        width = max(len("█ full  · linear"), *(len(cells) for _, cells, _ in rows))
        table = [f"layer  {'█ full  · linear':<{width}}  full   KV kept"]
        table += [f"{number:>5}  {cells:<{width}}  {counts}" for number, cells, counts in rows]
        return "\n".join([*header, "", *table, *(f"note: {note}" for note in self.notes)])


def package_versions() -> dict[str, str]:
    """Versions of the packages on which a head set depends."""
    found = {}
    for package in ("hydrasurgery", "torch", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


def model_info(model: nn.Module, num_layers: int) -> ModelInfo:
    """Class name and `config.model_type` of a model (empty for a module without a config)."""
    config = getattr(model, "config", None)
    return ModelInfo(type(model).__name__, str(getattr(config, "model_type", "")), num_layers)


def units(shape: LayerPlan, unit: str) -> list[range]:
    """The query heads of each unit of a layer: one head each, or those of a KV group."""
    return list(shape.groups) if unit == "kv-group" else [range(head, head + 1) for head in range(shape.num_heads)]


def layer_shape(region: Any) -> LayerPlan:
    """A region's (or a layer's scores') shape as a LayerPlan with every head full."""
    value_dim = getattr(region, "value_dim", None) or region.head_dim
    kinds = (FULL,) * region.num_heads
    return LayerPlan(region.name, kinds, region.num_key_value_heads, region.head_dim, value_dim, region.window)


# --- files and pictures -----------------------------------------------------------------------------------------------


def _layer_to_dict(layer: LayerPlan) -> dict[str, Any]:
    return {
        "name": layer.name,
        "num_heads": layer.num_heads,
        "num_key_value_heads": layer.num_key_value_heads,
        "head_dim": layer.head_dim,
        "value_dim": layer.value_dim,
        "window": layer.window,
        "full": list(layer.full_heads),
    }


@dataclass(frozen=True)
class _SavedLayer:
    """A layer as its file has it: the numbers of the heads that stay full."""

    name: Name
    num_heads: Heads
    num_key_value_heads: Heads
    head_dim: Width
    value_dim: Width
    window: Positive | None
    full: Annotated[tuple[Heads, ...], MOST]

    def __post_init__(self) -> None:
        unknown = [head for head in self.full if head >= self.num_heads]
        if unknown or len(set(self.full)) < len(self.full):
            what = f"the unknown head {unknown[0]}" if unknown else "a head twice"
            raise PlanError(f"layer {self.name} keeps {what}; it has {self.num_heads} heads, numbered from 0")

    def plan(self) -> LayerPlan:
        full = set(self.full)
        kinds = tuple(FULL if head in full else LINEAR for head in range(self.num_heads))
        return LayerPlan(self.name, kinds, self.num_key_value_heads, self.head_dim, self.value_dim, self.window)


def _check_layer(layer: LayerPlan, region: Any, made_for: str) -> None:
    if layer.num_heads > region.num_heads:
        raise PlanError(
            f"plan{made_for}: {layer.name} has {region.num_heads} heads, so head {region.num_heads} of the plan is "
            "unknown there. Make a plan for this model with plan_heads."
        )
    for what in ("num_heads", "num_key_value_heads", "head_dim"):
        if getattr(layer, what) != getattr(region, what):
            raise PlanError(
                f"plan{made_for} is for another architecture: {layer.name} has {what} {getattr(layer, what)} in the "
                f"plan and {getattr(region, what)} in the model. Make a plan for this model with plan_heads."
            )


def _header(plan: Plan) -> list[str]:
    shared = sum(layer.num_key_value_heads for layer in plan.layers)
    kept = sum(len(layer.kept_key_value_heads) for layer in plan.layers)
    achieved = f"{plan.num_linear / plan.num_full:.3g}:1" if plan.num_full else "all linear"
    asked = f", asked {plan.ratio}" if not plan.strategy.startswith("all-") else ""
    who = plan.model.architecture or plan.model.model_type or "a model"
    return [
        f"Plan for {who}: {len(plan.layers)} layers ({plan.layers[0].name} ...), {plan.num_heads} query heads",
        f"full {plan.num_full} of {plan.num_heads} heads (linear:full {achieved}{asked}), "
        f"KV heads kept {kept} of {shared} ({kept / shared:.1%})",
        f"strategy {plan.strategy}, unit {plan.unit}, budget {plan.budget}, seed {plan.seed}"
        + (f", kept by request {_list(plan.keep)}" if plan.keep else "")
        + (f", never {_list(plan.never)}" if plan.never else ""),
        f"layer {plan.layer}",
    ]


def _list(heads: Iterable[tuple[int, int]]) -> str:
    return ", ".join(f"{layer}.{head}" for layer, head in heads)


def _row(number: int, layer: LayerPlan) -> tuple[int, str, str]:
    cells = " ".join("".join("█" if layer.kinds[head] == FULL else "·" for head in heads) for heads in layer.groups)
    full = f"{len(layer.full_heads)}/{layer.num_heads}"
    kept = f"{len(layer.kept_key_value_heads)}/{layer.num_key_value_heads}"
    window = f"  window {layer.window}" if layer.window else ""
    return number, cells, f"{full:<5}  {kept}{window}"

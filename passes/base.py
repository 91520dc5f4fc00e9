"""The contract of a pass, the manager that runs passes, and pipelines written as strings.

A pass is a frozen dataclass: its fields are its options. The manager verifies each region before and after every pass
and names the pass that broke it.
"""

from __future__ import annotations

import ast
import dataclasses
import operator
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, fx, nn

from hydrasurgery import ops
from hydrasurgery.errors import PassError, PipelineError, PostconditionError, PreconditionError
from hydrasurgery.files import atomic_write_text
from hydrasurgery.passes.verify import infer_shapes, run_random, verify
from hydrasurgery.regions import Region


class PassResult(NamedTuple):
    """What a pass returns: the region, and whether it differs from the one that went in."""

    region: Region
    modified: bool


@dataclass(frozen=True)
class Pass:
    """One rewrite of one region. Subclasses set `name` and implement `run`.

    A pass that is not `exact` may change the region's numbers.
    """

    name: ClassVar[str]
    exact: ClassVar[bool] = True

    def requires(self, region: Region) -> None:
        """Raise PreconditionError if the region is not in the form this pass needs."""

    def run(self, region: Region) -> PassResult:
        """Rewrite `region.graph` in place and say whether it changed."""
        raise NotImplementedError

    def ensures(self, region: Region) -> None:
        """Raise PostconditionError if the region is not in the form this pass promises."""

    def need(self, region: Region, condition: bool, message: str) -> None:
        """Raise PreconditionError with the pass's and the region's name unless `condition` holds."""
        if not condition:
            raise PreconditionError(f"{self.name}: {region.name}: {message}")

    def promise(self, region: Region, condition: bool, message: str) -> None:
        """Raise PostconditionError likewise."""
        if not condition:
            raise PostconditionError(f"{self.name}: {region.name}: {message}")

    def __str__(self) -> str:
        options = ",".join(
            f"{f.name}={getattr(self, f.name)}" for f in dataclasses.fields(self) if getattr(self, f.name) != f.default
        )
        return f"{self.name}{{{options}}}" if options else self.name


REGISTRY: dict[str, type[Pass]] = {}


def register(cls: type[Pass]) -> type[Pass]:
    """Class decorator: make a pass known to `parse` by its name."""
    REGISTRY[cls.name] = cls
    return cls


PRESETS = {
    "analyze": "canonicalize-attention,canonicalize-rotary",
    "hybrid": "canonicalize-attention,split-heads,linearize-heads,fuse-heads,thread-state,fuse-decode",
}


def parse(pipeline: str) -> tuple[Pass, ...]:
    """Passes of a pipeline string such as `split-heads,linearize-heads{rule=gated_delta,conv=4},fuse-heads`.

    The string may also be a preset's name. Raises PipelineError naming the unknown pass or option.
    """
    text = PRESETS.get(pipeline, pipeline)
    if not re.fullmatch(r"(\s*[\w-]+(\{[^{}]*\})?\s*(,|$))+", text):
        raise PipelineError(f"pipeline {pipeline!r} is not of the form name{{option=value,...}},name,...")
    return tuple(_build(name, options) for name, _, options in re.findall(r"([\w-]+)(\{([^{}]*)\})?", text))


def _build(name: str, options: str) -> Pass:
    if name not in REGISTRY:
        raise PipelineError(f"no pass is called {name!r}; known: {', '.join(sorted(REGISTRY))}")
    known = {f.name for f in dataclasses.fields(REGISTRY[name])}
    values: dict[str, Any] = {}
    for option in filter(None, (part.strip() for part in options.split(","))):
        key, _, value = option.partition("=")
        if key not in known:
            raise PipelineError(f"pass {name!r} has no option {key!r}; it has: {', '.join(sorted(known)) or 'none'}")
        try:
            values[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            values[key] = value
    return REGISTRY[name](**values)


def run_pipeline(
    regions: Iterable[Region],
    passes: Iterable[Pass] | str,
    *,
    dump: str | Path | None = None,
    tolerance: float | None = None,
) -> list[Region]:
    """Run passes over regions, verified before and after each.

    Args:
        regions: rewritten one after the other; their graphs are changed in place.
        passes: passes, a pipeline string, or a preset's name.
        dump: a folder that gets each region's text before the first and after every pass.
        tolerance: the largest difference that an exact pass may make to the region's outputs on random inputs, relative
            to the largest output; None does not run them.

    Raises:
        PassError: the pass's and region's names come first.
    """
    todo = parse(passes) if isinstance(passes, str) else tuple(passes)
    done: list[Region] = []
    known: dict[str, list[Any]] = {}
    for region in regions:
        original = {n for n, _ in region.module.named_parameters()}
        _dump(dump, region, 0, "captured")
        before = None if tolerance is None else run_random(region)
        for number, step in enumerate(todo, start=1):
            step.requires(region)
            region, modified = step.run(region)
            if modified:
                infer_shapes(region, known)
                region.module.graph = region.graph
            verify(region, step.name, original)
            step.ensures(region)
            _dump(dump, region, number, step.name)
            if before is not None and tolerance is not None and modified:
                before = _compare(step, region, before, tolerance)
        done.append(region)
    return done


def _compare(step: Pass, region: Region, before: Tensor, tolerance: float) -> Tensor:
    """The region's outputs after `step`, which must be those `before` if the pass is exact."""
    after = run_random(region)
    error = ((after - before).abs().max() / before.abs().max()).item()
    if step.exact and not error <= tolerance:
        raise PassError(
            f"{step.name}: {region.name}: the pass changed the region's outputs by {error:.2g} of the largest; "
            f"{tolerance:.2g} is allowed"
        )
    return after


def _dump(folder: str | Path | None, region: Region, number: int, name: str) -> None:
    if folder is not None:
        atomic_write_text(Path(folder) / f"{region.name}.{number:02d}-{name}.txt", f"{region}\n")


def source(region: Region) -> fx.Node:
    """The input node of the hidden states [B, T, C]."""
    return next(n for n in region.graph.nodes if n.op == "placeholder" and n.target == region.source)


def token_flags(region: Region, mask: fx.Node | None) -> tuple[fx.Node, fx.Node]:
    """The nodes `valid` and `reset` [B, T] of a mask (`ops.token_flags`), made where they are not there yet."""
    graph = region.graph
    if not region.find(ops.token_flags):
        order = list(graph.nodes)
        before = [n for n in order if n.op == "placeholder" or n is mask][-1]
        with graph.inserting_before(before.next):
            flags = graph.call_function(ops.token_flags, (mask, source(region)))
            for place, name in enumerate(("valid", "reset")):
                graph.create_node("call_function", operator.getitem, (flags, place), None, name)
    valid, reset = region.find(ops.token_flags)[0].users
    return valid, reset


def ancestors(*nodes: fx.Node) -> list[fx.Node]:
    """The nodes and all that they are computed from, in the graph's order."""
    above, todo = set(nodes), list(nodes)
    while todo:
        for node in todo.pop().all_input_nodes:
            if node not in above:
                above.add(node)
                todo.append(node)
    return [node for node in nodes[0].graph.nodes if node in above] if nodes else []


def arguments(node: fx.Node) -> tuple[Any, ...]:
    """The node's arguments, whose type fx leaves open to all that a graph may hold."""
    return node.args


def hidden_size(region: Region) -> int:
    """Width C of the hidden states that enter the region."""
    return int(source(region).meta["shape"][-1])


def new_parameters(region: Region, name: str, module: nn.Module) -> str:
    """Put `module` under `<region>.hydra.<name>`, in the region's dtype and device; returns its path in the region."""
    like = next(region.module.parameters())
    setattr(region.module.hydra, name, module.to(device=like.device, dtype=like.dtype))
    return f"hydra.{name}"

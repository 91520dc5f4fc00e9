"""What holds of every region after every pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from hydrasurgery.ir.graphs import arguments
from hydrasurgery.ir.region import Region
from hydrasurgery.ir.state import count_tokens, extend_kv, read_state, write_state
from hydrasurgery.passes.base import Pass


@dataclass(frozen=True)
class Facts:
    """What a pass has to leave as it is.

    Attributes:
        shapes: of the parameters, by name.
        versions: how often each parameter was written in place, by its identity.
        tied: the groups of names that are one parameter.
        outputs: shape, dtype and strides of what the graph returns, None for what is no tensor.
    """

    shapes: dict[str, tuple[int, ...]]
    versions: dict[int, int]
    tied: frozenset[frozenset[str]]
    outputs: tuple[Any, ...]

    @classmethod
    def of(cls, region: Region) -> Facts:
        """A region's facts; its shapes are inferred already."""
        names: dict[int, set[str]] = {}
        parameters = dict(region.module.named_parameters(remove_duplicate=False))
        for name, parameter in parameters.items():
            names.setdefault(id(parameter), set()).add(name)
        return cls(
            {name: tuple(parameter.shape) for name, parameter in parameters.items()},
            {id(parameter): parameter._version for parameter in parameters.values()},
            frozenset(frozenset(group) for group in names.values() if len(group) > 1),
            tuple(map(_of_output, _outputs(region))),
        )


def verify(region: Region, step: Pass, before: Facts) -> None:
    """Raise ValueError unless the invariants hold of `region` after `step`.

    The graph is well formed, and every child and parameter that it names exists. Head kinds cover every slot, and the slots hold
    each of the teacher's heads once. Every parameter of before is there under its name, with its shape (unless the pass resizes)
    and its tying, and was not written in place; additions live under `hydra`. Outputs have the shapes, dtypes and strides of
    before. Recurrent states are fp32 (fp64 in a model of fp64).
    """
    region.graph.lint()
    if (problem := region.wrong_heads()) is not None:
        raise ValueError(problem)
    for graph in (region.graph, region.decode):
        if graph is not None:
            _check_names(region, graph)
    _check_parameters(region, step, before)
    if region.threaded:
        _check_states(region)
    outputs = _outputs(region)
    if len(outputs) != len(before.outputs):
        raise ValueError(f"the graph returned {len(before.outputs)} values and returns {len(outputs)}")
    for number, (old, new) in enumerate(zip(before.outputs, map(_of_output, outputs), strict=True)):
        if old != new:
            raise ValueError(f"output {number} was {_words(old)} and is {_words(new)}")
    for node in region.find(write_state):
        state = arguments(node)[2]
        value = state.meta["val"]
        if arguments(node)[1] == "recurrent" and value.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"%{state.name} is a recurrent state of {value.dtype}, not of float32")


def _check_names(region: Region, graph: fx.Graph) -> None:
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            part: Any = region.module
            for step in str(node.target).split("."):
                part = getattr(part, step, None)
                if part is None:
                    raise ValueError(f"%{node.name} reads {node.target}, which the region does not have")


def _check_parameters(region: Region, step: Pass, before: Facts) -> None:
    now = Facts.of(region)
    lost = before.shapes.keys() - now.shapes.keys()
    if lost:
        raise ValueError(f"parameters vanished: {', '.join(sorted(lost))}")
    stray = [name for name in now.shapes.keys() - before.shapes.keys() if not name.startswith("hydra.")]
    if stray:
        raise ValueError(f"new parameters outside hydra: {', '.join(sorted(stray))}")
    other = [name for name, shape in before.shapes.items() if now.shapes[name] != shape]
    if other and step.keeps_shapes:
        raise ValueError(f"{other[0]} had shape {list(before.shapes[other[0]])} and has {list(now.shapes[other[0]])}")
    untied = before.tied - now.tied
    if untied:
        raise ValueError(f"parameters were one and are no longer: {', '.join(sorted(next(iter(untied))))}")
    for name, parameter in region.module.named_parameters():
        if before.versions.get(id(parameter), parameter._version) != parameter._version:
            raise ValueError(f"{name} was written in place; put a new parameter into its place instead")


def _check_states(region: Region) -> None:
    """Tokens enter the cache once, and what has a state reads and writes it."""
    tells = [node.name for node in region.graph.nodes if node.target in (extend_kv, count_tokens)]
    if len(tells) != 1:
        raise ValueError(f"the cache is told {len(tells)} times what tokens there are ({', '.join(tells)}), not once")
    written = [arguments(node)[1] for node in region.find(write_state)]
    for node in region.graph.nodes:
        name = node.meta.get("state")
        if name is None:
            continue
        reads = any(n.target is read_state and n.args[1] == name for n in node.all_input_nodes)
        if not reads or written.count(name) != 1:
            raise ValueError(
                f"%{node.name} does not read and write its state {name!r}: run the pass before thread-state"
            )


def _outputs(region: Region) -> list[Any]:
    output = next(node for node in reversed(region.graph.nodes) if node.op == "output")
    return pytree.tree_leaves(output.args[0], lambda leaf: leaf is None)


def _of_output(leaf: Any) -> Any:
    value = leaf.meta["val"] if hasattr(leaf, "meta") else leaf
    if not isinstance(value, Tensor):
        return value
    return leaf.meta["shape"], value.dtype, tuple(map(str, value.stride()))


def _words(fact: Any) -> str:
    return f"{fact[1]} {list(fact[0])} of strides {list(fact[2])}" if isinstance(fact, tuple) else str(fact)

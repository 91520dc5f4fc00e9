"""untie-projections: the linear branch gets its own copies of the projections that q, k and v are computed with."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx, nn

from hydrasurgery.dialect.names import LINEAR
from hydrasurgery.ir.graphs import ancestors, remove_unused
from hydrasurgery.ir.region import Region
from hydrasurgery.passes.base import Pass, PassResult, register

# What later passes put under `hydra`.
RESERVED = frozenset({"beta", "decay", "gamma", "k_conv", "output_gate", "q_conv", "v_conv"})


@register
@dataclass(frozen=True)
class UntieProjections(Pass):
    """Query decomposition: linear heads read W_q x, W_k x and W_v x of their own, at first equal to the full heads'.

    Everything between the inputs and the linear branch's q, k and v that depends on a parameter is doubled: a child
    `q_proj` (or `q_norm`) gets the copy `hydra.q_proj`. Children without parameters and nodes that depend on none are
    shared. Outputs stay bit-identical. A region without a full head is left as it is: its projections have one reader.
    """

    name: ClassVar[str] = "untie-projections"

    def requires(self, region: Region) -> None:
        found = len(_branch(region))
        self.need(
            region, not region.linear_heads or found == 3, "run split-heads first: the linear branch has no q, k and v"
        )

    def run(self, region: Region) -> PassResult:
        roots = _branch(region)
        if not roots or not region.full_heads:
            return PassResult(region, False)
        graph = region.graph
        copies: dict[fx.Node, fx.Node] = {}
        names: dict[str, str] = {}
        for node in _depend_on_parameters(region, roots):
            target: Any = node.target
            if _reads_parameters(region, node):
                if target not in names:
                    names[target] = _own(region, target)
                target = names[target]
            inputs: Any = (node.args, node.kwargs)
            args, kwargs = fx.node.map_arg(inputs, lambda n: copies.get(n, n))
            with graph.inserting_after(node):
                copies[node] = graph.create_node(node.op, target, args, kwargs, f"{node.name}_linear")
            copies[node].meta["shape"] = node.meta.get("shape")
        for root in roots:
            for old in root.all_input_nodes:
                if old in copies:
                    root.replace_input_with(old, copies[old])
        remove_unused(graph)
        return PassResult(region, bool(copies))

    def ensures(self, region: Region) -> None:
        if region.full_heads and region.linear_heads:
            reached = _depend_on_parameters(region, _branch(region))
            read = [str(n.target) for n in reached if _reads_parameters(region, n)]
            shared = [path for path in read if not path.startswith("hydra.")]
            self.promise(region, not shared, f"the linear branch still reads {', '.join(shared)} of the full branch")


def _branch(region: Region) -> list[fx.Node]:
    """The linear branch's q, k and v."""
    return [n for n in region.graph.nodes if n.meta.get("branch") == LINEAR]


def _attribute(module: nn.Module, path: str) -> Any:
    for step in path.split("."):
        module = getattr(module, step)
    return module


def _reads_parameters(region: Region, node: fx.Node) -> bool:
    """Whether the node calls a child that has parameters, or is a parameter."""
    if node.op == "call_module":
        return next(region.module.get_submodule(str(node.target)).parameters(), None) is not None
    return node.op == "get_attr" and isinstance(_attribute(region.module, str(node.target)), nn.Parameter)


def _depend_on_parameters(region: Region, roots: list[fx.Node]) -> list[fx.Node]:
    """What the roots are computed from and that itself depends on a parameter, in the graph's order."""
    found: dict[fx.Node, None] = {}
    for node in ancestors(*(n for root in roots for n in root.all_input_nodes)):
        if _reads_parameters(region, node) or any(n in found for n in node.all_input_nodes):
            found[node] = None
    return list(found)


def _own(region: Region, path: str) -> str:
    """Copy the child or parameter at `path` to `hydra`; returns the copy's path."""
    hydra = region.module.hydra
    name = path.replace(".", "_")
    while name in RESERVED or hasattr(hydra, name):
        name += "_linear"
    setattr(hydra, name, copy.deepcopy(_attribute(region.module, path)))
    return f"hydra.{name}"

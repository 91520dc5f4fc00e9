"""order-heads: heads of one kind stand side by side, so that taking them is a slice and putting them back no scatter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from hydrasurgery import ops
from hydrasurgery.dialect.names import ATTENTION, LINEAR
from hydrasurgery.ir.graphs import arguments
from hydrasurgery.ir.region import Region
from hydrasurgery.passes.base import Pass, PassResult, register
from hydrasurgery.passes.prune_projections import is_own_linear, remove_selection, replace_parameters

aten = torch.ops.aten
# What may lie between the heads [B, T, H, D] and the projection of them, side by side.
VIEWS = frozenset(
    {
        aten.view.default,
        aten.reshape.default,
        aten._unsafe_view.default,
        aten.flatten.using_ints,
        aten.contiguous.default,
        aten.clone.default,
        aten.alias.default,
    }
)


@register
@dataclass(frozen=True)
class OrderHeads(Pass):
    """Slots are dealt anew: KV groups of full heads first, then mixed ones, then linear ones, so that kinds change seldom.

    Query heads, KV heads and sinks are selected in the new order before the attention, and outputs back into the old one
    after it. The selection after it is folded into the columns of the output projection where that is an `nn.Linear` right
    after the heads; prune-projections folds the ones before it, so the two belong together:
    `canonicalize-attention,order-heads,prune-projections,split-heads,...`. What cannot be folded stays as a selection. Exact
    up to the rounding of sums in another order.

    The region's `kinds` follow the new slots; `region.teacher_heads` says which old head each slot holds. The projections
    keep their names but are new parameters, no longer the teacher's.
    """

    name: ClassVar[str] = "order-heads"

    def requires(self, region: Region) -> None:
        nodes = region.find(ATTENTION)
        self.need(region, len(nodes) == 1, "run canonicalize-attention first: one attention node is needed")
        self.need(region, "kind" not in nodes[0].meta, "run it before split-heads")
        mask = arguments(nodes[0])[3] if len(nodes[0].args) > 3 else None
        shape = None if mask is None else mask.meta.get("shape")
        self.need(region, shape is None or shape[1] == 1, "the attention mask differs from head to head")

    def run(self, region: Region) -> PassResult:
        groups, heads = _order(region)
        if heads == tuple(range(region.num_heads)):
            return PassResult(region, False)
        graph, node = region.graph, region.find(ATTENTION)[0]
        with graph.inserting_before(node):
            for place, order, dim in ((0, heads, 1), (1, groups, 1), (2, groups, 1), (4, heads, 0)):
                if len(node.args) > place and node.args[place] is not None:
                    node.update_arg(place, _select(graph, arguments(node)[place], order, dim))
        back = tuple(heads.index(head) for head in range(region.num_heads))
        with graph.inserting_after(node):
            restored = _select(graph, node, back, 2)
        node.replace_all_uses_with(restored, delete_user_cb=lambda user: user is not restored)
        _fold_output(region, restored, heads)
        region.kinds = tuple(region.kinds[head] for head in heads)
        region.teacher_heads = tuple(region.teacher_heads[head] for head in heads)
        return PassResult(region, True)


def _order(region: Region) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(old KV head of each new one, old head of each new slot); equals keep their order."""
    times = region.num_heads // region.num_key_value_heads
    members = [range(g * times, (g + 1) * times) for g in range(region.num_key_value_heads)]

    def linear(head: int) -> bool:
        return region.kinds[head] == LINEAR

    groups = sorted(range(len(members)), key=lambda g: sum(map(linear, members[g])))
    slots: list[int] = []
    for group in groups:
        # A mixed group goes on with the kind that the one before it ended with.
        after_linear = bool(slots) and linear(slots[-1])
        slots += sorted(members[group], key=linear, reverse=after_linear)
    return tuple(groups), tuple(slots)


def _select(graph: fx.Graph, x: fx.Node, order: tuple[int, ...], dim: int) -> fx.Node:
    return graph.create_node("call_function", ops.select_heads, (x, order, dim))


def _fold_output(region: Region, restored: fx.Node, heads: tuple[int, ...]) -> None:
    """Let the output projection read the heads in their new slots instead of selecting them back."""
    before = node = restored
    while len(node.users) == 1:
        before, node = node, next(iter(node.users))
        if node.target not in VIEWS:
            break
    flat = before.meta.get("shape") == ("B", "T", region.num_heads * region.value_dim)
    if not flat or not is_own_linear(region, node):
        return

    def permute(name: str, parameter: Tensor) -> Tensor:
        if name != "weight":
            return parameter
        columns = parameter.unflatten(1, (region.num_heads, -1))
        return ops.select_heads(columns, heads, 1).flatten(1, 2)

    replace_parameters(region, str(node.target), permute)
    remove_selection(region.graph, restored)

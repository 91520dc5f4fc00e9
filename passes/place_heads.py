"""place-heads: what each head kind knows of positions: a rotary embedding or none, and the growth of full heads' logits."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import fx

from hydrasurgery.dialect.names import ATTENTION, FULL, TOKEN_POSITIONS
from hydrasurgery.ir.graphs import arguments, remove_unused, token_flags
from hydrasurgery.ir.region import Region
from hydrasurgery.layers import LOG_LENGTH, scale_by_length
from hydrasurgery.passes.base import Pass, PassResult, register
from hydrasurgery.passes.canonicalize_rotary import rotations, unrotated
from hydrasurgery.records import Bounds


@register
@dataclass(frozen=True)
class PlaceHeads(Pass):
    """Drops the rotary embedding of a head kind's q and k, and scales full heads' q by log(p + a) / log(a).

    p counts a document's tokens before the query, padding left out, and goes on through a cache (`ops.token_positions`).

    Options: `full_rope`, `linear_rope` (whether that kind keeps its rotary embedding), `log_length` (whether to scale), `a`.
    """

    name: ClassVar[str] = "place-heads"
    exact: ClassVar[bool] = False
    full_rope: bool = True
    linear_rope: bool = True
    log_length: bool = False
    a: Annotated[float, Bounds(1, 10**9, "(]")] = LOG_LENGTH

    def requires(self, region: Region) -> None:
        drops = not (self.full_rope and self.linear_rope)
        self.need(region, not drops or "rotary" in region.options, "run canonicalize-rotary first")
        self.need(region, not region.threaded, "run it before thread-state: the graph has a cache")
        kinds = {n.meta.get("kind") for n in region.find(ATTENTION)}
        self.need(region, None not in kinds, "run split-heads first: attention nodes have no kind")

    def run(self, region: Region) -> PassResult:
        before = str(region.graph)
        for node in region.find(ATTENTION):
            if not (self.full_rope if node.meta["kind"] == FULL else self.linear_rope):
                _drop_rotary(node)
            if self.log_length and node.meta["kind"] == FULL:
                _scale(region, node, self.a)
        remove_unused(region.graph)
        return PassResult(region, str(region.graph) != before)

    def ensures(self, region: Region) -> None:
        for node in region.find(ATTENTION):
            kept = self.full_rope if node.meta["kind"] == FULL else self.linear_rope
            left = any(rotations(x) for x in arguments(node)[:2])
            self.promise(region, kept or not left, f"a {node.meta['kind']} head still has its rotary embedding")


def _drop_rotary(attention: fx.Node) -> None:
    for place in (0, 1):
        x = arguments(attention)[place]
        plain = unrotated(x)
        plain.meta.update({key: x.meta.pop(key) for key in ("role", "branch") if plain is not x and key in x.meta})
        attention.update_arg(place, plain)


def _scale(region: Region, attention: fx.Node, a: float) -> None:
    graph, (q, _, _, *rest) = region.graph, arguments(attention)
    valid, reset = token_flags(region, rest[0] if rest else None)
    with graph.inserting_before(attention):
        counted = graph.create_node("call_function", TOKEN_POSITIONS, (valid, reset, None), None, "counted")
        counted.meta["state"] = "seen"
        positions = graph.create_node("call_function", operator.getitem, (counted, 0), None, "positions")
        scaled = graph.create_node("call_function", scale_by_length, (q, positions, a), None, f"{q.name}_scaled")
    attention.update_arg(0, scaled)

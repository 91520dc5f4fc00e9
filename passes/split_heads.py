"""split-heads: one attention node over all heads becomes one per head kind, merged back into their own slots."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from hydrasurgery import ops
from hydrasurgery.dialect.names import ATTENTION, FULL, LINEAR
from hydrasurgery.ir.graphs import arguments
from hydrasurgery.ir.region import KEPT, Region
from hydrasurgery.layers import merge_heads
from hydrasurgery.passes.base import Pass, PassResult, register


@register
@dataclass(frozen=True)
class SplitHeads(Pass):
    """Full heads keep only the KV heads that one of them reads; linear heads get one KV head each."""

    name: ClassVar[str] = "split-heads"

    def requires(self, region: Region) -> None:
        nodes = region.find(ATTENTION)
        self.need(region, len(nodes) == 1, "run canonicalize-attention first: one attention node is needed")
        self.need(region, "kind" not in nodes[0].meta, "the heads are split already")

    def run(self, region: Region) -> PassResult:
        graph, node = region.graph, region.find(ATTENTION)[0]
        q, k, v, mask, sinks = (arguments(node) + (None, None))[:5]
        full, linear = region.full_heads, region.linear_heads
        if not linear:
            node.meta["kind"] = FULL
            k.meta["role"], v.meta["role"] = KEPT
            return PassResult(region, True)
        outputs = {}
        with graph.inserting_before(node):
            if full:
                kept = tuple(sorted({region.key_value_head(h) for h in full}))
                reads = tuple(kept.index(region.key_value_head(h)) for h in full)
                keys, values = (_select(graph, x, kept, 1, f"{n}_full") for x, n in ((k, "k"), (v, "v")))
                keys.meta["role"], values.meta["role"] = KEPT
                if not _uniform(reads, len(kept)):
                    keys, values = (_select(graph, x, reads, 1, f"{x.name}_expanded") for x in (keys, values))
                queries = _select(graph, q, full, 1, "q_full")
                if sinks is not None:
                    sinks = _select(graph, sinks, full, 0, "sinks_full")
                outputs[FULL] = graph.create_node(
                    "call_function", ATTENTION, (queries, keys, values, mask, sinks), dict(node.kwargs), "o_full"
                )
            own = tuple(region.key_value_head(h) for h in linear)
            queries = _select(graph, q, linear, 1, "q_linear")
            keys, values = (_select(graph, x, own, 1, f"{n}_linear") for x, n in ((k, "k"), (v, "v")))
            for x in (queries, keys, values):
                x.meta["branch"] = LINEAR
            outputs[LINEAR] = graph.create_node(
                "call_function", ATTENTION, (queries, keys, values, mask), dict(node.kwargs), "o_linear"
            )
            for kind, output in outputs.items():
                output.meta["kind"] = kind
            merged = outputs[LINEAR]
            if full:
                merged = graph.create_node(
                    "call_function", merge_heads, (outputs[FULL], outputs[LINEAR], linear), None, "heads"
                )
        node.replace_all_uses_with(merged)
        graph.erase_node(node)
        return PassResult(region, True)


def _uniform(reads: tuple[int, ...], kept: int) -> bool:
    """Whether query head i reads KV head i * kept // heads, the layout that grouped attention has."""
    return all(read == i * kept // len(reads) for i, read in enumerate(reads)) and len(reads) % kept == 0


def _select(graph: fx.Graph, x: fx.Node, heads: tuple[int, ...], dim: int, name: str) -> fx.Node:
    return graph.create_node("call_function", ops.select_heads, (x, heads, dim), None, name)

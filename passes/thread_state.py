"""thread-state: kept KV heads, convolution inputs, recurrent states and counts go through the region's cache layer."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from hydrasurgery.dialect.names import ATTENTION, CAUSAL_CONV, LINEAR_ATTENTION, TOKEN_POSITIONS
from hydrasurgery.ir.graphs import ancestors, arguments
from hydrasurgery.ir.region import KEPT, Region
from hydrasurgery.ir.state import STATE, count_tokens, extend_kv, first_key, read_state, write_state
from hydrasurgery.ops import token_flags
from hydrasurgery.passes.base import Pass, PassResult, register

STATE_ARGUMENT = {CAUSAL_CONV: 2, LINEAR_ATTENTION: 5, TOKEN_POSITIONS: 2}


@register
@dataclass(frozen=True)
class ThreadState(Pass):
    """Adds an input `state` (the cache layer or None) and reads and writes it; without a cache nothing changes."""

    name: ClassVar[str] = "thread-state"

    def requires(self, region: Region) -> None:
        kinds = [n.meta.get("kind") for n in region.find(ATTENTION)]
        self.need(region, None not in kinds, "run split-heads first: attention nodes have no kind")
        self.need(region, not region.threaded, "the state is threaded already")

    def run(self, region: Region) -> PassResult:
        graph = region.graph
        hidden = region.source
        last_input = [n for n in graph.nodes if n.op == "placeholder"][-1]
        with graph.inserting_after(last_input):
            state = graph.placeholder(STATE)
        if region.full_heads:
            self._extend(region, state)
        else:
            with graph.inserting_after(state):
                graph.call_function(count_tokens, (state, hidden))
        for node in region.find(token_flags):
            with graph.inserting_after(state):  # before anything is counted
                node.args = (*node.args, graph.call_function(first_key, (state,)))
        for node in [n for n in graph.nodes if n.meta.get("state")]:
            name = node.meta["state"]
            with graph.inserting_before(node):
                read = graph.call_function(read_state, (state, name))
            node.update_arg(STATE_ARGUMENT[node.target], read)
            with graph.inserting_after(node):
                new = graph.call_function(operator.getitem, (node, 1))
            with graph.inserting_after(new):
                graph.call_function(write_state, (state, name, new))
        return PassResult(region, True)

    @staticmethod
    def _extend(region: Region, state: fx.Node) -> None:
        graph = region.graph
        keys, values = (next(n for n in graph.nodes if n.meta.get("role") == role) for role in KEPT)
        mask = (arguments(region.find(ATTENTION)[0]) + (None,))[3]
        order = {n: i for i, n in enumerate(graph.nodes)}
        later = max((n for n in (keys, values, mask) if isinstance(n, fx.Node)), key=order.__getitem__)
        with graph.inserting_after(later):
            pair = graph.create_node("call_function", extend_kv, (state, keys, values, mask), None, "kv")
        with graph.inserting_after(pair):
            all_values = graph.create_node("call_function", operator.getitem, (pair, 1), None, "v_all")
        with graph.inserting_after(pair):
            all_keys = graph.create_node("call_function", operator.getitem, (pair, 0), None, "k_all")
        order = {n: i for i, n in enumerate(graph.nodes)}
        for old, new in ((keys, all_keys), (values, all_values)):
            old.replace_all_uses_with(new, delete_user_cb=lambda user: order[user] > order[all_values])

    def ensures(self, region: Region) -> None:
        self.promise(region, region.threaded, "the graph has no state input")
        if region.full_heads:
            attention = region.find(ATTENTION)[0]
            read = [any(n.target is extend_kv for n in ancestors(x)) for x in arguments(attention)[1:3]]
            self.promise(region, all(read), "softmax attention does not read the keys and values of the state")

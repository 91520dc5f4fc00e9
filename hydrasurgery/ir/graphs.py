"""What passes do with graphs again and again: arguments, ancestors, and the nodes that a mask's flags come from."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from hydrasurgery import ops
from hydrasurgery.ir.region import Region
from hydrasurgery.ir.state import TELLS

FLAGS = ("valid", "reset")  # what `ops.token_flags` returns


def arguments(node: fx.Node) -> tuple[Any, ...]:
    """The node's arguments, whose type fx leaves open to all that a graph may hold."""
    return node.args


def ancestors(*nodes: fx.Node) -> list[fx.Node]:
    """The nodes and all that they are computed from, in the graph's order."""
    above, todo = set(nodes), list(nodes)
    while todo:
        for node in todo.pop().all_input_nodes:
            if node not in above:
                above.add(node)
                todo.append(node)
    return [node for node in nodes[0].graph.nodes if node in above] if nodes else []


def remove_unused(graph: fx.Graph) -> None:
    """Take out what nothing reads; inputs stay, and so does what the cache layer is told."""
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output") or node.target in TELLS)


def token_flags(region: Region, mask: fx.Node | None) -> tuple[fx.Node, fx.Node]:
    """The nodes `valid` and `reset` [B, T] of a mask (`ops.token_flags`), made where they are not there yet."""
    graph = region.graph
    if not region.find(ops.token_flags):
        order = list(graph.nodes)
        before = [n for n in order if n.op == "placeholder" or n is mask][-1]
        with graph.inserting_before(before.next):
            window: dict[str, Any] = {} if region.window is None or mask is None else {"window": region.window}
            flags = graph.call_function(ops.token_flags, (mask, region.source), window)
            for place, name in enumerate(FLAGS):
                graph.create_node("call_function", operator.getitem, (flags, place), None, name)
    flags = region.find(ops.token_flags)[0]
    found = {arguments(user)[1]: user for user in flags.users}
    with graph.inserting_after(flags):
        for place in {0, 1} - found.keys():  # removed as long as nothing read it
            found[place] = graph.create_node("call_function", operator.getitem, (flags, place), None, FLAGS[place])
    return found[0], found[1]


def previous_tokens(region: Region, mask: fx.Node | None) -> fx.Node:
    """The node of each token's predecessor (`ops.previous_tokens`), made where it is not there yet."""
    valid, _ = token_flags(region, mask)
    if not region.find(ops.previous_tokens):
        with region.graph.inserting_after(valid):
            region.graph.create_node("call_function", ops.previous_tokens, (valid, mask), None, "previous")
    return region.find(ops.previous_tokens)[0]

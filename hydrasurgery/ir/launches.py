"""A graph for fewer launches: the same computation in larger operators, as GPUs run it outside of tracing.

It is made of a region's graph whenever that is compiled and is not seen otherwise: passes, exports and torch.compile work on the
graph as it is.
"""

from __future__ import annotations

import copy
import operator
from typing import Any

from torch import fx

from hydrasurgery.dialect.heads import select_heads
from hydrasurgery.dialect.names import CAUSAL_CONV, HEAD_INPUTS
from hydrasurgery.kernels.rotary import rotate
from hydrasurgery.layers import l2_norm, rotate_tokens, to_heads, to_tokens


def fewer_launches(graph: fx.Graph) -> fx.Graph:
    """A copy of `graph` in which convolution, rotary embedding and norm of a linear head's input are one operator, and only heads
    that are read are rotated."""
    new = copy.deepcopy(graph)
    for node in new.find_nodes(op="call_function", target=to_heads):
        _fuse(new, node)
    for node in new.find_nodes(op="call_function", target=rotate):
        _select_first(new, node)
    new.eliminate_dead_code(lambda node: not _replaced(node))
    return new


def _replaced(node: fx.Node) -> bool:
    return node.target in (
        to_tokens,
        to_heads,
        CAUSAL_CONV,
        operator.add,
        operator.getitem,
        rotate_tokens,
        l2_norm,
        rotate,
    )


def _fuse(graph: fx.Graph, heads: fx.Node) -> None:
    """`to_heads(x + conv(x))` and what follows it, if that is all the operator does."""
    mixed = heads.args[0]
    if not (_only(mixed, operator.add) and isinstance(mixed, fx.Node)):
        return
    tokens, taken = mixed.args
    if not (_only(taken, operator.getitem) and isinstance(taken, fx.Node) and taken.args[1] == 0):
        return
    conv: Any = taken.args[0]
    if not (isinstance(tokens, fx.Node) and tokens.target is to_tokens and conv.target is CAUSAL_CONV):
        return
    x, weight, state, reset, previous = (*conv.args, *[None] * 5)[:5]
    if x is not tokens or set(tokens.users) != {mixed, conv}:
        return
    last, norm = heads, False
    tables: tuple[Any, ...] = ()
    if _used_by(last, rotate_tokens):
        (following,) = last.users
        if following.args[3] == "half" and _as_wide(following):
            last, tables = following, following.args[1:3]
    if _used_by(last, l2_norm) and len(next(iter(last.users)).args) == 1:
        (last,) = last.users
        norm = True
    order = {node: place for place, node in enumerate(graph.nodes)}
    if any(order[table] > order[conv] for table in tables):
        return
    inputs = (tokens.args[0], weight, state, reset, previous, *tables)
    with graph.inserting_before(conv):
        fused = graph.call_function(HEAD_INPUTS, inputs, {"norm": norm})
        parts = [graph.call_function(operator.getitem, (fused, place)) for place in (0, 1)]
    for user in list(conv.users):
        if user.args[1] == 1:
            user.replace_all_uses_with(parts[1])
    last.replace_all_uses_with(parts[0])


def _as_wide(turn: fx.Node) -> bool:
    """Whether a rotary embedding turns all channels of its heads."""
    x, cos = turn.args[:2]
    shapes = [node.meta.get("shape") or () for node in (x, cos) if isinstance(node, fx.Node)]
    return len(shapes) == 2 and shapes[0][-1:] == shapes[1][-1:] != ()


def _only(node: Any, target: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is target and len(node.users) == 1


def _used_by(node: fx.Node, target: Any) -> bool:
    return len(node.users) == 1 and next(iter(node.users)).target is target


def _select_first(graph: fx.Graph, turned: fx.Node) -> None:
    """Heads are selected and then rotated, where all that reads the rotated ones are selections."""
    users = list(turned.users)
    if not users or any(user.target is not select_heads or user.args[2] not in (1, -3) for user in users):
        return
    x, *turn = turned.args
    for user in users:
        with graph.inserting_before(user):
            chosen = graph.call_function(select_heads, (x, *user.args[1:]))
            user.replace_all_uses_with(graph.call_function(rotate, (chosen, *turn)))
        graph.erase_node(user)

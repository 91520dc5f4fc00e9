"""canonicalize-rotary: the rotary embedding of q and of k becomes one node each, so that passes can reach q and k before it."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from hydrasurgery.dialect.names import ATTENTION, LINEAR_ATTENTION
from hydrasurgery.ir.graphs import ancestors, arguments, remove_unused
from hydrasurgery.ir.region import Region
from hydrasurgery.kernels.rotary import TURNS
from hydrasurgery.layers import rotate
from hydrasurgery.passes.base import Pass, PassResult, register

aten = torch.ops.aten
# What the second copy of x goes through before it meets the sines: its channels change places and signs.
MOVES = frozenset(
    {
        aten.slice.Tensor,
        aten.neg.default,
        aten.cat.default,
        aten.stack.default,
        aten.flatten.using_ints,
        aten.view.default,
        aten.reshape.default,
        aten.unsqueeze.default,
        aten.chunk.default,
        aten.split.Tensor,
        aten.alias.default,
    }
)
CASTS = frozenset({aten.to.dtype, aten._to_copy.default})


@register
@dataclass(frozen=True)
class CanonicalizeRotary(Pass):
    """`x * cos + turn(x) * sin` becomes `rotate(x, cos, sin, turn)`, `hydrasurgery.layers.rotate`.

    A turn is known by what it does and not by how it is written: its nodes are run on numbered channels, and what comes out is
    compared with `hydrasurgery.kernels.rotary.TURNS`. Where only the first channels are turned, slicing them off and putting them
    back is part of the node. Where halves of x are turned one by one, with tables of half the channels, the node takes the tables
    twice. Bit-exact: the products and the sum stay as they were. Other regions stay as they are.
    """

    name: ClassVar[str] = "canonicalize-rotary"

    def requires(self, region: Region) -> None:
        there = region.find(ATTENTION) or region.find(LINEAR_ATTENTION)
        self.need(region, bool(there), "run canonicalize-attention first: no attention node is there")

    def run(self, region: Region) -> PassResult:
        graph = region.graph
        hidden = _after_hidden(region)
        ways = ((aten.add.Tensor, _match), (aten.cat.default, _match_halves))
        ends = [(n, way) for target, way in ways for n in graph.find_nodes(op="call_function", target=target)]
        found = [match for node, way in ends if node in hidden and (match := way(node, hidden)) is not None]
        for end, x, cos, sin, turn in found:
            with graph.inserting_before(end):
                new = graph.create_node("call_function", rotate, (x, cos, sin, turn), None, "rotated")
            new.meta.update(end.meta)
            end.replace_all_uses_with(new)
        remove_unused(graph)
        before = region.options.get("rotary")
        region.options["rotary"] = len(graph.find_nodes(op="call_function", target=rotate))
        return PassResult(region, bool(found) or before != region.options["rotary"])


def unrotated(x: fx.Node) -> fx.Node:
    """x as it is without its rotary embedding; what follows the embedding (a cast, a norm) is done to the plain one.

    Returns x itself if none is in it.
    """
    if x.target is rotate:
        return arguments(x)[0]
    if not rotations(x):
        return x
    graph, new = x.graph, {n: unrotated(n) for n in x.all_input_nodes}
    inputs: Any = (x.args, x.kwargs)
    args, kwargs = fx.node.map_arg(inputs, new.__getitem__)
    with graph.inserting_before(x):
        plain = graph.create_node(x.op, x.target, args, kwargs, f"{x.name}_plain")
    plain.meta.update(x.meta)
    return plain


def rotations(x: fx.Node) -> list[fx.Node]:
    """The `rotate` nodes that x is computed from."""
    return [node for node in ancestors(x) if node.target is rotate]


def knows_places(region: Region, x: fx.Node) -> bool:
    """Whether x [B, H, T, D] is computed from a table of numbers a token and channel that the hidden states do not give.

    Such a table is what a rotary embedding looks like that was not recognised. One number a token is none: a scale.
    """
    hidden = _after_hidden(region)
    inside = [node for node in ancestors(x) if node in hidden]
    tables = {table for node in inside for table in node.all_input_nodes if table not in hidden}
    shapes = [table.meta.get("shape") for table in tables]
    return any(shape and "T" in map(str, shape[:-1]) and shape[-1] != 1 for shape in shapes)


def _after_hidden(region: Region) -> set[fx.Node]:
    """What is computed from the values of the hidden states, and not only from their sizes."""
    found = {region.source}
    for node in region.graph.nodes:
        if node.target is not aten.sym_size.int and any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


def _match(node: fx.Node, hidden: set[fx.Node]) -> tuple[fx.Node, fx.Node, fx.Node, fx.Node, str] | None:
    """(what takes the rotated x's place, x, cos, sin, turn) of a sum that is a rotary embedding."""
    products = [_product(n, hidden) for n in node.args[:2] if isinstance(n, fx.Node)]
    if len(products) != 2 or None in products or node.kwargs:
        return None
    (x, cos), (turned, sin) = products  # type: ignore[misc]
    shape = x.meta.get("shape")
    if shape is None or len(shape) != 4 or not isinstance(shape[-1], int) or shape[-1] % 2:
        return None
    turn = _turn(turned, x, shape[-1])
    if turn is None or not all(_is_table(t, shape[-1]) for t in (cos, sin)):
        return None
    end, x = _whole(node, x, shape[-1])
    return end, x, cos, sin, turn


def _match_halves(node: fx.Node, hidden: set[fx.Node]) -> tuple[fx.Node, fx.Node, fx.Node, fx.Node, str] | None:
    """The same of halves put together: `cat([a * cos - b * sin, b * cos + a * sin])`, where x is `cat([a, b])`."""
    shape, pieces = node.meta.get("shape"), arguments(node)[0]
    width = shape[-1] if shape is not None and len(shape) == 4 else None
    if not isinstance(width, int) or node.args[1:] not in ((-1,), (3,)) or len(pieces) != 2:
        return None
    first, second = (_terms(piece, hidden) for piece in pieces)
    if first is None or second is None or first.keys() != second.keys():
        return None
    tables, moved = [*first], [factor for terms in (first, second) for factor, _ in terms.values()]
    x = moved[0]
    while x.meta.get("shape") is None or x.meta["shape"][-1] != width:  # a list of pieces has no shape
        if x.target not in MOVES and x.target is not operator.getitem or not x.all_input_nodes:
            return None
        x = x.all_input_nodes[0]
    if x.meta["shape"] != shape or not all(_is_table(table, width // 2) for table in tables):
        return None
    channels = _channels(width)
    values = _moved(moved, x, channels)
    if values is None:
        return None
    whole = {t: torch.cat([values[terms[t][0]] * terms[t][1] for terms in (first, second)], -1) for t in tables}
    for cos, sin in (tables, tables[::-1]):
        turn = _name_of(whole[sin], channels)
        if turn is not None and torch.equal(whole[cos], channels):
            end, x = _whole(node, x, width)
            return end, x, _twice(cos), _twice(sin), turn
    return None


def _terms(node: Any, hidden: set[fx.Node]) -> dict[fx.Node, tuple[fx.Node, int]] | None:
    """A sum or difference of two products, as {factor from positions only: (factor from the hidden states, 1 or -1)}."""
    signs = {aten.add.Tensor: 1, aten.sub.Tensor: -1}
    if not isinstance(node, fx.Node) or node.target not in signs or node.kwargs or len(node.args) != 2:
        return None
    products = [_product(n, hidden) for n in node.args if isinstance(n, fx.Node)]
    if len(products) != 2 or None in products:
        return None
    (a, first), (b, second) = products  # type: ignore[misc]
    return {first: (a, 1), second: (b, signs[node.target])} if first is not second else None  # type: ignore[index]


def _twice(table: fx.Node) -> fx.Node:
    """The node of a table [B, 1, T, R] beside itself."""
    graph, args = table.graph, ([table, table], -1)
    known = next((n for n in table.users if n.target is aten.cat.default and n.args == args), None)
    if known is not None:
        return known
    with graph.inserting_after(table):
        new = graph.call_function(aten.cat.default, args)
    new.meta["shape"] = (*table.meta["shape"][:-1], 2 * table.meta["shape"][-1])
    return new


def _product(node: fx.Node, hidden: set[fx.Node]) -> tuple[fx.Node, fx.Node] | None:
    """(factor from the hidden states, factor from positions only) of a product."""
    factors = [n for n in node.args if isinstance(n, fx.Node)]
    if node.target is not aten.mul.Tensor or len(factors) != 2:
        return None
    ours = [n for n in factors if n in hidden]
    return (ours[0], next(n for n in factors if n is not ours[0])) if len(ours) == 1 else None


def _is_table(node: fx.Node, width: int) -> bool:
    """Cosines or sines that are the same for all heads [B, H, T, D]."""
    shape = node.meta.get("shape")
    return shape is not None and len(shape) == 4 and shape[1] == 1 and shape[3] == width


def _turn(node: fx.Node, x: fx.Node, width: int) -> str | None:
    """The name in TURNS of what makes `node` from x, or None."""
    channels = _channels(width)
    values = _moved([node], x, channels)
    return None if values is None else _name_of(values[node], channels)


def _channels(width: int) -> Tensor:
    """Numbered channels [1, 1, 1, width]."""
    # Where a model is built empty the default device is meta, which holds no numbers to compare.
    return torch.arange(1, width + 1, dtype=torch.float64, device="cpu").expand(1, 1, 1, width)


def _name_of(result: Tensor, channels: Tensor) -> str | None:
    return next((name for name, turn in TURNS.items() if torch.equal(turn(channels), result)), None)


def _moved(nodes: list[fx.Node], x: fx.Node, channels: Tensor) -> dict[fx.Node, Tensor] | None:
    """The values of nodes where x has numbered channels; None if they come from x by more than moves, or from elsewhere."""
    steps: list[fx.Node] = []
    origins, todo = _same_values(x), [*nodes]
    while todo:
        step = todo.pop()
        if step in origins or step in steps:
            continue
        if step.target not in MOVES | CASTS and step.target is not operator.getitem:
            return None
        steps.append(step)
        todo.extend(step.all_input_nodes)
    values: dict[fx.Node, Any] = dict.fromkeys(origins, channels)
    try:
        for step in (n for n in x.graph.nodes if n in steps):
            inputs: Any = (step.args, step.kwargs)
            args, kwargs = fx.node.map_arg(inputs, values.__getitem__)
            values[step] = args[0] if step.target in CASTS else step.target(*args, **kwargs)  # type: ignore[operator]
    except (RuntimeError, TypeError, KeyError, IndexError):  # it names sizes that numbered channels do not have
        return None
    return {node: values[node] for node in nodes} if all(isinstance(values[n], Tensor) for n in nodes) else None


def _same_values(x: fx.Node) -> set[fx.Node]:
    """x and what it is a cast of: turning and casting change places."""
    found = {x}
    while x.target in CASTS:
        x = arguments(x)[0]
        found.add(x)
    return found


def _whole(node: fx.Node, x: fx.Node, width: int) -> tuple[fx.Node, fx.Node]:
    """Where x is the first `width` channels of a tensor and the others are put back after them: (that node, that tensor)."""
    user = next(iter(node.users), None)
    first = x.target is aten.slice.Tensor and x.args[1:] in ((3, 0, width), (-1, 0, width))
    if not (first or x.target is aten.alias.default) or user is None or len(node.users) != 1:
        return node, x
    whole, pieces = arguments(x)[0], arguments(user)[0]
    if user.target is not aten.cat.default or user.args[1:] not in ((-1,), (3,)) or len(pieces) != 2:
        return node, x
    rest = pieces[1]
    others = rest.target is aten.slice.Tensor and rest.args[0] is whole and rest.args[1:3] in ((3, width), (-1, width))
    if pieces[0] is not node or not others or user.meta.get("shape") != whole.meta.get("shape"):
        return node, x
    return user, whole

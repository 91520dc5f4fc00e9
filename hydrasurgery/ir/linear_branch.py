"""The linear branch of a region's graph, if it is what the operators that do all of it at once compute."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

from torch import fx, nn

from hydrasurgery.dialect.names import CAUSAL_CONV, FUSION, LINEAR_ATTENTION
from hydrasurgery.dialect.tokens import previous_tokens
from hydrasurgery.ir.state import write_state
from hydrasurgery.layers import BetaGate, DecayGate, OutputGate, l2_norm, rotate_tokens, to_heads, to_tokens

Turn = tuple[Any, ...]  # cos, sin and turn of the rotary embedding after the convolution; nothing without one


class LinearBranch(NamedTuple):
    """What linearize-heads and fuse-heads make of rule gated_delta, with full heads passed through and no native convolution.

    Attributes:
        fusion, recurrence: the nodes.
        full: the full heads [B, T, Hf, V]; None if there are none.
        gamma: the scale of the linear heads.
        gates: the modules' calls for decay, beta and, if there is one, the output gate.
        heads: q, k and v [B, H, T, D] as projected.
        weights: of their convolutions; None each without.
        turn: of the rotary embedding after the convolutions.
    """

    fusion: fx.Node
    recurrence: fx.Node
    full: fx.Node | None
    gamma: fx.Node
    gates: tuple[fx.Node, fx.Node, fx.Node | None]
    heads: tuple[fx.Node, ...]
    weights: tuple[fx.Node | None, ...]
    turn: Turn

    @property
    def hidden(self) -> Any:
        return self.gates[0].args[0]

    @property
    def flags(self) -> tuple[Any, ...]:
        """The nodes `valid` and `reset`."""
        return tuple(self.gates[0].args[1:])

    @property
    def tables(self) -> Turn:
        """cos and sin, if there are any."""
        return self.turn[:2]

    @property
    def options(self) -> dict[str, Any]:
        """Of the operator: scale, eps, and how the rotary embedding pairs channels."""
        turn = {"turn": self.turn[2]} if self.turn else {}
        return {"scale": self.recurrence.kwargs.get("scale"), "eps": self.fusion.kwargs.get("eps", 1e-6), **turn}

    def replace(self, node: fx.Node) -> None:
        """Let `node`, which also writes the states, stand for the fusion."""
        graph = self.fusion.graph
        self.fusion.replace_all_uses_with(node)
        for written in graph.find_nodes(op="call_function", target=write_state):
            value: Any = written.args[2]
            if value.args[0].target in (CAUSAL_CONV, LINEAR_ATTENTION):
                graph.erase_node(written)


def linear_branch(module: nn.Module, graph: fx.Graph) -> LinearBranch | None:
    """The linear branch of a graph of `module`, if it is node for node what the operators compute."""
    fusions, recurrences = (graph.find_nodes(op="call_function", target=op) for op in (FUSION, LINEAR_ATTENTION))
    if len(fusions) != 1 or len(recurrences) != 1:
        return None
    (fusion,), (recurrence,) = fusions, recurrences
    full, linear, gamma, gate = _arguments(fusion)
    q, k, v, decay, beta, _ = _arguments(recurrence)
    if recurrence.kwargs["rule"] != "gated_delta" or fusion.kwargs["norm_full"]:
        return None
    if not _is(linear, operator.getitem, recurrence, 0) or len(linear.users) != 1 or not _only_read(recurrence):
        return None
    for node, kind in ((decay, DecayGate), (beta, BetaGate), (gate, OutputGate)):
        if node is not None and (node.op != "call_module" or type(module.get_submodule(str(node.target))) is not kind):
            return None
    hidden, valid, reset = _arguments(decay)
    if _arguments(beta) != (hidden, valid) or (gate is not None and _arguments(gate) != (hidden,)):
        return None
    normed = [n for n in (q, k) if n.target is l2_norm and len(n.args) == 1 and len(n.users) == 1]
    if len(normed) != 2:
        return None
    turned, turns = zip(*(_unturned(_arguments(n)[0]) for n in normed), strict=True)
    if turns[0] != turns[1]:
        return None
    heads = (*turned, v)
    branches = [branch for node in heads if (branch := _branch(node, valid, reset)) is not None]
    if len(branches) != 3:
        return None
    inputs, weights = zip(*branches, strict=True)
    return LinearBranch(fusion, recurrence, full, gamma, (decay, beta, gate), inputs, weights, turns[0])


def _arguments(node: fx.Node) -> tuple[Any, ...]:
    return node.args


def _unturned(node: fx.Node) -> tuple[fx.Node, Turn]:
    """The heads before the rotary embedding that ends in `node`, and what that is."""
    if node.target is not rotate_tokens or len(node.users) != 1:
        return node, ()
    x, *turn = _arguments(node)
    return x, tuple(turn)


def _branch(node: fx.Node, valid: fx.Node, reset: fx.Node) -> tuple[fx.Node, fx.Node | None] | None:
    """What `to_heads(x)` is made of, x = to_tokens(heads, valid) or x + conv(x) of that."""
    if node.target is not to_heads or len(node.users) != 1:
        return None
    tokens, weight = _arguments(node)[0], None
    if tokens.target is operator.add:
        plain, mixed = _arguments(tokens)
        conv = _arguments(mixed)[0]
        if not _is(mixed, operator.getitem, conv, 0) or conv.target is not CAUSAL_CONV or not _only_read(conv):
            return None
        if (
            _arguments(conv)[0] is not plain
            or _arguments(conv)[3] is not reset
            or not _follows(_arguments(conv)[4], valid)
        ):
            return None
        if any(len(n.users) != 1 for n in (tokens, mixed)) or set(plain.users) != {tokens, conv}:
            return None
        tokens, weight = plain, _arguments(conv)[1]
    return (_arguments(tokens)[0], weight) if tokens.target is to_tokens and _arguments(tokens)[1] is valid else None


def _follows(previous: Any, valid: fx.Node) -> bool:
    """Whether padding is left out by the same flags."""
    return previous is None or (previous.target is previous_tokens and _arguments(previous)[0] is valid)


def _is(node: Any, target: Any, *args: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is target and node.args == args


def _only_read(node: fx.Node) -> bool:
    """Whether of (result, state) the result is taken once, and the state is taken to be written and for nothing else."""
    parts = [_arguments(user)[1] for user in node.users if user.target is operator.getitem]
    states = [user for user in node.users if user.target is operator.getitem and _arguments(user)[1] == 1]
    written = all(reader.target is write_state for state in states for reader in state.users)
    return sorted(parts) == [0, 1] and len(node.users) == 2 and written

"""fuse-decode: for one token that follows a state, all linear heads of a layer become one `hydra::decode_step`."""

from __future__ import annotations

import copy
import operator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx, nn

from hydrasurgery.dialect.names import CAUSAL_CONV, FUSION, LINEAR_ATTENTION
from hydrasurgery.ir.graphs import arguments, remove_unused
from hydrasurgery.ir.region import STATE, Region
from hydrasurgery.ir.state import step_linear, write_state
from hydrasurgery.layers import (
    BetaGate,
    DecayGate,
    OutputGate,
    l2_norm,
    merge_heads,
    rotate_tokens,
    to_heads,
    to_tokens,
)
from hydrasurgery.ops import previous_tokens
from hydrasurgery.passes.base import Pass, PassResult, register

Gates = tuple[fx.Node, fx.Node, fx.Node | None]
Branch = tuple[fx.Node, fx.Node | None]  # heads [B, H, T, D], and the weight of their convolution if there is one
Turn = tuple[Any, ...]  # cos, sin and turn of the rotary embedding after the convolution; nothing without one


@register
@dataclass(frozen=True)
class FuseDecode(Pass):
    """Gives the region a second graph, `decode`, in which all that follows the projections of a linear head is one node.

    That is: gates, convolution, a rotary embedding after it, L2 norm, recurrence, RMS norm, gamma and output gate. The region's own
    graph stays as it is: prefill, training and tracing run it. Where the linear branch is anything but what linearize-heads and
    fuse-heads make of rule gated_delta with full heads passed through and no native convolution, the region keeps one graph.
    """

    name: ClassVar[str] = "fuse-decode"

    def requires(self, region: Region) -> None:
        self.need(region, region.threaded, "run thread-state first: the graph has no state input")

    def run(self, region: Region) -> PassResult:
        graph = copy.deepcopy(region.graph)
        found = _match(region.module, graph)
        if found is None:
            return PassResult(region, False)
        fusion, recurrence, gates, branches, turn = found
        full, _, gamma, _ = arguments(fusion)
        decay = gates[0]
        hidden, *flags = arguments(decay)
        state = next(n for n in graph.nodes if n.op == "placeholder" and n.target == STATE)
        inputs, weights = zip(*branches, strict=True)
        with graph.inserting_before(fusion):
            # The operator takes the gates as their projections leave them.
            raw = [
                None if gate is None else graph.call_module(f"{gate.target}.{name}", (hidden,))
                for gate, name in zip(gates, ("a_proj", "b_proj", "g_proj"), strict=True)
            ]
            rates = [graph.get_attr(f"{decay.target}.{name}") for name in ("A_log", "dt_bias")]
            options = {"scale": recurrence.kwargs.get("scale"), "eps": fusion.kwargs.get("eps", 1e-6)}
            tables = turn[:2]
            if turn:
                options["turn"] = turn[2]
            step = graph.call_function(
                step_linear, (state, *inputs, *raw, gamma, *weights, *rates, *flags, *tables), options
            )
            merged = step if full is None else graph.call_function(merge_heads, (full, step, region.linear_heads))
        fusion.replace_all_uses_with(merged)
        for node in graph.find_nodes(op="call_function", target=write_state):
            if arguments(arguments(node)[2])[0].target in (
                CAUSAL_CONV,
                LINEAR_ATTENTION,
            ):  # the one node writes these in place
                graph.erase_node(node)
        remove_unused(graph)
        region.decode, region.decoded_by = graph, str(self)
        return PassResult(region, True)

    def ensures(self, region: Region) -> None:
        if region.decode is not None:
            region.decode.lint()
            left = [n for n in region.decode.nodes if n.target in (CAUSAL_CONV, LINEAR_ATTENTION, FUSION)]
            self.promise(region, not left, "the decode graph still holds what decode_step does")


def _match(module: nn.Module, graph: fx.Graph) -> tuple[fx.Node, fx.Node, Gates, list[Branch], Turn] | None:
    """(fusion, recurrence, gates, q, k and v, rotation) of the linear branch, if it is node for node what the operator computes."""
    fusions, recurrences = (graph.find_nodes(op="call_function", target=op) for op in (FUSION, LINEAR_ATTENTION))
    if len(fusions) != 1 or len(recurrences) != 1:
        return None
    (fusion,), (recurrence,) = fusions, recurrences
    _, linear, _, gate = arguments(fusion)
    q, k, v, decay, beta, _ = arguments(recurrence)
    if recurrence.kwargs["rule"] != "gated_delta" or fusion.kwargs["norm_full"]:
        return None
    if not _is(linear, operator.getitem, recurrence, 0) or len(linear.users) != 1 or not _only_read(recurrence):
        return None
    for node, kind in ((decay, DecayGate), (beta, BetaGate), (gate, OutputGate)):
        if node is not None and (node.op != "call_module" or type(module.get_submodule(str(node.target))) is not kind):
            return None
    hidden, valid, reset = arguments(decay)
    if arguments(beta) != (hidden, valid) or (gate is not None and arguments(gate) != (hidden,)):
        return None
    normed = [n for n in (q, k) if n.target is l2_norm and len(n.args) == 1 and len(n.users) == 1]
    if len(normed) != 2:
        return None
    turned, turns = zip(*(_unturned(arguments(n)[0]) for n in normed), strict=True)
    if turns[0] != turns[1]:
        return None
    heads = (*turned, v)
    branches = [branch for node in heads if (branch := _branch(node, valid, reset)) is not None]
    return (fusion, recurrence, (decay, beta, gate), branches, turns[0]) if len(branches) == 3 else None


def _unturned(node: fx.Node) -> tuple[fx.Node, Turn]:
    """The heads before the rotary embedding that ends in `node`, and what that is."""
    if node.target is not rotate_tokens or len(node.users) != 1:
        return node, ()
    x, *turn = arguments(node)
    return x, tuple(turn)


def _branch(node: fx.Node, valid: fx.Node, reset: fx.Node) -> Branch | None:
    """What `to_heads(x)` is made of, x = to_tokens(heads, valid) or x + conv(x) of that."""
    if node.target is not to_heads or len(node.users) != 1:
        return None
    tokens, weight = arguments(node)[0], None
    if tokens.target is operator.add:
        plain, mixed = arguments(tokens)
        conv = arguments(mixed)[0]
        if not _is(mixed, operator.getitem, conv, 0) or conv.target is not CAUSAL_CONV or not _only_read(conv):
            return None
        if (
            arguments(conv)[0] is not plain
            or arguments(conv)[3] is not reset
            or not _follows(arguments(conv)[4], valid)
        ):
            return None
        if any(len(n.users) != 1 for n in (tokens, mixed)) or set(plain.users) != {tokens, conv}:
            return None
        tokens, weight = plain, arguments(conv)[1]
    return (arguments(tokens)[0], weight) if tokens.target is to_tokens and arguments(tokens)[1] is valid else None


def _follows(previous: Any, valid: fx.Node) -> bool:
    """Whether padding is left out by the same flags."""
    return previous is None or (previous.target is previous_tokens and arguments(previous)[0] is valid)


def _is(node: Any, target: Any, *args: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is target and node.args == args


def _only_read(node: fx.Node) -> bool:
    """Whether of (result, state) the result is taken once, and the state is taken to be written and for nothing else."""
    parts = [arguments(user)[1] for user in node.users if user.target is operator.getitem]
    states = [user for user in node.users if user.target is operator.getitem and arguments(user)[1] == 1]
    written = all(reader.target is write_state for state in states for reader in state.users)
    return sorted(parts) == [0, 1] and len(node.users) == 2 and written

"""fuse-decode: for one token that follows a state, all linear heads of a layer become one `hydra::decode_step`."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from hydrasurgery.dialect.names import CAUSAL_CONV, FUSION, LINEAR_ATTENTION
from hydrasurgery.ir.graphs import arguments, remove_unused
from hydrasurgery.ir.region import STATE, Region
from hydrasurgery.ir.state import step_linear, write_state
from hydrasurgery.layers import merge_heads, to_tokens
from hydrasurgery.passes.base import Pass, PassResult, register


@register
@dataclass(frozen=True)
class FuseDecode(Pass):
    """Gives the region a second graph, `decode`, in which all that follows the projections of a linear head is one node.

    That is: gates, convolution, L2 norm, recurrence, RMS norm, gamma and output gate.

    The region's own graph stays as it is: prefill, training and tracing run it. The operator is for rule gated_delta, full heads
    that pass unchanged and no native convolution; other regions keep one graph.
    """

    name: ClassVar[str] = "fuse-decode"

    def requires(self, region: Region) -> None:
        self.need(region, region.threaded, "run thread-state first: the graph has no state input")

    def run(self, region: Region) -> PassResult:
        fused, given = region.find(FUSION), region.options
        plain = given.get("rule") == "gated_delta" and given.get("conv") != "native"
        if not (fused and plain and region.linear_heads) or fused[0].kwargs["norm_full"]:
            return PassResult(region, False)
        graph = copy.deepcopy(region.graph)
        fusion = graph.find_nodes(op="call_function", target=FUSION)[0]
        recurrence = graph.find_nodes(op="call_function", target=LINEAR_ATTENTION)[0]
        full, _, gamma, gate = arguments(fusion)
        decay, beta = arguments(recurrence)[3:5]
        hidden, *flags = arguments(decay)
        state = next(n for n in graph.nodes if n.op == "placeholder" and n.target == STATE)
        inputs, weights = zip(*map(_before, arguments(recurrence)[:3]), strict=True)
        with graph.inserting_before(fusion):
            # The operator takes the gates as their projections leave them.
            raw = [
                None if node is None else graph.call_module(f"{node.target}.{name}", (hidden,))
                for node, name in ((decay, "a_proj"), (beta, "b_proj"), (gate, "g_proj"))
            ]
            rates = [graph.get_attr(f"{decay.target}.{name}") for name in ("A_log", "dt_bias")]
            options = {"scale": recurrence.kwargs.get("scale"), "eps": fusion.kwargs.get("eps", 1e-6)}
            step = graph.call_function(step_linear, (state, *inputs, *raw, gamma, *weights, *rates, *flags), options)
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


def _before(x: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """The heads [B, H, T, D] that x was made of by convolution and norm, and the convolution's weight if there is one."""
    while x.target is not to_tokens:
        x = x.all_input_nodes[0]
    conv = next((user for user in x.users if user.target is CAUSAL_CONV), None)
    return x.all_input_nodes[0], None if conv is None else arguments(conv)[1]

"""fuse-decode: for one token that follows a state, all linear heads of a layer become one `hydra::decode_step`."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

from hydrasurgery.dialect.names import CAUSAL_CONV, FUSION, LINEAR_ATTENTION
from hydrasurgery.ir.graphs import remove_unused
from hydrasurgery.ir.linear_branch import linear_branch
from hydrasurgery.ir.region import Region
from hydrasurgery.ir.state import STATE, step_linear
from hydrasurgery.layers import merge_heads
from hydrasurgery.passes.base import Pass, PassResult, register


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
        branch = linear_branch(region.module, graph)
        if branch is None:
            return PassResult(region, False)
        state = next(n for n in graph.nodes if n.op == "placeholder" and n.target == STATE)
        with graph.inserting_before(branch.fusion):
            # The operator takes the gates as their projections leave them.
            raw = [
                None if gate is None else graph.call_module(f"{gate.target}.{name}", (branch.hidden,))
                for gate, name in zip(branch.gates, ("a_proj", "b_proj", "g_proj"), strict=True)
            ]
            rates = [graph.get_attr(f"{branch.gates[0].target}.{name}") for name in ("A_log", "dt_bias")]
            inputs = (*branch.heads, *raw, branch.gamma, *branch.weights, *rates, *branch.flags, *branch.tables)
            step = graph.call_function(step_linear, (state, *inputs), branch.options)
            merged = (
                step
                if branch.full is None
                else graph.call_function(merge_heads, (branch.full, step, region.linear_heads))
            )
        branch.replace(merged)
        remove_unused(graph)
        region.decode, region.decoded_by = graph, str(self)
        return PassResult(region, True)

    def ensures(self, region: Region) -> None:
        if region.decode is not None:
            region.decode.lint()
            left = [n for n in region.decode.nodes if n.target in (CAUSAL_CONV, LINEAR_ATTENTION, FUSION)]
            self.promise(region, not left, "the decode graph still holds what decode_step does")

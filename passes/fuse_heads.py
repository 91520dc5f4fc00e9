"""fuse-heads: `hydra::scale_norm_fusion` brings full and linear heads to one scale, in their own slots."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import fx, nn

from hydrasurgery.dialect.names import ATTENTION, DELTA_RULES, FULL, FUSION, LINEAR
from hydrasurgery.ir.region import Region
from hydrasurgery.layers import OutputGate, cast_like, merge_heads
from hydrasurgery.passes.base import Pass, PassResult, register


@register
@dataclass(frozen=True)
class FuseHeads(Pass):
    """Linear heads: gamma_h * RMSNorm(o_h) * gate (paper eq. 13-14). Full heads: passed on, or normalised too.

    Options: `full_norm` ("exact": full heads pass unchanged; "paper": they are normalised), `gate` (output gate or not),
    `full_gate` (the gate is one of all heads, and is multiplied onto them after the fusion).
    """

    name: ClassVar[str] = "fuse-heads"
    exact: ClassVar[bool] = False
    full_norm: Literal["exact", "paper"] = "exact"
    gate: bool = True
    full_gate: bool = False

    def requires(self, region: Region) -> None:
        self.need(
            region, self.gate or not self.full_gate, "full_gate is set and gate is not: one gate serves all heads"
        )
        self.need(
            region,
            bool(region.find(ATTENTION)) or not region.full_heads,
            "no attention node of the full heads is there",
        )
        made = any(n.meta.get("kind") == LINEAR and n.target != ATTENTION for n in region.graph.nodes)
        self.need(
            region,
            made or not region.linear_heads,
            "run split-heads and linearize-heads first: no linear heads are there",
        )
        self.need(region, "full_norm" not in region.options, "the heads are fused already")

    def run(self, region: Region) -> PassResult:
        region.options["full_norm"] = self.full_norm
        gates_all = self.full_gate and bool(region.full_heads)
        if not region.linear_heads and self.full_norm == "exact":
            heads = region.find(ATTENTION)[0]
            if not gates_all:
                return PassResult(region, True)
        else:
            heads = self._fuse(region, gate=self.gate and not gates_all)
        if gates_all:
            gate = _gate(region, heads, region.num_heads)
            with region.graph.inserting_after(gate):
                gated = region.graph.create_node("call_function", operator.mul, (heads, gate), None, "gated_heads")
            heads.replace_all_uses_with(gated, delete_user_cb=lambda user: user is not gated)
        return PassResult(region, True)

    def _fuse(self, region: Region, gate: bool) -> fx.Node:
        """The fusion node in place of the merge; `gate`: with an output gate of the linear heads."""
        graph, linear = region.graph, region.linear_heads
        full = next((n for n in region.find(ATTENTION) if n.meta.get("kind") == FULL), None)
        recurrent = next((n for n in graph.nodes if n.meta.get("kind") == LINEAR), None)
        old = next(n for n in (*region.find(merge_heads), full, recurrent) if n is not None)
        norm_full = self.full_norm == "paper"
        count = region.num_heads if norm_full else len(linear)
        path = region.add("gamma", nn.Parameter(torch.ones(count)))
        with graph.inserting_after(old):
            gamma = graph.get_attr(path)
        gates = _gate(region, gamma, len(linear)) if gate and linear else None
        with graph.inserting_after(gates or gamma):
            fused = graph.create_node(
                "call_function",
                FUSION,
                (full, recurrent, gamma, gates),
                {"linear_heads": list(linear), "norm_full": norm_full},
                "fused_heads",
            )
        new = fused
        if linear and region.options.get("rule") not in DELTA_RULES:  # whose sums may be wider than the model
            with graph.inserting_after(fused):
                new = graph.create_node("call_function", cast_like, (fused, region.source), None, "narrow_heads")
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in (fused, new))
        if old.target is merge_heads:
            graph.erase_node(old)
        return new

    def ensures(self, region: Region) -> None:
        if region.linear_heads:
            self.promise(region, len(region.find(FUSION)) == 1, "the heads are not fused by one node")


def _gate(region: Region, after: fx.Node, heads: int) -> fx.Node:
    """An output gate [B, T, heads, 1] of the hidden states, computed after the node `after`."""
    path = region.add("output_gate", OutputGate(region.hidden_size, heads))
    with region.graph.inserting_after(after):
        return region.graph.create_node("call_module", path, (region.source,), None, "gate")

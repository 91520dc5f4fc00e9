"""fuse-heads: `hydra::scale_norm_fusion` brings full and linear heads to one scale, in their own slots."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from hydrasurgery.layers import OutputGate, merge_heads
from hydrasurgery.passes.base import Pass, PassResult, hidden_size, new_parameters, register, source
from hydrasurgery.regions import ATTENTION, Region

FUSION = torch.ops.hydra.scale_norm_fusion.default


@register
@dataclass(frozen=True)
class FuseHeads(Pass):
    """Linear heads: gamma_h * RMSNorm(o_h) * gate (paper eq. 13-14). Full heads: passed on, or normalised too.

    Options: `full_norm` ("exact": full heads pass unchanged; "paper": they are normalised), `gate` (output gate or not).
    """

    name: ClassVar[str] = "fuse-heads"
    exact: ClassVar[bool] = False
    full_norm: str = "exact"
    gate: bool = True

    def requires(self, region: Region) -> None:
        self.need(
            region, self.full_norm in ("exact", "paper"), f'full_norm is {self.full_norm!r}, not "exact" or "paper"'
        )

    def run(self, region: Region) -> PassResult:
        region.options["full_norm"] = self.full_norm
        linear = region.linear_heads
        if not linear and self.full_norm == "exact":
            return PassResult(region, False)
        graph = region.graph
        full = next((n for n in region.find(ATTENTION) if n.meta.get("kind") == "full"), None)
        recurrent = next((n for n in graph.nodes if n.meta.get("kind") == "linear"), None)
        old = next(n for n in (*region.find(merge_heads), full, recurrent) if n is not None)
        hidden, width = source(region), hidden_size(region)
        norm_full = self.full_norm == "paper"
        like = next(region.module.parameters())
        count = region.num_heads if norm_full else len(linear)
        region.module.hydra.gamma = nn.Parameter(torch.ones(count, device=like.device, dtype=like.dtype))
        with graph.inserting_after(old):
            gamma = graph.get_attr("hydra.gamma")
        previous = gamma
        gate = None
        if self.gate and linear:
            path = new_parameters(region, "output_gate", OutputGate(width, len(linear)))
            with graph.inserting_after(previous):
                gate = previous = graph.create_node("call_module", path, (hidden,), None, "gate")
        with graph.inserting_after(previous):
            fused = graph.create_node(
                "call_function",
                FUSION,
                (full, recurrent, gamma, gate),
                {"linear_heads": list(linear), "norm_full": norm_full},
                "fused_heads",
            )
        old.replace_all_uses_with(fused, delete_user_cb=lambda user: user is not fused)
        if old.target is merge_heads:
            graph.erase_node(old)
        return PassResult(region, True)

    def ensures(self, region: Region) -> None:
        if region.linear_heads:
            self.promise(region, len(region.find(FUSION)) == 1, "the heads are not fused by one node")

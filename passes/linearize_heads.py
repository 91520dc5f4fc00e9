"""linearize-heads: a linear kind's attention becomes gates, short convolution and `hydra::linear_attention`."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from hydrasurgery import ops
from hydrasurgery.layers import BetaGate, ConvWeight, DecayGate, l2_norm, to_heads, to_tokens
from hydrasurgery.passes.base import Pass, PassResult, hidden_size, new_parameters, register, source
from hydrasurgery.regions import ATTENTION, Region

LINEAR = torch.ops.hydra.linear_attention.default
CONV = torch.ops.hydra.causal_conv.default


@register
@dataclass(frozen=True)
class LinearizeHeads(Pass):
    """q, k and v of the old attention (rotated, normalised) feed the recurrence; q and k are L2-normalised.

    Options: `rule` (linear, gated, delta, gated_delta), `conv` (taps of the residual short convolution; 0: none).
    """

    name: ClassVar[str] = "linearize-heads"
    exact: ClassVar[bool] = False
    rule: str = "gated_delta"
    conv: int = 4

    def requires(self, region: Region) -> None:
        self.need(region, self.rule in ops.RULES, f"rule {self.rule!r} is none of {', '.join(ops.RULES)}")
        kinds = {n.meta.get("kind") for n in region.find(ATTENTION)}
        self.need(region, None not in kinds, "run split-heads first: attention nodes have no kind")

    def run(self, region: Region) -> PassResult:
        node = next((n for n in region.find(ATTENTION) if n.meta["kind"] == "linear"), None)
        if node is None:
            return PassResult(region, False)
        graph, hidden, heads = region.graph, source(region), len(region.linear_heads)
        width = hidden_size(region)
        q, k, v = node.args[:3]
        mask = node.args[3] if len(node.args) > 3 else None
        with graph.inserting_before(node):

            def call(function: Any, *args: Any, name: str | None = None) -> fx.Node:
                return graph.create_node("call_function", function, args, None, name)

            flags = call(ops.token_flags, mask, hidden)
            valid, reset = (
                call(operator.getitem, flags, 0, name="valid"),
                call(operator.getitem, flags, 1, name="reset"),
            )
            tensors = []
            for label, x in (("q", q), ("k", k), ("v", v)):
                tokens = call(to_tokens, x, valid)
                if self.conv:
                    channels = heads * (region.value_dim if label == "v" else region.head_dim)
                    new_parameters(region, f"{label}_conv", ConvWeight(channels, self.conv))
                    weight = graph.get_attr(f"hydra.{label}_conv.weight")
                    mixed = graph.create_node(
                        "call_function", CONV, (tokens, weight, None, reset), None, f"{label}_conv"
                    )
                    mixed.meta["state"] = f"{label}_conv"
                    tokens = call(operator.add, tokens, call(operator.getitem, mixed, 0))
                    tokens = call(operator.mul, tokens, call(torch.ops.aten.unsqueeze.default, valid, -1))
                x = call(to_heads, tokens, heads)
                tensors.append(x if label == "v" else call(l2_norm, x))
            decay = beta = None
            if self.rule in ("gated", "gated_delta"):
                path = new_parameters(region, "decay", DecayGate(width, heads))
                decay = graph.create_node("call_module", path, (hidden, valid, reset), None, "decay")
            if self.rule in ("delta", "gated_delta"):
                path = new_parameters(region, "beta", BetaGate(width, heads))
                beta = graph.create_node("call_module", path, (hidden, valid), None, "beta")
            out = graph.create_node(
                "call_function", LINEAR, (*tensors, decay, beta, None), {"rule": self.rule}, "linear_attention"
            )
            out.meta["state"] = "recurrent"
            new = call(operator.getitem, out, 0, name="o_recurrent")
        new.meta["kind"] = "linear"
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        region.options["rule"] = self.rule
        return PassResult(region, True)

    def ensures(self, region: Region) -> None:
        left = [n for n in region.find(ATTENTION) if n.meta.get("kind") == "linear"]
        self.promise(region, not left, "a linear head is still softmax attention")

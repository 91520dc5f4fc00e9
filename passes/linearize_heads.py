"""linearize-heads: a linear kind's attention becomes gates, short convolution and `hydra::linear_attention`."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import fx
from torch.nn.functional import silu

from hydrasurgery.dialect.names import ATTENTION, CAUSAL_CONV, LINEAR, LINEAR_ATTENTION, Rule
from hydrasurgery.ir.graphs import arguments, remove_unused, token_flags
from hydrasurgery.ir.region import Region
from hydrasurgery.layers import BetaGate, ConvWeight, DecayGate, l2_norm, rotate_tokens, to_heads, to_tokens
from hydrasurgery.options import TAPS
from hydrasurgery.passes.base import Pass, PassResult, register
from hydrasurgery.passes.canonicalize_rotary import rotations, unrotated
from hydrasurgery.records import Bounds


@register
@dataclass(frozen=True)
class LinearizeHeads(Pass):
    """q, k and v of the old attention (rotated, normalised) feed the recurrence; q and k are L2-normalised.

    Options: `rule` (linear, gated, delta, gated_delta), `conv` (taps of the short convolution; 0: none), `conv_kind`
    ("residual": x + conv(x) of the rotated q and k; "native": SiLU(conv(x)) as in Gated DeltaNet, before they are rotated:
    after SiLU of a rotated pair, scores would no longer depend only on distances).
    """

    name: ClassVar[str] = "linearize-heads"
    exact: ClassVar[bool] = False
    rule: Rule = "gated_delta"
    conv: Annotated[int, Bounds(0, 256)] = TAPS
    conv_kind: Literal["residual", "native"] = "residual"

    def requires(self, region: Region) -> None:
        late = self.conv and self.conv_kind == "native"
        self.need(region, not late or "rotary" in region.options, "run canonicalize-rotary first: conv_kind is native")
        self.need(region, not region.threaded, "run it before thread-state: the graph has a cache")
        kinds = {n.meta.get("kind") for n in region.find(ATTENTION)}
        self.need(region, None not in kinds, "run split-heads first: attention nodes have no kind")

    def run(self, region: Region) -> PassResult:
        node = next((n for n in region.find(ATTENTION) if n.meta["kind"] == LINEAR), None)
        if node is None:
            return PassResult(region, False)
        graph, hidden, heads = region.graph, region.source, len(region.linear_heads)
        width = region.hidden_size
        q, k, v, mask = (*arguments(node), None)[:4]
        with graph.inserting_before(node):

            def call(function: Any, *args: Any, name: str | None = None) -> fx.Node:
                return graph.create_node("call_function", function, args, None, name)

            valid, reset = token_flags(region, mask)
            native = bool(self.conv) and self.conv_kind == "native"
            tensors = []
            for label, x in (("q", q), ("k", k), ("v", v)):
                turns = rotations(x) if native else []
                if turns:
                    x = unrotated(x)
                tokens = call(to_tokens, x, valid)
                if self.conv:
                    channels = heads * (region.value_dim if label == "v" else region.head_dim)
                    region.add(f"{label}_conv", ConvWeight(channels, self.conv, float(native)))
                    weight = graph.get_attr(f"hydra.{label}_conv.weight")
                    mixed = graph.create_node(
                        "call_function", CAUSAL_CONV, (tokens, weight, None, reset), None, f"{label}_conv"
                    )
                    mixed.meta["state"] = f"{label}_conv"
                    mixed = call(operator.getitem, mixed, 0)
                    tokens = call(silu, mixed) if native else call(operator.add, tokens, mixed)
                    tokens = call(operator.mul, tokens, call(torch.ops.aten.unsqueeze.default, valid, -1))
                x = call(to_heads, tokens, heads)
                for turn in turns:
                    x = call(rotate_tokens, x, *arguments(turn)[1:])
                tensors.append(x if label == "v" else call(l2_norm, x))
            decay = beta = None
            if self.rule in ("gated", "gated_delta"):
                path = region.add("decay", DecayGate(width, heads))
                decay = graph.create_node("call_module", path, (hidden, valid, reset), None, "decay")
            if self.rule in ("delta", "gated_delta"):
                path = region.add("beta", BetaGate(width, heads))
                beta = graph.create_node("call_module", path, (hidden, valid), None, "beta")
            out = graph.create_node(
                "call_function",
                LINEAR_ATTENTION,
                (*tensors, decay, beta, None),
                {"rule": self.rule},
                "linear_attention",
            )
            out.meta["state"] = "recurrent"
            new = call(operator.getitem, out, 0, name="o_recurrent")
        new.meta["kind"] = LINEAR
        node.replace_all_uses_with(new)
        remove_unused(graph)
        region.options["rule"] = self.rule
        region.options["conv"] = self.conv_kind if self.conv else "none"
        return PassResult(region, True)

    def ensures(self, region: Region) -> None:
        left = [n for n in region.find(ATTENTION) if n.meta.get("kind") == LINEAR]
        self.promise(region, not left, "a linear head is still softmax attention")

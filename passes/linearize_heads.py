"""linearize-heads: a linear kind's attention becomes gates, short convolution and `hydra::linear_attention`."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from torch import fx
from torch.nn.functional import silu

from hydrasurgery.dialect.names import ATTENTION, CAUSAL_CONV, DECAY_RULES, DELTA_RULES, LINEAR, LINEAR_ATTENTION, Rule
from hydrasurgery.ir.graphs import arguments, previous_tokens, remove_unused, token_flags
from hydrasurgery.ir.region import Region
from hydrasurgery.layers import BetaGate, ConvWeight, DecayGate, forget, l2_norm, rotate_tokens, to_heads, to_tokens
from hydrasurgery.options import TAPS
from hydrasurgery.passes.base import Pass, PassResult, register
from hydrasurgery.passes.canonicalize_rotary import knows_places, rotations, unrotated
from hydrasurgery.records import Bounds

BEFORE = ("residual-unrotated", "native")  # kinds of convolution that stand before the rotary embedding


@register
@dataclass(frozen=True)
class LinearizeHeads(Pass):
    """q, k and v of the old attention (rotated, normalised) feed the recurrence; q and k are L2-normalised.

    Options: `rule` (linear, gated, delta, gated_delta), `conv` (taps of the short convolution; 0: none), `conv_kind`:

    - "residual-unrotated": x + conv(x), of q and k before their rotary embedding, so that scores depend on distances only.
    - "native": SiLU(conv(x)), at the same place: the convolution of Gated DeltaNet.
    - "residual": x + conv(x) of the rotated q and k, as hybrids of earlier versions have it. Once it is trained, a head also sees
      at which places tokens stand: padding that is counted as places changes what it says.
    """

    name: ClassVar[str] = "linearize-heads"
    exact: ClassVar[bool] = False
    rule: Rule = "gated_delta"
    conv: Annotated[int, Bounds(0, 256)] = TAPS
    conv_kind: Literal["residual-unrotated", "residual", "native"] = "residual"

    def requires(self, region: Region) -> None:
        reason = f"run canonicalize-rotary first: conv_kind is {self.conv_kind}"
        self.need(region, not self._before or "rotary" in region.options, reason)
        self.need(region, not region.threaded, "run it before thread-state: the graph has a cache")
        kinds = {n.meta.get("kind") for n in region.find(ATTENTION)}
        self.need(region, None not in kinds, "run split-heads first: attention nodes have no kind")

    @property
    def _before(self) -> bool:
        """Whether there is a convolution, before the rotary embedding."""
        return self.conv > 0 and self.conv_kind in BEFORE

    def run(self, region: Region) -> PassResult:
        node = next((n for n in region.find(ATTENTION) if n.meta["kind"] == LINEAR), None)
        if node is None:
            return PassResult(region, False)
        graph, hidden, heads = region.graph, region.source, len(region.linear_heads)
        q, k, v, mask = (*arguments(node), None)[:4]
        valid, reset = token_flags(region, mask)
        tensors = [self._tokens(region, node, label, x, mask) for label, x in (("q", q), ("k", k), ("v", v))]
        rule, decay, beta = self.rule, None, None
        with graph.inserting_before(node):
            if rule in DECAY_RULES:
                path = region.add("decay", DecayGate(region.hidden_size, heads))
                decay = graph.create_node("call_module", path, (hidden, valid, reset), None, "decay")
            elif mask is not None:  # documents end here too
                rule = "gated" if rule == "linear" else "gated_delta"
                decay = graph.create_node("call_function", forget, (reset, heads), None, "decay")
            if self.rule in DELTA_RULES:
                path = region.add("beta", BetaGate(region.hidden_size, heads))
                beta = graph.create_node("call_module", path, (hidden, valid), None, "beta")
            inputs = (*tensors, decay, beta, None)
            out = graph.create_node("call_function", LINEAR_ATTENTION, inputs, {"rule": rule}, "linear_attention")
            out.meta["state"] = "recurrent"
            new = graph.create_node("call_function", operator.getitem, (out, 0), None, "o_recurrent")
        new.meta["kind"] = LINEAR
        node.replace_all_uses_with(new)
        remove_unused(graph)
        region.options["rule"] = self.rule
        region.options["conv"] = self.conv_kind if self.conv else "none"
        return PassResult(region, True)

    def _tokens(self, region: Region, before: fx.Node, label: str, x: fx.Node, mask: fx.Node | None) -> fx.Node:
        """q, k or v [B, H, T, D] as the recurrence takes it, [B, T, H, D]: convolved, rotated, normalised."""
        graph, heads = region.graph, len(region.linear_heads)
        valid, reset = token_flags(region, mask)
        turns = rotations(x) if self._before else []
        if turns:
            x = unrotated(x)
        if self._before:
            self.need(
                region,
                not knows_places(region, x),
                f"{label} depends on the places of tokens by something that is no known rotary embedding, so that a convolution "
                "cannot stand before it; give the layer option conv=none (or conv=residual, with which a trained linear head "
                "sees places and not only distances)",
            )
        previous = previous_tokens(region, mask) if self.conv and mask is not None else None

        def call(function: Any, *args: Any, name: str | None = None) -> fx.Node:
            with graph.inserting_before(before):
                return graph.create_node("call_function", function, args, None, name)

        tokens = call(to_tokens, x, valid)
        if self.conv:
            native = self.conv_kind == "native"
            channels = heads * (region.value_dim if label == "v" else region.head_dim)
            path = region.add(f"{label}_conv", ConvWeight(channels, self.conv, float(native)))
            with graph.inserting_before(before):
                weight = graph.get_attr(f"{path}.weight")
            mixed = call(CAUSAL_CONV, tokens, weight, None, reset, previous, name=f"{label}_conv")
            mixed.meta["state"] = f"{label}_conv"
            mixed = call(operator.getitem, mixed, 0)
            tokens = call(silu, mixed) if native else call(operator.add, tokens, mixed)  # 0 at padding, both
        x = call(to_heads, tokens, heads)
        for turn in turns:
            x = call(rotate_tokens, x, *arguments(turn)[1:])
        return x if label == "v" else call(l2_norm, x)

    def ensures(self, region: Region) -> None:
        left = [n for n in region.find(ATTENTION) if n.meta.get("kind") == LINEAR]
        self.promise(region, not left, "a linear head is still softmax attention")

"""select-kernels: writes on each operator's node which kernel will run it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import fx

from hydrasurgery.dialect.names import ATTENTION, CAUSAL_CONV, FUSION, LINEAR_ATTENTION
from hydrasurgery.ir.graphs import arguments
from hydrasurgery.ir.region import Region
from hydrasurgery.kernels.registry import BACKWARD, DECODE, FORWARD, IMPLEMENTATIONS, Case, choose, machine_of
from hydrasurgery.passes.base import Pass, PassResult, register

OPS = {
    ATTENTION: "attention",
    LINEAR_ATTENTION: "linear_attention",
    CAUSAL_CONV: "causal_conv",
    FUSION: "scale_norm_fusion",
}


@register
@dataclass(frozen=True)
class SelectKernels(Pass):
    """Records the choice of `hydrasurgery.kernels.registry` for long sequences as `node.meta["kernel"]`; printed after the node.

    Every call makes that choice anew from what it is given, so this pass changes nothing: it shows what is to be expected.

    Options: `device` and `dtype` (those of the region's parameters if empty), `mode` (forward, backward or decode), `masked`
    (whether calls come with a mask of padding or documents: one number a key; a dense one of the user's own is not meant).
    """

    name: ClassVar[str] = "select-kernels"
    device: str = ""
    dtype: str = ""
    mode: Literal["forward", "backward", "decode"] = "forward"
    masked: bool = False

    def requires(self, region: Region) -> None:
        known = isinstance(getattr(torch, self.dtype or "float32", None), torch.dtype)
        self.need(region, known, f"dtype is {self.dtype!r}, which torch does not have")

    def run(self, region: Region) -> PassResult:
        machine = machine_of(self.device or region.device)
        dtype = getattr(torch, self.dtype) if self.dtype else region.dtype
        for node in _operators(region):
            target: Any = node.target
            op = OPS[target]
            mode = self.mode if self.mode in IMPLEMENTATIONS[op][0].modes or self.mode == BACKWARD else FORWARD
            case = Case(mode, dtype, self._sizes(region), frozenset(self._features(region, node)))
            node.meta["kernel"] = choose(op, case, machine).implementation.name
        return PassResult(region, False)

    def ensures(self, region: Region) -> None:
        left = [n.name for n in _operators(region) if "kernel" not in n.meta]
        self.promise(region, not left, f"no kernel is noted for {', '.join(left)}")

    @staticmethod
    def _sizes(region: Region) -> tuple[tuple[str, int], ...]:
        widths = {"D": region.head_dim, "K": region.head_dim, "V": region.value_dim, "H": region.num_heads}
        taps = [p.shape[1] for name, p in region.module.named_parameters() if name.startswith("hydra.q_conv.")]
        return (*widths.items(), *(("W", width) for width in taps))

    def _features(self, region: Region, node: fx.Node) -> Iterator[str]:
        """What the node's calls will be like, as `registry.Case` names it."""
        if node.target is ATTENTION:
            window = region.window is not None and not self.masked
            flags = {"reach": self.masked, "window": window, "softcap": region.softcap, "sinks": region.sinks}
            yield from (name for name, used in flags.items() if used)
            if region.value_dim != region.head_dim:
                yield "a value width of its own"
        if node.target is LINEAR_ATTENTION:
            yield str(node.kwargs["rule"])
        if node.target is CAUSAL_CONV:
            yield "reset"
            if self.masked and arguments(node)[4] is not None:
                yield "padding"
        if node.target in (LINEAR_ATTENTION, CAUSAL_CONV) and self.mode == DECODE:
            yield "state"


def _operators(region: Region) -> list[fx.Node]:
    return [n for n in region.graph.nodes if n.target in OPS]

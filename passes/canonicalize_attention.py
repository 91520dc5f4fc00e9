"""canonicalize-attention: `F.scaled_dot_product_attention` and the Hugging Face interface become `hydra::attention`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hydrasurgery.dialect.names import ATTENTION, LINEAR_ATTENTION
from hydrasurgery.ir.raising import raise_attention
from hydrasurgery.ir.region import Region
from hydrasurgery.passes.base import Pass, PassResult, register


@register
@dataclass(frozen=True)
class CanonicalizeAttention(Pass):
    """Exactly one `hydra::attention` node per region, its mask straight from the call."""

    name: ClassVar[str] = "canonicalize-attention"

    def run(self, region: Region) -> PassResult:
        modified = raise_attention(region.name, region.graph)
        return PassResult(region, modified)

    def ensures(self, region: Region) -> None:
        count, wanted = len(region.find(ATTENTION)), int(bool(region.full_heads) or not region.find(LINEAR_ATTENTION))
        self.promise(region, count == wanted, f"{count} attention nodes where {wanted} was expected")

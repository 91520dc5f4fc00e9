"""A pass of your own: each full head gets a learned temperature, which starts at 1 and so changes nothing at first.

python examples/own_pass.py
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

import hydrasurgery as hs
from hydrasurgery.dialect.names import ATTENTION
from hydrasurgery.ir.region import Region
from hydrasurgery.passes import Pass, PassResult, register


class Temperature(nn.Module):
    """q_h * exp(tau_h), tau_h = 0 at the start."""

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.tau = nn.Parameter(torch.zeros(num_heads))

    def forward(self, q: Tensor) -> Tensor:
        """q [B, H, T, D] -> the same shape."""
        return q * self.tau.exp()[:, None, None]


@register
@dataclass(frozen=True)
class TemperHeads(Pass):
    """Runs after split-heads, which says which attention node is the full heads'."""

    name: ClassVar[str] = "temper-heads"

    def run(self, region: Region) -> PassResult:
        node = next((n for n in region.find(ATTENTION) if n.meta.get("kind") == "full"), None)
        if node is None:
            return PassResult(region, False)
        path = region.add("temperature", Temperature(len(region.full_heads)))
        with region.graph.inserting_before(node):
            queries = region.graph.call_module(path, (node.args[0],))
        node.update_arg(0, queries)
        return PassResult(region, True)


PIPELINE = "canonicalize-attention,split-heads,temper-heads,linearize-heads,fuse-heads,thread-state"


def main() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
    teacher = Qwen3ForCausalLM(Qwen3Config(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()
    plan = hs.plan_heads(teacher, ratio="1:1", strategy="random")
    tokens = torch.arange(1, 33)[None]
    with torch.no_grad():
        plain = hs.rewrite(teacher, plan)(tokens).logits
        hybrid = hs.rewrite(teacher, plan, pipeline=PIPELINE)
        print("largest difference before training:", (hybrid(tokens).logits - plain).abs().max().item())
    print([name for name, _ in hybrid.named_parameters() if "temperature" in name])


if __name__ == "__main__":
    main()

"""A decoder of your own, no transformers class: half of its heads become linear, and the hybrid trains like any module.

python examples/own_module.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hydrasurgery as hs


class Attention(nn.Module):
    """Grouped attention by `F.scaled_dot_product_attention`: what hydrasurgery looks for."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.head_dim = width // heads
        self.q, self.o = nn.Linear(width, width), nn.Linear(width, width)
        self.kv = nn.Linear(width, width)  # half as many KV heads, keys and values in one matrix

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2).chunk(2, dim=1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o(out.transpose(1, 2).flatten(2))


class Decoder(nn.Module):
    """Tokens [B, T] -> logits [B, T, 256]."""

    def __init__(self, width: int = 64, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.layers = nn.ModuleList(Attention(width, heads) for _ in range(layers))
        self.head = nn.Linear(width, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def main() -> None:
    torch.manual_seed(0)
    decoder = Decoder()
    plan = hs.plan_heads(decoder, ratio="1:1", strategy="random")
    print(plan)
    hybrid = hs.rewrite(decoder, plan)
    print(hs.capture(decoder)[0])  # the region before the passes
    print(hs.regions(hybrid)[0])  # and after

    text = torch.tensor(list(__doc__.encode()))[None]
    optimizer = torch.optim.AdamW(hybrid.parameters(), lr=3e-3)
    for step in range(60):
        loss = F.cross_entropy(hybrid(text)[0, :-1], text[0, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    print(f"at the end: loss {loss.item():.3f}")


if __name__ == "__main__":
    main()

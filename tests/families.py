"""Tiny decoders of many families, built from configs (random weights), and plain nn.Module decoders."""

from __future__ import annotations

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel

import hydrasurgery as hs

FAMILIES = """
llama qwen2 qwen3 mistral ministral mixtral olmo2 olmo3 phi phi3 gemma2 gemma3_text gpt2 gpt_neox opt cohere cohere2
granite smollm3 starcoder2 glm4 stablelm helium nemotron exaone4 hunyuan_v1_dense seed_oss apertus nanochat ernie4_5
arcee persimmon internlm3
""".split()

SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SPECIAL = {
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "mixtral": {"num_local_experts": 2, "num_experts_per_tok": 1},
    "gemma2": {"query_pre_attn_scalar": 16, "sliding_window": 8},
    "gemma3_text": {"query_pre_attn_scalar": 16, "sliding_window": 8, "sliding_window_pattern": 2},
    "mistral": {"sliding_window": 8},
    "ministral": {"sliding_window": 8},
    "exaone4": {"sliding_window": 8},
    "olmo3": {"sliding_window": 8},
    "cohere2": {"sliding_window": 8},
}


# The kernel rounds as transformers does since this release; with an older one the numbers agree to a few units in the last place.
SAME_BITS = Version(transformers.__version__) >= Version("5.23")


def same(actual: Tensor, expected: Tensor) -> bool:
    """Whether two results of one computation are equal: bit for bit, or to rounding under an older transformers."""
    return torch.equal(actual, expected) if SAME_BITS else torch.allclose(actual, expected, rtol=1e-5, atol=1e-6)


def tiny(family: str, seed: int = 0, **changes: object) -> PreTrainedModel:
    """A random model of two layers, 4 query and (where the family has them) 2 KV heads of 16."""
    if family not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**SMALL, **SPECIAL.get(family, {}), **changes})
    for name in ("attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop", "hidden_dropout", "dropout"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    capped = getattr(config, "attn_logit_softcapping", None)  # which an older transformers drops under "sdpa"
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager" if capped else None).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # away from the symmetric start (unit norms, zero biases)
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def stir(hybrid: torch.nn.Module, seed: int = 1) -> torch.nn.Module:
    """Move what the surgery added away from its neutral start, so that every new parameter matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in hs.region_modules(hybrid).values():
            for parameter in module.hydra.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return hybrid


class FusedAttention(nn.Module):
    """One qkv projection, split by chunk."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class GroupedAttention(nn.Module):
    """Separate projections, grouped KV heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.dim = heads, width // heads
        self.wq, self.wo = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.wk, self.wv = (nn.Linear(width, width // 2, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (w(x).unflatten(-1, (-1, self.dim)).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.wo(out.transpose(1, 2).flatten(2))


class MaskedAttention(nn.Module):
    """A causal mask kept as a buffer, a scale of its own."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.register_buffer("mask", torch.ones(64, 64, dtype=torch.bool).tril(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        q, k, v = (w(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for w in (self.q, self.k, self.v))
        mask = self.mask[:length, :length]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.2)
        return self.o(out.transpose(1, 2).flatten(2))


class PlainDecoder(nn.Module):
    """Embedding, two residual attention blocks with MLPs, and a head: `forward(ids) -> logits`."""

    def __init__(self, attention: type[nn.Module], width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(96, width)
        self.attention = nn.ModuleList(attention(width, heads) for _ in range(2))
        self.mlp = nn.ModuleList(nn.Sequential(nn.Linear(width, 48), nn.GELU(), nn.Linear(48, width)) for _ in range(2))
        self.head = nn.Linear(width, 96)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for attention, mlp in zip(self.attention, self.mlp, strict=True):
            x = x + attention(x)
            x = x + mlp(x)
        return self.head(x)


PLAIN = (FusedAttention, GroupedAttention, MaskedAttention)

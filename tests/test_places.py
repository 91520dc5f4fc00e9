"""Linear heads know distances and not places: what every layer says is the same wherever a text begins."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import hydrasurgery as hs
from hydrasurgery.errors import PassError
from tests.families import PlainDecoder, tiny
from tests.test_families import half_plan, stir

IDS = torch.arange(3, 27).view(2, 12)
ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "longrope": {
        "short_factor": [1.0, 1.5] * 4,
        "long_factor": [2.0, 3.0] * 4,
        "factor": 1.0,
        "original_max_position_embeddings": 4096,
    },
}


class Exact(TorchFunctionMode):
    """fp32 asked for is fp64 given: models of transformers round their tables, so that places far apart differ by that."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            return args[0].double()
        asked = {name: torch.float64 if value is torch.float32 else value for name, value in (kwargs or {}).items()}
        return func(*args, **asked)


def exactly_turning(family: str, rope: str = "default") -> Any:
    """A teacher in fp64, tables of its rotary embedding too, which have places for all that is asked here."""
    changes: dict[str, Any] = {"max_position_embeddings": 4096}
    if rope != "default":
        changes["rope_parameters"] = {"rope_type": rope, "rope_theta": 10000.0, **ROPES[rope]}
    model = tiny(family, **changes).double()
    for name, module in model.named_modules():
        if name.endswith("rotary_emb"):
            module.forward = functools.partial(_exactly, type(module).forward, module)
    return model


def _exactly(forward: Any, *args: Any, **kwargs: Any) -> Any:
    with Exact():
        return forward(*args, **kwargs)


@torch.no_grad()
def shifted(model: Any, by: int) -> float:
    """How much logits change where all places are `by` higher."""
    places = torch.arange(IDS.shape[1])[None]
    here, there = (model(IDS, position_ids=places + start, use_cache=False).logits for start in (0, by))
    return float((here - there).abs().max())


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("layer", ["default", "hydrahead", "conv=native,rule=delta"])
def test_logits_do_not_depend_on_where_a_text_begins(rope: str, layer: str) -> None:
    teacher = exactly_turning("llama", rope)
    hybrid = stir(hs.rewrite(teacher, half_plan(teacher, ("linear",) * 3 + ("full",)), layer=layer)).double()
    for by in (1, 100, 1000):
        assert shifted(teacher, by) < 1e-10
        assert shifted(hybrid, by) < 1e-10, by


@pytest.mark.parametrize("family", ["qwen3", "gpt_neox", "phi", "glm4", "cohere", "persimmon", "stablelm", "ernie4_5"])
def test_wherever_the_embedding_turns_few_channels_or_pairs_of_them(family: str) -> None:
    teacher = exactly_turning(family)
    hybrid = stir(hs.rewrite(teacher, half_plan(teacher))).double()
    assert shifted(teacher, 100) < 1e-6
    assert shifted(hybrid, 100) < 4 * shifted(teacher, 100) + 1e-10


def test_a_convolution_of_what_is_rotated_does_depend_on_it() -> None:
    """What hybrids of earlier versions have stays what it was."""
    teacher = exactly_turning("llama")
    hybrid = stir(hs.rewrite(teacher, half_plan(teacher), layer="conv=residual")).double()
    assert shifted(hybrid, 100) > 1e-4


@torch.no_grad()
@pytest.mark.parametrize("layer", ["default", "hydrahead"])
def test_padding_may_count_as_places(layer: str) -> None:
    teacher = exactly_turning("qwen3")
    hybrid = stir(hs.rewrite(teacher, half_plan(teacher), layer=layer)).double()
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    for model in (teacher, hybrid):
        given, counted = (
            model(IDS, attention_mask=mask, position_ids=p, use_cache=False).logits for p in (places, None)
        )
        assert float((given - counted)[mask.bool()].abs().max()) < 1e-6  # the norms of q and k are of fp32


@torch.no_grad()
@pytest.mark.parametrize("turn", ["qwen3", "glm4", "cohere", "phi"])
def test_a_decoded_token_is_rotated_in_the_one_operator(turn: str) -> None:
    teacher = tiny(turn).double()
    hybrid = stir(hs.rewrite(teacher, half_plan(teacher))).double()
    assert all("step_linear" in str(region.decode) for region in hs.regions(hybrid))
    whole = hybrid(IDS, use_cache=False).logits
    cache, parts = hybrid(IDS[:, :4], use_cache=True).past_key_values, []
    for place in range(4, IDS.shape[1]):
        parts.append(hybrid(IDS[:, place : place + 1], past_key_values=cache).logits)
    assert torch.allclose(torch.cat(parts, 1), whole[:, 4:], rtol=0, atol=1e-12)


# --- embeddings that are not recognised -------------------------------------------------------------------------------


class Complex(nn.Module):
    """A rotary embedding by complex numbers, or one whose halves come from an einsum with a table of matrices."""

    def __init__(self, width: int, heads: int, by: str) -> None:
        super().__init__()
        self.heads, self.by = heads, by
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        angle = torch.arange(64.0)[:, None] * torch.arange(1, width // heads // 2 + 1)
        self.register_buffer("table", torch.polar(torch.ones_like(angle), angle) if by == "numbers" else angle)

    def turn(self, x: Tensor) -> Tensor:
        table = self.table[: x.shape[2]]
        if self.by == "numbers":
            pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
            return torch.view_as_real(pairs * table).flatten(-2)
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * table.cos() - b * table.sin(), b * table.cos() + a * table.sin()], dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        out = nn.functional.scaled_dot_product_attention(self.turn(q), self.turn(k), v, is_causal=True)
        return self.out(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("by", ["numbers", "halves"])
def test_an_unknown_embedding_is_refused_with_what_works(by: str) -> None:
    torch.manual_seed(0)
    model = PlainDecoder(lambda width, heads: Complex(width, heads, by))  # type: ignore[arg-type]
    plan = half_plan(model)
    with pytest.raises(PassError, match=r"attention\.0: q depends on the places of tokens .* conv=none"):
        hs.rewrite(model, plan)
    for layer in ("conv=none", "conv=residual"):
        assert hs.rewrite(model, plan, layer=layer)(IDS).shape == model(IDS).shape
    full = hs.rewrite(model, half_plan(model, ("full",) * 4))
    assert torch.equal(full(IDS), model(IDS))

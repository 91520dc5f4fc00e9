"""A masked token, wherever it stands, is as if it were not there: for every rule and layer, with a cache and without."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

import hydrasurgery as hs
from tests.families import tiny
from tests.test_families import half_plan, stir

LENGTH = 14
RULES = ("linear", "gated", "delta", "gated_delta")
LAYERS = (
    *(f"default,rule={rule}" for rule in RULES),
    *(f"hydrahead,rule={rule}" for rule in ("gated_delta", "linear")),
    "conv=none,log_length=true",
    "conv=residual",
    "linear_rope=false,full_gate=true",
)
SPLITS = ((), (1,), (5,), (9, 10), (2, 3, 4, 5, 6, 7))


@functools.cache
def hybrid_of(family: str, layer: str) -> Any:
    """A hybrid in fp64 whose additions all matter."""
    model = tiny(family)
    return stir(hs.rewrite(model, half_plan(model), layer=layer)).double()


def drawn(seed: int, batch: int = 3) -> tuple[Tensor, Tensor]:
    """Token ids and a mask: holes anywhere in the first row, a tail of padding in the second, any in the others."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 90, (batch, LENGTH), generator=generator)
    mask = (torch.rand(batch, LENGTH, generator=generator) < 0.6).long()
    mask[0, 4:7], mask[1:2, :6], mask[1:2, 6:10] = 0, 1, 0
    mask[:, -1] = 1
    return ids, mask


def places(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


@torch.no_grad()
def run(model: Any, ids: Tensor, mask: Tensor, splits: tuple[int, ...], cache: Any = None) -> Tensor:
    """Logits of all tokens, in as many calls as there are pieces."""
    if not splits:
        return model(ids, attention_mask=mask, position_ids=places(mask), use_cache=False).logits
    cache, parts = cache or DynamicCache(config=model.config), []
    for first, last in itertools.pairwise((0, *splits, ids.shape[1])):
        call = {"attention_mask": mask[:, :last], "position_ids": places(mask)[:, first:last]}
        parts.append(model(ids[:, first:last], **call, past_key_values=cache, use_cache=True).logits)
    return torch.cat(parts, 1)


@torch.no_grad()
def compacted(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits of each row without its padding, in the places of its tokens."""
    out = []
    for row, real in zip(ids, mask.bool(), strict=True):
        logits = model(row[real][None], use_cache=False).logits[0]
        out.append(logits.new_zeros(len(row), logits.shape[-1]).masked_scatter(real[:, None], logits))
    return torch.stack(out)


def differ(found: Tensor, wanted: Tensor, mask: Tensor) -> float:
    return float((found - wanted)[mask.bool()].abs().max())


@pytest.mark.parametrize("layer", LAYERS)
def test_padding_is_as_if_it_were_not_there(layer: str) -> None:
    hybrid = hybrid_of("qwen3", layer)
    for seed, splits in enumerate(SPLITS):
        ids, mask = drawn(seed % 2)
        wanted = compacted(hybrid, ids, mask)
        assert differ(run(hybrid, ids, mask, splits), wanted, mask) < 1e-10, splits


@pytest.mark.parametrize("family", ["gpt_neox", "gpt2", "olmo2"])
def test_padding_in_other_families(family: str) -> None:
    hybrid = hybrid_of(family, "default")
    ids, mask = drawn(5)
    wanted = compacted(hybrid, ids, mask)
    for splits in SPLITS[:3]:
        assert differ(run(hybrid, ids, mask, splits), wanted, mask) < 1e-10, splits


@pytest.mark.parametrize("family", ["mistral", "gemma2", "exaone4"])
def test_a_hole_longer_than_the_window_resets_nothing(family: str) -> None:
    """Full heads of a window do see a hole: the linear ones, all of a layer's here, do not."""
    model = tiny(family, sliding_window=4)
    hybrid = stir(hs.rewrite(model, half_plan(model, ("linear",) * 4))).double()
    ids, mask = drawn(0, batch=1)
    for hole in (2, 9):
        mask[:] = 1
        mask[0, 3 : 3 + hole] = 0
        wanted = compacted(hybrid, ids, mask)
        for splits in ((), (3,), (4,), (3 + hole,), (2 + hole, 3 + hole)):
            assert differ(run(hybrid, ids, mask, splits), wanted, mask) < 1e-10, (hole, splits)


@pytest.mark.parametrize("layer", ["default,rule=gated_delta", "hydrahead,rule=gated_delta", "default,rule=delta"])
def test_static_caches_leave_padding_out(layer: str) -> None:
    hybrid = hybrid_of("qwen3", layer)
    ids, mask = drawn(1)
    wanted = compacted(hybrid, ids, mask)
    for splits in ((5,), (9, 10)):
        cache = StaticCache(config=hybrid.config, max_cache_len=LENGTH + 3)
        assert differ(run(hybrid, ids, mask, splits, cache), wanted, mask) < 1e-10


@pytest.mark.parametrize("layer", ["default,rule=gated_delta", "hydrahead,rule=gated_delta"])
def test_a_row_of_nothing_but_padding_leaves_every_state(layer: str) -> None:
    hybrid = hybrid_of("qwen3", layer)
    ids, mask = drawn(2)
    mask[1, 6:] = 0
    cache = DynamicCache(config=hybrid.config)
    for first, last in ((0, 6), (6, 7), (7, LENGTH)):
        before = [{name: x[1].clone() for name, x in held.states.items()} for held in cache.layers if first]
        with torch.no_grad():
            hybrid(ids[:, first:last], attention_mask=mask[:, :last], past_key_values=cache)
        for held, states in zip(cache.layers, before, strict=bool(first)):
            assert {"recurrent", "q_conv", "k_conv", "v_conv"} <= set(states)
            assert all(torch.equal(held.states[name][1], x) for name, x in states.items())


@pytest.mark.parametrize("rule", RULES)
@torch.no_grad()
def test_documents_restart_by_their_position_ids_under_every_rule(rule: str) -> None:
    hybrid = hybrid_of("qwen3", f"default,rule={rule}")
    ids, _ = drawn(3, batch=1)
    packed = hybrid(ids, position_ids=torch.tensor([[*range(5), *range(9)]]), use_cache=False).logits
    apart = [hybrid(part, use_cache=False).logits for part in (ids[:, :5], ids[:, 5:])]
    assert torch.allclose(packed, torch.cat(apart, 1), rtol=0, atol=1e-10)


@torch.no_grad()
def test_a_document_may_begin_behind_padding_and_with_a_call() -> None:
    """Masks of one's own: [B, 1, T, S], two documents of five tokens, padding between them, and a cache."""
    hybrid = hybrid_of("qwen3", "default,rule=gated_delta")
    ids, _ = drawn(4, batch=1)
    of = torch.tensor([0, 0, 0, 0, 0, -1, -1, 1, 1, 1, 1, 1, -1, -1])
    mask = ((of[:, None] == of) & (of >= 0)).tril()[None, None]
    spots = torch.tensor([[0, 1, 2, 3, 4, 0, 0, 0, 1, 2, 3, 4, 0, 0]])
    wanted = torch.cat([hybrid(ids[:, part], use_cache=False).logits for part in (slice(0, 5), slice(7, 12))], 1)
    for splits in ((), (7,), (3, 8), (6, 9), (7, 8)):
        cache, parts = DynamicCache(config=hybrid.config), []
        for first, last in itertools.pairwise((0, *splits, LENGTH)):
            call = {"attention_mask": mask[:, :, first:last, :last], "position_ids": spots[:, first:last]}
            parts.append(hybrid(ids[:, first:last], **call, past_key_values=cache).logits)
        assert torch.allclose(torch.cat(parts, 1)[:, of >= 0], wanted, rtol=0, atol=1e-10), splits

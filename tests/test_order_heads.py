"""order-heads deals the slots anew and folds the permutation into the weights: the same numbers from another layout."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, DynamicCache

import hydrasurgery as hs
from hydrasurgery import ops
from hydrasurgery.errors import PreconditionError
from hydrasurgery.passes import run_pipeline
from hydrasurgery.surgery import hybrid_pipeline
from tests.families import GroupedAttention, PlainDecoder, tiny
from tests.test_families import IDS, half_plan, stir

KINDS = ("linear", "linear", "linear", "full", "full", "full", "linear", "linear")  # four KV groups, one of them mixed
EIGHT = {"num_attention_heads": 8, "num_key_value_heads": 4}
HEAD, TAIL = hybrid_pipeline().split(",", 1)
ORDERED = f"{HEAD},order-heads,prune-projections,{TAIL}"
FOLDED = ("llama", "qwen3", "qwen2")


def selections(hybrid: torch.nn.Module) -> list[tuple[int, ...]]:
    """The heads of every selection left in the first layer."""
    region = hs.regions(hybrid)[0]
    return [n.args[1] for n in region.graph.nodes if n.target is ops.select_heads]


def pair(model: torch.nn.Module, kinds: tuple[str, ...] = KINDS):
    """Two equal hybrids: heads where they were, and in order."""
    plain = stir(hs.rewrite(model, half_plan(model, kinds)))
    ordered = hs.rewrite(model, half_plan(model, kinds), pipeline=ORDERED)
    for old, new in zip(hs.region_modules(plain).values(), hs.region_modules(ordered).values(), strict=True):
        carry(old, new)
    return plain, ordered


@torch.no_grad()
def carry(old: hs.RegionModule, new: hs.RegionModule) -> None:
    """Move what stirring gave the linear heads, head by head, to their new slots."""
    before = [h for h, kind in enumerate(old.kinds) if kind == "linear"]
    after = [h for h, kind in zip(new.region.teacher_heads, new.kinds, strict=True) if kind == "linear"]
    rows = torch.tensor([before.index(head) for head in after])
    for (name, target), source in zip(new.hydra.named_parameters(), old.hydra.parameters(), strict=True):
        heads = source.unflatten(0, (len(rows), -1)) if source.shape[0] % len(rows) == 0 else source
        target.copy_(heads[rows].flatten(0, 1).view_as(target) if heads is not source else source), name


@pytest.fixture(params=FOLDED, scope="module")
def both(request):
    return pair(tiny(request.param, **EIGHT))


@torch.no_grad()
def test_numbers_are_those_of_the_unordered_hybrid(both):
    plain, ordered = both
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    for call in ({"input_ids": IDS}, {"input_ids": IDS, "attention_mask": mask}):
        wanted = plain(**call, use_cache=False).logits
        torch.testing.assert_close(ordered(**call, use_cache=False).logits, wanted, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_selections_are_slices_and_nothing_is_put_back(both):
    for heads in selections(both[1]):
        assert all(b - a in (0, 1) for a, b in zip(heads, heads[1:], strict=False))  # a slice, or each of one repeated
    region = hs.regions(both[1])[0]
    assert region.kinds == ("full",) * 3 + ("linear",) * 5
    assert region.teacher_heads == (4, 5, 3, 2, 0, 1, 6, 7)


@torch.no_grad()
def test_cached_equals_full(both):
    hybrid = both[1]
    full = hybrid(IDS, use_cache=False).logits
    cache, parts = DynamicCache(config=hybrid.config), []
    for piece in (IDS[:, :5], *IDS[:, 5:].split(1, dim=1)):
        parts.append(hybrid(piece, past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), full, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_saved_copied_and_pickled_hybrids_are_bit_equal(both, tmp_path):
    hybrid = both[1]
    expected = hybrid(IDS, use_cache=False).logits
    hybrid.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    for other in (loaded, copy.deepcopy(hybrid), pickle.loads(pickle.dumps(hybrid))):
        assert torch.equal(other(IDS, use_cache=False).logits, expected)
    layers = [hs.regions(each) for each in (loaded, hybrid)]
    assert all(a.teacher_heads == b.teacher_heads for a, b in zip(*layers, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("family", ["phi3", "gpt2", "olmo2", "gemma2", "gpt_neox", "glm4"])
def test_what_cannot_be_folded_stays_a_selection(family):
    plain, ordered = pair(tiny(family), ("linear", "full", "full", "linear"))
    wanted = plain(IDS, use_cache=False).logits
    torch.testing.assert_close(ordered(IDS, use_cache=False).logits, wanted, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_linear_heads_with_projections_of_their_own_are_ordered_too():
    model = tiny("qwen3", **EIGHT)
    own = TAIL.replace("split-heads", "split-heads,untie-projections,prune-projections")
    tied, untied = (
        hs.rewrite(model, half_plan(model, KINDS), pipeline=f"{HEAD},order-heads,prune-projections,{tail}")
        for tail in (TAIL, own)
    )
    assert all(len(set(heads)) < len(heads) for heads in selections(untied))  # KV heads of uneven groups, repeated
    wanted = tied(IDS, use_cache=False).logits
    torch.testing.assert_close(untied(IDS, use_cache=False).logits, wanted, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_plain_module_is_ordered_too():
    torch.manual_seed(0)
    model = PlainDecoder(GroupedAttention).eval()
    plain, ordered = pair(model, ("linear", "linear", "full", "full"))
    torch.testing.assert_close(ordered(IDS), plain(IDS), atol=1e-5, rtol=1e-4)


@torch.no_grad()
@given(kinds=st.lists(st.sampled_from(["full", "linear"]), min_size=8, max_size=8))
@settings(max_examples=10, deadline=None, derandomize=True)
def test_any_kinds_give_the_softmax_layer_back_before_linearising(kinds):
    """Only ordering and folding, on softmax attention: KV groups stay whole, and the numbers stay."""
    model = tiny("qwen3", **EIGHT, head_dim=8)
    wanted = model(IDS).logits
    ordered = hs.rewrite(model, half_plan(model, tuple(kinds)), pipeline=f"{HEAD},order-heads,prune-projections")
    torch.testing.assert_close(ordered(IDS).logits, wanted, atol=1e-5, rtol=1e-4)
    region = hs.regions(ordered)[0]
    assert all(region.teacher_heads[i] // 2 == region.teacher_heads[i + 1] // 2 for i in range(0, 8, 2))
    assert selections(ordered) == []
    mixed = sum(kinds[i] != kinds[i + 1] for i in range(0, 8, 2))
    changes = sum(a != b for a, b in zip(region.kinds, region.kinds[1:], strict=False))
    assert changes <= 1 + mixed


@torch.no_grad()
def test_calibration_follows_the_heads():
    model = tiny("qwen3", **EIGHT)
    plain, ordered = (hs.rewrite(model, half_plan(model, KINDS), pipeline=p) for p in (None, ORDERED))
    for hybrid in (plain, ordered):
        hs.calibrate(hybrid, model, IDS)
    wanted = plain(IDS, use_cache=False).logits
    torch.testing.assert_close(ordered(IDS, use_cache=False).logits, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_it_is_exact_by_the_manager_s_own_check(family):
    for region in hs.capture(tiny(family, **EIGHT)):
        region.kinds = KINDS
        run_pipeline([region], "order-heads,prune-projections", tolerance=1e-5)


def test_it_comes_before_split_heads():
    region = hs.capture(tiny("qwen3", **EIGHT))[0]
    region.kinds = KINDS
    with pytest.raises(PreconditionError, match="order-heads"):
        run_pipeline([region], f"{HEAD},split-heads,order-heads")

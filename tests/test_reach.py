"""Masks of one number a key say what transformers' dense masks say, and no dense one is made in their place."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache, masking_utils

import hydrasurgery as hs
from hydrasurgery import ops
from hydrasurgery.ir.interface import reach_mask
from hydrasurgery.kernels import registry
from hydrasurgery.kernels.attention.reach import dense, is_reach
from tests.families import FAMILIES, tiny

CAUSAL = masking_utils.causal_mask_function
PACKED = torch.tensor([[0, 0, 0, 1, 1, 2, 3, 3, 3], [0, 0, 0, 0, 0, 0, 0, 1, 1]])
PADDINGS = {
    "none": None,
    "left": torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9]).bool(),
    "right": torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0, 0], [1] * 9]).bool(),
    "holes": torch.tensor([[1, 0, 0, 1, 0, 1, 1, 0, 1], [0, 1, 1, 0, 0, 0, 0, 1, 1]]).bool(),
    "all": torch.zeros(2, 9).bool(),
}
FUNCTIONS = {
    "causal": (CAUSAL, None),
    "window": (masking_utils.sliding_window_causal_mask_function(3), 3),
    "window of one": (masking_utils.sliding_window_causal_mask_function(1), 1),
    "chunks": (masking_utils.chunked_causal_mask_function(4, torch.tensor([0, 2])), 4),
    "documents": (masking_utils.and_masks(CAUSAL, masking_utils.packed_sequence_mask_function(PACKED)), None),
    "documents and window": (
        masking_utils.and_masks(
            masking_utils.sliding_window_causal_mask_function(2), masking_utils.packed_sequence_mask_function(PACKED)
        ),
        2,
    ),
}


def both(function: str, padding: str, queries: int, **options) -> tuple[Tensor, Tensor]:
    """The reach mask and transformers' own, of the last `queries` of 9 tokens."""
    mask_function, size = FUNCTIONS[function]
    call = {"batch_size": 2, "q_length": queries, "kv_length": 9, "q_offset": 9 - queries, "kv_offset": 0, **options}
    call |= {"mask_function": mask_function, "attention_mask": PADDINGS[padding], "local_size": size}
    found = reach_mask(**call, allow_is_causal_skip=False)
    wanted = masking_utils.sdpa_mask(**call, allow_is_causal_skip=False)
    assert is_reach(found) and tuple(found.shape) == (2, 1, 1, 10)
    return found, wanted.expand(2, -1, -1, -1)


@pytest.mark.parametrize("queries", [9, 4, 1])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_it_says_what_the_dense_mask_says(function, padding, queries):
    found, wanted = both(function, padding, queries)
    assert torch.equal(dense(found, queries), wanted)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("queries", [9, 4, 1])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("function", ["causal", "chunks", "documents"])
def test_its_flags_are_those_of_the_dense_mask(function, padding, queries, window):
    found, wanted = both(function, padding, queries)
    hidden_states = torch.empty(2, queries, 3)
    flags = zip(
        ops.token_flags(found, hidden_states, window=window),
        ops.token_flags(wanted, hidden_states, window=window),
        strict=True,
    )
    assert all(torch.equal(*pair) for pair in flags)


def test_keys_that_are_not_written_yet_are_not_seen():
    seen = torch.tensor(4)  # a static cache counts on the device
    found = reach_mask(1, 3, 12, q_offset=seen, kv_offset=0, mask_function=CAUSAL)
    wanted = masking_utils.sdpa_mask(1, 3, 12, q_offset=seen, kv_offset=0, mask_function=CAUSAL)
    assert torch.equal(dense(found, 3), wanted)


@pytest.mark.parametrize(
    ("sizes", "padding"),
    [((9, 9, 0), None), ((4, 9, 5), None), ((9, 9, 0), torch.ones(1, 9).bool()), ((9, 20, 0), torch.ones(1, 9).bool())],
)
def test_plain_causal_attention_needs_no_mask(sizes, padding):
    queries, keys, first = sizes
    assert reach_mask(1, queries, keys, q_offset=first, mask_function=CAUSAL, attention_mask=padding) is None


@pytest.mark.parametrize("name", ["or_mask", "vmap", "both ways"])
def test_what_it_cannot_say_stays_dense(name):
    function, options = CAUSAL, {}
    if name == "or_mask":
        function = masking_utils.or_masks(CAUSAL, masking_utils.blockwise_overlay(PACKED))
    if name == "vmap":
        function, options = masking_utils.and_masks(CAUSAL, lambda b, h, q, k: k % 2 == 0), {"use_vmap": True}
    if name == "both ways":
        function, options = masking_utils.bidirectional_mask_function, {"allow_is_bidirectional_skip": False}
    call = {"batch_size": 2, "q_length": 9, "kv_length": 9, "mask_function": function, "allow_is_causal_skip": False}
    assert torch.equal(reach_mask(**call, **options), masking_utils.sdpa_mask(**call, **options))


def test_attention_by_it_is_attention_by_the_dense_mask():
    torch.manual_seed(0)
    for function, padding, queries in (("causal", "holes", 9), ("documents", "left", 4), ("window", "left", 1)):
        found, wanted = both(function, padding, queries)
        q = torch.randn(2, 4, queries, 8, dtype=torch.float64, requires_grad=True)
        k, v = (torch.randn(2, 2, 9, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
        results = []
        for mask in (found, wanted):
            out = ops.attention(q, k, v, mask)
            results.append((out, *torch.autograd.grad(out.square().sum(), [q, k, v])))
        assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_another_shape_of_integers_is_refused():
    q = torch.randn(1, 2, 5, 4)
    with pytest.raises(ValueError, match=r"mask must have shape \[1 or 1, 2 or 1, 5, 5\], found \[1, 1, 1, 5\]"):
        ops.attention(q, q, q, torch.ones(1, 1, 1, 5, dtype=torch.int32))


# --- whole models ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cases(monkeypatch):
    """The features of every case that the registry is asked for."""
    asked: list[registry.Case] = []
    kernel = registry._kernel

    def ask(op, case, machine):
        asked.append(case)
        return kernel(op, case, machine)

    monkeypatch.setattr(registry, "_kernel", ask)
    return asked


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("call", ["padded", "packed", "second turn"])
def test_no_dense_mask_reaches_a_hybrid(family, call, cases):
    teacher = tiny(family)
    hybrid = hs.rewrite(teacher, hs.plan_heads(teacher, ratio="1:1", strategy="fixed")).eval()
    cases.clear()
    ids = torch.randint(3, 60, (2, 12))
    inputs = {"input_ids": ids}
    if call == "padded":
        inputs["attention_mask"] = torch.ones_like(ids).index_fill(1, torch.arange(3), 0)
    if call == "packed":
        inputs |= {"position_ids": (torch.arange(12) % 5)[None].expand(2, -1), "use_cache": False}
    counts = inputs.get("attention_mask", torch.ones_like(ids)).bool()[:, 7 if call == "second turn" else 0 :]

    def logits() -> Tensor:
        with torch.no_grad():
            if call != "second turn":
                return hybrid(**inputs).logits[counts]
            cache = DynamicCache(config=hybrid.config)
            hybrid(ids[:, :7], past_key_values=cache)
            return hybrid(ids[:, 7:], past_key_values=cache).logits[counts]

    found = logits()
    assert cases
    assert not [case for case in cases if "mask" in case.features]
    hybrid.set_attn_implementation(teacher.config._attn_implementation)  # whose masks are dense
    assert torch.equal(found, logits())


def test_a_static_cache_is_read_by_structure(cases):
    teacher = tiny("qwen3")
    hybrid = hs.rewrite(teacher, hs.plan_heads(teacher, ratio="1:1", strategy="fixed")).eval()
    cases.clear()
    ids = torch.randint(3, 60, (2, 9))
    with torch.no_grad():
        cache = StaticCache(config=hybrid.config, max_cache_len=16)
        hybrid(ids[:, :5], past_key_values=cache)
        found = hybrid(ids[:, 5:], past_key_values=cache).logits
        wanted = hybrid(ids).logits[:, 5:]
    assert not [case for case in cases if "mask" in case.features]
    assert torch.allclose(found, wanted, atol=1e-5)


def test_restored_models_make_dense_masks_again():
    teacher = tiny("qwen3")
    hybrid = hs.rewrite(teacher, hs.plan_heads(teacher, ratio="1:1", strategy="fixed"))
    assert (hybrid.config._attn_implementation, teacher.config._attn_implementation) == ("hydra", "sdpa")
    assert hs.restore(hybrid).config._attn_implementation == "sdpa"

"""The layer's options on many families: the meaning of each, and what holds of every hybrid holds with each of them."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import hydrasurgery as hs
from hydrasurgery import ops
from hydrasurgery.conversion import share_copy
from hydrasurgery.errors import PlanError, PreconditionError
from hydrasurgery.ir.stitch import stitch
from hydrasurgery.kernels.rotary import TURNS
from hydrasurgery.layers import rotate, scale_by_length
from hydrasurgery.passes import run_pipeline
from hydrasurgery.surgery import hybrid_pipeline
from tests import test_families
from tests.families import FAMILIES, PlainDecoder, same, tiny
from tests.test_families import IDS, half_plan, stir

# The properties of hybrids, collected here too: now of those that `hybrid` below makes.
test_cached_equals_full = test_families.test_cached_equals_full
test_gradients_reach_every_new_parameter = test_families.test_gradients_reach_every_new_parameter
test_left_padding_changes_nothing = test_families.test_left_padding_changes_nothing
test_no_future_token_matters = test_families.test_no_future_token_matters
test_packed_documents_do_not_see_each_other = test_families.test_packed_documents_do_not_see_each_other
test_saved_copied_and_pickled_hybrids_are_bit_equal = test_families.test_saved_copied_and_pickled_hybrids_are_bit_equal

ROTARY = [family for family in FAMILIES if family not in ("gpt2", "opt")]
FORMS = "llama olmo2 phi phi3 gpt_neox cohere glm4 helium hunyuan_v1_dense nanochat ernie4_5 persimmon".split()
OPTION_FAMILIES = "qwen3 llama gemma2 gemma3_text phi3 gpt_neox olmo2 cohere".split()
LAYERS = (
    "hydrahead",
    "log_length=true,full_rope=false,conv=none",
    "conv=native,full_gate=true,linear_rope=false",
)
FULL = ("full",) * 4


def layered(model: nn.Module, layer: str, kinds: tuple[str, ...] = ("full", "linear", "linear", "full")) -> Any:
    """A hybrid whose length coefficient differs from token to token by far more than rounding: a = 2, not 500."""
    pipeline = hybrid_pipeline(layer).replace("log_length=True", "log_length=True,a=2.0")
    return hs.rewrite(model, half_plan(model, kinds), pipeline=pipeline)


@functools.cache
def one_layer(family: str, layer: str) -> Any:
    """A hybrid shared by the tests of exports, none of which changes it."""
    return stir(layered(tiny(family, num_hidden_layers=1), layer))


@functools.cache
def make_hybrid(family: str, layer: str) -> nn.Module:
    return stir(layered(tiny(family), layer))


@pytest.fixture(params=[(family, layer) for family in OPTION_FAMILIES for layer in LAYERS], ids=":".join)
def hybrid(request: pytest.FixtureRequest) -> nn.Module:
    return make_hybrid(*request.param)


def test_generation_and_beams() -> None:
    test_families.test_generate_is_the_same_with_and_without_cache(make_hybrid("qwen3", "hydrahead"))


# --- canonicalize-rotary ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_rotary_embeddings_become_one_node_each_bit_for_bit(family: str) -> None:
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    model = tiny(family)
    canonical = share_copy(model)
    stitch(canonical, run_pipeline(hs.capture(canonical), "analyze", tolerance=0.0))
    for region in hs.regions(canonical):
        assert len(region.find(rotate)) == region.options["rotary"] == (2 if family in ROTARY else 0)
        assert not region.find(torch.ops.aten.neg.default)
    for padding in (None, mask):
        wanted, got = (m(IDS, attention_mask=padding, use_cache=False).logits for m in (model, canonical))
        assert same(got, wanted)


@pytest.mark.parametrize("family", ["cohere", "ernie4_5", "phi3"])
def test_casts_around_a_rotation_stay(family: str) -> None:
    regions = run_pipeline(hs.capture(tiny(family).bfloat16()), "analyze", tolerance=0.0)
    assert [region.options["rotary"] for region in regions] == [2, 2]


class Shuffled(nn.Module):
    """What looks like a rotary embedding and is none: its second copy of q is turned by another permutation."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)
        table = torch.arange(64.0)[:, None] * torch.arange(1, width // heads + 1)
        self.register_buffer("cos", table.cos()[None, None])
        self.register_buffer("sin", table.sin()[None, None])

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        cos, sin = self.cos[:, :, : x.shape[1]], self.sin[:, :, : x.shape[1]]
        a, b = q.chunk(2, dim=-1)
        q = q * cos + torch.cat([b, a], dim=-1) * sin
        a, b = k.chunk(2, dim=-1)
        k = k * cos + torch.cat([-b, a], dim=-1) * sin
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


def test_only_a_rotation_is_one() -> None:
    regions = run_pipeline(hs.capture(PlainDecoder(Shuffled)), "analyze", tolerance=0.0)
    assert [region.options["rotary"] for region in regions] == [1, 1]  # only k's


def test_every_turn_is_a_quarter_of_a_full_one() -> None:
    x = torch.randn(2, 3, 4, 8)
    for turn in TURNS.values():
        assert torch.equal(turn(turn(x)), -x)
        assert (turn(x) * x).sum(-1).abs().max() < 1e-5


# --- positions --------------------------------------------------------------------------------------------------------


class Unturned(nn.Module):
    """Rotary tables of position 0 for every token."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original = original

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        cos, sin = self.original(*args, **kwargs)
        return torch.ones_like(cos), torch.zeros_like(sin)


def stop_turning(model: nn.Module) -> None:
    for name, module in list(model.named_modules()):
        if name.endswith("rotary_emb"):
            model.set_submodule(name, Unturned(module))


@pytest.mark.parametrize("family", FORMS)
@torch.no_grad()
def test_full_heads_without_rotary_are_a_teacher_that_never_turns(family: str) -> None:
    model = tiny(family)
    hybrid = hs.rewrite(model, half_plan(model, FULL), layer="full_rope=false")
    turned = model(IDS, use_cache=False).logits
    stop_turning(model)
    plain = model(IDS, use_cache=False).logits
    assert torch.allclose(hybrid(IDS, use_cache=False).logits, plain, atol=1e-5)
    assert not torch.allclose(turned, plain, atol=1e-4)


@pytest.mark.parametrize("layer", ["default", "conv=native", "conv=native,linear_rope=false"])
@torch.no_grad()
def test_linear_heads_know_distances_and_not_places(layer: str) -> None:
    hybrid = stir(layered(tiny("qwen3"), layer, ("linear",) * 4))
    places = torch.arange(IDS.shape[1])[None]
    here, there = (hybrid(IDS, position_ids=p, use_cache=False).logits for p in (places, places + 9))
    assert torch.allclose(here, there, atol=1e-5)
    stop_turning(hybrid)
    assert torch.equal(hybrid(IDS, use_cache=False).logits, here) == ("linear_rope=false" in layer)


@torch.no_grad()
def test_the_length_coefficient_multiplies_the_logits() -> None:
    model = tiny("llama")
    hybrid = hs.rewrite(model, half_plan(model, FULL), layer="log_length=true")
    coefficient = torch.tensor([math.log(p + 500) / math.log(500) for p in range(IDS.shape[1])])
    assert torch.allclose(scale_by_length(torch.ones(1, 1, 12, 2), torch.arange(12)[None])[0, 0, :, 1], coefficient)
    for layer in model.model.layers:  # q is linear in its projection, and a rotation keeps its length
        layer.self_attn.q_proj.register_forward_hook(lambda _module, _args, out: out * coefficient[:, None])
    assert torch.allclose(hybrid(IDS, use_cache=False).logits, model(IDS, use_cache=False).logits, atol=2e-6)


flags = st.integers(1, 9).flatmap(lambda n: st.lists(st.sampled_from("t.r"), min_size=n, max_size=n))


@settings(deadline=None, max_examples=80)
@given(flags, st.integers(0, 9))
def test_positions_count_a_documents_tokens(text: list[str], cut: int) -> None:
    """t: a token, r: the first of a document, dot: padding."""
    expected, seen = [], 0
    for letter in text:
        seen = {"t": seen + 1, ".": seen, "r": 1}[letter]
        expected.append(max(seen - 1, 0))
    valid = torch.tensor([[letter != "." for letter in text]])
    reset = torch.tensor([[letter == "r" for letter in text]])
    positions, total = ops.token_positions(valid, reset)
    assert positions.tolist() == [expected]
    assert total.tolist() == [seen]
    cut = min(cut, len(text))
    first, between = ops.token_positions(valid[:, :cut], reset[:, :cut])
    second, after = ops.token_positions(valid[:, cut:], reset[:, cut:], between)
    assert torch.cat([first, second], 1).tolist() == [expected]
    assert after.tolist() == [seen]


def test_counting_is_an_operator() -> None:
    valid = torch.tensor([[False, True, True, True], [True] * 4])
    reset = torch.tensor([[False, False, True, False], [False] * 4])
    for seen in (None, torch.tensor([3, 4])):
        torch.library.opcheck(torch.ops.hydra.token_positions.default, (valid, reset, seen))


# --- gates, norms, start values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", ["default", "full_gate=true", "conv=native,linear_rope=false"])
@torch.no_grad()
def test_without_a_linear_head_a_layer_starts_bit_identical(layer: str) -> None:
    model = tiny("qwen3")
    hybrid = hs.rewrite(model, half_plan(model, FULL), layer=layer)
    assert torch.equal(hybrid(IDS, use_cache=False).logits, model(IDS, use_cache=False).logits)


@torch.no_grad()
def test_the_gate_of_all_heads_is_the_gate_of_linear_heads_on_their_slots() -> None:
    model = tiny("qwen3")
    some, every = (hs.rewrite(model, half_plan(model), layer=layer) for layer in ("default", "full_gate=true"))
    for a, b in zip(*(hs.region_modules(m).values() for m in (some, every)), strict=True):
        a.hydra.output_gate.g_proj.weight.normal_()
        b.hydra.output_gate.g_proj.weight[[1, 2]] = a.hydra.output_gate.g_proj.weight
    assert torch.allclose(some(IDS, use_cache=False).logits, every(IDS, use_cache=False).logits, atol=1e-5)


@pytest.mark.parametrize("layer", ["default", "hydrahead", "conv=native", "linear_rope=false,full_norm=paper"])
def test_start_values_are_fitted_to_what_each_layer_is(layer: str) -> None:
    model = tiny("qwen3")
    hybrid = hs.rewrite(model, half_plan(model), layer=layer)
    fits = hs.calibrate(hybrid, model, IDS)
    assert all(fit.error.shape == (2,) and 0 < fit.error.max() < 1 for fit in fits.values())
    heads: dict[str, Tensor] = {}
    with hs.head_taps(model) as taps, torch.no_grad():
        taps["model.layers.0.self_attn"].register_forward_hook(lambda _m, _a, out: heads.update(wanted=out))
        model(IDS, use_cache=False)
    module = next(iter(hs.region_modules(hybrid).values()))
    module.o_proj.register_forward_pre_hook(lambda _m, args: heads.update(got=args[0]))
    with torch.no_grad():
        hybrid(IDS, use_cache=False)
    got = heads["got"].unflatten(-1, (4, 16))
    fitted = (0, 1, 2, 3) if hs.LayerOptions.of(layer).full_norm == "paper" else (1, 2)
    for head in fitted:  # of a least-squares fit g o^ = got, what is left is at right angles to it
        left = heads["wanted"][:, :, head] - got[:, :, head]
        assert abs((left * got[:, :, head]).sum()) < 1e-4 * got[:, :, head].square().sum()


# --- asking for them --------------------------------------------------------------------------------------------------


def test_options_are_text_and_back() -> None:
    texts = ("default", "hydrahead", "hydrahead,conv=none", "default,untie=true", "default,rule=delta,gate=false")
    for text in texts:
        assert str(hs.LayerOptions.of(text)) == text
        assert hs.LayerOptions.of(hs.LayerOptions.of(text)) == hs.LayerOptions.of(text)
    assert hs.LayerOptions.of("conv=none, untie=True") == hs.LayerOptions(conv="none", untie=True)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("hydra", "'hydra' is neither option=value nor a preset"),
        ("conv=none,hydrahead", "'hydrahead' is neither .* at the beginning"),
        ("norm=paper", "no option is called 'norm'; there are conv, full_gate"),
        ("conv=4", "conv is '4'; give one of residual-unrotated, residual, native, none"),
        ("untie=yes", "untie is 'yes'; give true or false"),
        ("gate=false,full_gate=true", "full_gate=true needs gate=true"),
        ("conv=none,conv=native", "conv is given twice"),
        ("gate=false," * 2, "gate is given twice"),
        ("x" * 10**6, r"^.{,300}$"),
        ("rule=" + "x" * 10**6, r"^.{,300}$"),
        (4, "layer=4 is neither LayerOptions nor text"),
    ],
)
def test_wrong_options_are_named(layer: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        hs.rewrite(nn.Linear(1, 1), half_plan(tiny("llama")), layer=layer)


def test_what_a_model_lacks_is_named() -> None:
    model = tiny("gpt2")
    for layer in ("hydrahead", "linear_rope=false"):
        with pytest.raises(PlanError, match=r"GPT2LMHeadModel: no rotary embedding .* transformer\.h\.0\.attn"):
            hs.rewrite(model, half_plan(model), layer=layer)
    hs.rewrite(model, half_plan(model), layer="hydrahead,full_rope=true")
    with pytest.raises(PlanError, match="leave one of them out"):
        hs.rewrite(model, half_plan(model), layer="hydrahead", pipeline="analyze")
    rope = "place-heads: model.layers.0.self_attn: run canonicalize-rotary first"
    with pytest.raises(PreconditionError, match=rope):
        llama = tiny("llama")
        steps = "canonicalize-attention,split-heads,place-heads{full_rope=False}"
        hs.rewrite(llama, half_plan(llama), pipeline=steps)


def test_a_plan_keeps_its_layer_and_a_rewrite_may_change_it(tmp_path: Path) -> None:
    model = tiny("qwen3")
    plan = hs.plan_heads(model, strategy="random", ratio="1:1", layer="hydrahead")
    assert "layer hydrahead" in str(plan)
    assert hs.Plan.load(plan.save(tmp_path / "plan.json")) == plan
    older = {key: value for key, value in plan.to_dict().items() if key != "layer"}
    assert hs.Plan.from_dict(older).layer == hs.LayerOptions()
    with pytest.raises(PlanError, match="plan: layer.conv is 'x'"):
        hs.Plan.from_dict({**plan.to_dict(), "layer": {"conv": "x"}})
    for layer in (None, "conv=none"):
        hybrid = hs.rewrite(model, plan, layer=layer)
        hybrid.save_pretrained(tmp_path / "hybrid")
        loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "hybrid")
        kept = hs.Plan.from_dict(loaded.config.hydrasurgery["plan"])
        assert kept.layer == hs.LayerOptions.of(layer or "hydrahead")
        assert [str(r.graph) for r in hs.regions(loaded)] == [str(r.graph) for r in hs.regions(hybrid)]
        with torch.no_grad():
            wanted = model(IDS, use_cache=False).logits
            assert torch.equal(hs.restore(hybrid)(IDS, use_cache=False).logits, wanted)


# --- exports ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(("family", "target"), [("qwen3", "onnxruntime"), ("gemma2", "opset27")])
def test_layers_export_to_onnx(family: str, target: str, layer: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    from tests.test_onnx import difference

    hybrid = one_layer(family, layer)
    written = hs.export_onnx(hybrid, tmp_path / "model.onnx", target=target, verbose=False)
    decoder = hs.OnnxDecoder(written.path, threads=1)
    assert max(difference(hybrid, decoder, length) for length in (1, 40)) < 1e-4


@pytest.mark.parametrize("layer", LAYERS)
def test_layers_export_to_pt2_and_compile(layer: str, tmp_path: Path) -> None:
    from hydrasurgery.export.stateful import StatefulDecoder, exportable
    from tests.test_backend import compiled, of_any_length

    hybrid = one_layer("qwen3", layer)
    written = hs.export_pt2(hybrid, tmp_path / "model.pt2", verbose=False)
    program = torch.export.load(written.path).module()
    with torch.no_grad(), exportable(hybrid):
        decoder = StatefulDecoder(hybrid, written.states)
        past, mask = tuple(slot.empty(2) for slot in written.states), torch.ones(2, 0, dtype=torch.long)
        for length in (9, 1, 5):
            ids = torch.randint(3, 90, (2, length))
            mask = torch.cat([mask, torch.ones_like(ids)], 1)
            if length == 9:
                mask[0, :4] = 0
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -length:].contiguous()
            expected = decoder(ids, mask, positions, tuple(value.clone() for value in past))
            got = program(ids, mask, positions, past)
            for a, b in zip(got, expected, strict=True):
                assert torch.allclose(a, b, atol=1e-6, rtol=0)
            past = expected[1:]
    torch._dynamo.reset()
    run, counter = compiled(hybrid)
    with torch.no_grad():
        for length in (12, 7, 33):
            ids = of_any_length(torch.randint(3, 90, (2, length)))
            assert torch.allclose(run(ids, use_cache=False).logits, hybrid(ids, use_cache=False).logits, atol=1e-5)
    assert counter.frame_count == 1

"""Surgery over model families, one line per family: exactness of capture, stitch and restore; meaning of the hybrids."""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

import hydrasurgery as hs
from hydrasurgery.plan import LayerPlan, Plan
from tests.families import FAMILIES, PLAIN, PlainDecoder, same, stir, tiny

HYBRIDS = """
llama qwen2 qwen3 mistral mixtral olmo2 phi phi3 gemma2 gemma3_text gpt2 gpt_neox cohere2 granite smollm3 glm4 exaone4 opt
""".split()
IDS = torch.arange(3, 27).view(2, 12)
_LAYERS: dict[tuple[Any, ...], list[dict[str, Any]]] = {}  # of models that differ in their weights only


def half_plan(model: torch.nn.Module, kinds: tuple[str, ...] = ("full", "linear", "linear", "full")) -> Plan:
    """Two of four heads linear in every layer, or the kinds given."""
    key = (type(model), str(getattr(model, "config", "")), *((n, type(m)) for n, m in model.named_modules()))
    if key not in _LAYERS:
        names = ("name", "num_key_value_heads", "head_dim", "value_dim", "window")
        _LAYERS[key] = [{name: getattr(region, name) for name in names} for region in hs.capture(model)]
    layers = [LayerPlan(kinds=kinds, **layer) for layer in _LAYERS[key]]
    return Plan(layers=tuple(layers), unit="head", strategy="given", min_full_per_layer=min(1, kinds.count("full")))


@functools.cache
def make_hybrid(family: str) -> torch.nn.Module:
    model = tiny(family)
    return stir(hs.rewrite(model, half_plan(model)))


@pytest.fixture(params=HYBRIDS)
def hybrid(request: pytest.FixtureRequest) -> torch.nn.Module:
    """One hybrid a family, shared by the tests, none of which changes it."""
    return make_hybrid(request.param)


@pytest.mark.parametrize("family", ["llama", "olmo2", "olmo3", "cohere", "cohere2", "ernie4_5"])
@pytest.mark.parametrize(("made", "run"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
@torch.no_grad()
def test_a_hybrid_runs_in_another_dtype_than_it_was_made_in(family: str, made: torch.dtype, run: torch.dtype) -> None:
    model = tiny(family).to(made)
    expected = copy.deepcopy(model).to(run)(IDS, use_cache=False).logits
    stitched = hs.rewrite(copy.deepcopy(model), half_plan(model, ("full",) * 4)).to(run)
    assert same(stitched(IDS, use_cache=False).logits, expected)
    hybrid = hs.rewrite(model, half_plan(model)).to(run)
    assert hybrid(IDS, use_cache=False).logits.dtype == run


@pytest.mark.parametrize("family", FAMILIES)
def test_capture_stitch_restore_are_bit_exact(family: str) -> None:
    model = tiny(family)
    names = list(model.state_dict())
    modules = dict(model.named_modules())
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    calls = [{"input_ids": IDS}, {"input_ids": IDS, "attention_mask": mask}]
    with torch.no_grad():
        before = [model(**call, use_cache=False).logits for call in calls]
        plan = half_plan(model, ("full",) * 4)
        stitched = hs.rewrite(model, plan)
        assert len(hs.region_modules(stitched)) == 2
        assert list(stitched.state_dict()) == names
        for call, expected in zip(calls, before, strict=True):
            # In models with "eager" attention, tokens of padding see a mean over all tokens; in hybrids nothing.
            counts = call.get("attention_mask", torch.ones_like(IDS)).bool()
            assert same(stitched(**call, use_cache=False).logits[counts], expected[counts])
        restored = hs.restore(stitched)
        assert [type(m) for m in restored.modules()] == [type(m) for m in modules.values()]
        for call, expected in zip(calls, before, strict=True):
            assert torch.equal(restored(**call, use_cache=False).logits, expected)
            assert torch.equal(model(**call, use_cache=False).logits, expected)


@pytest.mark.parametrize("attention", PLAIN)
def test_plain_modules_are_bit_exact_and_convert(attention: type[torch.nn.Module]) -> None:
    torch.manual_seed(0)
    model = PlainDecoder(attention)
    with torch.no_grad():
        expected = model(IDS)
        stitched = hs.rewrite(model, half_plan(model, ("full",) * 4))
        assert torch.equal(stitched(IDS), expected)
        assert torch.equal(hs.restore(stitched)(IDS), expected)
        hybrid = stir(hs.rewrite(model, half_plan(model)))
        changed = IDS.clone()
        changed[:, 7:] = 5
        assert torch.allclose(hybrid(changed)[:, :7], hybrid(IDS)[:, :7], atol=1e-5)
        assert not torch.allclose(hybrid(IDS), expected, atol=1e-3)


@torch.no_grad()
def test_cached_equals_full(hybrid: torch.nn.Module) -> None:
    full = hybrid(IDS, use_cache=False).logits
    cache, parts = DynamicCache(config=hybrid.config), []
    for piece in (IDS[:, :5], IDS[:, 5:6], IDS[:, 6:9], *IDS[:, 9:].split(1, dim=1)):
        parts.append(hybrid(piece, past_key_values=cache, use_cache=True).logits)
    assert torch.allclose(torch.cat(parts, dim=1), full, atol=1e-4)


@torch.no_grad()
def test_generate_is_the_same_with_and_without_cache(hybrid: torch.nn.Module) -> None:
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    cached = hybrid.generate(IDS, use_cache=True, **settings)
    assert torch.equal(cached, hybrid.generate(IDS, use_cache=False, **settings))
    beams = hybrid.generate(IDS, num_beams=3, use_cache=True, **settings)
    assert torch.equal(beams, hybrid.generate(IDS, num_beams=3, use_cache=False, **settings))


@torch.no_grad()
def test_no_future_token_matters(hybrid: torch.nn.Module) -> None:
    changed = IDS.clone()
    changed[:, 8:] = 50
    before, after = (hybrid(ids, use_cache=False).logits for ids in (IDS, changed))
    assert torch.allclose(before[:, :8], after[:, :8], atol=1e-5)


@torch.no_grad()
def test_left_padding_changes_nothing(hybrid: torch.nn.Module) -> None:
    plain = hybrid(IDS[:1], use_cache=False).logits
    padded = torch.cat([torch.full((1, 5), 90), IDS[:1]], dim=1)
    mask = torch.ones_like(padded)
    mask[:, :5] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    extra = {} if hybrid.config.model_type == "opt" else {"position_ids": positions}
    got = hybrid(padded, attention_mask=mask, use_cache=False, **extra).logits[:, 5:]
    assert torch.allclose(got, plain, atol=1e-5)


@pytest.mark.parametrize("graphs", ["plain", "of GPUs"])
def test_packed_documents_do_not_see_each_other(hybrid: torch.nn.Module, graphs: str, monkeypatch: Any) -> None:
    """Outputs are those of the documents apart in fp32, and gradients in fp64, where differences of sums keep their digits."""
    if hybrid.config.model_type == "opt":
        pytest.skip("opt takes no position_ids to pack with")
    exact = copy.deepcopy(hybrid).double()
    if hybrid.config.model_type == "mixtral":
        exact.set_experts_implementation("batched_mm")  # the default has no fp64
    ends = (0, 3, 7, 12)
    pieces = [IDS[:1, start:end] for start, end in zip(ends, ends[1:], strict=False)]
    positions = torch.cat([torch.arange(piece.shape[1]) for piece in pieces])[None]
    for model in (hybrid, exact):
        for module in hs.region_modules(model).values() if graphs == "of GPUs" else ():
            monkeypatch.setitem(vars(module), "_run", module._run_fast)
        apart = torch.cat([model(piece, use_cache=False).logits for piece in pieces], dim=1)
        packed = model(IDS[:1], position_ids=positions, use_cache=False).logits
        assert torch.allclose(packed, apart, rtol=1e-5, atol=1e-5)
    parameters = [p for p in exact.parameters() if p.requires_grad]
    wanted, found = (
        torch.autograd.grad(logits.log_softmax(-1)[..., 7].mean(), parameters, allow_unused=True)
        for logits in (apart, packed)
    )
    for one, other in zip(wanted, found, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.allclose(one, other, rtol=1e-5, atol=1e-5 * float(one.abs().max()) + 1e-8)


def test_gradients_reach_every_new_parameter(hybrid: torch.nn.Module) -> None:
    hybrid(IDS, use_cache=False).logits.float().square().mean().backward()
    for name, module in hs.region_modules(hybrid).items():
        for key, parameter in module.hydra.named_parameters():
            assert parameter.grad is not None, f"{name}.{key} got no gradient"
            assert parameter.grad.abs().sum() > 0, f"{name}.{key} got a zero gradient"
    hybrid.zero_grad()


@torch.no_grad()
def test_saved_copied_and_pickled_hybrids_are_bit_equal(hybrid: torch.nn.Module, tmp_path: object) -> None:
    expected = hybrid(IDS, use_cache=False).logits
    hybrid.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert list(loaded.state_dict()) == list(hybrid.state_dict())
    for name, value in hybrid.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    for other in (loaded, copy.deepcopy(hybrid), pickle.loads(pickle.dumps(hybrid))):
        assert torch.equal(other(IDS, use_cache=False).logits, expected)

"""Calls of `generate` and of a hybrid's cache as users make them: the right tokens, or a refusal by name before any is made."""

from __future__ import annotations

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jvp, vmap
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache, DynamicLayer

import hydrasurgery as hs
from hydrasurgery import ops
from hydrasurgery.errors import UnsupportedModelError
from tests.families import tiny
from tests.test_families import half_plan, stir

IDS = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(0))
GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
KINDS = ("full", "linear", "linear", "full")


def make(family: str = "qwen3", kinds: tuple[str, ...] = KINDS, **changes: Any) -> Any:
    model = tiny(family, **changes)
    return stir(hs.rewrite(model, half_plan(model, kinds)))


@pytest.fixture(scope="module")
def hybrid() -> Any:
    return make()


@pytest.fixture(scope="module")
def wanted(hybrid: Any) -> torch.Tensor:
    return hybrid.generate(IDS, **GREEDY)


# --- what is refused ---------------------------------------------------------------------------------------------------------


class Countdown(nn.Module):
    """Counts the forwards of a model that it is hooked to."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.calls = 0
        self.handle = model.register_forward_pre_hook(self.count)

    def count(self, *args: Any) -> None:
        self.calls += 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"prompt_lookup_num_tokens": 3}, "assisted generation is not supported"),
        ({"assistant_model": "teacher"}, "assisted generation is not supported"),
        ({"assistant_early_exit": 1}, "assisted generation is not supported"),
        ({"cache_implementation": "paged"}, "continuous batching"),
    ],
)
@pytest.mark.parametrize("loaded", [False, True])
def test_generate_refuses_before_it_computes(
    options: dict[str, Any], says: str, loaded: bool, hybrid: Any, tmp_path: Any
) -> None:
    model = hybrid
    if loaded:
        hybrid.save_pretrained(tmp_path)
        model = type(hybrid).from_pretrained(tmp_path)
    if "assistant_model" in options:
        options = {"assistant_model": tiny("qwen3")}
    count = Countdown(model)
    with pytest.raises((ValueError, UnsupportedModelError), match=says):
        model.generate(IDS[:1], max_new_tokens=4, **options)
    count.handle.remove()
    assert count.calls == 0


def test_continuous_batching_is_refused_by_name_in_copies_too(hybrid: Any) -> None:
    for model in (hybrid, copy.deepcopy(hybrid), pickle.loads(pickle.dumps(hybrid))):
        with pytest.raises(UnsupportedModelError, match="Qwen3ForCausalLM.*padded batch"):
            model.generate_batch([[3, 4, 5]], max_new_tokens=2)
        with pytest.raises(UnsupportedModelError, match="continuous batching"):
            model.init_continuous_batching()


def test_a_restored_model_refuses_nothing() -> None:
    model = tiny("qwen3")
    restored = hs.restore(hs.rewrite(model, half_plan(model, KINDS)))
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(
        restored.generate(IDS[:1], prompt_lookup_num_tokens=2, **options), model.generate(IDS[:1], **options)
    )
    assert type(restored) is type(model)


def test_an_assistant_that_is_a_hybrid_says_so(hybrid: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="assisted generation"):
        tiny("qwen3").generate(IDS[:1], assistant_model=hybrid, max_new_tokens=4, do_sample=False)


def other_cache(kind: str, hybrid: Any) -> Any:
    if kind == "offloaded":
        cache = DynamicCache(config=hybrid.config)
        cache.offloading = True  # as DynamicCache(offloading=True), which needs an accelerator
        return cache
    if kind == "foreign layers":

        class Layer(DynamicLayer):
            pass

        return Cache(layers=[Layer(), Layer()])
    if kind == "list":
        return [None, None]
    cache = DynamicCache(config=hybrid.config)
    model = tiny("qwen3") if kind == "teacher's" else make(kinds=("linear", "linear", "full", "full"))
    with torch.no_grad():
        model(IDS, past_key_values=cache)
    return cache


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("offloaded", "offloads its layers"),
        ("foreign layers", "has a Layer there.*give a DynamicCache"),
        ("list", "a list is no cache"),
        ("teacher's", "has not seen"),
        ("another hybrid's", "other linear heads"),
    ],
)
@torch.no_grad()
def test_a_cache_of_another_kind_is_refused(kind: str, says: str, hybrid: Any) -> None:
    cache = other_cache(kind, hybrid)
    module = hs.region_modules(hybrid)["model.layers.0.self_attn"]
    hidden = torch.zeros(2, 1, hybrid.config.hidden_size)
    turns = hybrid.model.rotary_emb(hidden, torch.zeros(2, 1, dtype=torch.long))
    with pytest.raises(UnsupportedModelError, match=says):
        module(hidden_states=hidden, position_embeddings=turns, attention_mask=None, past_key_values=cache)


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("kinds", [KINDS, ("linear",) * 4, ("full",) * 4])
def test_a_hybrids_cache_is_refused_by_a_teacher(kinds: tuple[str, ...], static: bool) -> None:
    hybrid = make(kinds=kinds)
    cache = StaticCache(hybrid.config, max_cache_len=20) if static else DynamicCache(config=hybrid.config)
    hybrid(IDS, past_key_values=cache)
    with pytest.raises(UnsupportedModelError, match="start a new cache"):
        tiny("qwen3")(IDS[:, :1], past_key_values=cache)


def test_quantized_caches_are_refused_by_name(hybrid: Any) -> None:
    try:
        cache = hybrid.generate(IDS, cache_implementation="quantized", cache_config={"backend": "fp8"}, **GREEDY)
    except UnsupportedModelError as error:
        assert "QuantizedLayer" in str(error) and "DynamicCache" in str(error)
    except (ImportError, ValueError, TypeError) as error:
        pytest.skip(f"this transformers cannot make one: {error}")
    else:
        raise AssertionError(cache)


# --- what is right -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("step", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("kinds", [KINDS, ("linear",) * 4])
def test_a_prompt_and_its_continuation_in_modes_of_their_own(prompt: Any, step: Any, kinds: tuple[str, ...]) -> None:
    hybrid = make(kinds=kinds)
    with torch.no_grad():
        whole = hybrid(IDS, use_cache=False).logits
    cache = DynamicCache(config=hybrid.config)
    with prompt():
        hybrid(IDS[:, :9], past_key_values=cache)
    for place in range(9, 12):
        with step():
            logits = hybrid(IDS[:, place : place + 1], past_key_values=cache).logits
            if step is torch.enable_grad:
                logits.square().mean().backward(retain_graph=True)
        assert torch.allclose(logits[:, 0], whole[:, place], atol=1e-5)


@torch.no_grad()
def test_a_cache_is_copied_pickled_reset_repeated_and_selected(hybrid: Any) -> None:
    cache = DynamicCache(config=hybrid.config)
    hybrid(IDS[:, :9], past_key_values=cache)
    step = IDS[:, 9:10]

    def after(cache: Any, ids: torch.Tensor = step) -> torch.Tensor:
        return hybrid(ids, past_key_values=cache).logits

    copies = [copy.deepcopy(cache) for _ in range(5)]
    wanted = after(copies[0])
    assert torch.equal(after(pickle.loads(pickle.dumps(cache))), wanted)
    copies[1].batch_repeat_interleave(2)
    repeated = after(copies[1], step.repeat_interleave(2, 0))
    assert torch.allclose(repeated, wanted.repeat_interleave(2, 0), atol=1e-6)
    copies[2].batch_select_indices(torch.tensor([1]))
    assert torch.allclose(after(copies[2], step[1:]), wanted[1:], atol=1e-6)
    copies[3].reorder_cache(torch.tensor([1, 0]))
    assert torch.allclose(after(copies[3], step.flip(0)), wanted.flip(0), atol=1e-6)
    copies[4].crop(0)
    with pytest.raises(UnsupportedModelError, match="cannot be cropped"):
        copies[4].crop(-1)
    assert torch.equal(after(copies[4]), wanted)
    copies[4].reset()
    hybrid(IDS[:, :9], past_key_values=copies[4])
    assert torch.equal(after(copies[4]), wanted)


@pytest.mark.parametrize(
    "options",
    [
        {"num_return_sequences": 2, "do_sample": True},
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_beams": 2, "do_sample": True},
        {"prefill_chunk_size": 5},
    ],
)
def test_ways_to_generate_say_the_same_with_every_cache(options: dict[str, Any], hybrid: Any) -> None:
    found = []
    for cache in ({"use_cache": False}, {}, {"cache_implementation": "static"}):
        if "prefill_chunk_size" in options and not cache.get("use_cache", True):
            continue
        torch.manual_seed(3)
        found.append(hybrid.generate(IDS, **{**GREEDY, **options, **cache}))
    assert all(torch.equal(x, found[0]) for x in found)


def test_a_conversation_goes_on_with_the_cache_that_generate_returns(hybrid: Any, wanted: torch.Tensor) -> None:
    first = hybrid.generate(IDS, **{**GREEDY, "max_new_tokens": 3, "min_new_tokens": 3}, return_dict_in_generate=True)
    rest = {**GREEDY, "attention_mask": torch.ones_like(first.sequences), "max_new_tokens": 3, "min_new_tokens": 3}
    assert torch.equal(hybrid.generate(first.sequences, past_key_values=first.past_key_values, **rest), wanted)


# --- threads and torch.func --------------------------------------------------------------------------------------------------


def test_threads_rewrite_and_run_at_once() -> None:
    model = tiny("qwen3")
    plan, start = half_plan(model, KINDS), threading.Barrier(4)
    with torch.no_grad():
        wanted = hs.rewrite(model, plan)(IDS).logits

    def work(_: int) -> torch.Tensor:
        start.wait()
        with torch.no_grad():
            return hs.rewrite(model, plan)(IDS).logits

    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(logits, wanted) for logits in pool.map(work, range(4)))
    assert model.config._attn_implementation == "sdpa"


def test_threads_generate_with_one_hybrid(hybrid: Any, wanted: torch.Tensor) -> None:
    fresh = pickle.loads(pickle.dumps(hybrid))
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(x, wanted) for x in pool.map(lambda _: fresh.generate(IDS, **GREEDY), range(4)))


def test_functional_call_gives_the_gradients_of_backward() -> None:
    hybrid = make().double()
    parameters = {name: p.detach().clone().requires_grad_() for name, p in hybrid.named_parameters()}

    def loss(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        return functional_call(hybrid, parameters, (IDS,), {"use_cache": False}).logits.square().mean()

    found = torch.autograd.grad(loss(parameters), list(parameters.values()))
    hybrid(IDS, use_cache=False).logits.square().mean().backward()
    for gradient, parameter in zip(found, hybrid.parameters(), strict=True):
        assert torch.allclose(gradient, parameter.grad, rtol=0, atol=1e-12)
    tangents = {name: torch.ones_like(p) for name, p in parameters.items()}
    refused = (
        lambda: grad(loss)(parameters),
        lambda: jvp(loss, (parameters,), (tangents,)),
        lambda: vmap(lambda ids: functional_call(hybrid, parameters, (ids[None],)).logits)(IDS),
    )
    for call in refused:
        with pytest.raises(NotImplementedError, match=r"layers\.0\.self_attn .*torch.func's .*torch.autograd.grad"):
            call()


X = torch.randn(3, 1, 4, 2, 8, generator=torch.Generator().manual_seed(1))
OPERATORS = {
    "attention": lambda x: ops.attention(x, X[1], X[2]),
    "linear_attention": lambda x: ops.linear_attention(x, X[1], X[2], rule="linear")[0],
    "causal_conv": lambda x: ops.causal_conv(x.flatten(2), torch.ones(16, 4))[0],
    "scale_norm_fusion": lambda x: ops.scale_norm_fusion(None, x, torch.ones(2), linear_heads=[0, 1]),
    "decode_step": lambda x: ops.decode_step(
        *x.transpose(0, 2)[:, 0].transpose(0, 1)[:3, None].expand(3, 1, 2, 8),
        *torch.zeros(2, 1, 2),
        None,
        torch.ones(2),
        state=torch.zeros(1, 2, 8, 8),
    ),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_no_operator_drops_a_tangent(name: str) -> None:
    run = OPERATORS[name]
    with pytest.raises(NotImplementedError, match="reverse mode|torch.func's"):
        jvp(run, (X[0],), (torch.ones_like(X[0]),))
    with pytest.raises(NotImplementedError, match="torch.func's"):
        hessian(lambda x: run(x).square().sum())(X[0])
    with forward_ad.dual_level():
        run(X[0])  # nothing has a tangent
        with pytest.raises(NotImplementedError, match="reverse mode"):
            run(forward_ad.make_dual(X[0], torch.ones_like(X[0])))

"""Static caches: fixed buffers written in place, for as many KV heads as a layer keeps, and the tokens of a dynamic cache."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from transformers import CompileConfig, DynamicCache, StaticCache

import hydrasurgery as hs
from hydrasurgery.export.backend import hydra
from hydrasurgery.export.graph_rewrites import PIPELINE
from hydrasurgery.inference.cache import HybridStaticLayer
from hydrasurgery.plan import Plan
from tests.families import tiny
from tests.test_backend import BACKEND_FAMILIES
from tests.test_families import half_plan, stir

KINDS = (("full", "linear", "linear", "full"), ("linear", "linear", "full", "linear"), ("linear",) * 4)
IDS = torch.randint(3, 90, (2, 20), generator=torch.Generator().manual_seed(0))
MASK = torch.ones(2, 12, dtype=torch.long)
MASK[0, :4] = 0


@pytest.fixture(autouse=True)
def fresh() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make(family: str, **changes: Any) -> Any:
    """A hybrid whose first layer keeps two KV heads, the second one and the third none."""
    model = tiny(family, num_hidden_layers=len(KINDS), **changes)
    same = [half_plan(model, kinds).layers[i] for i, kinds in enumerate(KINDS)]
    plan = Plan(layers=tuple(same), unit="head", strategy="given", min_full_per_layer=0)
    return stir(hs.rewrite(model, plan))


def poisoned(hybrid: Any, length: int, batch: int = 2) -> StaticCache:
    """An empty static cache that has been used and reset, with huge keys and values where nothing may be read."""
    cache = StaticCache(config=hybrid.config, max_cache_len=length)
    with torch.no_grad():
        hybrid(IDS[:batch, :6], past_key_values=cache)
    cache.reset()
    for layer in cache.layers:
        if layer.keys is not None:
            layer.keys.fill_(1e4)
            layer.values.fill_(1e4)
    return cache


def addresses(cache: StaticCache) -> list[int]:
    kept = [x for layer in cache.layers for x in (layer.keys, layer.values, *layer.states.values())]
    return [x.data_ptr() for x in kept if x is not None]


@torch.no_grad()
@pytest.mark.parametrize("family", [*BACKEND_FAMILIES, "mistral", "olmo3"])
def test_the_same_tokens_and_logits_as_with_a_dynamic_cache(family: str) -> None:
    hybrid = make(family)
    options = {"attention_mask": MASK, "max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False}
    wanted = hybrid.generate(IDS[:, :12], **options)
    assert torch.equal(hybrid.generate(IDS[:, :12], cache_implementation="static", **options), wanted)
    static, dynamic = poisoned(hybrid, 24), DynamicCache(config=hybrid.config)
    places = addresses(static)
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, :4] = 0
    for first, last in ((0, 5), (5, 6), (6, 7), (7, 15), (15, 16), (16, 20)):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, first:last]
        call = {"input_ids": IDS[:, first:last], "attention_mask": mask[:, :last], "position_ids": positions}
        found, expected = (hybrid(**call, past_key_values=cache).logits for cache in (static, dynamic))
        real = mask[:, first:last].bool()
        assert torch.allclose(found[real], expected[real], atol=1e-5), (first, last)
    assert addresses(static) == places
    assert static.get_seq_length() == dynamic.get_seq_length() == 20


def test_a_layer_holds_no_more_than_it_keeps() -> None:
    cache = poisoned(make("qwen3"), 24)
    assert [None if x.keys is None else tuple(x.keys.shape) for x in cache.layers] == [
        (2, 2, 24, 16),
        (2, 1, 24, 16),
        None,
    ]
    assert [set(layer.states) for layer in cache.layers] == [{"q_conv", "k_conv", "v_conv", "recurrent"}] * 3
    assert not any(x.any() for layer in cache.layers for x in layer.states.values())
    assert cache.is_compileable and not cache.is_croppable


@torch.no_grad()
def test_beams_are_reordered_in_place() -> None:
    hybrid = make("qwen3")
    options = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "attention_mask": MASK}
    wanted = hybrid.generate(IDS[:, :12], **options)
    assert torch.equal(hybrid.generate(IDS[:, :12], cache_implementation="static", **options), wanted)
    cache = poisoned(hybrid, 24)
    hybrid(IDS[:, :6], past_key_values=cache)
    places, before = addresses(cache), cache.layers[1].states["recurrent"].clone()
    cache.reorder_cache(torch.tensor([1, 0]))
    assert addresses(cache) == places
    assert torch.equal(cache.layers[1].states["recurrent"], before.flip(0))


@torch.no_grad()
@pytest.mark.parametrize("batch", [2, 1])
@pytest.mark.parametrize("family", BACKEND_FAMILIES)
def test_a_compiled_step_says_what_eager_says_and_is_compiled_once(family: str, batch: int) -> None:
    hybrid, ids = make(family), IDS[:batch]
    # AOTAutograd, which turns writes in place into returns and back, has every family's step once.
    options = {"inner": "aot_eager" if batch == 1 else "eager", "pipeline": PIPELINE}
    counter = CompileCounterWithBackend(lambda g, x: hydra(g, x, options=options))
    run = torch.compile(hybrid, backend=counter, fullgraph=True)
    static, dynamic = poisoned(hybrid, 40, batch), DynamicCache(config=hybrid.config)
    for cache in (static, dynamic):
        hybrid(ids[:, :12], past_key_values=cache)
    for step in range(12):
        token = ids[:, step : step + 1]
        found, wanted = run(token, past_key_values=static).logits, hybrid(token, past_key_values=dynamic).logits
        assert torch.allclose(found, wanted, atol=1e-5), step
    # Layers with a sliding window count in a number, which dynamo frees after it has changed once.
    assert counter.frame_count <= (2 if True in static.is_sliding else 1)
    # Nothing is read back from the device, as CUDA graphs ask for.
    reads = ("item", "tolist", "aten._local_scalar_dense.default")
    assert not [node for graph in counter.graphs for node in graph.graph.nodes if str(node.target) in reads]
    assert all(isinstance(layer, HybridStaticLayer) for layer in static.layers)


def test_generate_compiles_the_step_of_a_hybrid_as_of_its_teacher() -> None:
    """transformers does so by itself on accelerators; here it is told to on any device."""
    teacher, hybrid, counts = tiny("qwen3"), make("qwen3"), []
    for model in (teacher, hybrid):
        graphs: list[Any] = []

        def count(
            graph: Any, inputs: Any, graphs: list[Any] = graphs
        ) -> Any:  # not a counter, which generate would copy
            graphs.append(graph)
            return hydra(graph, inputs, options={"inner": "aot_eager"})

        options = {"attention_mask": MASK, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
        wanted = model.generate(IDS[:, :12], **options)
        config = CompileConfig(backend=count, fullgraph=True, mode=None)
        config._compile_all_devices = True
        found = model.generate(IDS[:, :12], cache_implementation="static", compile_config=config, **options)
        assert torch.equal(found, wanted)
        counts.append(len(graphs))
    assert counts == [1, 1]


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@torch.no_grad()
def test_equal_layers_are_compiled_once(family: str) -> None:
    """Layer by layer, more of them than the graphs that torch.compile keeps of one function."""
    teacher = tiny(family, num_hidden_layers=10)
    plan = half_plan(teacher, KINDS[0])
    hybrid, counts = stir(hs.rewrite(teacher, plan)), []
    reloaded = pickle.loads(pickle.dumps(hybrid))
    for model in (teacher, hybrid, reloaded):
        torch._dynamo.reset()
        wanted, counter = model(IDS, use_cache=False).logits, CompileCounter()
        for layer in model.model.layers:
            layer.compile(backend=counter, fullgraph=True)
        assert torch.equal(model(IDS, use_cache=False).logits, wanted)
        counts.append(counter.frame_count)
    assert counts == [1, 1, 1]


def test_regions_of_other_text_run_other_code() -> None:
    modules = list(hs.region_modules(make("qwen3")).values())
    assert len({module._run for module in modules}) == len(KINDS)

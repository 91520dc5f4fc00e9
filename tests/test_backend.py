"""`torch.compile(hybrid, backend="hydra")`: no graph breaks, the numbers of eager, few recompiles."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing._internal.two_tensor import TwoTensor

import hydrasurgery as hs
from hydrasurgery.export.backend import hydra
from hydrasurgery.export.graph_rewrites import PIPELINE, TALL, sum_linear
from tests.decode_launches import a_layer
from tests.families import tiny
from tests.test_families import half_plan, stir

BACKEND_FAMILIES = "qwen3 llama gemma2 gemma3_text phi3 mixtral gpt2 olmo2 gpt_neox cohere2".split()


@pytest.fixture(autouse=True)
def fresh() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@functools.cache
def make(family: str) -> Any:
    """A hybrid shared by the tests, which leave its parameters as they are."""
    model = tiny(family, num_hidden_layers=1)
    if family == "mixtral":  # the gradients of transformers' grouped products do not compile with PyTorch 2.11
        model.set_experts_implementation("batched_mm")
    return stir(hs.rewrite(model, half_plan(model)))


def compiled(model: Any, inner: str = "aot_eager", **options: Any) -> tuple[Any, CompileCounterWithBackend]:
    """The compiled model, and a counter of the graphs that were handed over."""
    counter = CompileCounterWithBackend(lambda g, x: hydra(g, x, options={"inner": inner, **options}))
    return torch.compile(model, backend=counter, fullgraph=True), counter


def tokens(length: int) -> torch.Tensor:
    return torch.randint(3, 90, (2, length), generator=torch.Generator().manual_seed(length))


def of_any_length(x: torch.Tensor) -> torch.Tensor:
    """Have the first compilation leave the length free; one that needs it fixed fails."""
    torch._dynamo.mark_dynamic(x, 1)
    return x


@pytest.mark.parametrize("family", BACKEND_FAMILIES)
def test_forward_and_training_equal_eager(family: str) -> None:
    hybrid = make(family)
    # Training goes through AOTAutograd in every family; inference, whose graph is a part of training's, in two.
    run, counter = compiled(hybrid, "aot_eager" if family in ("qwen3", "gemma3_text") else "eager")
    with torch.no_grad():
        for length in (12, 7, 130, 33, 64):
            ids = of_any_length(tokens(length))
            mask = of_any_length(torch.ones_like(ids))
            mask[0, :3] = 0
            call = {"attention_mask": mask, "use_cache": False}
            assert torch.allclose(run(ids, **call).logits, hybrid(ids, **call).logits, atol=1e-5)
    assert counter.frame_count == 1  # for every length
    torch._dynamo.reset()
    trained = copy.deepcopy(hybrid).train()
    run, counter = compiled(trained)
    for length in (12, 33):
        gradients = []
        for model in (run, trained):
            trained.zero_grad()
            model(of_any_length(tokens(length)), use_cache=False).logits.square().mean().backward()
            gradients.append({n: p.grad.clone() for n, p in trained.named_parameters() if p.grad is not None})
        assert gradients[0].keys() == gradients[1].keys()
        for name, gradient in gradients[0].items():
            assert torch.allclose(gradient, gradients[1][name], atol=1e-5), name
    assert counter.frame_count == 1


def test_it_is_found_by_name_and_inductor_gives_the_same_numbers() -> None:
    assert "hydra" in torch._dynamo.list_backends()
    hybrid = make("qwen3")
    ids = tokens(12)
    with torch.no_grad():
        fast = torch.compile(hybrid, backend="hydra", fullgraph=True, options={"pipeline": "drop-causal-masks"})
        assert torch.allclose(fast(ids, use_cache=False).logits, hybrid(ids, use_cache=False).logits, atol=1e-5)


def attention_masks(model: Any, *calls: dict[str, Any], **options: Any) -> list[int]:
    """How many attention nodes of each compiled graph still have a mask."""
    found = []

    def look(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        run = hydra(graph, inputs, options={"inner": "eager", **options})
        nodes = graph.graph.find_nodes(op="call_function", target=torch.ops.hydra.attention.default)
        found.append(sum(node.args[3] is not None for node in nodes))
        return run

    run = torch.compile(model, backend=look, fullgraph=True)
    with torch.no_grad():
        for call in calls:
            logits = run(**call, use_cache=False).logits
            assert torch.allclose(logits, model(**call, use_cache=False).logits, atol=1e-5)
    return found


def test_only_masks_that_are_causal_are_dropped() -> None:
    ids = {"input_ids": tokens(12)}
    more = {"input_ids": tokens(17)}
    hybrid = make("qwen3")
    # The second length is compiled for all others.
    assert attention_masks(hybrid, ids, more, {"input_ids": tokens(33)}) == [0, 0]
    torch._dynamo.reset()
    assert attention_masks(hybrid, ids, pipeline="") == [1]
    torch._dynamo.reset()
    assert attention_masks(hybrid, {**ids, "attention_mask": torch.ones(2, 12, dtype=torch.long)}) == [1]
    torch._dynamo.reset()
    assert attention_masks(make("mistral"), ids, more) == [1, 1]  # a window of 8 tokens


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_projections_of_few_tokens_are_sums(dtype: torch.dtype) -> None:
    hybrid = copy.deepcopy(make("qwen3")).to(dtype)
    counts = []

    def look(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        run = hydra(graph, inputs, options={"inner": "eager", "pipeline": PIPELINE})
        counts.append(len(graph.graph.find_nodes(op="call_function", target=sum_linear)))
        return run

    run = torch.compile(hybrid, backend=look, fullgraph=True)
    exact = copy.deepcopy(hybrid).double()
    for ids in (tokens(1)[:1], tokens(1), tokens(4), tokens(5)):
        wanted = exact(ids, use_cache=False).logits
        error, eager = ((model(ids, use_cache=False).logits - wanted).abs().max() for model in (run, hybrid))
        assert error <= 1.5 * eager + 1e-6
        torch._dynamo.reset()
    # One token: three projections, three gates, o_proj, the MLP's three, and this tiny vocabulary; then the gates, to 8 tokens.
    assert counts == [11, 3, 3, 0]


def summed(function: Any, *inputs: torch.Tensor, **options: Any) -> int:
    """How many sums the backend makes of a function's projections."""
    found = []

    def look(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        run = hydra(graph, inputs, options=options)
        found.append(len(graph.graph.find_nodes(op="call_function", target=sum_linear)))
        return run

    torch._dynamo.reset()
    compiled, plain = torch.compile(function, backend=look, fullgraph=True)(*inputs), function(*inputs)
    torch.testing.assert_close(compiled, plain)
    return found[0]


def test_sums_are_for_inductor_unless_they_are_named() -> None:
    linear, x = torch.nn.Linear(16, 24), torch.randn(1, 1, 16)
    assert summed(linear, x) == 1
    assert summed(linear, x, inner="aot_eager") == 0
    assert summed(linear, x, inner="aot_eager", pipeline="sum-linears") == 1
    with torch._inductor.config.patch(freezing=True):
        assert summed(linear, x) == 0


def test_what_is_no_plain_projection_of_one_token_stays_a_product() -> None:
    named = {"inner": "eager", "pipeline": "sum-linears"}
    one, many, weight = torch.randn(1, 16), torch.randn(40, 16), torch.randn(24, 16)
    assert summed(F.linear, one, weight, **named) == 1
    assert summed(F.linear, many, weight, **named) == 0
    assert summed(F.linear, one, torch.randn(TALL, 16), **named) == 0
    assert summed(F.linear, one, weight[0], **named) == 0
    assert summed(F.linear, one, torch.randn(16, 24).t(), **named) == 0
    assert summed(F.linear, one.long(), weight.long(), **named) == 0
    assert summed(torch.vmap(F.linear, (0, None)), many, weight, **named) == 0  # each sample is one token
    half = torch.autocast("cpu", torch.bfloat16)
    assert summed(half(F.linear), one, weight, **named) == 0
    # A weight that is a tensor of its own kind, as a quantised or a sharded one is, has its own product.
    assert summed(F.linear, one, TwoTensor(weight, weight.clone()), **named) == 0


def test_sums_are_of_fp32() -> None:
    near = 1 + 2.0**-7  # its square is 1 + 2^-6 + 2^-14, which bf16 does not hold
    x, weight, bias = (
        torch.tensor(x, dtype=torch.bfloat16) for x in ([[near, 1.0]], [[near, -1 - 2.0**-6]], [2.0**-14])
    )
    assert sum_linear(x, weight, bias).item() == 2.0**-13


def test_a_decoding_layer_launches_less_than_by_inductor_alone() -> None:
    kinds = ("linear", "linear", "full", "full")
    ours, theirs = (a_layer(kinds, backend, 2) for backend in ("hydra", "inductor"))
    assert [x["aten.mm"] + x["aten.addmm"] for x in (theirs, ours)] == [10, 0]
    assert ours.total() <= theirs.total() - 2
    assert a_layer(("linear",) * 4, "hydra", 2).total() <= a_layer(("full",) * 4, "hydra", 2).total()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"pipeline": "fold-everything"},
            "no graph rewrite is called 'fold-everything'; known: drop-causal-masks, sum",
        ),
        (
            {"plan": "plan.json"},
            r"rewrite first: torch\.compile\(hydrasurgery\.rewrite\(model, plan\), backend='hydra'\)",
        ),
        ({"fast": True}, "the backend has no option 'fast'; it has pipeline, mode, inner"),
    ],
)
def test_what_the_backend_does_not_know_is_named(options: dict[str, Any], message: str) -> None:
    run = torch.compile(tiny("llama", num_hidden_layers=1), backend="hydra", options=options)
    with pytest.raises(Exception, match=message):
        run(tokens(5), use_cache=False)

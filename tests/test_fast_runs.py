"""Runs of the transfer that are compiled, recompute layers or follow a copy of the teacher are the runs that they would be."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

import hydrasurgery as hs
from hydrasurgery.errors import CheckpointError, CompileError, DataError, RecipeError
from hydrasurgery.transfer import Recipe, SplitModel, Stage, distill, language_loss
from hydrasurgery.transfer import compiling as compiling_module
from hydrasurgery.transfer.compiling import Compiler
from hydrasurgery.transfer.data import Batch
from hydrasurgery.transfer.lowering import lowered
from hydrasurgery.transfer.progress import flops_per_token, peak
from tests.families import GroupedAttention, tiny

ALIGN = Stage("align", batch_size=2, length=16, steps=3, lr=1e-2, lr_end=1e-3, warmup=0)
DISTIL = Stage("distil", batch_size=2, length=16, steps=3, lr=1e-3, lr_end=1e-3, warmup=0, ce_weight=0.2)
LENGTHEN = replace(DISTIL, name="lengthen")
STAGES = {stage.name: stage for stage in (ALIGN, DISTIL, LENGTHEN)}
DATA = 3 + torch.randint(1, 4, (2048,), generator=torch.Generator().manual_seed(0)).cumsum(0) % 90


@pytest.fixture(autouse=True)
def fresh() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@functools.cache
def made(layers: int) -> tuple[Any, Any]:
    """A teacher and a hybrid; its first layer has one linear head, and each layer after it another pattern of them."""
    teacher = tiny("qwen3", num_hidden_layers=layers)
    plan = hs.plan_heads(teacher, ratio="1:1", strategy="random")
    patterns = [tuple("linear" if 1 << head & (at + 1) else "full" for head in range(4)) for at in range(layers)]
    kinds = [replace(layer, kinds=pattern) for layer, pattern in zip(plan.layers, patterns, strict=True)]
    return teacher, hs.rewrite(teacher, replace(plan, layers=tuple(kinds)))


def pair(layers: int = 1) -> tuple[Any, Any]:
    return copy.deepcopy(made(layers))


def run(hybrid: Any, teacher: Any, *stages: Stage, data: Any = DATA, **options: Any) -> Any:
    fields = {name: options.pop(name) for name in ("compile", "teacher_dtype") if name in options}
    recipe = Recipe("test", stages, checkpoint_every=2, **fields)
    return distill(hybrid, teacher, data, recipe=recipe, progress=False, **options)


def numbers(result: Any) -> list[tuple[float, ...]]:
    return [(record["loss"], record["grad_norm"], record["tokens"]) for record in result.history]


def close(one: Any, other: Any) -> bool:
    return all(
        torch.allclose(torch.tensor(a), torch.tensor(b), rtol=1e-3)
        for a, b in zip(numbers(one), numbers(other), strict=True)
    )


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> CompileCounterWithBackend:
    """Compiles to what eager runs, and counts graphs."""
    count = CompileCounterWithBackend("eager")
    monkeypatch.setattr(compiling_module, "BACKEND", count)
    return count


def own_forwards(*models: nn.Module) -> dict[nn.Module, Any]:
    return {m: vars(m)["forward"] for model in models for m in model.modules() if "forward" in vars(m)}


class Stop(Exception):
    """Raised by a test in the middle of a run."""


# --- compiled ---------------------------------------------------------------------------------------------------------


def inductor_follows_eager(teacher: Any, hybrid: Any, stage: Stage, folder: Path) -> None:
    eager = run(copy.deepcopy(hybrid), teacher, stage, compile=False)
    first, second = copy.deepcopy(hybrid), copy.deepcopy(hybrid)
    whole = run(first, teacher, stage, compile=True)
    assert numbers(eager) != numbers(whole)
    assert close(eager, whole)

    def stop(record: dict[str, Any]) -> None:
        if record["step"] == 2:
            raise Stop

    with pytest.raises(Stop):
        run(copy.deepcopy(hybrid), teacher, stage, compile=True, out=folder, callback=stop)
    assert numbers(run(second, teacher, stage, compile=True, out=folder)) == numbers(whole)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_inductor_gives_the_run_of_eager_and_a_resumed_run_the_same_bits(tmp_path: Path) -> None:
    teacher = tiny("llama", num_hidden_layers=1)
    hybrid = hs.rewrite(teacher, hs.plan_heads(teacher, ratio="1:1", strategy="random"), layer="conv=none")
    inductor_follows_eager(teacher, hybrid, LENGTHEN, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_inductor_gives_the_run_of_eager_in_every_stage(stage: str, tmp_path: Path) -> None:
    inductor_follows_eager(*pair(), STAGES[stage], tmp_path)


@pytest.mark.parametrize("stage", STAGES)
def test_layers_of_many_patterns_are_all_compiled(stage: str, counter: CompileCounterWithBackend) -> None:
    teacher, hybrid = pair(layers=12)
    eager = run(copy.deepcopy(hybrid), teacher, replace(STAGES[stage], steps=1), compile=False)
    assert counter.frame_count == 0
    assert close(run(hybrid, teacher, replace(STAGES[stage], steps=1), compile=True), eager)
    # Besides the hybrid's layers: the teacher's norms, attention and MLP; its layer and the losses; the losses.
    assert counter.frame_count == 12 + {"align": 3, "distil": 2, "lengthen": 1}[stage]


@pytest.mark.parametrize("stage", STAGES)
def test_batches_that_vary_in_size_share_graphs(stage: str, counter: CompileCounterWithBackend) -> None:
    rows = [
        {"input_ids": DATA[:length].tolist(), "labels": [-100, *DATA[1:length].tolist()]} for length in range(5, 16)
    ]
    longer = replace(STAGES[stage], steps=8)
    counts = []

    def note(record: dict[str, Any]) -> None:
        counts.append(counter.frame_count)

    teacher, hybrid = pair()
    eager = run(copy.deepcopy(hybrid), teacher, longer, data=rows, compile=False)
    assert close(run(hybrid, teacher, longer, data=rows, compile=True, callback=note), eager)
    assert 0 < counts[3] == counts[-1]


def test_batches_of_a_stages_own_sizes_run_code_of_their_own() -> None:
    compiler, graphs = Compiler(True, DISTIL), torch._dynamo.utils.counters["stats"]
    cpu = torch.device("cpu")
    rows, double = compiler.compiled_by_rows(lambda x: 2 * x, cpu), compiler.compiled(lambda x: x + x, cpu)
    counts = []
    for size in (2, 5), (2, 6), (2, 16), (2, 16):
        ids = torch.ones(size, dtype=torch.long)
        (_,) = compiler.pieces(Batch({"input_ids": ids}, ids.bool(), ids), torch.nn.Identity())
        before = graphs["unique_graphs"]
        rows(torch.ones(ids.numel(), 3))
        double(torch.ones(size))
        counts.append(graphs["unique_graphs"] - before)
    assert counts == [2, 0, 2, 0]


@pytest.mark.parametrize("stage", STAGES)
def test_forwards_are_replaced_for_a_step_and_then_back(stage: str, counter: CompileCounterWithBackend) -> None:
    teacher, hybrid = pair(layers=2)
    layer = teacher.model.layers[1]
    own = layer.mlp.forward if stage == "align" else layer.forward
    (layer.mlp if stage == "align" else layer).forward = own  # as some libraries set it
    before = own_forwards(hybrid, teacher)
    assert len(before) == 1
    seen, found = [], []
    hybrid.model.norm.register_forward_hook(lambda *_: seen.append(len(own_forwards(hybrid))))
    teacher.model.norm.register_forward_hook(lambda *_: seen.append(len(own_forwards(teacher))))
    run(hybrid, teacher, STAGES[stage], compile=True, callback=lambda _: found.append(own_forwards(hybrid, teacher)))
    assert found == [before] * 3
    assert own_forwards(hybrid, teacher) == before
    assert max(seen) == (8 if stage == "align" else 2)  # norms, attention and MLP of two layers; two layers

    def fail(*_: Any) -> None:
        if own_forwards(hybrid, teacher) != before:
            raise Stop

    (teacher if stage == "align" else hybrid).model.norm.register_forward_hook(fail)
    with pytest.raises(Stop):
        run(hybrid, teacher, STAGES[stage], compile=True)
    assert own_forwards(hybrid, teacher) == before
    assert torch._dynamo.config.recompile_limit == 8


def test_hooks_of_layers_run_in_compiled_steps(counter: CompileCounterWithBackend) -> None:
    teacher, hybrid = pair(layers=2)
    calls = []
    for model in (teacher, hybrid):
        for layer in model.model.layers:
            layer.register_forward_hook(lambda module, _args, _out: calls.append(module))
    run(hybrid, teacher, replace(DISTIL, steps=1), compile=True)
    assert set(calls) == {*teacher.model.layers, *hybrid.model.layers}
    assert counter.frame_count > 0


def test_what_cannot_be_compiled_is_said_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_graph: Any, _inputs: Any) -> Callable[..., Any]:
        raise ValueError("no such instruction")

    monkeypatch.setattr(compiling_module, "BACKEND", broken)
    teacher, hybrid = pair()
    with pytest.raises(CompileError, match="no such instruction.*compile=false in the recipe"):
        run(hybrid, teacher, DISTIL, compile=True)
    assert not own_forwards(hybrid, teacher)


class Unlisted(nn.Module):
    """A decoder of two layers that stand in no list."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(96, 32), nn.Linear(32, 96)
        self.first, self.second = GroupedAttention(32, 4), GroupedAttention(32, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.first(x)
        return self.head(x + self.second(x))


@pytest.mark.parametrize("stage", STAGES)
def test_a_model_whose_layers_are_not_known_runs_as_it_is_and_says_so(
    stage: str, counter: CompileCounterWithBackend
) -> None:
    torch.manual_seed(0)
    teacher = Unlisted()
    hybrid = hs.rewrite(teacher, hs.plan_heads(teacher, ratio="1:1", strategy="random"))
    eager = run(copy.deepcopy(hybrid), teacher, STAGES[stage], compile=False)
    with pytest.warns(UserWarning, match="Unlisted runs uncompiled: its layers are not known"):
        compiled = run(hybrid, teacher, STAGES[stage], compile=True)
    assert close(eager, compiled)


def test_layers_are_compiled_on_cuda_unless_the_recipe_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: True)
    compiling_module._triton.cache_clear()
    assert [Compiler(wanted, DISTIL).covers(cpu) for wanted in (None, True, False)] == [False, True, False]
    assert [Compiler(wanted, DISTIL).covers(cuda) for wanted in (None, True, False)] == [True, True, False]
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: False)
    compiling_module._triton.cache_clear()
    with pytest.warns(UserWarning, match="run uncompiled: Inductor needs Triton"):
        assert not Compiler(None, DISTIL).covers(cuda)
    compiling_module._triton.cache_clear()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("stage", STAGES)
def test_a_run_on_a_gpu_is_compiled_and_waits_for_it_once_a_step_besides_masks(stage: str) -> None:
    teacher, hybrid = (model.cuda() for model in pair(layers=2))
    longer, waits = replace(STAGES[stage], steps=6), []
    eager = run(copy.deepcopy(hybrid), teacher, longer, compile=False)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")

        def note(record: dict[str, Any]) -> None:
            waits.append(sum("synchronizing" in str(warning.message) for warning in caught))
            torch.cuda.set_sync_debug_mode("warn")

        try:
            compiled = run(hybrid, teacher, longer, callback=note)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before
    assert [r["loss"] for r in compiled.history] == pytest.approx([r["loss"] for r in eager.history], rel=1e-2)
    forwards = {"align": 1, "distil": 2, "lengthen": 1}[stage]  # in each, transformers asks whether rows hold documents
    assert 1 <= waits[-1] - waits[-2] <= 1 + forwards


# --- recomputed -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [None, "aot_eager"])
@pytest.mark.parametrize("stage", ["distil", "lengthen"])
def test_layers_that_are_recomputed_get_equal_gradients(
    stage: str, backend: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling_module, "BACKEND", backend)
    teacher, hybrid = pair(layers=2)
    kept, again = copy.deepcopy(hybrid), copy.deepcopy(hybrid)
    calls = []
    if backend is None:
        for model in (kept, again):
            model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    whole = run(kept, teacher, STAGES[stage], compile=backend is not None)
    once = len(calls)
    result = run(again, teacher, replace(STAGES[stage], recompute=True), compile=backend is not None)
    assert numbers(result) == numbers(whole)
    for name, value in kept.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert len(calls) - once == (0 if backend else once + 3)  # once more in each of three backward passes
    assert not own_forwards(again)


# --- the teacher's copy -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["align", "distil"])
def test_a_bfloat16_copy_is_followed_and_the_teacher_stays_as_it_is(stage: str) -> None:
    teacher, hybrid = pair(layers=2)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    exact = run(copy.deepcopy(hybrid), teacher, STAGES[stage])
    calls = []
    teacher.register_forward_pre_hook(lambda *_: calls.append(1))
    found = run(hybrid, teacher, STAGES[stage], teacher_dtype="bfloat16")
    assert numbers(found) != numbers(exact)
    assert found.losses(stage) == pytest.approx(exact.losses(stage), rel=0.05)
    assert {value.dtype for value in teacher.parameters()} == {torch.float32}
    assert all(value.requires_grad for value in teacher.parameters())
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_copy_holds_new_memory_for_what_is_of_another_dtype_only() -> None:
    model = tiny("qwen3", num_hidden_layers=1, tie_word_embeddings=True).train()
    model.model.norm.to(torch.bfloat16)
    made = lowered(model, torch.bfloat16)
    assert {value.dtype for value in made.parameters()} == {torch.bfloat16}
    assert made.lm_head.weight is made.model.embed_tokens.weight
    assert made.model.norm.weight is model.model.norm.weight
    assert made.model.rotary_emb.inv_freq.dtype == torch.float32
    assert (made.training, model.training) == (False, True)


# --- what a run is ----------------------------------------------------------------------------------------------------


def test_how_a_run_is_computed_may_change_but_not_what_it_follows(
    tmp_path: Path, counter: CompileCounterWithBackend
) -> None:
    def stop(record: dict[str, Any]) -> None:
        raise Stop

    teacher, hybrid = pair()
    with pytest.raises(Stop):
        run(copy.deepcopy(hybrid), teacher, replace(DISTIL, steps=1), DISTIL, out=tmp_path, callback=stop)
    with pytest.raises(CheckpointError, match='teacher_dtype was null, is "bfloat16"'):
        run(copy.deepcopy(hybrid), teacher, replace(DISTIL, steps=1), DISTIL, out=tmp_path, teacher_dtype="bfloat16")
    first = replace(DISTIL, steps=1, recompute=True)
    assert len(run(hybrid, teacher, first, DISTIL, out=tmp_path, compile=True).history) == 4


def test_a_bad_batch_is_found_at_its_own_step(tmp_path: Path) -> None:
    class Source:
        def batch(self, step: int, stage: Stage, generator: torch.Generator) -> dict[str, Tensor]:
            ids = DATA[:32].view(2, 16)
            return {"input_ids": ids if step < 2 else ids[:, :0]}

    teacher, hybrid = pair()
    with pytest.raises(DataError, match="step 2 must hold input_ids"):
        run(hybrid, teacher, DISTIL, data=Source(), out=tmp_path)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert (tmp_path / "checkpoints" / "0-distil-00000002").is_dir()


def test_recipes_of_earlier_versions_are_read_and_new_fields_survive() -> None:
    recipe = Recipe("fast", (replace(DISTIL, recompute=True),), compile=True, teacher_dtype="bfloat16")
    assert Recipe.from_json(recipe.to_json()) == recipe
    data = recipe.to_json()
    del data["compile"], data["teacher_dtype"], data["stages"][0]["recompute"]
    assert Recipe.from_json(data) == Recipe("fast", (DISTIL,))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"compile": 1}, "compile is 1; give true or false"),
        ({"compile": "true"}, "compile is 'true'; give true or false"),
        ({"teacher_dtype": "float16"}, "teacher_dtype is 'float16'; give one of bfloat16"),
        ({"recompute": None}, r"stages\[0\].recompute is null; give true or false"),
        ({"recompute": 1}, r"stages\[0\].recompute is 1; give true or false"),
    ],
)
def test_new_fields_of_wrong_types_are_refused(change: dict[str, Any], words: str) -> None:
    data = Recipe("fast", (DISTIL,)).to_json()
    (data["stages"][0] if "recompute" in change else data).update(change)
    with pytest.raises(RecipeError, match=words):
        Recipe.from_json(data)


# --- the loss ---------------------------------------------------------------------------------------------------------


def batch_of(kind: str) -> Batch:
    ids = DATA[:30].view(2, 15)
    mask = torch.ones_like(ids).bool()
    inputs: dict[str, Any] = {"input_ids": ids}
    if kind == "padded":
        mask[0, :4] = False
        inputs["attention_mask"] = mask.long()
    labels = ids.masked_fill(~mask, -100)
    if kind == "labels":
        mask[:, 3:6] = False
        labels = ids.masked_fill(~mask, -100)
    return Batch(inputs, mask, labels)


@pytest.mark.parametrize("follows", [True, False])
@pytest.mark.parametrize("chunk", [4, None])
@pytest.mark.parametrize("kind", ["whole", "padded", "labels"])
def test_the_loss_and_its_gradients_are_those_of_all_logits_at_once(
    kind: str, chunk: int | None, follows: bool
) -> None:
    teacher, student = (
        tiny("qwen3", num_hidden_layers=1),
        tiny("qwen3", 1, num_hidden_layers=1, tie_word_embeddings=True),
    )
    plain, batch = copy.deepcopy(student), batch_of(kind)
    loss, _ = language_loss(
        SplitModel(student), SplitModel(teacher) if follows else None, batch, ce_weight=0.5, chunk=chunk
    )
    (3 * loss).backward()
    logits = plain(**batch.inputs).logits
    targets = batch.labels[:, 1:]
    if "attention_mask" in batch.inputs:
        targets = targets.masked_fill(batch.inputs["attention_mask"][:, :-1] == 0, -100)
    expected = 0.5 * F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten())
    if follows:
        wanted = teacher(**batch.inputs).logits.detach().log_softmax(-1)[batch.mask]
        expected = expected + (wanted.exp() * (wanted - logits.log_softmax(-1)[batch.mask])).sum(-1).mean()
    (3 * expected).backward()
    torch.testing.assert_close(loss, expected)
    for (name, ours), theirs in zip(student.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-4, msg=name)
    with pytest.raises(RuntimeError, match="can be taken once|second time"):
        loss.backward()


def test_each_token_has_logits_once() -> None:
    student = tiny("qwen3", num_hidden_layers=1)
    rows = []
    student.lm_head.register_forward_hook(lambda _module, _args, output: rows.append(output.shape[1]))
    split = SplitModel(student)
    rows.clear()
    loss, _ = language_loss(split, None, batch_of("whole"), ce_weight=1.0, chunk=8)
    loss.backward()
    assert rows == [1, 8, 8, 8, 6]  # one token says how large the vocabulary is


def test_a_loss_without_gradients_takes_none() -> None:
    student = SplitModel(tiny("qwen3", num_hidden_layers=1))
    with torch.no_grad():
        loss, _ = language_loss(student, student, batch_of("whole"), ce_weight=1.0)
    assert not loss.requires_grad
    for parameter in student.model.parameters():
        parameter.requires_grad_(False)
    assert not language_loss(student, student, batch_of("whole"))[0].requires_grad
    student.model.model.norm.weight.requires_grad_(True)
    language_loss(student, None, batch_of("whole"), ce_weight=1.0)[0].backward()
    assert [name for name, value in student.model.named_parameters() if value.grad is not None] == ["model.norm.weight"]


# --- pace -------------------------------------------------------------------------------------------------------------


def test_operations_are_counted_by_what_a_stage_runs() -> None:
    teacher, hybrid = pair(layers=2)  # whose head is not its embedding
    size = {model: sum(p.numel() for p in model.parameters()) - 96 * 64 for model in (teacher, hybrid)}
    assert flops_per_token(hybrid, teacher, DISTIL) == 6 * size[hybrid] + 2 * size[teacher]
    assert flops_per_token(hybrid, teacher, LENGTHEN) == 6 * size[hybrid]
    regions = sum(p.numel() for region in hs.region_modules(hybrid).values() for p in region.parameters())
    assert flops_per_token(hybrid, teacher, ALIGN) == 6 * regions + 2 * (size[teacher] - 96 * 64)
    hybrid.requires_grad_(False)
    assert flops_per_token(hybrid, teacher, LENGTHEN) == 4 * size[hybrid]


def test_peaks_are_those_of_the_card_that_is_named() -> None:
    assert peak("NVIDIA H100 80GB HBM3") == 989e12
    assert peak("NVIDIA H100 PCIe") == 756e12
    assert peak("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak("NVIDIA RTX A1000") is None

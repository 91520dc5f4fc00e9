"""The transfer: what each stage changes, its losses, the data's order, and runs that stop and go on."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hydrasurgery import LayerOptions, plan_heads, region_modules, rewrite
from hydrasurgery.errors import (
    CheckpointError,
    DataError,
    DivergedError,
    PlanError,
    RecipeError,
    SequenceLengthError,
)
from hydrasurgery.sharing import unchanged_names
from hydrasurgery.transfer import (
    RECIPES,
    Recipe,
    SplitModel,
    Stage,
    TokenStream,
    addition_names,
    as_source,
    distill,
    get_recipe,
    language_loss,
)
from hydrasurgery.transfer.data import Batch, draw
from hydrasurgery.transfer.losses import relative_error
from hydrasurgery.transfer.trainable import full_query_key_names, region_names
from tests.families import PLAIN, PlainDecoder, tiny

VOCABULARY, PADDED = 96, [5, 0]  # of the padded batches' two sequences, how many tokens on the left are padding
ALIGN = Stage("align", batch_size=2, length=16, steps=6, lr=1e-2, lr_end=1e-3, warmup=2)
DISTIL = Stage("distil", batch_size=2, length=16, steps=6, lr=2e-3, lr_end=1e-3, warmup=2)
LENGTHEN = Stage("lengthen", batch_size=2, length=16, steps=3, lr=1e-3, lr_end=1e-3, warmup=0)


@functools.cache
def made(ratio: str, strategy: str, tied: bool) -> tuple[nn.Module, nn.Module]:
    teacher = tiny("qwen3", tie_word_embeddings=tied)
    return teacher, rewrite(teacher, plan_heads(teacher, ratio=ratio, strategy=strategy))


def pair(ratio: str = "3:1", strategy: str = "random", tied: bool = False) -> tuple[nn.Module, nn.Module]:
    """A teacher and its hybrid, the same numbers at each call."""
    return copy.deepcopy(made(ratio, strategy, tied))


def tokens(count: int = 4096, seed: int = 0) -> Tensor:
    """A noisy walk over the vocabulary, so that the next token can be learned."""
    steps = torch.randint(1, 4, (count,), generator=torch.Generator().manual_seed(seed))
    return 3 + steps.cumsum(0) % (VOCABULARY - 3)


def run(hybrid: nn.Module, teacher: nn.Module | None, *stages: Stage, data: Any = None, **options: Any) -> Any:
    recipe = Recipe("test", stages, checkpoint_every=options.pop("checkpoint_every", 2))
    return distill(hybrid, teacher, tokens() if data is None else data, recipe=recipe, progress=False, **options)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}


def padded_batch(seed: int = 0) -> Batch:
    ids = tokens(2 * 12, seed).view(2, 12)
    mask = torch.arange(12)[None] >= torch.tensor(PADDED)[:, None]
    labels = ids.masked_fill(~mask, -100)
    labels[1, :4] = -100
    return Batch({"input_ids": ids, "attention_mask": mask.long()}, mask, labels)


class Padded:
    """Sequences padded on the left, with `junk` where the padding is."""

    def __init__(self, junk: int) -> None:
        self.junk = junk

    def batch(self, step: int, stage: Stage, generator: torch.Generator) -> dict[str, Tensor]:
        ids = torch.randint(3, VOCABULARY, (stage.batch_size, stage.length), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, :5] = 0
        return {"input_ids": ids.masked_fill(mask == 0, self.junk), "attention_mask": mask}


class Stop(Exception):
    """Raised by a test in the middle of a run."""


def stop_at(stage: str, step: int) -> Any:
    def callback(record: dict[str, Any]) -> None:
        if (record["stage"], record["step"]) == (stage, step):
            raise Stop

    return callback


# --- the stages -------------------------------------------------------------------------------------------------------


def test_align_lowers_its_loss_and_changes_the_additions_only() -> None:
    teacher, hybrid = pair()
    before, own = state(teacher), state(hybrid)
    additions = addition_names(hybrid)
    stage = Stage("align", batch_size=4, length=24, steps=40, lr=2e-2, lr_end=1e-3, warmup=4)
    result = run(hybrid, teacher, stage)
    losses = result.losses("align")
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert changed(hybrid, own) == additions
    assert all(".hydra." in name for name in additions)
    assert changed(teacher, before) == set()
    assert unchanged_names(hybrid, teacher) == set(dict(hybrid.named_parameters())) - additions


def test_align_can_train_the_projections_of_heads_that_lose_their_rope() -> None:
    teacher, _ = pair()
    plan = plan_heads(teacher, ratio="1:1", strategy="random")
    hybrid = rewrite(teacher, plan, layer=LayerOptions(full_rope=False))
    before, own = state(teacher), state(hybrid)
    queries_and_keys = full_query_key_names(hybrid)
    stage = Stage("align", batch_size=4, length=24, steps=40, lr=2e-3, lr_end=1e-3, warmup=4, trainable="all")
    losses = run(hybrid, teacher, stage).losses("align")
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert queries_and_keys <= changed(hybrid, own) <= region_names(hybrid)
    assert changed(teacher, before) == set()


def test_align_gives_the_gradients_of_the_hybrids_layers_run_by_hand() -> None:
    teacher, hybrid = pair()
    stage = Stage("align", batch_size=2, length=16, steps=1, lr=1.0, lr_end=1.0, warmup=0, clip=None)
    batch = draw(as_source(tokens()), 0, stage, 0)
    inputs, outputs, handles = {}, {}, []
    for name in region_modules(hybrid):

        def keep(module: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
            inputs[name], outputs[name] = (args, kwargs), output[0]

        handles.append(teacher.get_submodule(name).register_forward_hook(keep, with_kwargs=True))
    teacher(**batch.inputs, use_cache=False)
    _, reference = pair()
    errors = []
    for handle in handles:
        handle.remove()
    for name, region in region_modules(reference).items():
        args, kwargs = inputs[name]
        errors.append(relative_error(region(*args, **kwargs)[0], outputs[name], batch.mask))
    loss = torch.stack(errors).mean()
    loss.backward()
    grads = [p.grad for n, p in reference.named_parameters() if n in addition_names(hybrid)]
    record = run(hybrid, teacher, stage).history[0]
    assert record["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert record["grad_norm"] == pytest.approx(torch.cat([g.flatten() for g in grads]).norm().item(), rel=1e-4)


def test_distil_lowers_the_kl_and_leaves_the_teacher_bit_for_bit() -> None:
    teacher, hybrid = pair()
    before, own = state(teacher), state(hybrid)
    stage = Stage("distil", batch_size=4, length=24, steps=30, lr=3e-3, lr_end=1e-4, warmup=4)
    result = run(hybrid, teacher, stage)
    losses = result.losses("distil")
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    assert all(record["kl"] == record["loss"] and record["ce"] > 0 for record in result.history)
    assert changed(teacher, before) == set()
    assert changed(hybrid, own) == set(dict(hybrid.named_parameters()))
    assert unchanged_names(hybrid, teacher) == set()


def test_lengthen_lowers_the_cross_entropy_without_a_teacher() -> None:
    teacher, hybrid = pair()
    stage = Stage("lengthen", batch_size=4, length=24, steps=30, lr=3e-3, lr_end=3e-3, warmup=2)
    losses = run(hybrid, None, stage).losses("lengthen")
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_distil_can_train_the_additions_on_a_shared_body() -> None:
    teacher, hybrid = pair()
    before, own = state(teacher), state(hybrid)
    stage = Stage("distil", batch_size=2, length=16, steps=3, lr=1e-2, lr_end=1e-2, warmup=0, trainable="additions")
    run(hybrid, teacher, stage)
    assert changed(hybrid, own) == addition_names(hybrid)
    assert changed(teacher, before) == set()


def test_body_lr_zero_freezes_the_body() -> None:
    teacher, hybrid = pair()
    own = state(hybrid)
    run(hybrid, teacher, Stage("distil", batch_size=2, length=16, steps=2, lr=1e-2, lr_end=1e-2, body_lr=0.0))
    assert changed(hybrid, own) == region_names(hybrid)


def test_freeze_full_qk_leaves_queries_and_keys_of_full_heads() -> None:
    teacher, hybrid = pair()
    own = state(hybrid)
    stage = Stage("lengthen", batch_size=2, length=16, steps=2, lr=1e-2, lr_end=1e-2, freeze_full_qk=True)
    run(hybrid, teacher, stage)
    kept = set(dict(hybrid.named_parameters())) - changed(hybrid, own)
    assert kept == full_query_key_names(hybrid)
    assert kept == {f"{name}.{x}_proj.weight" for name in region_modules(hybrid) for x in "qk"}


def test_freeze_full_qk_refuses_a_fused_projection() -> None:
    teacher = tiny("phi3")
    hybrid = rewrite(teacher, plan_heads(teacher, ratio="1:1", strategy="random"))
    stage = Stage("lengthen", batch_size=1, length=8, steps=1, lr=1.0, lr_end=1.0, freeze_full_qk=True)
    with pytest.raises(PlanError, match=r"self_attn\.qkv_proj\.weight"):
        run(hybrid, teacher, stage)


def test_modes_flags_and_random_state_are_left_as_they_were() -> None:
    teacher, hybrid = pair()
    hybrid.lm_head.weight.requires_grad_(False)
    modes = [module.training for model in (hybrid, teacher) for module in model.modules()]
    random = torch.get_rng_state()
    run(hybrid, teacher, ALIGN, DISTIL)
    assert torch.equal(random, torch.get_rng_state())
    assert modes == [module.training for model in (hybrid, teacher) for module in model.modules()]
    assert [n for n, p in hybrid.named_parameters() if not p.requires_grad] == ["lm_head.weight"]
    assert all(p.grad is None for model in (hybrid, teacher) for p in model.parameters())
    assert not any(module._forward_hooks for module in teacher.modules())


def test_micro_batches_take_the_step_of_the_whole_batch() -> None:
    results = []
    for size in (None, 1):
        teacher, hybrid = pair()
        stages = [
            Stage(n, batch_size=3, length=16, steps=1, lr=1e-3, lr_end=1e-3, warmup=0, micro_batch=size)
            for n in ("distil", "lengthen")
        ]
        results.append((run(hybrid, teacher, *stages, data=Padded(0)).history, state(hybrid)))
    (whole, a), (pieces, b) = results
    for one, other in zip(whole, pieces, strict=True):
        for key in {"loss", "kl", "ce", "grad_norm"} & one.keys():
            assert one[key] == pytest.approx(other[key], rel=1e-4)
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=2e-5, rtol=1e-3)


def test_bfloat16_autocast_keeps_float32_weights() -> None:
    teacher, hybrid = pair()
    recipe = Recipe("test", (ALIGN, DISTIL), autocast="bfloat16")
    result = distill(hybrid, teacher, tokens(), recipe=recipe, progress=False)
    assert all(math.isfinite(record["loss"]) for record in result.history)
    assert {parameter.dtype for parameter in hybrid.parameters()} == {torch.float32}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_run_on_a_gpu_goes_on(tmp_path: Path) -> None:
    recipe = Recipe("test", (ALIGN, DISTIL, LENGTHEN), autocast="bfloat16", checkpoint_every=2)
    histories = []
    for out, callback in ((None, None), (tmp_path, stop_at("distil", 3)), (tmp_path, None)):
        teacher = tiny("qwen3").cuda()
        hybrid = rewrite(teacher, plan_heads(teacher, ratio="3:1", strategy="random"))
        with contextlib.suppress(Stop):
            result = distill(hybrid, teacher, tokens(), recipe=recipe, out=out, progress=False, callback=callback)
            histories.append([record["loss"] for record in result.history])
    assert histories[0] == pytest.approx(histories[1], rel=1e-2)


def test_half_precision_parameters_are_warned_about() -> None:
    teacher = tiny("qwen3").bfloat16()
    hybrid = rewrite(teacher, plan_heads(teacher, ratio="3:1", strategy="random"))
    with pytest.warns(UserWarning, match="half-precision"):
        run(hybrid, teacher, LENGTHEN)


def test_a_plain_module_is_trained_too() -> None:
    torch.manual_seed(0)
    teacher = PlainDecoder(PLAIN[1])
    hybrid = rewrite(teacher, plan_heads(teacher, ratio="1:1", strategy="random"))
    before = state(teacher)
    stages = [Stage(n, batch_size=4, length=16, steps=20, lr=1e-2, lr_end=1e-2, warmup=2) for n in ("align", "distil")]
    result = run(hybrid, teacher, *stages)
    for name in ("align", "distil"):
        assert result.losses(name)[-1] < result.losses(name)[0]
    assert changed(teacher, before) == set()


def test_what_cannot_be_trained_is_refused() -> None:
    teacher, hybrid = pair()
    with pytest.raises(PlanError, match="same object"):
        run(teacher, teacher, DISTIL)
    with pytest.raises(PlanError, match="needs a teacher"):
        run(hybrid, None, ALIGN)
    same, full = pair(strategy="all-full")
    with pytest.raises(PlanError, match="no head linear"):
        run(full, same, ALIGN)
    with pytest.raises(PlanError, match=r"model\.layers\.1\.self_attn"):
        run(hybrid, tiny("qwen3", num_hidden_layers=1), ALIGN)


# --- losses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "cohere", "granite", "gpt2", "opt"])
@pytest.mark.parametrize("chunk", [1, 5, None])
def test_chunked_loss_equals_the_plain_one(family: str, chunk: int | None) -> None:
    special = {
        "cohere": {"logit_scale": 0.3},
        "granite": {"logits_scaling": 3.0},
        "gemma2": {"final_logit_softcapping": 2.0},
    }
    teacher = tiny(family, seed=1, **special.get(family, {}))
    student, plain = tiny(family, seed=2, **special.get(family, {})), tiny(family, seed=2, **special.get(family, {}))
    batch = padded_batch()
    split = SplitModel(student)
    assert split.backbone is not student
    loss, parts = language_loss(split, SplitModel(teacher), batch, ce_weight=0.5, chunk=chunk)
    loss.backward()

    log_p = teacher(**batch.inputs).logits.detach().log_softmax(-1)[batch.mask]
    logits = plain(**batch.inputs).logits
    kl = (log_p.exp() * (log_p - logits.log_softmax(-1)[batch.mask])).sum(-1).mean()
    targets = batch.labels[:, 1:].masked_fill(~batch.mask[:, :-1], -100)  # padding predicts nothing
    ce = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten())
    (kl + 0.5 * ce).backward()
    torch.testing.assert_close(parts["kl"], kl.detach())
    torch.testing.assert_close(parts["ce"], ce.detach())
    for (name, one), other in zip(student.named_parameters(), plain.parameters(), strict=True):
        if other.grad is not None:
            assert one.grad is not None, name
            torch.testing.assert_close(one.grad, other.grad, atol=1e-6, rtol=1e-4)


def test_logits_of_all_tokens_never_exist_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = SplitModel(tiny("qwen3", seed=1)), SplitModel(tiny("qwen3"))
    rows = []
    for model in (student, teacher):
        model.model.lm_head.register_forward_hook(lambda module, args, output: rows.append(output.shape[1]))
    loss, _ = language_loss(student, teacher, padded_batch(), chunk=4)
    loss.backward()
    assert max(rows) == 4


def test_a_model_that_cannot_be_split_is_run_whole() -> None:
    class Shifted(type(tiny("qwen3"))):  # type: ignore[misc]
        def forward(self, input_ids: Tensor | None = None, **kwargs: Any) -> Any:
            output = super().forward(input_ids, **kwargs)
            output.logits = output.logits + (0.0 if input_ids is None else input_ids[..., None])
            return output

    student = tiny("qwen3", seed=1)
    student.__class__ = Shifted
    with pytest.warns(UserWarning, match="cannot be run as backbone and head"):
        split = SplitModel(student)
    batch = padded_batch()
    loss, _ = language_loss(split, None, batch, ce_weight=1.0, chunk=3)
    logits = student(**batch.inputs).logits
    targets = batch.labels[:, 1:].masked_fill(~batch.mask[:, :-1], -100)
    torch.testing.assert_close(loss, F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten()))


def test_a_piece_without_labels_counts_nothing() -> None:
    batch = padded_batch()
    batch = Batch(batch.inputs, batch.mask, torch.full_like(batch.labels, -100))
    loss, parts = language_loss(SplitModel(tiny("qwen3")), None, batch, ce_weight=1.0)
    loss.backward()
    assert loss.item() == parts["ce"].item() == 0.0


@pytest.mark.parametrize("stage", [ALIGN, DISTIL, LENGTHEN], ids=lambda stage: stage.name)
def test_what_stands_in_the_padding_changes_nothing(stage: Stage) -> None:
    states, histories = [], []
    for junk in (0, 77):
        teacher, hybrid = pair()
        result = run(hybrid, teacher, stage, data=Padded(junk))
        histories.append([(r["loss"], r["tokens"]) for r in result.history])
        states.append({n: p for n, p in state(hybrid).items() if "embed" not in n})
    assert histories[0] == histories[1]
    assert histories[0][0][1] == stage.batch_size * stage.length - 5
    for name in states[0]:
        assert torch.equal(states[0][name], states[1][name]), name


# --- stopping and going on --------------------------------------------------------------------------------------------


def without_time(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key != "seconds"} for record in history]


@functools.cache
def uninterrupted() -> tuple[Any, dict[str, Tensor]]:
    teacher, hybrid = pair(tied=True)
    return run(hybrid, teacher, ALIGN, DISTIL, LENGTHEN), state(hybrid)


@pytest.mark.parametrize("where", [("align", 1), ("align", 3), ("align", 6), ("distil", 5), ("lengthen", 1)])
def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path: Path, where: tuple[str, int]) -> None:
    stages = (ALIGN, DISTIL, LENGTHEN)
    expected, whole = uninterrupted()
    teacher, first = pair(tied=True)
    with pytest.raises(Stop):
        run(first, teacher, *stages, out=tmp_path, callback=stop_at(*where))
    teacher, second = pair(tied=True)
    result = run(second, teacher, *stages, out=tmp_path)
    assert without_time(result.history) == without_time(expected.history)
    assert changed(second, whole) == set()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == result.history
    assert [(line["stage"], line["step"]) for line in lines] == [
        (s.name, i + 1) for s in stages for i in range(s.num_steps)
    ]


def test_a_finished_run_is_loaded_not_repeated(tmp_path: Path) -> None:
    teacher, hybrid = pair()
    done = run(hybrid, teacher, ALIGN, DISTIL, out=tmp_path)
    teacher, again = pair()
    result = run(again, teacher, ALIGN, DISTIL, out=tmp_path, callback=stop_at("align", 1))
    assert result.history == done.history
    assert changed(again, state(hybrid)) == set()
    assert result.checkpoint == done.checkpoint
    assert Recipe.load(tmp_path / "recipe.json").stages == (ALIGN, DISTIL)


def test_resume_false_begins_afresh_and_touches_nothing_else(tmp_path: Path) -> None:
    teacher, hybrid = pair()
    run(hybrid, teacher, ALIGN, DISTIL, out=tmp_path)
    (tmp_path / "checkpoints" / "mine").mkdir()
    teacher, hybrid = pair()
    result = run(hybrid, teacher, ALIGN, out=tmp_path, resume=False)
    assert len(result.history) == len((tmp_path / "metrics.jsonl").read_text().splitlines()) == ALIGN.num_steps
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["0-align-00000006", "mine"]


def test_checkpoints_hold_no_teacher_and_no_pickle(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    teacher, hybrid = pair()
    additions = addition_names(hybrid)
    with pytest.raises(Stop):
        run(hybrid, teacher, ALIGN, DISTIL, out=tmp_path, callback=stop_at("distil", 5))
    folders = sorted((tmp_path / "checkpoints").iterdir())
    assert [folder.name for folder in folders] == ["0-align-00000006", "1-distil-00000004"]
    assert set(load_file(folders[0] / "model.safetensors")) == additions
    assert set(load_file(folders[1] / "model.safetensors")) == set(dict(hybrid.named_parameters()))
    assert {file.suffix for folder in folders for file in folder.iterdir()} == {".safetensors", ".json"}


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_truncated_checkpoint_is_named(tmp_path: Path, name: str) -> None:
    teacher, hybrid = pair()
    with pytest.raises(Stop):
        run(hybrid, teacher, ALIGN, out=tmp_path, callback=stop_at("align", 5))
    path = tmp_path / "checkpoints" / "0-align-00000004" / name
    path.write_bytes(path.read_bytes()[:-10])
    teacher, hybrid = pair()
    with pytest.raises(CheckpointError, match=name):
        run(hybrid, teacher, ALIGN, out=tmp_path)


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    teacher, hybrid = pair()
    with pytest.raises(Stop):
        run(hybrid, teacher, ALIGN, out=tmp_path, callback=stop_at("align", 5))
    teacher, hybrid = pair()
    with pytest.raises(CheckpointError, match="seed=0"):
        run(hybrid, teacher, ALIGN, out=tmp_path, seed=1)
    with pytest.raises(CheckpointError, match="no such stage"):
        run(hybrid, teacher, DISTIL, out=tmp_path)
    with pytest.raises(CheckpointError, match="only 3 steps"):
        run(hybrid, teacher, replace(ALIGN, steps=3), out=tmp_path)
    teacher, hybrid = pair(strategy="all-linear")
    with pytest.raises(CheckpointError, match=r'plan\.model\.layers\.0\.self_attn\.kinds was "lllF", is "llll"'):
        run(hybrid, teacher, ALIGN, out=tmp_path)


def test_a_run_that_diverges_stops_and_keeps_its_checkpoint(tmp_path: Path) -> None:
    teacher, hybrid = pair()

    def poison(record: dict[str, Any]) -> None:
        if (record["stage"], record["step"]) == ("distil", 3):
            with torch.no_grad():
                hybrid.model.norm.weight[0] = math.nan

    with pytest.raises(DivergedError, match=r"'distil', step 4: loss nan.*1-distil-00000002") as caught:
        run(hybrid, teacher, ALIGN, DISTIL, out=tmp_path, callback=poison)
    assert str(tmp_path) in str(caught.value)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == ALIGN.num_steps + 3
    teacher, hybrid = pair()
    assert len(run(hybrid, teacher, ALIGN, DISTIL, out=tmp_path).history) == ALIGN.num_steps + DISTIL.num_steps


def test_a_parameter_that_is_not_finite_reaches_no_checkpoint(tmp_path: Path) -> None:
    teacher, hybrid = pair()
    with torch.no_grad():
        hybrid.model.embed_tokens.weight[VOCABULARY - 1] = math.inf  # of a token that the data does not have
    data = tokens() % (VOCABULARY - 1)
    with pytest.raises(DivergedError, match=r"step 2: a parameter is not finite; no checkpoint was written"):
        run(hybrid, teacher, LENGTHEN, data=data, out=tmp_path)
    assert not (tmp_path / "checkpoints").exists()


# --- data and recipes -------------------------------------------------------------------------------------------------


class Recorder:
    """Notes the tokens that a run sees."""

    def __init__(self, seed: int) -> None:
        self.stream, self.seen = TokenStream(tokens(), seed=seed), []

    def batch(self, step: int, stage: Stage, generator: torch.Generator) -> dict[str, Tensor]:
        batch = self.stream.batch(step, stage, generator)
        self.seen.append(batch["input_ids"])
        return batch


def test_arms_of_one_seed_see_the_same_tokens() -> None:
    seen = []
    for ratio, seed in (("3:1", 0), ("1:1", 0), ("3:1", 1)):
        teacher, hybrid = pair(ratio)
        source = Recorder(seed)
        run(hybrid, teacher, ALIGN, DISTIL, data=source, seed=seed)
        seen.append(torch.stack(source.seen))
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0][: ALIGN.num_steps], seen[0][ALIGN.num_steps :])  # stages do not replay each other


def test_an_epoch_visits_every_window_once() -> None:
    stream, stage = TokenStream(torch.arange(103)), Stage("align", batch_size=2, length=10, steps=10, lr=1, lr_end=1)
    epoch = torch.cat([draw(stream, step, stage, 0).inputs["input_ids"] for step in range(5)])
    starts = sorted(epoch[:, 0].tolist())
    assert [b - a for a, b in itertools.pairwise(starts)] == [10] * 9
    assert torch.equal(epoch, epoch[:, :1] + torch.arange(10))
    assert not torch.equal(
        epoch, torch.cat([draw(stream, step, stage, 0).inputs["input_ids"] for step in range(5, 10)])
    )


class Letters:
    """A tokenizer of one token a character."""

    bos_token_id: int | None = 1

    def __init__(self, bos: bool) -> None:
        self.bos = bos

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [1] * (self.bos and add_special_tokens) + [ord(letter) for letter in text]}


def test_every_form_of_data_gives_the_same_tokens(tmp_path: Path) -> None:
    from datasets import Dataset

    text = "the quick brown fox\njumps over the lazy dog\n" * 20
    ids = [ord(letter) for letter in text]
    (tmp_path / "text.txt").write_text(text)
    np.save(tmp_path / "ids.npy", np.array(ids, np.uint16))
    documents = [ids[:100], ids[100:]]
    forms = [torch.tensor(ids), np.array(ids), ids, documents, Dataset.from_dict({"input_ids": documents})]
    forms += [tmp_path / "text.txt", str(tmp_path / "ids.npy")]
    batches = [draw(as_source(form, tokenizer=Letters(bos=False)), 3, ALIGN, 0).inputs["input_ids"] for form in forms]
    assert all(torch.equal(batch, batches[0]) for batch in batches)
    windows = draw(as_source(tmp_path / "text.txt", tokenizer=Letters(bos=True)), 3, ALIGN, 0).inputs["input_ids"]
    assert (windows[:, 0] == 1).all()
    assert windows.shape == batches[0].shape


def test_data_without_tokens_is_refused(tmp_path: Path) -> None:
    from datasets import Dataset

    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x9f")
    letters = Letters(bos=False)
    for data in (torch.empty(0, dtype=torch.long), [], [[]], tmp_path / "empty.txt"):
        with pytest.raises(DataError, match="holds no token"):
            as_source(data, tokenizer=letters)
    for data, words in (
        (tmp_path / "binary.txt", "binary.txt"),
        (tmp_path / "missing.txt", "missing.txt"),
        (torch.rand(8), "integers"),
        ([["a"]], "token ids"),
        (3, "int"),
        (Dataset.from_dict({"text": ["a"]}), "tokenize it first"),
        (Dataset.from_dict({"input_ids": [[1, 2]]}).to_iterable_dataset(), "streamed"),
    ):
        with pytest.raises(DataError, match=words):
            as_source(data, tokenizer=letters)
    with pytest.raises(DataError, match="tokenizer="):
        as_source(tmp_path / "empty.txt")
    with pytest.raises(DataError, match="shorter length"):
        draw(as_source([1, 2, 3]), 0, ALIGN, 0)


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ({}, "input_ids"),
        ({"input_ids": torch.empty(0, 4, dtype=torch.long)}, "at least one token"),
        ({"input_ids": torch.ones(1, 4).long(), "labels": torch.ones(1, 3).long()}, "same shape"),
        ({"input_ids": torch.ones(1, 4).long(), "attention_mask": torch.zeros(1, 4).long()}, "padding"),
    ],
)
def test_a_bad_batch_is_named(batch: dict[str, Tensor], words: str) -> None:
    class Source:
        def batch(self, step: int, stage: Stage, generator: torch.Generator) -> dict[str, Tensor]:
            return batch

    with pytest.raises(DataError, match=f"'align', step 7.*{words}"):
        draw(Source(), 7, ALIGN, 0)


@pytest.mark.parametrize(
    ("data", "stage", "error", "words"),
    [
        (torch.arange(500), {}, DataError, "token 96 of the training data is 96, but the model embeds 0 to"),
        (torch.arange(4), {}, DataError, "shorter length"),
        (tokens(900), {"length": 300}, SequenceLengthError, "300 tokens, the model's position limit is 256"),
    ],
)
def test_what_cannot_be_run_leaves_no_file(
    tmp_path: Path, data: Tensor, stage: dict[str, Any], error: type[Exception], words: str
) -> None:
    teacher, hybrid = pair()
    with pytest.raises(error, match=words):
        run(hybrid, teacher, replace(ALIGN, **stage), data=data, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_recipes_survive_a_file(tmp_path: Path, name: str) -> None:
    recipe = RECIPES[name]
    assert get_recipe(name) is recipe
    assert get_recipe(recipe.save(tmp_path / "recipe.json")) == recipe


def test_the_papers_recipe() -> None:
    align, distil, lengthen = RECIPES["hydrahead"].stages
    assert [round(s.num_steps * s.batch_size * s.length, -7) for s in (align, distil, lengthen)] == [3e8, 1e9, 1e9]
    assert (align.rate(0), align.rate(49)) == (pytest.approx(2e-5), pytest.approx(1e-3))
    assert align.rate(align.num_steps - 1) == pytest.approx(1e-5)
    assert (distil.rate(50), lengthen.rate(10**3)) == (pytest.approx(1e-4), pytest.approx(1e-5))
    rates = [align.rate(step) for step in range(50, align.num_steps, 100)]
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize(
    "change",
    [
        {"lr": 0},
        {"steps": None},
        {"tokens": 5},
        {"warmup": -1},
        {"name": "other"},
        {"trainable": "some"},
        {"betas": [2, 3]},
        {"lr": float("nan")},
    ],
)
def test_bad_stages_are_refused(change: dict[str, Any]) -> None:
    fields = {"name": "distil", "batch_size": 1, "length": 8, "lr": 1e-3, "lr_end": 1e-4, "steps": 4}
    with pytest.raises(RecipeError, match="stage"):
        Stage(**{**fields, **change})


def test_bad_recipes_are_refused(tmp_path: Path) -> None:
    data = copy.deepcopy(RECIPES["demo"].to_json())
    data["stages"][0]["speed"] = 3
    with pytest.raises(RecipeError, match="speed"):
        Recipe.from_json(data)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(RecipeError, match=r"broken\.json"):
        get_recipe(tmp_path / "broken.json")
    with pytest.raises(RecipeError, match="hydrahead"):
        get_recipe("nothing")
    with pytest.raises(RecipeError, match="no stage"):
        Recipe("empty", ())

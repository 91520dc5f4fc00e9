"""Hybrids among the tools that people train and sample with: PEFT, the Trainer, checkpointing, `generate`'s options."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.generation.streamers import BaseStreamer

import hydrasurgery as hs
from hydrasurgery.pretrained import model_class
from tests.families import tiny
from tests.test_families import half_plan, stir

IDS = torch.arange(3, 35).view(2, 16)


@pytest.fixture
def hybrid() -> Any:
    model = tiny("qwen3")
    return stir(hs.rewrite(model, half_plan(model)))


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_lora_trains_on_the_projections_of_a_hybrid(hybrid: Any) -> None:
    config = LoraConfig(target_modules=["q_proj", "v_proj"], r=4, task_type="CAUSAL_LM")
    adapted: Any = get_peft_model(hybrid, config)
    before, losses = values(adapted), []
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=3e-2)
    for _ in range(8):
        loss = adapted(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    changed = {name for name, value in adapted.named_parameters() if not torch.equal(value, before[name])}
    assert len(changed) == 2 * 2 * 2  # A and B of q and v in two layers
    assert all("lora_" in name for name in changed)
    with torch.no_grad():
        expected = adapted(input_ids=IDS).logits
        merged = adapted.merge_and_unload()
        assert len(hs.region_modules(merged)) == 2
        assert torch.allclose(merged(input_ids=IDS).logits, expected, atol=1e-5)


def test_the_trainer_runs(hybrid: Any, tmp_path: Path) -> None:
    before = values(hybrid)
    rows = [{"input_ids": row, "labels": row} for row in IDS.repeat(5, 1)]
    options = {"max_steps": 5, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1}
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, save_steps=5, **options)
    trainer = Trainer(model=hybrid, args=arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 5
    assert losses[-1] < losses[0]
    assert all(not torch.equal(value, before[name]) for name, value in hybrid.named_parameters())
    saved = type(hybrid).from_pretrained(tmp_path / "checkpoint-5").eval()
    with torch.no_grad():
        assert torch.equal(saved(IDS).logits, hybrid.eval()(IDS).logits)


def test_a_loaded_hybrid_is_a_model_like_any_other(hybrid: Any, tmp_path: Path) -> None:
    hybrid.save_pretrained(tmp_path / "first")
    loaded = type(hybrid).from_pretrained(tmp_path / "first")
    arguments = TrainingArguments(
        str(tmp_path / "run"), report_to="none", use_cpu=True, save_strategy="no", max_steps=2
    )
    rows = [{"input_ids": row, "labels": row} for row in IDS.repeat(5, 1)]
    Trainer(model=loaded, args=arguments, train_dataset=rows).train()
    assert copy.deepcopy(loaded).bfloat16().float().half().dtype == torch.float16
    loaded.save_pretrained(tmp_path / "second")
    again = type(hybrid).from_pretrained(tmp_path / "second").eval()
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, loaded.eval()(IDS).logits)


@torch.no_grad()
def test_a_restored_model_saves_as_the_teacher_it_is(tmp_path: Path) -> None:
    model = tiny("qwen3")
    restored: Any = hs.restore(hs.rewrite(model, half_plan(model)))
    restored.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert not hs.region_modules(loaded)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_gradient_checkpointing_gives_the_same_gradients(hybrid: Any) -> None:
    hybrid.train()
    gradients = []
    for checkpointing in (False, True):
        model = copy.deepcopy(hybrid)
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


class Collector(BaseStreamer):
    """Keeps what `generate` streams."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


@torch.no_grad()
@pytest.mark.parametrize("asked", ["call", "config"])
@pytest.mark.parametrize("run_before", [False, True])
def test_hidden_states_are_those_of_every_layer_once(asked: str, run_before: bool, tmp_path: Path) -> None:
    teacher = tiny("llama")
    arguments = {"input_ids": IDS, "use_cache": False, **({"output_hidden_states": True} if asked == "call" else {})}
    teacher.config.output_hidden_states = asked == "config"
    if run_before:
        teacher(**arguments)
    stitched = hs.rewrite(teacher, half_plan(teacher, ("full",) * 4))
    hybrid = hs.rewrite(teacher, half_plan(teacher))
    wanted = teacher(**arguments).hidden_states
    assert len(wanted) == teacher.config.num_hidden_layers + 1
    assert all(map(torch.equal, stitched(**arguments).hidden_states, wanted))
    hybrid.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    loaded.config.output_hidden_states = teacher.config.output_hidden_states
    built = model_class(LlamaForCausalLM)(copy.deepcopy(hybrid.config))
    for model in (hybrid, loaded, copy.deepcopy(hybrid), built):
        assert len(model(**arguments).hidden_states) == len(wanted)


@torch.no_grad()
def test_sampling_draws_the_same_tokens_with_and_without_cache(hybrid: Any) -> None:
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        settings = {"do_sample": True, "top_k": 20, "temperature": 0.8, "num_return_sequences": 3}
        drawn.append(hybrid.generate(IDS, attention_mask=mask, max_new_tokens=8, use_cache=use_cache, **settings))
    assert drawn[0].shape == (6, 24)
    assert torch.equal(*drawn)
    assert len(drawn[0][:, 16:].unique(dim=0)) > 1


@torch.no_grad()
def test_a_streamer_sees_every_token(hybrid: Any) -> None:
    streamer = Collector()
    out = hybrid.generate(IDS[:1], max_new_tokens=6, do_sample=False, streamer=streamer)
    assert streamer.tokens == out[0].tolist()
    assert streamer.ended


@torch.no_grad()
def test_the_cache_holds_the_kept_heads_only(hybrid: Any) -> None:
    cache = hybrid(IDS, use_cache=True).past_key_values
    for layer in cache.layers:  # heads 0 and 3 of four stay full: both KV heads are read
        assert layer.keys.shape == (2, 2, 16, 16)
        assert layer.states["recurrent"].shape == (2, 2, 16, 16)
        assert layer.states["recurrent"].dtype == torch.float32
    model = tiny("qwen3")
    one_group = hs.rewrite(model, half_plan(model, ("full", "full", "linear", "linear")))
    assert one_group(IDS, use_cache=True).past_key_values.layers[0].keys.shape == (2, 1, 16, 16)

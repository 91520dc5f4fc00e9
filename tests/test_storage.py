"""How a hybrid lies on disk and is loaded: every way of transformers gives the same hybrid."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GenerationConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainingArguments,
    pipeline,
)

import hydrasurgery as hs
from hydrasurgery import stored
from hydrasurgery.demo.teacher import load_teacher
from hydrasurgery.errors import CheckpointError
from hydrasurgery.loading import load_model
from tests.families import SMALL, tiny
from tests.test_families import half_plan, stir

IDS = torch.arange(3, 35).view(2, 16)


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model.eval()(ids, use_cache=False).logits


@torch.no_grad()
def states(model: Any) -> torch.Tensor:
    return model.eval()(IDS, use_cache=False).last_hidden_state


def hybrid_of(model: Any) -> Any:
    return stir(hs.rewrite(model, half_plan(model))).eval()


@pytest.fixture(scope="module")
def hybrid() -> Any:
    return hybrid_of(tiny("qwen3"))


@pytest.fixture(scope="module")
def folder(hybrid: Any, tmp_path_factory: Any) -> Path:
    path = tmp_path_factory.mktemp("hybrid")
    hybrid.save_pretrained(path)
    return path


# --- ways to load -----------------------------------------------------------------------------------------------------

WAYS: dict[str, Callable[[Any, Path], Any]] = {
    "auto": lambda hybrid, folder: AutoModelForCausalLM.from_pretrained(folder),
    "class": lambda hybrid, folder: type(hybrid).from_pretrained(folder),
    "config": lambda hybrid, folder: AutoModelForCausalLM.from_pretrained(
        folder, config=AutoConfig.from_pretrained(folder)
    ),
    "state dict": lambda hybrid, folder: type(hybrid).from_pretrained(
        None, config=hybrid.config, state_dict=hybrid.state_dict()
    ),
    "device map": lambda hybrid, folder: AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", dtype="auto"),
    "load_model": lambda hybrid, folder: load_model(folder),
    "deepcopy": lambda hybrid, folder: copy.deepcopy(hybrid),
    "pickle": lambda hybrid, folder: pickle.loads(pickle.dumps(hybrid)),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_gives_the_same_hybrid(way: str, hybrid: Any, folder: Path) -> None:
    loaded = WAYS[way](hybrid, folder)
    assert type(loaded) is type(hybrid)
    assert type(loaded.config) is type(hybrid.config)
    assert loaded.config.hydrasurgery == hybrid.config.hydrasurgery
    assert torch.equal(logits(loaded), logits(hybrid))


def test_a_hybrid_built_from_its_config_takes_the_weights(hybrid: Any, folder: Path) -> None:
    for config in (hybrid.config, AutoConfig.from_pretrained(folder)):
        built: Any = AutoModelForCausalLM.from_config(config)
        assert len(hs.region_modules(built)) == 2
        built.load_state_dict(hybrid.state_dict())
        assert torch.equal(logits(built), logits(hybrid))


def test_the_base_model_of_a_causal_hybrid_and_the_reverse(hybrid: Any, folder: Path, tmp_path: Path) -> None:
    base: Any = AutoModel.from_pretrained(folder)
    assert type(base).__name__ == "Qwen3Model"
    assert torch.equal(states(base), states(hybrid.model))
    base.save_pretrained(tmp_path / "base")
    hybrid.model.save_pretrained(tmp_path / "inner")
    for name in ("base", "inner"):
        assert torch.equal(states(AutoModel.from_pretrained(tmp_path / name)), states(base))
        causal: Any = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert torch.equal(states(causal.model), states(base))


def test_a_task_head_on_a_hybrid(hybrid: Any, folder: Path, tmp_path: Path) -> None:
    classifier: Any = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    assert torch.equal(states(classifier.model), states(hybrid.model))
    classifier.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(logits(again, IDS[:1]), logits(classifier, IDS[:1]))


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gemma3_text", "opt", "mixtral", "persimmon"])
def test_tensors_that_files_do_not_hold_are_made_at_loading(family: str, tmp_path: Path) -> None:
    hybrid = hybrid_of(tiny(family))
    hybrid.save_pretrained(tmp_path)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(hybrid))
    buffers = dict(hybrid.named_buffers())
    for name, buffer in loaded.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    for name, module in loaded.named_modules():
        assert not [key for key, value in vars(module).items() if isinstance(value, torch.Tensor)], name


@pytest.mark.parametrize(
    ("family", "rope"),
    [("phi3", "longrope"), ("llama", "longrope"), ("qwen3", "dynamic"), ("llama", "yarn")],
)
def test_rotary_embeddings_that_depend_on_the_length(family: str, rope: str, tmp_path: Path) -> None:
    options = {
        "longrope": {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 16},
        "dynamic": {"factor": 2.0},
        "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    }[rope]
    parameters = {"rope_type": rope, "rope_theta": 10000.0, "partial_rotary_factor": 1.0, **options}
    more = {"original_max_position_embeddings": 16} if family == "phi3" else {}
    hybrid = hybrid_of(tiny(family, rope_parameters=parameters, **more))
    hybrid.save_pretrained(tmp_path)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    for length in (8, 40, 8):
        ids = torch.arange(3, 3 + length)[None]
        assert torch.equal(logits(loaded, ids), logits(hybrid, ids)), length


def test_capture_leaves_no_trace_in_a_rotary_embedding() -> None:
    parameters = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    model: Any = tiny("llama", rope_parameters={**parameters, "original_max_position_embeddings": 16})
    before = set(vars(model.model.rotary_emb))
    hs.capture(model)
    assert set(vars(model.model.rotary_emb)) == before


@torch.no_grad()
def test_a_text_decoder_inside_a_multimodal_model(tmp_path: Path) -> None:
    text = {**SMALL, "query_pre_attn_scalar": 16, "sliding_window": 8}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14}, image_token_index=95
    )
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(config).eval()
    hybrid: Any = hs.rewrite(model, half_plan(model))
    hybrid.save_pretrained(tmp_path)
    loaded = type(hybrid).from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(hybrid))
    assert torch.equal(states(AutoModel.from_pretrained(tmp_path)), states(hybrid.model))
    with pytest.raises(CheckpointError, match="part of a hybrid"):
        hybrid.model.language_model.save_pretrained(tmp_path / "part")


class OwnConfig(Qwen3Config):
    """A config class outside of transformers, with a constructor of its own."""

    model_type = "own_decoder"

    def __init__(self, extra: int = 3, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.extra = extra


class OwnModel(Qwen3ForCausalLM):
    config_class = OwnConfig


def test_a_model_class_outside_of_transformers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    hybrid = hybrid_of(OwnModel(OwnConfig(extra=5, **SMALL)))
    hybrid.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="'own_decoder', which transformers"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    AutoConfig.register("own_decoder", OwnConfig)
    AutoModelForCausalLM.register(OwnConfig, OwnModel)
    for loaded in (
        type(hybrid).from_pretrained(tmp_path),
        AutoModelForCausalLM.from_pretrained(tmp_path),
        pickle.loads(pickle.dumps(hybrid)),
    ):
        assert isinstance(loaded, OwnModel)
        assert loaded.config.extra == 5
        assert torch.equal(logits(loaded), logits(hybrid))


# --- what lies on disk ------------------------------------------------------------------------------------------------


def test_the_file_is_a_form_of_its_own_and_the_object_is_like_its_base(hybrid: Any, folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    assert values["model_type"] == "hydrasurgery"
    assert values["hydrasurgery"]["base"]["model_type"] == "qwen3"
    assert values["architectures"] == ["Qwen3ForCausalLM"]
    assert (values["hidden_size"], values["tie_word_embeddings"]) == (64, stored.ADVICE)
    assert "quantization_config" not in values
    config = AutoConfig.from_pretrained(folder)
    for read in (config, hybrid.config):
        assert isinstance(read, Qwen3Config)
        assert (read.model_type, read.to_dict()["model_type"]) == ("qwen3", "qwen3")
        assert (read.tie_word_embeddings, read.eos_token_id) == (False, 2)
    assert isinstance(hybrid, Qwen3ForCausalLM)
    assert type(hybrid).__name__ == "Qwen3ForCausalLM"


def test_configs_come_back_as_they_were(hybrid: Any, tmp_path: Path) -> None:
    config = hybrid.config
    config.save_pretrained(tmp_path)
    for again in (
        AutoConfig.from_pretrained(tmp_path),
        type(config).from_pretrained(tmp_path),
        type(config).from_dict(config.to_dict()),
        pickle.loads(pickle.dumps(config)),
        copy.deepcopy(config),
    ):
        assert type(again) is type(config)
        assert json.loads(again.to_json_string()) == json.loads(config.to_json_string())
    assert pickle.loads(pickle.dumps(type(hybrid))) is type(hybrid)
    assert pickle.loads(pickle.dumps(type(config))) is type(config)


def test_shards_variants_and_repeated_saves(hybrid: Any, tmp_path: Path) -> None:
    hybrid.save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    assert len([*(tmp_path / "sharded").glob("model-*.safetensors")]) > 1
    hybrid.save_pretrained(tmp_path / "variant", variant="half")
    sharded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "sharded")
    variant: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "variant", variant="half")
    sharded.save_pretrained(tmp_path / "again")
    for loaded in (sharded, variant, AutoModelForCausalLM.from_pretrained(tmp_path / "again")):
        assert torch.equal(logits(loaded), logits(hybrid))


def test_half_precision_comes_back(folder: Path, tmp_path: Path) -> None:
    half: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(loaded), logits(half))
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert {p.dtype for p in whole.parameters()} == {torch.float32}


def test_what_lies_beside_a_hybrid(tmp_path: Path) -> None:
    teacher, tokenizer = load_teacher()
    hybrid: Any = hs.rewrite(teacher, hs.plan_heads(teacher, strategy="random", ratio="3:1"))
    hybrid.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == tokenizer.get_vocab()
    assert GenerationConfig.from_pretrained(tmp_path).to_dict() == hybrid.generation_config.to_dict()
    text = pipeline("text-generation", model=str(tmp_path))("The for", max_new_tokens=3, do_sample=False)
    prompt = tokenizer("The for", return_tensors="pt")
    wanted = hybrid.generate(**prompt, max_new_tokens=3, do_sample=False)[0]
    assert text[0]["generated_text"] == tokenizer.decode(wanted, skip_special_tokens=True)


def test_training_goes_on_from_a_checkpoint(hybrid: Any, tmp_path: Path) -> None:
    rows = [{"input_ids": row, "labels": row} for row in IDS.repeat(4, 1)]

    def train(steps: int, model: Any, resume: bool) -> Any:
        options = {"max_steps": steps, "per_device_train_batch_size": 2, "save_steps": 2, "learning_rate": 1e-3}
        arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, **options)
        trainer = Trainer(model=model, args=arguments, train_dataset=rows)
        trainer.train(resume_from_checkpoint=resume)
        return model

    whole = train(4, copy.deepcopy(hybrid), resume=False)
    shutil.rmtree(tmp_path / "checkpoint-4")
    resumed = train(4, AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2"), resume=True)
    assert torch.equal(logits(resumed), logits(whole))


def test_lora_finds_the_hybrid_again(folder: Path, tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model

    for task in ("CAUSAL_LM", None):
        lora = LoraConfig(r=2, task_type=task)  # its targets are looked up by the model type
        adapted: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), lora)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter)
        adapted.save_pretrained(tmp_path / str(task))
        wanted = logits(adapted)
        again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), str(tmp_path / str(task)))
        assert torch.equal(logits(again), wanted)
        allowed = None if task else [type(adapted.get_base_model()).__module__]
        found = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / str(task)), import_allowlist=allowed)
        assert torch.equal(logits(found), wanted)

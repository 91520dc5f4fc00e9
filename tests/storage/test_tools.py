"""What lies on disk of a hybrid, and the tools that write and read it: shards, tokenizers, the Trainer, PEFT, pipelines."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainingArguments,
    pipeline,
)

from hydrasurgery import stored
from hydrasurgery.demo.teacher import load_teacher
from tests.storage.models import IDS, hybrid_of, logits, small


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
    tokenizer = load_teacher()[1]
    hybrid = hybrid_of(small("qwen3", vocab_size=len(tokenizer)))
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

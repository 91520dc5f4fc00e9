"""How a hybrid lies on disk and is loaded: every way of transformers gives the same hybrid."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import hydrasurgery as hs
from hydrasurgery.errors import CheckpointError
from hydrasurgery.loading import load_model
from tests.families import SMALL
from tests.storage.models import IDS, hybrid_of, logits, small, states
from tests.test_families import half_plan

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


@pytest.mark.parametrize("family", ["internlm3", "iquestcoder"])
def test_a_type_whose_models_are_of_another_types_class(family: str, tmp_path: Path) -> None:
    hybrid = hybrid_of(small(family))
    assert type(hybrid).__name__ == "LlamaForCausalLM"
    hybrid.save_pretrained(tmp_path)
    for way in WAYS.values():
        loaded = way(hybrid, tmp_path)
        assert type(loaded) is type(hybrid)
        assert type(loaded.config) is type(hybrid.config)
        assert torch.equal(logits(loaded), logits(hybrid))


def test_a_hybrid_built_from_its_config_takes_the_weights(hybrid: Any, folder: Path) -> None:
    for config in (hybrid.config, AutoConfig.from_pretrained(folder)):
        built: Any = AutoModelForCausalLM.from_config(config)
        assert len(hs.region_modules(built)) == 1
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
    hybrid = hybrid_of(small(family))
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
    hybrid = hybrid_of(small(family, rope_parameters=parameters, **more))
    hybrid.save_pretrained(tmp_path)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    for length in (8, 40, 8):
        ids = torch.arange(3, 3 + length)[None]
        assert torch.equal(logits(loaded, ids), logits(hybrid, ids)), length


def test_capture_leaves_no_trace_in_a_rotary_embedding() -> None:
    parameters = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    model: Any = small("llama", rope_parameters={**parameters, "original_max_position_embeddings": 16})
    before = set(vars(model.model.rotary_emb))
    hs.capture(model)
    assert set(vars(model.model.rotary_emb)) == before


@torch.no_grad()
def test_a_text_decoder_inside_a_multimodal_model(tmp_path: Path) -> None:
    text = {**SMALL, "num_hidden_layers": 1, "query_pre_attn_scalar": 16, "sliding_window": 8}
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
    hybrid = hybrid_of(OwnModel(OwnConfig(extra=5, **{**SMALL, "num_hidden_layers": 1})))
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

"""For each family two classes of transformers' tests: of its models, and of hybrids of them."""

from __future__ import annotations

import copy
import unittest
from typing import Any

import transformers
from transformers.testing_utils import torch_device
from transformers_tests.generation.test_utils import GenerationTesterMixin
from transformers_tests.test_modeling_common import ModelTesterMixin, ids_tensor, random_attention_mask

import hydrasurgery as hs
from hydrasurgery.pretrained import model_class
from tests.test_families import half_plan

TASKS = ("Model", "ForCausalLM", "ForSequenceClassification")
FAMILIES = {"Qwen3": "Qwen3Config", "Llama": "LlamaConfig", "Gemma3": "Gemma3TextConfig"}
SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 32,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_labels": 3,
    "is_decoder": False,
}


class Tester:
    """Small configs and inputs, as transformers' mixins ask for them."""

    batch_size, seq_length, is_training = 3, 7, True
    num_hidden_layers, num_attention_heads, hidden_size = 2, 4, 32

    def __init__(self, parent: Any, config: Any) -> None:
        self.parent, self.config = parent, config

    def get_config(self) -> Any:
        return copy.deepcopy(self.config)

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, Any]]:
        shape = [self.batch_size, self.seq_length]
        ids, mask = ids_tensor(shape, SIZES["vocab_size"]), random_attention_mask(shape)
        return self.get_config(), {"input_ids": ids.to(torch_device), "attention_mask": mask.to(torch_device)}


def model_classes(family: str) -> tuple[type[Any], ...]:
    names = (f"{family}Text{task}" for task in TASKS), (f"{family}{task}" for task in TASKS)
    config = getattr(transformers, FAMILIES[family])
    found = (getattr(transformers, name, None) for pair in zip(*names, strict=True) for name in pair)
    return tuple(cls for cls in found if cls is not None and cls.config_class is config)


def case(classes: tuple[type[Any], ...], config: Any) -> type[unittest.TestCase]:
    def setUp(self: Any) -> None:
        self.model_tester = Tester(self, config)

    body = {"all_model_classes": classes, "pipeline_model_mapping": {}, "setUp": setUp}
    return type("Case", (ModelTesterMixin, GenerationTesterMixin, unittest.TestCase), body)


def hybrid_config(config: Any, causal: type[Any]) -> Any:
    """The config of a hybrid whose every second head is linear: whatever is built from it is one."""
    model = causal(copy.deepcopy(config))
    return hs.rewrite(model, half_plan(model, ("full", "linear", "full", "linear"))).config


for _family in FAMILIES:
    _classes, _config = model_classes(_family), getattr(transformers, FAMILIES[_family])(**SIZES)
    globals()[f"Test{_family}Teacher"] = case(_classes, _config)
    _hybrid = hybrid_config(_config, next(cls for cls in _classes if cls.__name__.endswith("ForCausalLM")))
    globals()[f"Test{_family}Hybrid"] = case(tuple(map(model_class, _classes)), _hybrid)

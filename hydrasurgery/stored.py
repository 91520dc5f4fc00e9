"""A hybrid's config.json: its base model's config and the surgery, in a form that no program takes for the base model's.

    {"model_type": "hydrasurgery", "tie_word_embeddings": "<what to do>", ... the other fields of the base model's config ...,
     "hydrasurgery": {"base": {"model_type": "qwen3", "tie_word_embeddings": false}, "pipeline": ..., "plan": ...}}

Without hydrasurgery the Auto classes know no such model type. The base model's own classes only warn of another model type, but
they check that some fields of theirs are no text, and show the text.
"""

from __future__ import annotations

import importlib
import json
from typing import Any

from transformers.configuration_utils import PreTrainedConfig

from hydrasurgery.errors import CheckpointError
from hydrasurgery.trust import check_config

# The model type in the file, the key of the surgery there, and the config's attribute that holds it.
KEY = "hydrasurgery"
# Every decoder's config class has one of these for itself and checks its type. PreTrainedConfig, by which the Trainer reads any
# config.json, has none.
GUARDS = ("tie_word_embeddings", "eos_token_id", "text_config")
ADVICE = "this is a hybrid: import hydrasurgery and load it with an Auto class, such as AutoModelForCausalLM"


def stored(values: dict[str, Any]) -> dict[str, Any]:
    """The form for the file of a hybrid's config, given as its base model's fields and the surgery."""
    guards = [name for name in GUARDS if name in values or name != "text_config"]
    base = {name: values[name] for name in ("model_type", *guards) if name in values}
    return {**values, **dict.fromkeys(guards, ADVICE), "model_type": KEY, KEY: {**values[KEY], "base": base}}


def json_text(text: str) -> str:
    """The text of a hybrid's config.json, given the JSON text of its base model's fields and the surgery."""
    return json.dumps(stored(json.loads(text)), indent=2, sort_keys=True) + "\n"


def unstored(values: dict[str, Any], source: str) -> dict[str, Any]:
    """The base model's fields and the surgery: the inverse of `stored`. What is in that form already stays as it is.

    Raises:
        CheckpointError: naming `source`, if there is no surgery, or code would be run.
    """
    surgery = values.get(KEY)
    whole = (
        isinstance(surgery, dict) and isinstance(surgery.get("plan"), dict) and isinstance(surgery.get("pipeline"), str)
    )
    if not isinstance(surgery, dict) or not whole:
        raise CheckpointError(
            f"{source}: is no hybrid, or lacks its plan or pipeline; load another model with its own class or an Auto class, "
            "or save the hybrid again with save_pretrained"
        )
    base = {} if values.get("model_type") != KEY else surgery.get("base")
    if not isinstance(base, dict) or (values.get("model_type") == KEY and not isinstance(base.get("model_type"), str)):
        raise CheckpointError(f"{source}: does not say what model the hybrid was made of; save the hybrid again")
    fields = {**{key: value for key, value in values.items() if value != ADVICE and key != KEY}, **base}
    check_config(fields, source)
    if "auto_map" in fields:
        raise CheckpointError(
            f"{source}: auto_map names code of the checkpoint, which a hybrid does not run; take it out"
        )
    return {**fields, KEY: {key: value for key, value in surgery.items() if key != "base"}}


class StoredConfig(PreTrainedConfig):
    """What AutoConfig knows the model type "hydrasurgery" as: reading it gives a config of the base model's kind."""

    model_type = KEY

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        source = str(kwargs.get("name_or_path") or "config.json")
        values = unstored(config_dict, source)
        return (
            importlib.import_module("hydrasurgery.pretrained")
            .config_class_of(values["model_type"], source)
            .from_dict(values, **kwargs)
        )


def register_form() -> None:
    """Let AutoConfig, and with it every Auto class, read the form."""
    from transformers.models.auto.configuration_auto import AutoConfig

    AutoConfig.register(KEY, StoredConfig, exist_ok=True)

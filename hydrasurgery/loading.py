"""Reading models for the command line: nothing random in place of a missing tensor, and errors that name the file."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from hydrasurgery.decoders import vocabulary_size
from hydrasurgery.errors import CheckpointError, HydraError, TokenizerError
from hydrasurgery.trust import check_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

INDEX = "model.safetensors.index.json"
JSON_FILES = ("config.json", "generation_config.json", INDEX)
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "tekken.json")
SHOWN = 3  # names in a message
# What transformers raises for a folder, a hub name, a config or a weight that it cannot read.
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError)


def load_model(path: str | os.PathLike[str], *, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """Load a decoder or a hybrid in eval mode, from safetensors only; no code of the checkpoint is run.

    Args:
        path: a local folder, or the name of a model on the hub.
        dtype: of the weights; "auto" takes the checkpoint's own.

    Raises:
        CheckpointError: a file is missing, truncated or not JSON, config.json asks for code to be run, or a tensor that the
            model needs is not in the checkpoint; the message names the file or the tensor.
    """
    from transformers import AutoModelForCausalLM, PreTrainedConfig

    check_files(path)
    name = os.fspath(path)
    try:
        if not Path(path).is_dir():
            check_config(PreTrainedConfig.get_config_dict(name)[0], f"{name}: config.json")
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except HydraError as error:  # the surgery in its config.json, which does not know the file
        raise type(error)(f"{name}: {error}") from error
    except UNREADABLE as error:
        raise CheckpointError(
            f"{name}: cannot be loaded as a model ({type(error).__name__}: {error}); give a folder with config.json and "
            "safetensors files, or the name of a model on the hub"
        ) from error
    model, report = loaded
    _check_report(name, report)
    return model.eval()


def load_tokenizer(path: str | os.PathLike[str], model: Any = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer beside a model.

    Args:
        model: if given, the model that will read its tokens.

    Raises:
        TokenizerError: there is none, it cannot be read, or it has more tokens than `model` has embeddings.
    """
    from transformers import AutoTokenizer

    name = os.fspath(path)
    if Path(path).is_dir() and not any(next(Path(path).glob(pattern), None) for pattern in TOKENIZER_FILES):
        # transformers would make up an empty tokenizer of the model's family
        raise TokenizerError(f"{name}: holds no tokenizer; save one there with tokenizer.save_pretrained")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exception for a broken tokenizer.json
        raise TokenizerError(
            f"{name}: no tokenizer can be loaded from it ({error}); save one there with tokenizer.save_pretrained"
        ) from error
    rows = None if model is None else vocabulary_size(model)
    if rows is not None and len(tokenizer) > rows:
        raise TokenizerError(
            f"{name}: the tokenizer has {len(tokenizer)} tokens, but {type(model).__name__} embeds {rows}; "
            "give the tokenizer that the model was trained with"
        )
    return tokenizer


def check_files(path: str | os.PathLike[str]) -> None:
    """Read the headers of a local folder's weights and its JSON files; a name that is no folder is the hub's matter.

    Raises:
        CheckpointError: naming the first file that is missing, truncated or not JSON, or asks for code to be run.
    """
    folder, name = Path(path), os.fspath(path)
    if not folder.is_dir():
        if folder.exists() or not HUB_NAME.fullmatch(name):
            raise CheckpointError(f"{name}: no such folder; give a folder that save_pretrained wrote, or a hub name")
        return
    values = {file: _json(folder / file) for file in JSON_FILES if (folder / file).exists()}
    if "config.json" not in values:
        raise CheckpointError(f"{folder / 'config.json'}: missing; give a folder that save_pretrained wrote")
    check_config(values["config.json"], os.fspath(folder / "config.json"))
    for file in _weight_files(folder, values.get(INDEX)):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{file}: missing, truncated or not a safetensors file ({error}); copy or save it again"
            ) from error


def share_parameters(hybrid: nn.Module, teacher: nn.Module) -> set[str]:
    """Let a hybrid that was loaded from disk share again what it has unchanged from its teacher, in place.

    A parameter of the same name, shape, type and values becomes the teacher's own object, as `rewrite` leaves it: the
    first stage of the transfer then trains only the additions, and no weight is held twice.

    Returns:
        The names of the parameters that are now shared.
    """
    originals = dict(teacher.named_parameters(remove_duplicate=False))
    shared = set()
    for name, parameter in list(hybrid.named_parameters(remove_duplicate=False)):
        original = originals.get(name)
        if original is None or original.shape != parameter.shape or original.dtype != parameter.dtype:
            continue
        if torch.equal(original.data, parameter.data.to(original.device)):
            path, _, key = name.rpartition(".")
            hybrid.get_submodule(path)._parameters[key] = original
            shared.add(name)
    return shared


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: not JSON ({error}); save the model again") from error


def _weight_files(folder: Path, index: Any) -> list[Path]:
    """The safetensors files that transformers will read."""
    if (folder / "model.safetensors").exists() or index is None:
        return [folder / "model.safetensors"]
    try:
        return [folder / file for file in sorted(set(index["weight_map"].values()))]
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / INDEX}: holds no weight_map; save the model again") from error


def _check_report(name: str, report: dict[str, Any]) -> None:
    missing = sorted(report["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{name}: the checkpoint lacks {_some(missing)}, which would be left random; save the model again"
        )
    stray = sorted(key for key in report["unexpected_keys"] if ".hydra." in key)
    if stray:
        raise CheckpointError(
            f"{name}: the checkpoint holds {_some(stray)}, but its config.json has no plan that makes a place for it; "
            "save the hybrid again with save_pretrained"
        )


def _some(names: list[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")

"""Reading models for the command line: nothing random in place of a missing tensor, and errors that name the file."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from safetensors import SafetensorError, safe_open

from hydrasurgery.decoders import vocabulary_size
from hydrasurgery.errors import CheckpointError, HydraError, TokenizerError
from hydrasurgery.gguf_files import check_gguf, is_gguf, load_gguf
from hydrasurgery.json_files import load_json, shown
from hydrasurgery.quantized import method
from hydrasurgery.records import Bounds, read_value
from hydrasurgery.trust import check_config, shard_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
INDEX = "model.safetensors.index.json"
JSON_FILES = ("config.json", "generation_config.json", INDEX)
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "tekken.json")
SHOWN = 3  # names in a message
# Sizes that a config.json may state: transformers builds whatever it says, a layer after the other.
LAYERS = Annotated[int, Bounds(1, 2048)]
WIDTH = Annotated[int, Bounds(1, 2**31 - 1)]
SIZES = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), LAYERS),
    **dict.fromkeys(
        ("hidden_size", "n_embd", "num_attention_heads", "n_head", "num_key_value_heads", "head_dim"), WIDTH
    ),
    **dict.fromkeys(("intermediate_size", "vocab_size"), WIDTH),
}


def load_model(path: str | os.PathLike[str], *, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """Load a decoder or a hybrid in eval mode, from safetensors or GGUF; no code of the checkpoint is run.

    Args:
        path: a local folder, the name of a model on the hub, or a .gguf file, whose weights are dequantised.
        dtype: of the weights; "auto" takes the checkpoint's own.

    Raises:
        CheckpointError: a file is missing, truncated or not JSON, config.json asks for code to be run, or a tensor that the
            model needs is not in the checkpoint, is not stored as real numbers, or holds one that is not finite; the message
            names the file or the tensor.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

    check_files(path)
    name = os.fspath(path)
    if is_gguf(path):
        plain, report = load_gguf(path, dtype)
        _check_report(name, report)
        _check_numbers(name, plain)
        return plain.eval()
    options: Any = {"trust_remote_code": False}
    try:
        if not Path(path).is_dir():
            check_config(PreTrainedConfig.get_config_dict(name)[0], f"{name}: config.json")
        config = AutoConfig.from_pretrained(name, **options)
    except HydraError:
        raise
    except Exception as error:  # a config class checks its own values in ways of its own
        raise CheckpointError(
            f"{os.path.join(name, 'config.json')}: not a config that transformers can read ({type(error).__name__}: {error}); give "
            "a folder that save_pretrained wrote, or the name of a model on the hub"
        ) from error
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
        )
    except HydraError as error:  # the surgery in its config.json, which does not know the file
        raise type(error)(f"{name}: {error}") from error
    except Exception as error:
        raise CheckpointError(
            f"{name}: cannot be loaded as a model ({_mismatch(path, config) or f'{type(error).__name__}: {error}'}); give a folder "
            "with config.json and safetensors files, or the name of a model on the hub"
        ) from error
    model, report = loaded
    _check_report(name, report)
    _check_stored(path, model)
    _check_numbers(name, model)
    if (quantiser := method(model)) is not None:
        logger.warning("%s: is quantised by %s; its weights stay so, and what a rewrite adds is plain", name, quantiser)
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
    source: dict[str, Any] = {"pretrained_model_name_or_path": name}
    if is_gguf(path):
        check_gguf(path)
        source = {"pretrained_model_name_or_path": str(Path(path).parent), "gguf_file": Path(path).name}
    if Path(path).is_dir() and not any(next(Path(path).glob(pattern), None) for pattern in TOKENIZER_FILES):
        # transformers would make up an empty tokenizer of the model's family
        raise TokenizerError(f"{name}: holds no tokenizer; save one there with tokenizer.save_pretrained")
    try:
        tokenizer = AutoTokenizer.from_pretrained(**source, trust_remote_code=False)
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
    """Read the headers of a local folder's weights and its JSON files, or of a .gguf file; any other name is the hub's matter.

    Raises:
        CheckpointError: naming the first file that is missing, truncated or not JSON, or asks for code to be run.
    """
    folder, name = Path(path), os.fspath(path)
    if is_gguf(path):
        check_gguf(path)
        return
    if not folder.is_dir():
        if folder.exists() or not HUB_NAME.fullmatch(name):
            raise CheckpointError(
                f"{name}: no such folder; give a folder that save_pretrained wrote, a .gguf file, or a hub name"
            )
        return
    values = {file: _object(folder / file) for file in JSON_FILES if (folder / file).exists()}
    if "config.json" not in values:
        raise CheckpointError(f"{folder / 'config.json'}: missing; give a folder that save_pretrained wrote")
    check_config(values["config.json"], os.fspath(folder / "config.json"))
    _check_sizes(values["config.json"], folder / "config.json")
    for file in _weight_files(folder):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{file}: missing, truncated or not a safetensors file ({error}); copy or save it again"
            ) from error


def _object(file: Path) -> dict[str, Any]:
    value = load_json(file, CheckpointError)
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: holds {shown(value)}, not an object; save the model again")
    return value


def _check_sizes(config: dict[str, Any], file: Path) -> None:
    """What a config and the configs of its parts say of sizes; null and lists, one value a layer, are the model's matter."""
    parts = {
        f"{key}.": part for key, part in config.items() if key.endswith("_config") and key != "quantization_config"
    }
    for place, part in {"": config, **parts}.items():
        for key in sorted(SIZES.keys() & part.keys()) if isinstance(part, dict) else ():
            if not (part[key] is None or isinstance(part[key], list)):
                read_value(SIZES[key], part[key], f"{file}: {place}{key}", CheckpointError)


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers will read."""
    if (folder / "model.safetensors").exists() or not (folder / INDEX).exists():
        return [folder / "model.safetensors"]
    return [folder / file for file in sorted(shard_names(folder / INDEX))]


def _mismatch(path: str | os.PathLike[str], config: Any) -> str:
    """The first tensor whose shape in the files of a folder is not what its config makes it; empty if there is none."""
    from transformers import AutoModelForCausalLM

    folder = Path(path)
    if not folder.is_dir():
        return ""
    try:
        with torch.device("meta"):
            made = {name: list(x.shape) for name, x in AutoModelForCausalLM.from_config(config).state_dict().items()}
        for file in _weight_files(folder):
            with safe_open(file, framework="pt") as tensors:
                found = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
            for name in sorted(found.keys() & made.keys()):
                if found[name] != made[name]:
                    return f"{file.name} holds {name} of shape {found[name]}, but config.json makes it {made[name]}"
    except Exception:  # the config makes no model at all, which is what the caller reports
        return ""
    return ""


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


def _check_stored(path: str | os.PathLike[str], model: PreTrainedModel) -> None:
    """Refuse weights of a folder that are stored as integers, flags or complex numbers: transformers takes them as they are."""
    if not Path(path).is_dir() or getattr(model.config, "quantization_config", None) is not None:
        return
    weights = {name for name, weight in model.named_parameters() if weight.is_floating_point()}
    for file in _weight_files(Path(path)):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                dtype = tensors.get_slice(name).get_dtype()
                if not dtype.startswith(("F", "BF")) and {name, f"{model.base_model_prefix}.{name}"} & weights:
                    raise CheckpointError(
                        f"{file}: {name} is stored as {dtype}, and nothing says how to make weights of that; save the model again"
                    )


def _check_numbers(name: str, model: PreTrainedModel) -> None:
    for key, weight in model.named_parameters():
        plain = weight.dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
        if plain and weight.numel() and type(weight.data) is torch.Tensor:
            low, high = torch.aminmax(weight.detach())  # NaN if there is one
            if not (low.isfinite() and high.isfinite()):
                raise CheckpointError(f"{name}: {key} holds numbers that are not finite; save the model again")


def _some(names: list[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")

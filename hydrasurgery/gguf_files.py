"""GGUF files as models: transformers makes plain weights of them, and the model is an ordinary one afterwards."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hydrasurgery.errors import CheckpointError
from hydrasurgery.quantized import keep_plain

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAGIC = b"GGUF"
PACKAGES = ("gguf", "accelerate")  # that transformers reads such a file with
logger = logging.getLogger(__name__)


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """Whether `path` names a GGUF file, by its ending.

    Example:
        >>> is_gguf("SmolLM2-135M-Instruct.Q4_1.gguf"), is_gguf("models/SmolLM2")
        (True, False)
    """
    return os.fspath(path).lower().endswith(".gguf")


def check_gguf(path: str | os.PathLike[str]) -> Counter[str]:
    """How many tensors the file holds of each type, as in {"Q4_1": 210, "F32": 61}; reads its header only.

    Raises:
        CheckpointError: there is no such file, it is no whole GGUF file, or a package to read it is not installed.
    """
    name = os.fspath(path)
    if not Path(path).is_file():
        raise CheckpointError(f"{name}: no such file; give a .gguf file, or a folder that save_pretrained wrote")
    lacking = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
    if lacking:
        raise CheckpointError(f"{name}: reading it needs {' and '.join(lacking)} (pip install 'hydrasurgery[gguf]')")
    with open(path, "rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise CheckpointError(f"{name}: is called .gguf and is no GGUF file; download it again")
    from gguf import GGUFReader

    try:
        found = GGUFReader(path, "r")
        return Counter(tensor.tensor_type.name for tensor in found.tensors)
    except Exception as error:  # numpy's own errors, where an offset leads out of the file
        raise CheckpointError(
            f"{name}: truncated or not a GGUF file ({type(error).__name__}: {error}); download it again"
        ) from error


def load_gguf(path: str | os.PathLike[str], dtype: torch.dtype | str) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model of a GGUF file, its weights dequantised, and transformers' report of what was missing.

    It no longer calls itself quantised: it can be cast, rewritten, trained, and saved as safetensors.

    Args:
        dtype: of the weights; "auto" is float32, for rounding dequantised numbers once more gains nothing.

    Raises:
        CheckpointError: as `check_gguf`, or transformers cannot read the file's architecture.
    """
    from transformers import AutoModelForCausalLM

    kinds, name, where = check_gguf(path), os.fspath(path), Path(path)
    dtype = torch.float32 if dtype == "auto" else dtype
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(where.parent), gguf_file=where.name, dtype=dtype, output_loading_info=True, trust_remote_code=False
        )
    except Exception as error:  # a file may name any architecture
        raise CheckpointError(
            f"{name}: cannot be loaded as a model ({type(error).__name__}: {error}); convert it to safetensors with the tool it "
            "was made with, or give another file"
        ) from error
    model, report = loaded
    keep_plain(model)
    model.config.name_or_path = model.name_or_path = name
    listed = ", ".join(f"{count} of {kind}" for kind, count in kinds.most_common())
    logger.warning(
        "%s: its tensors (%s) are dequantised to %s, and saved as that", name, listed, str(dtype).removeprefix("torch.")
    )
    return model, report

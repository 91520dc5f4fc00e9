"""Quantised models as teachers: the hybrid's config says what of the hybrid is quantised, and nothing else."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from hydrasurgery.errors import UnsupportedModelError

LEFT_OUT = (
    "modules_to_not_convert",
    "llm_int8_skip_modules",
    "skip_modules",
)  # as quantisers call the list of plain modules


def keep_plain(hybrid: Any) -> None:
    """Make a hybrid's quantization_config tell its plain modules, so that loading quantises no more than was quantised.

    A config that speaks of weights which are not quantised (any more: some methods dequantise when they load) is taken out.

    Raises:
        UnsupportedModelError: the method keeps no list of plain modules.
    """
    config = hybrid.config
    described = getattr(config, "quantization_config", None)
    if described is None:
        return
    if all(map(_is_plain, hybrid.state_dict().values())):
        del config.quantization_config
        hybrid.hf_quantizer, hybrid.is_quantized = None, False
        return
    where = next((key for key in LEFT_OUT if hasattr(described, key)), None)
    if where is None:
        raise UnsupportedModelError(
            f"{type(hybrid).__name__}: is quantised by {method(hybrid)}, whose config has no list of modules that are not; "
            f"dequantise the model first, or load it without quantisation"
        )
    linear = {name: module for name, module in hybrid.named_modules() if type(module) is nn.Linear}
    plain = {
        name.removeprefix(f"{hybrid.base_model_prefix}.") for name, m in linear.items() if _is_plain(m.weight.data)
    }
    setattr(described, where, sorted({*(getattr(described, where) or ()), *plain}))


def method(model: nn.Module) -> str | None:
    """What a model is quantised by, in its config's words; None for any other."""
    described = getattr(getattr(model, "config", None), "quantization_config", None)
    name = getattr(described, "quant_method", None)
    return None if described is None else str(getattr(name, "value", name))


@contextlib.contextmanager
def blaming_quantization(model: nn.Module) -> Iterator[None]:
    """A refusal inside the block names the quantisation of `model`, if it has one."""
    try:
        yield
    except UnsupportedModelError as error:
        if method(model) is None:
            raise
        raise UnsupportedModelError(
            f"{error}; the model is quantised by {method(model)}: dequantise it first, or load it without quantisation"
        ) from error


def _is_plain(weight: Any) -> bool:
    return type(weight) is Tensor and weight.is_floating_point() and weight.element_size() > 1

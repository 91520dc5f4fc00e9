"""Where a hybrid's weights may lie: whole, on one device, since the graph of a region reads them in place."""

from __future__ import annotations

from typing import Any

from torch import nn

from hydrasurgery.errors import UnsupportedModelError

SPLITS = ("tp_plan", "tp_size", "distributed_config", "device_mesh")
TO_DO = "a region's graph reads its weights in place; load the hybrid whole, on one device"


def check_request(name: str, options: dict[str, Any]) -> None:
    """Refuse options of `from_pretrained` that would split or offload the weights of the model class `name`.

    Raises:
        UnsupportedModelError: naming the option.

    Example:
        >>> check_request("Qwen3ForCausalLM", {"device_map": "cpu"})
        >>> check_request("Qwen3ForCausalLM", {"tp_plan": "auto"})
        Traceback (most recent call last):
        ...
        hydrasurgery.errors.UnsupportedModelError: Qwen3ForCausalLM: tp_plan='auto' splits its weights, ...
    """
    for option in SPLITS:
        if options.get(option) is not None:
            raise UnsupportedModelError(f"{name}: {option}={options[option]!r} splits its weights, and {TO_DO}")
    devices = options.get("device_map")
    if isinstance(devices, dict) and (len({str(d) for d in devices.values()}) > 1 or "disk" in devices.values()):
        raise UnsupportedModelError(f"{name}: device_map={devices!r} spreads its weights, and {TO_DO}")


def check_placed(model: nn.Module) -> None:
    """Refuse a model whose weights are split, offloaded or on several devices.

    Raises:
        UnsupportedModelError: naming the module or the parameter.
    """
    name = type(model).__name__
    for path, module in model.named_modules():
        if hasattr(module, "_hf_hook"):
            raise UnsupportedModelError(
                f"{name}: accelerate moves the weights of {path or 'the model'} about (device_map over several devices, or "
                f"offloading), and {TO_DO}"
            )
    devices: dict[Any, str] = {}
    for key, parameter in model.named_parameters():
        if hasattr(parameter, "device_mesh"):  # a DTensor
            raise UnsupportedModelError(f"{name}: {key} is split over a device mesh (a DTensor), and {TO_DO}")
        devices.setdefault(parameter.device, key)
    if len(devices) > 1:
        where = ", ".join(f"{key} on {device}" for device, key in devices.items())
        raise UnsupportedModelError(f"{name}: its weights are on several devices ({where}), and {TO_DO}")

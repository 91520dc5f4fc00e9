"""The transformers attention interface that records attention as `hydra::attention`, and the models that are refused."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import hydrasurgery.dialect.names  # noqa: F401  (registers hydra::attention)
from hydrasurgery.errors import UnsupportedModelError


def register_interface() -> None:
    """Make `attn_implementation="hydra"` known to transformers: attention calls become `hydra::attention`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register("hydra", _interface)
    AttentionMaskInterface.register("hydra", sdpa_mask)


def _interface(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    if kwargs.get("position_bias") is not None:
        raise UnsupportedModelError(f"{type(module).__name__} adds a position bias to its attention: not supported")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    out = torch.ops.hydra.attention(
        query,
        key,
        value,
        attention_mask,
        s_aux,
        scale=scaling,
        causal=causal,
        window=sliding_window or None,
        softcap=softcap,
    )
    return out, None


@contextlib.contextmanager
def using_hydra_attention(model: nn.Module) -> Iterator[None]:
    """For the time of the block a Hugging Face model's attention calls become `hydra::attention`."""
    found: list[Any] = [getattr(m, "config", None) for m in model.modules()]
    configs = {id(config): config for config in found if hasattr(config, "_attn_implementation")}
    before = {key: config._attn_implementation for key, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation = "hydra"
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]


def refuse_known(model: nn.Module) -> None:
    """Raise UnsupportedModelError for the architectures whose attention has no place in the dialect."""
    config = getattr(model, "config", None)
    if config is None:
        return
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    name = type(model).__name__
    if getattr(text, "alibi", False) or text.model_type in ("bloom", "mpt"):
        raise UnsupportedModelError(
            f"{name}: its attention adds ALiBi position biases and bypasses the attention interface; "
            "choose a model with rotary or learned positions"
        )
    if rank := _setting(text, "kv_lora_rank"):
        raise UnsupportedModelError(f"{name}: latent KV attention (MLA, kv_lora_rank={rank}) has no heads to cut")
    if _setting(text, "num_kv_shared_layers") or text.model_type.startswith(("gemma3n", "gemma4")):
        raise UnsupportedModelError(
            f"{name}: layers share one KV cache (num_kv_shared_layers); a head cannot be cut out of one layer"
        )


def _setting(config: Any, name: str) -> Any:
    """A field of a config, of its first layer where layers may differ in it; None without it."""
    try:
        return getattr(config, name, None)
    except Exception:  # transformers' own, which says that there is a value for each layer
        return getattr(config.per_layer_config[0], name, None)

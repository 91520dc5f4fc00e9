"""The transformers attention interface `hydra`: attention is `hydra::attention`, and masks say in O(T) numbers who sees whom.

Captures record attention by the interface `hydra-dense`, whose masks are complete ones [B, 1, T, S].
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import hydrasurgery.dialect.names  # noqa: F401  (registers hydra::attention)
from hydrasurgery.errors import UnsupportedModelError
from hydrasurgery.ir.state import exporting
from hydrasurgery.kernels.attention.reach import OPEN

INTERFACE, CAPTURING = "hydra", "hydra-dense"
DENSE = ("eager", "sdpa")  # implementations of transformers with dense masks


def register_interface() -> None:
    """Make `attn_implementation="hydra"` known to transformers: attention calls become `hydra::attention`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    for name, mask in ((INTERFACE, reach_mask), (CAPTURING, sdpa_mask)):
        AttentionInterface.register(name, _interface)
        AttentionMaskInterface.register(name, mask)


def reach_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Tensor] | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **others: Any,
) -> Tensor | None:
    """What transformers' mask functions say, as a reach mask [B, 1, 1, S + 1] (`hydrasurgery.kernels.attention.reach`).

    The arguments are those of `transformers.masking_utils.sdpa_mask`. None: plain causal attention, the last query on the last
    key. A dense mask [B, 1, T, S] where tokens may see later ones or by a function of the user's own, and in exported graphs,
    which take dense masks.
    """
    # Not `from transformers import masking_utils`: TorchDynamo of PyTorch 2.11 takes no module from a lazy one.
    from transformers.masking_utils import causal_mask_function, or_masks, prepare_padding_mask, sdpa_mask

    function: Any = causal_mask_function if mask_function is None else mask_function
    both_ways = "allow_is_bidirectional_skip" in others or function.__name__ == or_masks().__name__
    if use_vmap or both_ways or exporting():
        return sdpa_mask(
            batch_size,
            q_length,
            kv_length,
            q_offset,  # type: ignore[arg-type]  # as transformers itself calls it
            kv_offset,
            function,
            attention_mask,
            local_size,
            allow_is_causal_skip,
            use_vmap=use_vmap,
            device=device,
            **others,
        )
    first: Any = q_offset - kv_offset
    padding: Any = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    padding = None if padding is None else padding[:, kv_offset : kv_offset + kv_length]
    if allow_is_causal_skip and not isinstance(first, Tensor):
        # A static cache has room for later keys; as long as it is empty, its layers give the new ones alone.
        whole = kv_length == first + q_length or (
            first == 0 and (attention_mask is None or attention_mask.shape[-1] <= q_length)
        )
        # A compiled graph with a window serves lengths on both sides of it.
        short = local_size is None or (not torch.compiler.is_compiling() and kv_length < local_size)
        if whole and short and _all(padding, first + q_length):
            return None
    key = torch.arange(kv_length, device=device)
    reach = torch.full_like(key, OPEN)[None]
    if function is not causal_mask_function:
        reach = _next_start(function, key + kv_offset, batch_size) - kv_offset
    if local_size is not None:
        reach = torch.minimum(reach, key + local_size)
    if padding is not None:
        reach = torch.where(padding, reach, 0)
    place = first.reshape(1, 1) if isinstance(first, Tensor) else torch.full((1, 1), first, device=device)
    whole = torch.cat([reach.expand(batch_size, -1), place.to(reach).expand(batch_size, 1)], dim=1)
    return whole.to(torch.int32)[:, None, None]


def _next_start(function: Callable[..., Tensor], place: Tensor, batch_size: int) -> Tensor:
    """For each key at `place` [S], where the next document starts [B, S]: at the first token that does not see the one before it.

    Every rule that transformers puts together (windows, chunks, packed documents) lets a token see its predecessor, or else none.
    """
    batch = torch.arange(batch_size, device=place.device)[:, None]
    seen: Any = function(batch, torch.zeros_like(batch), place[None], place[None] - 1)
    starts = torch.where(seen.expand(batch_size, -1), OPEN, place)
    following = starts.flip(1).cummin(1).values.flip(1)
    return torch.nn.functional.pad(following[:, 1:], (0, 1), value=OPEN)


def _all(padding: Tensor | None, count: int) -> bool:
    """Whether none of the first `count` keys is padding, as far as one may ask: a traced graph must not depend on it."""
    if padding is None:
        return True
    return not torch.compiler.is_compiling() and bool(padding[:, :count].all())


def use_reach(modules: Iterable[nn.Module]) -> list[tuple[Any, str]]:
    """Let the models that these attention modules are of make reach masks; returns configs that changed, with what they said."""
    found: list[Any] = [getattr(module, "config", None) for module in modules]
    configs = {id(config): config for config in found if getattr(config, "_attn_implementation", None) in DENSE}
    before = [(config, config._attn_implementation) for config in configs.values()]
    for config in configs.values():
        config._attn_implementation = INTERFACE
    return before


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
    """For the time of the block a Hugging Face model's attention calls become `hydra::attention`, with dense masks."""
    found: list[Any] = [getattr(m, "config", None) for m in model.modules()]
    configs = {id(config): config for config in found if hasattr(config, "_attn_implementation")}
    before = {key: config._attn_implementation for key, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation = CAPTURING
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

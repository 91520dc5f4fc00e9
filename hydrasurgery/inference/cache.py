"""Cache layers of a hybrid: the kept KV heads, the convolutions' last inputs, and the recurrent states.

They take the place of the ordinary layers inside a Hugging Face `DynamicCache` or `StaticCache` the first time a region meets
it. transformers has layers for models that are hybrids by design; those hold one convolution per layer and know it by number, where
a region has up to three, or none, and names them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from hydrasurgery.errors import UnsupportedModelError


class States:
    """What every hybrid layer adds to transformers' layers: named states beside the keys and values."""

    is_compileable = False
    is_croppable = False

    states: dict[str, Tensor]
    tokens: int
    heads: Any = None  # the kind and number of each head whose states these are, once a region has met the layer

    def _begin(self) -> None:
        self.states, self.tokens = {}, 0

    def extend(self, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Append keys and values [B, kept KV heads, T, D]; returns those that the columns of `mask` stand for."""
        return self._append(key, value)

    def _append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        held: tuple[Tensor, Tensor] = super().update(key, value)  # type: ignore[misc]
        return held

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """What other attention modules call: they would add keys to heads that are not theirs."""
        raise UnsupportedModelError(
            "the cache holds tokens that a hybrid has seen, and the model that reads it now is none; start a new cache"
        )

    def read(self, name: str) -> Tensor | None:
        """The state called `name`, or None at the start; one that was made in inference mode is copied for use outside of it."""
        state = self.states.get(name)
        if state is None or torch.compiler.is_compiling():  # which cannot ask a tensor where it was made
            return state
        if state.is_inference() and not torch.is_inference_mode_enabled():
            state = self.states[name] = state.clone()
        return state

    def write(self, name: str, value: Tensor) -> None:
        """Keep `value` as the state called `name`."""
        self.states[name] = value

    def first_key(self) -> Tensor | int | None:
        """The mask's column that stands for the next token; None: the tokens of a call stand on the last columns."""
        return None

    def advance(self, count: int, device: torch.device | None = None) -> None:
        """Count tokens that no kept KV head counts."""
        self.tokens += count

    def _map(self, change: Any) -> None:
        self.states = {name: change(state) for name, state in self.states.items()}

    def crop(self, tokens_to_remove: int) -> None:
        """A recurrent state cannot forget its last tokens."""
        if tokens_to_remove != 0:
            raise UnsupportedModelError(
                "a hybrid's cache cannot be cropped: a recurrent state does not give tokens back; "
                "copy the cache before the tokens to be undone (assisted generation is not supported)"
            )


class HybridLayer(States, DynamicLayer):
    """Kept KV heads of growing length, and states of constant size."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._begin()

    def get_seq_length(self) -> int:
        return self.tokens or super().get_seq_length()

    def reset(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False  # else some versions of transformers would keep counting tokens that are zeros now
        super().reset()
        self._begin()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        if self.is_initialized:
            super().reorder_cache(beam_idx)
        self._map(lambda s: s.index_select(0, beam_idx.to(s.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            super().batch_repeat_interleave(repeats)
        self._map(lambda s: s.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_initialized:
            super().batch_select_indices(indices)
        self._map(lambda s: s[indices])


class HybridSlidingLayer(HybridLayer, DynamicSlidingWindowLayer):
    """The same with kept KV heads that see a sliding window."""

    def __init__(self, sliding_window: int) -> None:
        DynamicSlidingWindowLayer.__init__(self, sliding_window)
        self._begin()

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def advance(self, count: int, device: torch.device | None = None) -> None:
        self.cumulative_length += count

    def reset(self) -> None:
        self.cumulative_length = 0
        super().reset()


class HybridStaticLayer(States, StaticLayer):
    """Kept KV heads in a buffer of fixed size, and states, all written in place: tensors keep their addresses for ever.

    The buffers are made by the first call, which should not be compiled. `reset` empties them in place.
    """

    is_compileable = True
    supports_early_init = False  # transformers would make the buffers for the config's number of KV heads

    def __init__(self, max_cache_len: int) -> None:
        StaticLayer.__init__(self, max_cache_len)
        self._begin()

    def _begin(self) -> None:
        super()._begin()
        self.placed = False

    def extend(self, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        self._place(key.device)
        held = self._append(key, value)
        # transformers leaves the mask out only for the first tokens: they see no further than themselves.
        return (key, value) if mask is None else held

    def write(self, name: str, value: Tensor) -> None:
        if name not in self.states:
            self.states[name] = _fixed(torch.zeros_like(value, memory_format=torch.contiguous_format))
        self.states[name].copy_(value)

    def first_key(self) -> Tensor | int | None:
        return self.cumulative_length.clone() if self.placed else 0

    def advance(self, count: int, device: torch.device | None = None) -> None:
        self._place(device)
        self.cumulative_length.add_(count)

    def _place(self, device: torch.device | None) -> None:
        """The counter on the device of what it counts."""
        if not self.placed:
            self.cumulative_length, self.placed = _fixed(self.cumulative_length.to(device)), True

    def get_seq_length(self) -> Any:
        return self.cumulative_length if self.placed else 0

    def reset(self) -> None:
        super().reset()
        for state in self.states.values():
            state.zero_()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        kept = [self.keys, self.values] if self.is_initialized else []
        for x in (*kept, *self.states.values()):
            x.copy_(x.index_select(0, beam_idx.to(x.device)))  # type: ignore[union-attr]


class HybridStaticSlidingLayer(HybridStaticLayer, StaticSlidingWindowLayer):
    """The same with kept KV heads that see a sliding window, whose buffer is no longer than that.

    As in transformers, how many tokens there are is a number too, for the mask's size depends on it.
    """

    def __init__(self, window: int) -> None:
        StaticSlidingWindowLayer.__init__(self, max_cache_len=window, sliding_window=window)
        self._begin()

    def first_key(self) -> Tensor | int | None:
        return self.max_cache_len - 1 if self.cumulative_length_int >= self.max_cache_len else super().first_key()

    def advance(self, count: int, device: torch.device | None = None) -> None:
        super().advance(count, device)
        self.cumulative_length_int += count

    def get_seq_length(self) -> int:
        return self.cumulative_length_int


def _fixed(x: Tensor) -> Tensor:
    """x, whose address compiled code may rely on."""
    if not torch.compiler.is_compiling():
        torch._dynamo.mark_static_address(x)
    return x


def layer_state(cache: Any, module: Any) -> States | None:
    """The cache layer of a region's module in `cache`, put in place on first use; None without a cache.

    Raises:
        UnsupportedModelError: for a cache that holds tokens of another model, or that a hybrid cannot fill.
    """
    if cache is None:
        return None
    cache = getattr(cache, "self_attention_cache", cache)  # an encoder-decoder's is two in one
    _check_kind(cache)
    index: int = module.layer_idx
    while len(cache.layers) <= index:
        cache.layers.append(HybridLayer())
    layer = cache.layers[index]
    if not isinstance(layer, States):
        layer = cache.layers[index] = _in_place_of(layer, index)
    heads = (module.region.kinds, module.region.teacher_heads)
    if layer.heads is None:
        layer.heads = heads
    elif layer.heads != heads:
        raise UnsupportedModelError(
            f"layer {index}: the cache holds tokens of a hybrid with other linear heads; start a new one"
        )
    return layer


def _check_kind(cache: Any) -> None:
    name = type(cache).__name__
    if not isinstance(cache, Cache):
        raise UnsupportedModelError(
            f"a {name} is no cache that a hybrid can fill; give a DynamicCache or a StaticCache"
        )
    if cache.offloading:
        raise UnsupportedModelError(
            f"the {name} offloads its layers, which a hybrid's layers cannot do; give one without offloading"
        )


def _in_place_of(layer: Any, index: int) -> States:
    """Our layer for one of transformers' that has seen no token."""
    kind = type(layer)
    if kind not in _OURS:
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            raise UnsupportedModelError(
                f"layer {index}: the model keeps a {kind.__name__} there, whose states a hybrid cannot replace; "
                "models with state-space or linear layers of their own run without a cache only (use_cache=False)"
            )
        raise UnsupportedModelError(
            f"layer {index}: the cache has a {kind.__name__} there, which a hybrid cannot fill; "
            "give a DynamicCache or a StaticCache"
        )
    if layer.get_seq_length():
        raise UnsupportedModelError(
            f"layer {index}: the cache holds tokens that this hybrid has not seen; start a new one"
        )
    return _OURS[kind](layer)


def replaceable(layer: Any) -> bool:
    """Whether a hybrid's layer can take the place of this one of transformers."""
    return type(layer) in _OURS


def own_layers(config: Any) -> list[Any]:
    """The layers of the cache that transformers makes for a model of this config; empty where it tells none in advance."""
    try:
        return list(DynamicCache(config=config).layers)
    except Exception:  # a config without the fields that say so
        return []


_OURS: dict[type, Callable[[Any], States]] = {
    DynamicLayer: lambda old: HybridLayer(),
    DynamicSlidingWindowLayer: lambda old: HybridSlidingLayer(old.sliding_window),
    StaticLayer: lambda old: HybridStaticLayer(old.max_cache_len),
    StaticSlidingWindowLayer: lambda old: HybridStaticSlidingLayer(old.max_cache_len),
}

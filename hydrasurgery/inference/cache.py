"""Cache layers of a hybrid: the kept KV heads, the convolutions' last inputs, and the recurrent states.

They take the place of the ordinary layers inside a Hugging Face `DynamicCache` the first time a region meets it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from hydrasurgery.errors import UnsupportedModelError


class _States:
    """What both hybrid layers add to transformers' layers: named states beside the keys and values."""

    is_compileable = False
    is_croppable = False

    states: dict[str, Tensor]
    tokens: int

    def _begin(self) -> None:
        self.states, self.tokens = {}, 0

    def advance(self, count: int) -> None:
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


class HybridLayer(_States, DynamicLayer):
    """Kept KV heads of growing length, and states of constant size."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._begin()

    def get_seq_length(self) -> int:
        return self.tokens or super().get_seq_length()

    def reset(self) -> None:
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

    def advance(self, count: int) -> None:
        self.cumulative_length += count

    def reset(self) -> None:
        self.cumulative_length = 0
        super().reset()


def layer_state(cache: Any, module: nn.Module) -> HybridLayer | None:
    """The cache layer of a region's module in `cache`, put in place on first use; None without a cache.

    Raises:
        UnsupportedModelError: for a static cache, or one that already holds tokens of another model.
    """
    if cache is None:
        return None
    index: int = module.layer_idx  # type: ignore[assignment]
    while len(cache.layers) <= index:
        cache.layers.append(HybridLayer())
    layer = cache.layers[index]
    if not isinstance(layer, HybridLayer):
        if isinstance(layer, StaticLayer):
            raise UnsupportedModelError(f"layer {index}: hybrids take a dynamic cache, not a {type(layer).__name__}")
        if layer.get_seq_length():
            raise UnsupportedModelError(
                f"layer {index}: the cache holds tokens that this hybrid has not seen; start a new one"
            )
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise UnsupportedModelError(
                f"layer {index}: the model keeps a {type(layer).__name__} there, whose states a hybrid cannot replace; "
                "models with state-space or linear layers of their own run without a cache only (use_cache=False)"
            )
        sliding = isinstance(layer, DynamicSlidingWindowLayer)
        layer = cache.layers[index] = HybridSlidingLayer(layer.sliding_window) if sliding else HybridLayer()
    return layer


def cache_bytes(cache: Any) -> int:
    """Bytes that a cache holds: keys, values and states."""
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values, *getattr(layer, "states", {}).values())]
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))

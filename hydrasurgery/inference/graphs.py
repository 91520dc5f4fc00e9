"""Decoding by CUDA graphs: what `generate` runs for each token after the first, launched as one.

A hybrid's step is a thousand launches of a few microseconds each, which PyTorch takes longer to ask for than a card to do. A graph
asks once. It holds addresses, so caches are static ones, and one is captured for every call of `generate`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from transformers.cache_utils import StaticLayer

SHARE = 0.5  # of the free memory, that a static cache may take unasked
CHUNK = 1 << 15  # tokens of a prompt that are computed at once
WINDOWS = "layers with a sliding window keep a count on the host"
ASKED = ("output_attentions", "output_hidden_states", "output_router_logits")  # kept by the caller, and not only read


class StepGraph:
    """Calls a model; from the second call for a single token on, replays what the second one did.

    The first one runs as it is, so that kernels are compiled and buffers made. A call that is not like the captured one (other
    shapes, other arguments that are no tensors) runs as it is too.
    """

    def __init__(self, model: Callable[..., Any]) -> None:
        self.model = model
        self.graph: torch.cuda.CUDAGraph | None = None
        self.like: Any = None
        self.inputs: list[Tensor] = []
        self.output: Any = None
        self.able = True

    def __call__(self, **inputs: Any) -> Any:
        """As the model; logits are overwritten by the next call."""
        ids = inputs.get("input_ids")
        if not self.able or ids is None or ids.shape[1] != 1 or any(inputs.get(name) for name in ASKED):
            return self.model(**inputs)
        cache = inputs.pop("past_key_values", None)
        leaves, form = pytree.tree_flatten(inputs)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        others = [leaf for leaf in leaves if not isinstance(leaf, Tensor)]
        like = (id(cache), form, others, [(x.shape, x.dtype, x.device) for x in tensors])
        if self.like != like:
            self.like, self.graph = like, None
            return self.model(**inputs, past_key_values=cache)
        if self.graph is None and not self._capture(leaves, form, cache):
            return self.model(**inputs, past_key_values=cache)
        for held, given in zip(self.inputs, tensors, strict=True):
            held.copy_(given)
        assert self.graph is not None
        self.graph.replay()
        return self.output

    def _capture(self, leaves: list[Any], form: Any, cache: Any) -> bool:
        held = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                output = self.model(**pytree.tree_unflatten(held, form), past_key_values=cache)
        except Exception as error:  # whatever a model's own code does that a graph cannot hold
            self.able = False
            lines = str(error).strip().splitlines() or [type(error).__name__]
            say(f"the step could not be captured ({lines[0][:200]})")
            return False
        self.graph, self.output = graph, output
        self.inputs = [leaf for leaf in held if isinstance(leaf, Tensor)]
        return True


def why_not(model: Any, batch: int, length: int) -> str | None:
    """Why `generate` on CUDA does not decode by graphs with a cache of `batch` rows and `length` tokens; None if it does.

    Args:
        model: a hybrid.
        batch, length: of the cache.
    """
    from hydrasurgery.inference.cache import own_layers
    from hydrasurgery.ir.stitch import region_modules

    if reason := _never(model):
        return reason
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        return "the model lies on several devices"
    if any(getattr(layer, "is_sliding", False) for layer in own_layers(model.config.get_text_config(decoder=True))):
        return WINDOWS
    regions = [module.region for module in region_modules(model).values()]
    numbers = sum(region.kept_key_value_heads * (region.head_dim + region.value_dim) for region in regions)
    needed = numbers * batch * length * model.dtype.itemsize
    held = torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
    free = torch.cuda.mem_get_info(model.device)[0] + held
    if needed > SHARE * free:
        return (
            f"a cache for all {length:,} tokens that may come takes {needed / 2**30:.1f} of {free / 2**30:.1f} GiB; give a smaller "
            "max_new_tokens, or cache_implementation='static'"
        )
    return None


def why_not_with(model: Any, cache: Any) -> str | None:
    """Why `generate` with this cache, which transformers would compile for, does not decode by graphs; None if it does."""
    if reason := _never(model):
        return reason
    layers = getattr(cache, "layers", [])
    if not (layers and all(isinstance(layer, StaticLayer) and not layer.is_sliding for layer in layers)):
        return WINDOWS
    return None


def _never(model: Any) -> str | None:
    """What no cache changes."""
    if torch.is_autocast_enabled("cuda"):
        return "autocast is on, which casts weights anew at every step; call model.to(torch.bfloat16) instead"
    hooks = (
        hook
        for module in model.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    )
    if any(not str(getattr(hook, "__module__", "")).startswith("transformers.") for hook in hooks):
        return "the model has forward hooks, which a graph would not run"
    return None


_said: set[str] = set()


def say(reason: str) -> None:
    """Warn, once, that tokens are decoded without graphs."""
    if reason not in _said:
        _said.add(reason)
        warnings.warn(f"generate decodes without CUDA graphs: {reason}", RuntimeWarning, stacklevel=2)

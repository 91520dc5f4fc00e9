"""Exports of attention modules that the tests share: most of the time of a capture, and the same for models that differ in weights.

A module is exported anew where anything about it is out of the ordinary: code or hooks of the object's own, or a
function that its forward names and that a test has patched.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hydrasurgery.ir import capture

_ALIVE: dict[int, Any] = {}  # so that no other object gets the id of one of these
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")


class SharedExports:
    """`capture._export` with a memory."""

    def __init__(self) -> None:
        self.export: Callable[..., Any] = capture._export
        self.known: dict[Any, Any] = {}

    def __call__(self, name: str, owner: nn.Module, kwargs: dict[str, Any]) -> Any:
        if any("forward" in vars(m) or any(getattr(m, hooks) for hooks in HOOKS) for m in owner.modules()):
            return self.export(name, owner, kwargs)
        key = (capture._shape_key(owner, kwargs), _code(owner), _config(owner), _given(owner, kwargs))
        if key not in self.known:
            self.known[key] = self.export(name, owner, kwargs)
        graph, inputs = self.known[key]
        return copy.deepcopy(graph), inputs


def _code(owner: nn.Module) -> tuple[Any, ...]:
    """The functions that a module's own and its classes' files define or name, as they are now: a test may have patched one."""
    found = []
    for kind in {type(m) for m in owner.modules()}:
        if not kind.__module__.startswith("torch."):
            names = kind.forward.__globals__
            found += [kind.forward, *(names[n] for n in kind.forward.__code__.co_names if n in names)]
    _ALIVE.update((id(thing), thing) for thing in found)
    return tuple(sorted(map(id, found)))


def _config(owner: nn.Module) -> tuple[Any, ...]:
    configs = [config for m in owner.modules() if (config := getattr(m, "config", None)) is not None]
    return tuple((str(config), getattr(config, "_attn_implementation", None)) for config in configs)


def _given(owner: nn.Module, kwargs: dict[str, Any]) -> tuple[Any, ...]:
    leaves, spec = pytree.tree_flatten(kwargs)
    tensors = [*owner.parameters(), *owner.buffers(), *(leaf for leaf in leaves if isinstance(leaf, Tensor))]
    plain = tuple(repr(leaf) for leaf in leaves if not isinstance(leaf, Tensor))
    facts = tuple((tuple(x.shape), x.stride(), x.dtype, x.device, type(x)) for x in tensors)
    return spec, plain, facts, torch.get_default_dtype(), torch.is_inference_mode_enabled()

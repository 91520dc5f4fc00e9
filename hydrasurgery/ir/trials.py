"""Trials: on a few random tokens a captured attention module must do what a region, with a cache of keys and values, can do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from hydrasurgery.dialect.names import ATTENTION
from hydrasurgery.dialect.tokens import may_attend
from hydrasurgery.errors import UnsupportedModelError
from hydrasurgery.ir.outline import LENGTH
from hydrasurgery.ir.region import Region

FEW = 7  # tokens of the shorter calls
LATER = 4  # where a shorter call begins that is not at the start
NEAR = {torch.float16: 1e-2, torch.bfloat16: 5e-2}  # rounding, of the largest number; else 1e-3


def try_out(region: Region, owner: nn.Module, call: dict[str, Any]) -> None:
    """Refuse a module that a region cannot stand for.

    Args:
        region: as captured, before any pass.
        owner: the module it was cut from.
        call: arguments of `owner`, without a cache; every dimension of `LENGTH` counts tokens.

    Raises:
        UnsupportedModelError: naming the module and what it does: it asks its cache for more than to append keys and values, lets
            a token see a later one, takes another way for other tokens, or counts or mixes tokens outside of its attention.
    """
    tensors = (*owner.parameters(), *owner.buffers(), *(x for x in pytree.tree_leaves(call) if isinstance(x, Tensor)))
    if any(tensor.is_meta for tensor in tensors):
        return  # an empty model has no numbers; it is tried when it has
    if region.inputs.cache is not None:
        _asks_only_to_append(region, owner, call)
    call = _on_random_tokens(region, call)
    _is_what_its_graph_is(region, owner, call)
    _sees_no_later_token(region, owner, call)
    if region.inputs.cache is not None:
        _takes_each_token_by_itself(region, call)


class _AskedCache:
    """A cache that is empty for ever and refuses all but to append."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._layers: list[Any] = []

    def update(self, key: Tensor, value: Tensor, layer_idx: Any, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self._layers.append(layer_idx)
        return key, value

    def __getattr__(self, asked: str) -> Any:
        if asked.startswith("__"):
            raise AttributeError(asked)
        raise UnsupportedModelError(
            f"{self._name} asks its cache for {asked} on the way to its attention, which a region cannot; only models whose "
            "attention appends keys and values, and takes positions from its call, are supported"
        )


def _asks_only_to_append(region: Region, owner: nn.Module, call: dict[str, Any]) -> None:
    cache = _AskedCache(region.name)
    with torch.no_grad():
        owner(**{**call, str(region.inputs.cache): cache})
    index = getattr(owner, "layer_idx", None)
    if cache._layers != [index] or not isinstance(index, int) or index < 0:
        raise UnsupportedModelError(
            f"{region.name} appends to the cache's layers {cache._layers} and is layer {index}; a region is one layer of the cache"
        )


def _on_random_tokens(region: Region, call: dict[str, Any]) -> dict[str, Any]:
    """The call with hidden states that differ from token to token."""
    given: Tensor = call[_hidden(region)]
    numbers = torch.randn(given.shape, generator=torch.Generator().manual_seed(0)).to(given.device, given.dtype)
    return _with_hidden(region, call, numbers)


def _with_hidden(region: Region, call: dict[str, Any], states: Tensor) -> dict[str, Any]:
    """The call with other hidden states, wherever it gives them."""
    given = call[_hidden(region)]
    return {key: states if value is given else value for key, value in call.items()}


def _hidden(region: Region) -> str:
    """The name of the argument that is the hidden states."""
    return next(str(path[0]) for name, path in region.inputs.paths if name == region.source.target)


def _part(call: dict[str, Any], start: int, length: int) -> dict[str, Any]:
    """The call for so many of its tokens."""

    def cut(x: Tensor) -> Tensor:
        for dim, size in enumerate(x.shape):
            if size == LENGTH:
                x = x.narrow(dim, start, length)
        return x.contiguous()

    return pytree.tree_map_only(Tensor, cut, call)


@torch.no_grad()
def _tokens(region: Region, run: Callable[..., Any], call: dict[str, Any]) -> Tensor:
    """What `run` gives for each token: the first tensor of its results, [B, T, ...]."""
    try:
        results = pytree.tree_leaves(run(**call))
    except UnsupportedModelError:
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"{region.name} fails on other tokens, or fewer, than it was captured with ({type(error).__name__}: {error})"
        ) from error
    return next(x for x in results if isinstance(x, Tensor)).nan_to_num()


def _differ(one: Tensor, other: Tensor, call: dict[str, Any]) -> bool:
    """Whether results [B, T, ...] differ by more than rounding at a token that sees something."""
    if one.shape != other.shape:
        return True
    near = NEAR.get(other.dtype, 1e-3) * max(float(other.abs().max()), 1e-3)
    apart = (one - other).abs()
    return float(apart.masked_fill(_blind(call, apart), 0).max()) > near


def _blind(call: dict[str, Any], results: Tensor) -> Tensor:
    """True where results [B, T, ...] are of tokens that a mask lets attend to nothing: what they get is their kernel's affair."""
    blind = torch.zeros_like(results, dtype=torch.bool)
    for x in pytree.tree_leaves(call):
        if isinstance(x, Tensor) and x.ndim == 4 and (x.dtype == torch.bool or x.is_floating_point()):
            rows = ~may_attend(x).any(-1).any(1)[:, : results.shape[1]]  # [B or 1, T]
            if rows.shape[1] == results.shape[1] and rows.shape[0] in (1, results.shape[0]):
                blind |= rows.view(*rows.shape, *[1] * (results.ndim - 2)).to(results.device)
    return blind


def _is_what_its_graph_is(region: Region, owner: nn.Module, call: dict[str, Any]) -> None:
    fewer = _part(call, 0, FEW)
    if _differ(_tokens(region, region.module, fewer), _tokens(region, owner, fewer), fewer):
        raise UnsupportedModelError(
            f"{region.name} was captured as something else than it is: on other tokens, or fewer, its code goes another way"
        )


def _sees_no_later_token(region: Region, owner: nn.Module, call: dict[str, Any]) -> None:
    for first in (LATER, FEW):
        changed = call[_hidden(region)].clone()
        changed[:, first:] = changed[:, first:].flip(-1)
        before, after = (
            _tokens(region, owner, given)[:, :first] for given in (call, _with_hidden(region, call, changed))
        )
        if _differ(after, before, call):
            raise UnsupportedModelError(
                f"{region.name} attends in both directions: a token sees later ones, by its mask or in code of its own; only "
                "decoders are supported"
            )


class _WithoutAttention(fx.Interpreter):
    """Runs a region's graph with something in the attention's place that takes each token by itself."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target != ATTENTION:
            return super().call_function(target, args, kwargs)
        q, k, v = args[:3]
        v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
        return (v + q.mean(-1, keepdim=True) + k.mean((1, 3), keepdim=True)).transpose(1, 2).contiguous()


def _takes_each_token_by_itself(region: Region, call: dict[str, Any]) -> None:
    def run(**given: Any) -> Any:
        return _WithoutAttention(region.module, graph=region.graph).run(*region.inputs.flatten(given))

    whole, last = (_tokens(region, run, given) for given in (call, _part(call, LATER, FEW)))
    if _differ(last, whole[:, LATER : LATER + FEW], {}):
        raise UnsupportedModelError(
            f"{region.name} mixes tokens, or counts them, outside of its attention: what it does to a token depends on those "
            "before it, which a cache of keys and values does not hold"
        )

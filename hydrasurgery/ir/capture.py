"""Capture: find the attention modules of a decoder in a run on a tiny input, and export each as a region."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from hydrasurgery.decoders import evaluating, takes
from hydrasurgery.dialect.names import ATTENTION
from hydrasurgery.errors import UnsupportedModelError
from hydrasurgery.inference.cache import own_layers, replaceable
from hydrasurgery.ir.interface import refuse_known, using_hydra_attention
from hydrasurgery.ir.outline import BATCH, CACHE_ARGUMENTS, LENGTH, free_device, free_dtype, outline
from hydrasurgery.ir.raising import raise_attention
from hydrasurgery.ir.region import Inputs, Region, RegionModule
from hydrasurgery.ir.stitch import region_modules
from hydrasurgery.ir.trials import try_out
from hydrasurgery.ir.turns import in_turn
from hydrasurgery.quantized import blaming_quantization


@in_turn
def capture(model: nn.Module, example_inputs: Any = None) -> list[Region]:
    """Cut out every attention module of `model` as a region; `model` itself is left as it was.

    Args:
        model: a Hugging Face decoder, or an nn.Module that calls `F.scaled_dot_product_attention`.
        example_inputs: for a plain module, what its forward takes (a tensor or a dict); by default token ids [2, 11].

    Returns:
        A region a layer, in the order in which the layers run.

    Raises:
        UnsupportedModelError: naming the module and the reason.

    Example:
        >>> import hydrasurgery as hs
        >>> from hydrasurgery.demo.teacher import load_teacher
        >>> regions = hs.capture(load_teacher()[0])
        >>> len(regions), regions[0]
        (8, <region model.layers.0.self_attn: 16 heads (0 linear), 8 KV heads of 16>)
    """
    refuse_known(model)
    if region_modules(model):
        raise UnsupportedModelError(
            f"{type(model).__name__} is a hybrid already; pass the teacher it was made from, or hydrasurgery.restore it"
        )
    with blaming_quantization(model), evaluating(model), using_hydra_attention(model), _unchanged(model):
        watch = _run_once(model, example_inputs)
        _check_owners(model, watch)
        cuts: dict[Any, tuple[fx.Graph, Inputs]] = {}
        regions = []
        for name, owner, args, kwargs in watch.attention:
            kwargs = _plain_call(owner, args, kwargs)
            key = _shape_key(owner, kwargs)
            first = key not in cuts
            if first:
                cuts[key] = _export(name, owner, kwargs)
                raise_attention(name, cuts[key][0])
                free_dtype(cuts[key][0])
                free_device(cuts[key][0])
            regions.append(_region(name, owner, *cuts[key]))
            if first:
                try_out(regions[-1], owner, kwargs)
        _check_cache(model, regions)
    return regions


@contextlib.contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """After the block the modules have the attributes, buffers and hooks they had.

    A rotary embedding may keep tables of the run, on its device; a config that asks for hidden states has hooks installed.
    """
    attributes = [vars(module) for module in model.modules()]
    held = [value for each in attributes for value in each.values() if isinstance(value, dict)]
    before = [(now, dict(now)) for now in (*attributes, *held)]
    try:
        yield
    finally:
        for now, then in before:
            for key in now.keys() - then.keys():
                del now[key]
            now.update(then)


class _Watch(TorchFunctionMode):
    """Notes which module is innermost when attention, or a bare softmax, is called."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[tuple[str, nn.Module, tuple[Any, ...], dict[str, Any]]] = []
        self.attention: list[tuple[str, nn.Module, tuple[Any, ...], dict[str, Any]]] = []
        self.softmax: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.stack:
            if func in (torch.nn.functional.scaled_dot_product_attention, torch.ops.hydra.attention):
                self.attention.append(self.stack[-1])
            elif func in (torch.softmax, torch.nn.functional.softmax, Tensor.softmax):
                self.softmax.append(self.stack[-1][0])
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _watched(model: nn.Module) -> Iterator[_Watch]:
    """Hooks that keep the stack of running modules, with the arguments each was called with."""
    watch, handles = _Watch(), []
    for name, module in model.named_modules():

        def enter(m: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
            watch.stack.append((name, m, args, kwargs))

        def leave(m: nn.Module, args: Any, output: Any) -> None:
            watch.stack.pop()

        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        with watch:
            yield watch
    finally:
        for handle in handles:
            handle.remove()


def _tiny_input(model: nn.Module, two_dimensional: bool) -> dict[str, Any]:
    device = next(model.parameters()).device
    ids = torch.ones(BATCH, LENGTH, dtype=torch.long, device=device)
    if not hasattr(model, "config"):
        return {"input": ids}
    if two_dimensional:
        mask = torch.ones_like(ids)
        if device.type != "meta":
            mask[0, :3] = 0  # left padding, so that the model hands a mask to its attention
    else:
        mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool, device=device).tril().expand(BATCH, 1, -1, -1)
    return {"input_ids": ids, "attention_mask": mask, "use_cache": False}


def _run_once(model: nn.Module, example: Any) -> _Watch:
    if example is not None:
        attempts = [example if isinstance(example, dict) else {"input": example}]
    else:
        empty = next(model.parameters()).is_meta  # masks of two dimensions are looked into, which has no values then
        attempts = [_tiny_input(model, two_dimensional) for two_dimensional in (not empty, empty)]
    failure: Exception | None = None
    for inputs in attempts:
        try:
            with _watched(model) as watch, torch.no_grad():
                model(inputs["input"]) if "input" in inputs else model(**inputs)
            return watch
        except UnsupportedModelError:
            raise
        except Exception as error:
            failure = error
    if next(model.parameters()).is_meta:  # some models read values on the way (routing, positions): give them zeros
        return _run_twin(model, example)
    raise UnsupportedModelError(
        f"{type(model).__name__} could not be run on a tiny input ({type(failure).__name__}: {failure}); "
        "pass example_inputs=..., what its forward takes"
    ) from failure


def _run_twin(model: nn.Module, example: Any) -> _Watch:
    """Run a copy of an empty model on zeros, and note its attention calls as calls of `model` itself."""
    twin = copy.deepcopy(model).to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*twin.parameters(), *twin.buffers()):
            tensor.zero_()
    with torch.device("cpu"):  # a loader may make new tensors without values
        watch = _run_once(twin, example)
    watch.attention = [
        (name, model.get_submodule(name), *pytree.tree_map_only(Tensor, lambda t: t.to("meta"), (args, kwargs)))
        for name, _, args, kwargs in watch.attention
    ]
    return watch


def _check_owners(model: nn.Module, watch: _Watch) -> None:
    names = [name for name, *_ in watch.attention]
    if not names:
        seen = f"; {watch.softmax[0]} computes softmax in code of its own" if watch.softmax else ""
        raise UnsupportedModelError(
            f"{type(model).__name__}: no call of an attention op was seen{seen}. It has no attention, or bypasses the "
            "attention interface"
        )
    for name in dict.fromkeys(names):
        if names.count(name) > 1:
            raise UnsupportedModelError(
                f"{name} calls attention {names.count(name)} times; a region holds exactly one call"
            )
    kinds = {type(owner) for _, owner, *_ in watch.attention}
    all_owners = [name for name, module in model.named_modules() if type(module) in kinds]
    missing = sorted(set(all_owners) - set(names))
    if missing:
        raise UnsupportedModelError(
            f"{missing[0]} is an attention module that makes no attention call when the model reads tokens alone "
            "(cross attention?): not supported"
        )


def _check_cache(model: nn.Module, regions: list[Region]) -> None:
    """Every region must have a layer of the model's cache to itself, and one that a hybrid's can take the place of."""
    if not hasattr(model, "config") or not (takes(model, "past_key_values") or takes(model, "use_cache")):
        return
    own = own_layers(model.config)
    seen: dict[int, str] = {}
    for region in regions:
        if region.inputs.cache is None:
            raise UnsupportedModelError(
                f"{region.name} takes no cache, though the model has one: what it keeps of earlier tokens is not known"
            )
        index: int = region.module.layer_idx  # type: ignore[assignment]
        if index in seen:
            raise UnsupportedModelError(f"{region.name} and {seen[index]} are both layer {index} of the cache")
        seen[index] = region.name
        if index < len(own) and not replaceable(own[index]):
            raise UnsupportedModelError(
                f"{region.name}: the model keeps a {type(own[index]).__name__} there, attention and other states in one, "
                "which a hybrid cannot replace"
            )


def _plain_call(owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The call's arguments by name, caches dropped."""
    names = [p.name for p in inspect.signature(owner.forward).parameters.values() if p.kind == p.POSITIONAL_OR_KEYWORD]
    bound = {**dict(zip(names, args, strict=False)), **kwargs}
    return {k: None if k in CACHE_ARGUMENTS else v for k, v in bound.items()}


def _shape_key(owner: nn.Module, kwargs: dict[str, Any]) -> Any:
    """Two modules of one key have the same graph: the same classes, settings, shapes and arguments."""
    by_layer = getattr(owner, "scale_attn_by_inverse_layer_idx", False)
    modules = tuple((name, type(module), _settings(module, by_layer)) for name, module in owner.named_modules())
    tensors = (*owner.named_parameters(), *owner.named_buffers())
    shapes = tuple((n, tuple(t.shape), t.dtype) for n, t in tensors)
    call = tuple((k, v is None) for k, v in kwargs.items())
    return modules, shapes, call


def _settings(module: nn.Module, by_layer: bool) -> tuple[tuple[str, str], ...]:
    """A module's attributes that are plain values, which its graph may hold as constants."""
    plain = (bool, int, float, str, type(None), tuple, list, torch.dtype)
    left_out = () if by_layer else ("layer_idx",)
    return tuple((k, repr(v)) for k, v in vars(module).items() if isinstance(v, plain) and k not in left_out)


class _OneArgument(nn.Module):
    """Calls `owner` with a dict of arguments: export then sees one tree of inputs, whatever the signature is."""

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        self.owner = owner

    def forward(self, call: dict[str, Any]) -> Any:
        return self.owner(**call)


def _export(name: str, owner: nn.Module, kwargs: dict[str, Any]) -> tuple[fx.Graph, Inputs]:
    sizes = torch.export.ShapesCollection()
    for leaf in pytree.tree_leaves(kwargs):
        if isinstance(leaf, Tensor):
            dynamic = {i: torch.export.Dim.AUTO for i, n in enumerate(leaf.shape) if n in (BATCH, LENGTH)}
            if dynamic:
                sizes[leaf] = dynamic
    try:
        # Fake tensors are remembered for a second trace, which does not come: a third of the time.
        with torch.no_grad(), torch._dynamo.config.patch(fake_tensor_cache_enabled=False):
            root = _OneArgument(owner).eval()
            shapes = sizes.dynamic_shapes(root, (kwargs,))
            program = torch.export.export(root, (kwargs,), strict=False, dynamic_shapes=shapes)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise UnsupportedModelError(f"{name} ({type(owner).__name__}) cannot be exported: {reason}") from error
    return outline(name, owner, program, kwargs)


def _region(name: str, owner: nn.Module, graph: fx.Graph, inputs: Inputs) -> Region:
    node = next(n for n in graph.nodes if n.target == ATTENTION)
    q, k, v = (a.meta["shape"] for a in node.args[:3])
    if q[3] != v[3]:
        raise UnsupportedModelError(
            f"{name}: keys of width {q[3]} and values of width {v[3]} (latent attention) are not supported"
        )
    variant = {key: node.kwargs.get(key) for key in ("window", "softcap")}
    sinks = len(node.args) > 4 and node.args[4] is not None
    region = Region(name, RegionModule(owner), q[1], k[1], q[3], v[3], inputs, **variant, sinks=sinks)
    region.graph = copy.deepcopy(graph)
    return region

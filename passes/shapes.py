"""What each node of a region gives, found on fake tensors whose batch B and length T are symbols."""

from __future__ import annotations

from collections.abc import Callable
from types import NoneType
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils import _pytree as pytree

from hydrasurgery.ir.region import Region
from hydrasurgery.passes.numerics import input_dtype

SYMBOLS = {
    "B": (5, "batch size"),
    "T": (13, "number of tokens"),
}  # what counts where code asks for a number, and what it is


class ShapeInference:
    """Fake runs of regions. Equal nodes are run once, however many layers and models have them and however often they come back.

    Example:
        >>> from hydrasurgery.demo.teacher import load_teacher
        >>> from hydrasurgery.dialect.names import ATTENTION
        >>> from hydrasurgery.ir.capture import capture
        >>> region = capture(load_teacher()[0])[0]
        >>> ShapeInference().infer(region)
        >>> region.find(ATTENTION)[0].meta["shape"]
        ('B', 'T', 16, 16)
    """

    _shared: ClassVar[dict[Any, ShapeInference]] = {}
    _LARGE = 10_000  # what it may know before it begins anew

    @classmethod
    def shared(cls) -> ShapeInference:
        """The process's own, of the defaults and modes that are set now: what a run of passes has found serves the next."""
        set_now = (torch.get_default_dtype(), torch.get_default_device(), torch.is_inference_mode_enabled())
        casts = tuple(torch.is_autocast_enabled(d) and torch.get_autocast_dtype(d) for d in ("cpu", "cuda"))
        known = cls._shared.get((set_now, casts))
        if known is None or known._failed or len(known._known) > cls._LARGE:
            known = cls._shared[set_now, casts] = cls()
        return known

    def __init__(self) -> None:
        self._failed = False  # a symbol may have become a number
        self._env = ShapeEnv()
        self._mode = FakeTensorMode(shape_env=self._env, allow_non_fake_inputs=True)
        self._mode.cache_enabled = False  # results are remembered here, by node
        self._sizes = {name: self._symbol(name, hint) for name, (hint, _) in SYMBOLS.items()}
        self._names = {str(size.node.expr): name for name, size in self._sizes.items()}
        self._known: dict[Any, Any] = {}
        self._keys: dict[int, Any] = {}

    def _symbol(self, name: str, hint: int) -> torch.SymInt:
        from torch._dynamo.source import ConstantSource  # loads dynamo, which nothing else here needs

        source = ConstantSource(name)
        symbol = self._env.create_symbol(hint, source, DimDynamic.DYNAMIC)
        size: Any = self._env.create_symintnode(symbol, hint=hint, source=source)
        return size

    def infer(self, region: Region) -> None:
        """Run the graph; each node's value goes to `meta["val"]` and a tensor's shape, symbols by name, to `meta["shape"]`.

        Raises:
            ValueError: the graph holds only for one batch size or one length.
            Exception: what a node raises.
        """
        values: dict[fx.Node, Any] = {}
        try:
            with enable_python_dispatcher(), self._mode, torch.no_grad():  # C++ would take the hints for sizes
                for node in region.graph.nodes:
                    if node.op == "output":
                        continue
                    values[node] = self._value(region, node, values)
                    self._check_free(node)
        except BaseException:
            self._failed = True
            raise
        for node, value in values.items():
            node.meta["val"] = value
            node.meta["shape"] = tuple(map(self._name, value.shape)) if isinstance(value, Tensor) else None

    @staticmethod
    def forget(region: Region) -> None:
        """Take the fake values out again; shapes stay."""
        for graph in (region.graph, region.decode):
            for node in () if graph is None else graph.nodes:
                node.meta.pop("val", None)

    def _value(self, region: Region, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        if node.op == "placeholder":
            return self._input(region, node)
        if node.op == "get_attr":
            given: Any = region.module
            for step in str(node.target).split("."):
                given = getattr(given, step)
            if not isinstance(given, Tensor):
                return given
            return self._once(("tensor", _of_tensor(given)), lambda: self._mode.from_tensor(given, static_shapes=True))
        inputs: Any = (node.args, node.kwargs)
        args, kwargs = fx.node.map_arg(inputs, values.__getitem__)
        target: Any = node.target
        if node.op == "call_module":
            module = region.module.get_submodule(target)
            return self._once((*_of_module(module), self._key((args, kwargs))), lambda: module.forward(*args, **kwargs))
        if node.op == "call_method":
            return self._once(
                (target, self._key((args, kwargs))), lambda: getattr(args[0], target)(*args[1:], **kwargs)
            )
        return self._once((target, self._key((args, kwargs))), lambda: target(*args, **kwargs))

    def _input(self, region: Region, node: fx.Node) -> Any:
        shape = node.meta.get("shape")
        if shape is None:
            return None  # a cache layer that is not there
        dtype = input_dtype(region, node)
        sizes = [self._sizes.get(size, size) for size in shape]
        key = ("input", shape, dtype, region.device)
        return self._once(key, lambda: torch.empty(sizes, dtype=dtype, device=region.device))

    def _once(self, key: Any, run: Callable[[], Any]) -> Any:
        if key not in self._known:
            self._known[key] = run()
        return self._known[key]

    def _key(self, value: Any) -> Any:
        """What a fake run can tell of a value: all of a constant, of a tensor all but its numbers."""
        leaves, spec = pytree.tree_flatten(value)
        return spec, tuple(map(self._of_leaf, leaves))

    def _of_leaf(self, leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            if id(leaf) not in self._keys:  # values live as long as this does, so ids stay theirs
                self._keys[id(leaf)] = ("tensor", _of_tensor(leaf))
            return self._keys[id(leaf)]
        if isinstance(leaf, slice):
            return "slice", tuple(map(self._of_leaf, (leaf.start, leaf.stop, leaf.step)))
        return ("size", str(leaf)) if isinstance(leaf, torch.SymInt) else (type(leaf), leaf)

    def _name(self, size: Any) -> str | int:
        if isinstance(size, int):
            return size
        text = str(size.node.expr)
        for symbol, name in self._names.items():
            text = text.replace(symbol, name)
        return text

    def _check_free(self, node: fx.Node) -> None:
        for name, size in self._sizes.items():
            if size.node.expr != size.node._expr:  # some code asked, and the answer has become a fact
                raise ValueError(f"%{node.name} holds only where {name}, the {SYMBOLS[name][1]}, is {size.node.expr}")


def _of_tensor(x: Tensor) -> Any:
    return tuple(map(str, x.shape)), x.dtype, tuple(map(str, x.stride())), x.device, type(x).__name__


def _of_module(module: nn.Module) -> Any:
    parts = tuple((name, type(part), _simple(part)) for name, part in module.named_modules())
    tensors = (*module.named_parameters(), *module.named_buffers())
    configs = tuple(str(part.config) for part in module.modules() if hasattr(part, "config"))
    return parts, configs, tuple((name, _of_tensor(x)) for name, x in tensors)


def _simple(module: nn.Module) -> Any:
    """The numbers, words and types among a module's attributes: what its shapes may depend on."""
    plain = (int, float, str, NoneType, tuple, list, torch.dtype)
    return tuple((key, repr(value)) for key, value in vars(module).items() if isinstance(value, plain))

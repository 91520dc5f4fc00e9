"""What a step of a stage runs compiled by Inductor: decoder layers and losses, in place for as long as the step takes.

On CUDA devices compiled layers are recorded as CUDA graphs too (Inductor's), for the launches of a layer take the host longer than
the layer takes the card.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from hydrasurgery.decoders import decoder_layers, running
from hydrasurgery.errors import CompileError
from hydrasurgery.transfer.data import Batch
from hydrasurgery.transfer.recipe import Stage

BACKEND = "inductor"
LIMIT = 1 << 20  # graphs of one function, of which layers of other head patterns each need their own
_SHOWN = 300  # characters of another package's message
# Packages whose errors are of compilation.
_RAISING = ("torch._dynamo", "torch._functorch", "torch._inductor", "triton")

Forward = Callable[..., Any]


class Compiler:
    """Compiles functions for a stage.

    Batches of the stage's own sizes run code with these sizes built in, whatever else has been compiled, so that a resumed run
    gives the same bits. Batches of all other sizes share code for any size, which rounds by the sizes that it was first run for and
    is not recorded.

    Attributes:
        records: whether CUDA graphs are recorded: in the second call of each function, after which it is replayed.

    Args:
        wanted: whether to compile; None does so on CUDA devices.
        stage: gives the sizes.
    """

    def __init__(self, wanted: bool | None, stage: Stage) -> None:
        self._wanted, self._used = wanted, False
        self._regular = self._whole = True
        self._recordable, self.records, self._micro_batch = not stage.recompute, False, stage.micro_batch
        self._sizes = (min(stage.micro_batch or stage.batch_size, stage.batch_size), stage.length)

    def covers(self, device: torch.device) -> bool:
        """Whether functions of tensors on `device` are to be compiled."""
        if self._wanted is None:
            return device.type == "cuda" and _triton(device)
        return self._wanted

    def compiled(self, function: Forward, device: torch.device) -> Forward:
        """`function` compiled, if functions on `device` are to be."""
        if not self.covers(device):
            return function
        self._used = True
        recorded = self._recordable and device.type == "cuda"
        self.records |= recorded
        fixed, free = _compiled_twice(function, recorded)

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            return (fixed if self._regular else free)(*args, **kwargs)

        return run

    def compiled_by_rows(self, function: Forward, device: torch.device) -> Forward:
        """The same for a function of tensors [N, ...] of the tokens that count: other batches have any N, but no other new size."""
        if not self.covers(device):
            return function
        self._used = True
        fixed, free = _compiled_twice(function)

        @functools.wraps(function)
        def run(*args: Any) -> Any:
            if self._regular and self._whole:
                return fixed(*args)
            for tensor in args:
                if tensor is not None:
                    torch._dynamo.mark_static(tensor, list(range(1, tensor.ndim)))
            return free(*args)

        return run

    def pieces(self, batch: Batch, trained: nn.Module) -> Iterator[Batch]:
        """The micro-batches of a step, each to be run forwards and backwards before the next is asked for.

        Args:
            batch: of the step, on the CPU.
            trained: whose gradients add up over the pieces.
        """
        owned: set[nn.Parameter] = set()
        for place, piece in enumerate(batch.split(self._micro_batch)):
            if place and self.records:
                _own_gradients(trained, owned)
            self._regular, self._whole = tuple(piece.mask.shape) == self._sizes, bool(piece.mask.all())
            if self.records:
                torch.compiler.cudagraph_mark_step_begin()
            yield piece

    @contextlib.contextmanager
    def active(self, forwards: Mapping[nn.Module, Forward]) -> Iterator[None]:
        """Inside the block modules run these functions, and dynamo compiles as many graphs of a function as there are.

        Args:
            forwards: what each module runs in the place of its `forward`; afterwards that is back.

        Raises:
            CompileError: something cannot be compiled.
        """
        with contextlib.ExitStack() as block:
            block.enter_context(running(forwards))
            if self._used:
                limits = {"recompile_limit": LIMIT, "accumulated_recompile_limit": LIMIT}
                block.enter_context(torch._dynamo.config.patch(limits))
                block.enter_context(_hinting())
            yield


def _own_gradients(trained: nn.Module, owned: set[nn.Parameter]) -> None:
    """Take new gradients out of the memory of recorded graphs, which the next replay overwrites; old ones are added to in place."""
    for parameter in trained.parameters():
        if parameter.grad is not None and parameter not in owned:
            parameter.grad = parameter.grad.clone()
            owned.add(parameter)


def _compiled_twice(function: Forward, recorded: bool = False) -> tuple[Forward, Forward]:
    """For the sizes of each call, `recorded` as CUDA graphs or not, and for any size; Inductor keeps the code of the two apart."""
    options: dict[str, Any] | None = {"triton.cudagraphs": True} if recorded else None
    fixed = torch.compile(function, backend=BACKEND, dynamic=False, options=options)
    return fixed, torch.compile(function, backend=BACKEND, dynamic=True)


def layer_forwards(
    model: nn.Module, attention: Iterable[str], compiler: Compiler, *, recompute: bool = False
) -> dict[nn.Module, Forward]:
    """What the decoder layers of a model run in a step; none where that is their own `forward`.

    Args:
        model: the hybrid or its teacher.
        attention: paths of attention modules, as far as the model has them.
        compiler: compiles the layers.
        recompute: run a layer again in the backward pass rather than keep what it computed.
    """
    device = next(model.parameters()).device
    if not (recompute or compiler.covers(device)):
        return {}
    layers = decoder_layers(model, attention)
    if not layers:
        _say_unknown(model, recompute)
    forwards = {layer: compiler.compiled(layer.forward, device) for layer in layers}
    return {layer: recomputed(run) for layer, run in forwards.items()} if recompute else forwards


def part_forwards(model: nn.Module, attention: Iterable[str], compiler: Compiler) -> dict[nn.Module, Forward]:
    """What the parts of a teacher's decoder layers run in a step, each compiled by itself: hooks of its attention modules are
    called between them.

    Args:
        model: the teacher.
        attention: paths of its attention modules.
        compiler: compiles the parts.
    """
    device = next(model.parameters()).device
    if not compiler.covers(device):
        return {}
    layers = decoder_layers(model, attention)
    if not layers:
        _say_unknown(model, recompute=False)
    hooked = {model.get_submodule(name) for name in attention}
    parts = dict.fromkeys(part for layer in layers for part in _parts(layer, hooked))
    return {part: compiler.compiled(part.forward, device) for part in parts}


def recomputed(function: Forward) -> Forward:
    """`function`, of which only the arguments are kept for the backward pass, which runs it again."""
    from torch.utils.checkpoint import checkpoint

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(function, *args, use_reentrant=False, **kwargs)

    return run


def _parts(module: nn.Module, hooked: set[nn.Module]) -> Iterator[nn.Module]:
    """The largest modules with parameters in which no hooked module is called."""
    inside = hooked.intersection(module.modules()) - {module}
    if inside or type(module).forward is nn.Module.forward:
        for child in module.children():
            yield from _parts(child, hooked)
    elif next(module.parameters(), None) is not None:
        yield module


def _say_unknown(model: nn.Module, recompute: bool) -> None:
    what = "keeps the activations of all its layers (recompute) and runs uncompiled" if recompute else "runs uncompiled"
    warnings.warn(
        f"{type(model).__name__} {what}: its layers are not known, since none of the hybrid's attention modules stands in a "
        "module list of it",
        stacklevel=7,
    )


@functools.cache
def _triton(device: torch.device) -> bool:
    from torch.utils._triton import has_triton

    if has_triton():
        return True
    warnings.warn(
        f"layers on {device} run uncompiled: Inductor needs Triton, which is not installed or does not know the device "
        "(pip install 'hydrasurgery[kernels]'); compile=false in the recipe says that this is meant",
        stacklevel=8,
    )
    return False


@contextlib.contextmanager
def _hinting() -> Iterator[None]:
    """Say in the errors of compilers how to do without them."""
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith(_RAISING):
            raise
        what = " ".join(str(error).split("\n\n")[0].split())[:_SHOWN]
        raise CompileError(
            f"the models' layers or losses cannot be compiled ({type(error).__name__}: {what}); compile=false in the recipe runs "
            "them as they are"
        ) from error

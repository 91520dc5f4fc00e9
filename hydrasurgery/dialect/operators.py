"""How `hydra::` operators are made known to PyTorch: as `torch.library.custom_op` does it, in less of the host's time a call.

A layer calls half a dozen operators, and what a call costs the host is what short prompts and single tokens wait for. An operator
has one kernel for all devices, which dynamo does not look into, a fake one, and its derivative as a function of what was saved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._C._dynamo.eval_frame import get_eval_frame_callback

from hydrasurgery.dialect.checks import save

_LIBRARY = torch.library.Library("hydra", "FRAGMENT")
_PLAIN_CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA).raw_repr()  # no mode, trace or wrapper below autograd


class Operator:
    """The operator `hydra::<name>`; without `register_autograd` its results have no derivative, and say so if one is asked for."""

    def __init__(self, name: str, schema: str, run: Callable[..., Any]) -> None:
        _LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, torch._disable_dynamo(run), "CompositeExplicitAutograd")
        self.name, self.run, self.call = name, run, getattr(torch.ops.hydra, name).default
        self.count = sum(not argument.kwarg_only for argument in self.call._schema.arguments)
        self.grads: Callable[..., Any] | None = None
        self.training: Any = None
        _LIBRARY.impl(name, self._autograd, "Autograd", with_keyset=True)

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """`fake` gives outputs of the right shapes, dtypes and devices."""
        return torch.library.register_fake(f"hydra::{self.name}", fake, lib=_LIBRARY)

    def register_autograd(self, grads: Callable[..., Any], training: Operator | None = None) -> None:
        """`grads(ctx, *grad_outputs)` gives a gradient, or None, for each positional input: `ctx.saved_tensors` holds them and
        `ctx.options` the rest.

        `training`: the operator that runs instead where a gradient is wanted. Its outputs are this one's, and a list of tensors to
        keep: `ctx.saved_tensors` holds the inputs, the first output and those. Gradients of outputs that nobody used are then None.
        """
        self.grads, self.training = grads, training

    def _autograd(self, keys: Any, *inputs: Any, **options: Any) -> Any:
        below = keys & torch._C._after_autograd_keyset
        wanted = _asking(inputs) if torch.is_grad_enabled() else None
        if wanted is not None and self.grads is not None:
            # PyTorch leaves out inputs that are None by default.
            inputs += (None,) * (self.count - len(inputs))
            return _Differentiable.apply(self, below, options, *inputs)  # type: ignore[no-untyped-call]
        if wanted is None and below.raw_repr() == _PLAIN_CUDA and get_eval_frame_callback() is None:
            return self.run(*inputs, **options)  # nothing else would look at the call
        with torch._C._AutoDispatchBelowAutograd():
            outputs = self.call.redispatch(below, *inputs, **options)
        if wanted is None:
            return outputs
        if isinstance(outputs, Tensor):
            return _fenced(self.name, outputs, wanted)
        return tuple(_fenced(self.name, output, wanted) for output in outputs)


def operator(name: str, schema: str) -> Callable[[Callable[..., Any]], Operator]:
    """Make a function the kernel of `hydra::<name>`, of this schema: "(Tensor x, ...) -> Tensor"."""
    return lambda run: Operator(name, schema, run)


def _asking(inputs: Iterable[Any]) -> Tensor | None:
    """The first input that asks for a gradient, of those in lists too."""
    for x in inputs:
        found = x if isinstance(x, Tensor) and x.requires_grad else _asking(x) if isinstance(x, (list, tuple)) else None
        if found is not None:
            return found
    return None


class _Differentiable(torch.autograd.Function):
    """An operator with its derivative, called below autograd."""

    @staticmethod
    def forward(ctx, operator, below, options, *inputs):  # type: ignore[no-untyped-def]
        training, kept = operator.training, ()
        with torch._C._AutoDispatchBelowAutograd():
            outputs = (training or operator).call.redispatch(below, *inputs, **options)
        if training is not None:
            *outputs, kept = outputs
            kept = (outputs[0], *kept)
            ctx.set_materialize_grads(False)
        save(ctx, (*inputs, *kept), options)
        ctx.grads = operator.grads
        return outputs if isinstance(outputs, Tensor) else tuple(outputs) if len(outputs) > 1 else outputs[0]

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        return None, None, None, *ctx.grads(ctx, *grads)


class _Fence(torch.autograd.Function):
    """A result that depends on inputs that ask for a gradient, of an operator that has none."""

    @staticmethod
    def forward(ctx, name, x, source):  # type: ignore[no-untyped-def]
        ctx.name = name
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        raise RuntimeError(f"hydra::{ctx.name} has no derivative")


def _fenced(name: str, output: Any, source: Tensor) -> Any:
    if isinstance(output, Tensor) and output.is_floating_point():
        return _Fence.apply(name, output, source)  # type: ignore[no-untyped-call]
    return output

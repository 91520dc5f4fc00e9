"""`hydra::head_inputs`: convolution, rotary embedding and norm of a linear head's q, k or v in one."""

from __future__ import annotations

import torch
from torch import Tensor

from hydrasurgery.dialect.checks import (
    exact,
    fake,
    fake_or_empty,
    full_precision,
    given,
    lower_under_autocast,
    or_empty,
    refuse_tangents,
)
from hydrasurgery.dialect.operators import operator
from hydrasurgery.kernels import registry

_INPUTS = (
    "Tensor x, Tensor weight, Tensor? state=None, Tensor? reset=None, Tensor? previous=None, "
    "Tensor? cos=None, Tensor? sin=None"
)


def head_inputs(
    x: Tensor,
    weight: Tensor,
    state: Tensor | None = None,
    reset: Tensor | None = None,
    previous: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    norm: bool = False,
) -> tuple[Tensor, Tensor]:
    """What stands between a linear head's projection and its recurrence: `l2_norm(rotate(x + causal_conv(x)))`.

    Args:
        x: [B, H, T, D], of any strides.
        weight: [H * D, W], of a `causal_conv` over all heads.
        state, reset, previous: of that convolution. `previous` says what is padding, of which x counts as 0.
        cos, sin: [B or 1, 1, T, D], of a rotary embedding that pairs both halves of the channels; none if None.
        norm: whether each head's vector is divided by its length.

    Returns:
        [B, T, H, D], and the convolution's state after x [B, H * D, W - 1].

    Example:
        >>> y, state = head_inputs(torch.randn(1, 2, 5, 8), torch.zeros(16, 4), norm=True)
        >>> y.shape, state.shape, round(float(y[0, 0, 0].norm()), 3)
        (torch.Size([1, 5, 2, 8]), torch.Size([1, 16, 3]), 1.0)
    """
    return torch.ops.hydra.head_inputs.default(x, weight, state, reset, previous, cos, sin, norm=norm)


@operator("head_inputs", f"({_INPUTS}, *, bool norm=False) -> (Tensor y, Tensor state)")
def _head_inputs(x, weight, state=None, reset=None, previous=None, cos=None, sin=None, *, norm=False):
    refuse_tangents(x, weight, state)
    kernel = registry.kernel("head_inputs", registry.head_inputs_case("forward", x, weight), x.device)
    with full_precision(x):
        y, tail = kernel.forward(x, weight, state, reset, previous, cos, sin, norm=norm)
    return exact(y), exact(tail)


@_head_inputs.register_fake
def _(x, weight, state=None, reset=None, previous=None, cos=None, sin=None, *, norm=False):
    batch, heads, length, dim = x.shape
    return x.new_empty(batch, length, heads, dim), x.new_empty(batch, heads * dim, weight.shape[1] - 1)


@operator(
    "head_inputs_backward",
    f"(Tensor grad, Tensor grad_state, {_INPUTS}, *, bool norm=False) -> (Tensor, Tensor, Tensor)",
)
def _backward(
    grad, grad_state, x, weight, state=None, reset=None, previous=None, cos=None, sin=None, *, norm=False
):  # fmt: skip
    kernel = registry.kernel("head_inputs", registry.head_inputs_case("backward", x, weight), x.device)
    with full_precision(x):
        grads = kernel.backward(grad, grad_state, x, weight, state, reset, previous, cos, sin, norm=norm)
    return tuple(or_empty(part, x) for part in grads)


@_backward.register_fake
def _(grad, grad_state, x, weight, state=None, reset=None, previous=None, cos=None, sin=None, *, norm=False):
    return fake(x), fake(weight), fake_or_empty(state, x)


def _grads(ctx, grad, grad_state):
    inputs = ctx.saved_tensors
    grads = torch.ops.hydra.head_inputs_backward.default(grad, grad_state, *inputs, **ctx.options)
    return (*given(grads, inputs[:3]), None, None, None, None)


_head_inputs.register_autograd(_grads)
lower_under_autocast("head_inputs", 0, 2)

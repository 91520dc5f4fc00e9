"""`hydra::causal_conv`: a depthwise causal convolution, with its backward."""

from __future__ import annotations

import torch
from torch import Tensor

from hydrasurgery.dialect.checks import (
    DERIVATIVES,
    exact,
    expect,
    fake,
    fake_or_empty,
    full_precision,
    given,
    lower_under_autocast,
    or_empty,
    refuse_tangents,
    refuse_transforms,
)
from hydrasurgery.dialect.operators import operator
from hydrasurgery.kernels import registry


def causal_conv(
    x: Tensor,
    weight: Tensor,
    state: Tensor | None = None,
    reset: Tensor | None = None,
    previous: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution, `y_t = sum_j weight[:, W-1-j] * x_{t-j}`: no bias, no activation.

    Args:
        x: [B, T, C].
        weight: [C, W]; the last column multiplies the current token.
        state: [B, C, W-1], the inputs before x, oldest first; zero if None.
        reset: [B, T] bool, True where a document starts. No tap reaches across a start, not even into `state`.
        previous: [B, T + 1] int64, of `previous_tokens`: taps go from each token to that, -1 being the last input of the state, and
            what no token points to is padding, left out as if it were not there. None: each token follows the one before it.

    Returns:
        y [B, T, C] (0 at padding) and the state after x [B, C, W-1], both in x's dtype. The state holds 0 for inputs of a document
        that has ended.

    Raises:
        ValueError: a shape or dtype does not fit; the message names the argument.

    Example:
        >>> y, state = causal_conv(torch.tensor([[[1.0], [2.0], [3.0]]]), torch.tensor([[10.0, 1.0]]))
        >>> y.flatten().tolist(), state.flatten().tolist()
        ([1.0, 12.0, 23.0], [3.0])
    """
    expect("x", x, (None, None, None))
    batch, length, channels = x.shape
    expect("weight", weight, (channels, None))
    if state is not None:
        expect("state", state, (batch, channels, weight.shape[1] - 1))
    if reset is not None:
        expect("reset", reset, (batch, length))
        if reset.dtype != torch.bool:
            raise ValueError(f"reset must be bool, found {reset.dtype}")
    if previous is not None:
        expect("previous", previous, (batch, length + 1))
        if previous.dtype != torch.int64:
            raise ValueError(f"previous must be int64, found {previous.dtype}")
    refuse_transforms("hydra::causal_conv", *DERIVATIVES)
    return torch.ops.hydra.causal_conv.default(x, weight, state, reset, previous)


_CONV_INPUTS = "Tensor x, Tensor weight, Tensor? state=None, Tensor? reset=None, Tensor? previous=None"


@operator("causal_conv", f"({_CONV_INPUTS}) -> (Tensor y, Tensor state)")
def _causal_conv(x, weight, state=None, reset=None, previous=None):
    refuse_tangents(x, weight, state)
    case = registry.causal_conv_case("forward", x, weight, state, reset, previous)
    with full_precision(x):
        y, tail = registry.kernel("causal_conv", case, x.device).forward(x, weight, state, reset, previous)
    return exact(y), exact(tail)


@_causal_conv.register_fake
def _(x, weight, state=None, reset=None, previous=None):
    return fake(x), x.new_empty(x.shape[0], x.shape[2], weight.shape[1] - 1)


@operator(
    "causal_conv_backward",
    f"(Tensor grad, Tensor grad_state, {_CONV_INPUTS}) -> (Tensor, Tensor, Tensor)",
)
def _causal_conv_backward(grad, grad_state, x, weight, state=None, reset=None, previous=None):
    case = registry.causal_conv_case("backward", x, weight, state, reset, previous)
    with full_precision(x):
        grads = registry.kernel("causal_conv", case, x.device).backward(
            grad, grad_state, x, weight, state, reset, previous
        )
    return tuple(or_empty(part, x) for part in grads)


@_causal_conv_backward.register_fake
def _(grad, grad_state, x, weight, state=None, reset=None, previous=None):
    return fake(x), fake(weight), fake_or_empty(state, x)


def _causal_conv_grads(ctx, grad, grad_state):
    inputs = ctx.saved_tensors
    grads = torch.ops.hydra.causal_conv_backward.default(grad, grad_state, *inputs)
    return (*given(grads, inputs[:3]), None, None)


_causal_conv.register_autograd(_causal_conv_grads)

lower_under_autocast("causal_conv", 0, 2)

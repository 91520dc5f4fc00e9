"""What a linear head's q, k or v go through on their way to the recurrence, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from hydrasurgery.kernels.causal_conv import reference as causal_conv
from hydrasurgery.kernels.rotary import TURNS, rotate

L2_EPS = 1e-6  # as in `hydrasurgery.layers.l2_norm`


def forward(
    x: Tensor,
    weight: Tensor,
    state: Tensor | None,
    reset: Tensor | None,
    previous: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    norm: bool,
) -> tuple[Tensor, Tensor]:
    """x [B, H, T, D] -> (l2_norm(rotate(x + conv(x))) [B, T, H, D], state after x); as in `hydrasurgery.ops.head_inputs`."""
    tokens = _tokens(x, previous)
    turned, tail = _turned(tokens, x.shape[1], weight, state, reset, previous, cos, sin)
    return (turned * _inverse(turned) if norm else turned).to(x.dtype), tail.to(x.dtype)


def backward(
    grad: Tensor,
    grad_state: Tensor,
    x: Tensor,
    weight: Tensor,
    state: Tensor | None,
    reset: Tensor | None,
    previous: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    norm: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of x, weight and state. With y = u r, r = (sum u^2 + eps)^-1/2: du = r (dy - y (y . dy))."""
    tokens = _tokens(x, previous)
    turned, _ = _turned(tokens, x.shape[1], weight, state, reset, previous, cos, sin)
    grad = grad.to(turned.dtype)
    if norm:
        inverse = _inverse(turned)
        y = turned * inverse
        grad = inverse * (grad - y * (y * grad).sum(-1, keepdim=True))
    if cos is not None and sin is not None:
        cosines, sines = (table.to(grad.dtype).transpose(1, 2) for table in (cos, sin))
        grad = grad * cosines + TURNS["half-back"](grad * sines)
    grad = grad.flatten(2)
    if previous is not None:
        grad = grad.masked_fill(~_valid(previous)[..., None], 0)
    dx, dweight, dstate = causal_conv.backward(grad, grad_state, tokens, weight, state, reset, previous)
    return (dx + grad).unflatten(2, (x.shape[1], -1)).transpose(1, 2).to(x.dtype), dweight, dstate


def _tokens(x: Tensor, previous: Tensor | None) -> Tensor:
    """[B, T, H D] in fp32 or fp64, 0 at padding."""
    tokens = x.to(torch.promote_types(x.dtype, torch.float32)).transpose(1, 2).flatten(2)
    return tokens if previous is None else tokens.masked_fill(~_valid(previous)[..., None], 0)


def _valid(previous: Tensor) -> Tensor:
    return previous[:, 1:] == torch.arange(previous.shape[1] - 1, device=previous.device)


def _turned(
    tokens: Tensor,
    heads: int,
    weight: Tensor,
    state: Tensor | None,
    reset: Tensor | None,
    previous: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
) -> tuple[Tensor, Tensor]:
    mixed, tail = causal_conv.forward(tokens, weight, state, reset, previous)
    y = (tokens + mixed).unflatten(2, (heads, -1))
    if cos is None or sin is None:
        return y, tail
    return rotate(y.transpose(1, 2), cos.to(y.dtype), sin.to(y.dtype), "half").transpose(1, 2), tail


def _inverse(u: Tensor) -> Tensor:
    return torch.rsqrt(u.square().sum(-1, keepdim=True) + L2_EPS)

"""What q, k and v of linear heads go through on their way to the recurrence, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hydrasurgery.kernels.causal_conv import reference as causal_conv
from hydrasurgery.kernels.rotary import rotate

L2_EPS = 1e-6  # as in `hydrasurgery.layers.l2_norm`
BACK = {"half": "half-back", "half-back": "half", "pairs": "pairs"}  # the way back, with -sin for pairs

States = Sequence[Tensor | None]


def forward(
    heads: Sequence[Tensor],
    weights: Sequence[Tensor],
    states: States,
    reset: Tensor | None,
    previous: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    turn: str = "half",
) -> tuple[list[Tensor], list[Tensor]]:
    """q, k -> l2_norm(rotate(x + conv(x))), v -> v + conv(v).

    Args:
        heads: q, k and v, [B, H, T, K or V], of any strides.
        weights: of their convolutions [H * K or V, W]; empty: none.
        states: of the convolutions, [B, H * K or V, W - 1] or None each.
        reset, previous: as in `hydrasurgery.ops.causal_conv`; what `previous` says to be padding counts as 0.
        cos, sin: [B or 1, 1, T, R], of a rotary embedding of the first R channels; none if None.
        turn: how it pairs them, one of `hydrasurgery.kernels.rotary.TURNS`.

    Returns:
        Stacks of the results that are equally wide, [3, B, T, H, K], or [2, B, T, H, K] and [1, B, T, H, V]; and of the states
        after x, likewise (none without convolutions).
    """
    results, tails = [], []
    for part, x in enumerate(heads):
        tokens = _tokens(x, previous)
        y, tail = _convolved(tokens, part, weights, states, reset, previous)
        y = y.unflatten(2, (x.shape[1], -1))
        if part < 2:
            y = _turned(y, cos, sin, turn)
            y = y * _inverse(y)
        results.append(y.to(x.dtype))
        tails += [] if tail is None else [tail.to(x.dtype)]
    return stacked(results), stacked(tails)


def backward(
    grads: Sequence[Tensor],
    grad_tails: Sequence[Tensor] | None,
    heads: Sequence[Tensor],
    weights: Sequence[Tensor],
    states: States,
    reset: Tensor | None,
    previous: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    turn: str = "half",
) -> tuple[list[Tensor], list[Tensor], list[Tensor | None]]:
    """Gradients of heads [B, T, H, D], weights and states, from those of the results [B, T, H, D] and of the last states (None: 0).
    Those of weights are stacked, in fp32 (fp64 for fp64).

    With y = u r, r = (sum u^2 + eps)^-1/2: du = r (dy - y (y . dy)).
    """
    dheads: list[Tensor] = []
    dweights: list[Tensor] = []
    dstates: list[Tensor | None] = []
    ends = None if grad_tails is None else unstacked(grad_tails)
    for part, (x, grad) in enumerate(zip(heads, grads, strict=True)):
        tokens = _tokens(x, previous)
        grad = grad.to(tokens.dtype)
        if part < 2:
            y, _ = _convolved(tokens, part, weights, states, reset, previous)
            y = _turned(y.unflatten(2, (x.shape[1], -1)), cos, sin, turn)
            inverse = _inverse(y)
            y = y * inverse
            grad = inverse * (grad - y * (y * grad).sum(-1, keepdim=True))
            if cos is not None and sin is not None:
                grad = _turned_back(grad, cos, sin, turn)
        grad = grad.flatten(2)
        if previous is not None:
            grad = grad.masked_fill(~_valid(previous)[..., None], 0)
        dx = grad
        if weights:
            end = (
                tokens.new_zeros(len(tokens), tokens.shape[2], weights[part].shape[1] - 1)
                if ends is None
                else ends[part]
            )
            mixed, dweight, dstate = causal_conv.backward(
                grad, end, tokens, weights[part].to(tokens.dtype), states[part], reset, previous
            )
            dx = mixed + grad
            dweights.append(dweight)
            dstates.append(dstate)
        dheads.append(dx.unflatten(2, (x.shape[1], -1)).to(x.dtype))
    return dheads, stacked(dweights), dstates


def stacked(parts: Sequence[Tensor]) -> list[Tensor]:
    """q, k and v in one tensor; v in another where it is of another width."""
    if not parts:
        return []
    if parts[0].shape == parts[2].shape:
        return [torch.stack(list(parts))]
    return [torch.stack(list(parts[:2])), parts[2][None]]


def unstacked(stacks: Sequence[Tensor]) -> list[Tensor]:
    """`stacked` undone, without a copy."""
    return [part for stack in stacks for part in stack.unbind(0)]


def _tokens(x: Tensor, previous: Tensor | None) -> Tensor:
    """[B, T, H D] in fp32 or fp64, 0 at padding."""
    tokens = x.to(torch.promote_types(x.dtype, torch.float32)).transpose(1, 2).flatten(2)
    return tokens if previous is None else tokens.masked_fill(~_valid(previous)[..., None], 0)


def _valid(previous: Tensor) -> Tensor:
    return previous[:, 1:] == torch.arange(previous.shape[1] - 1, device=previous.device)


def _convolved(
    tokens: Tensor,
    part: int,
    weights: Sequence[Tensor],
    states: States,
    reset: Tensor | None,
    previous: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    if not weights:
        return tokens, None
    mixed, tail = causal_conv.forward(tokens, weights[part], states[part], reset, previous)
    return tokens + mixed, tail


def _turned(y: Tensor, cos: Tensor | None, sin: Tensor | None, turn: str) -> Tensor:
    """y [B, T, H, D] with its rotary embedding, if there is one."""
    if cos is None or sin is None:
        return y
    return rotate(y.transpose(1, 2), cos.to(y.dtype), sin.to(y.dtype), turn).transpose(1, 2)


def _turned_back(grad: Tensor, cos: Tensor, sin: Tensor, turn: str) -> Tensor:
    """The transpose of `_turned`: a channel's sine is that of its own output, so it is multiplied first."""
    width = cos.shape[-1]
    first = grad[..., :width]
    cos, sin = (table.to(grad.dtype).transpose(1, 2) for table in (cos, sin))
    ones = torch.ones_like(cos).transpose(1, 2)
    sines = (first * sin).transpose(1, 2)
    sign = -1 if turn == "pairs" else 1
    back = sign * (rotate(sines, torch.zeros_like(ones), ones, BACK[turn])).transpose(1, 2)
    return torch.cat([first * cos + back, grad[..., width:]], dim=-1)


def _inverse(u: Tensor) -> Tensor:
    return torch.rsqrt(u.square().sum(-1, keepdim=True) + L2_EPS)

"""One token through a layer's linear heads, in plain PyTorch, a step at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from hydrasurgery.kernels.rotary import rotate

L2_EPS = 1e-6  # as in `hydrasurgery.layers.l2_norm`


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor,
    gate: Tensor | None,
    gamma: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    conv_weights: Sequence[Tensor],
    state: Tensor,
    conv_states: Sequence[Tensor],
    valid: Tensor | None = None,
    reset: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    scale: float | None,
    eps: float,
    turn: str = "half",
) -> Tensor:
    """The heads' outputs [B, H, V]; `state` and `conv_states` are brought up to date in place. As in `ops.decode_step`."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    query, key, value = (x.to(dtype) for x in (q, k, v))
    if valid is not None and reset is not None:
        query, key, value = (x.masked_fill(~valid[:, None, None], 0) for x in (query, key, value))
        for past in (state, *conv_states):
            past.flatten(1).masked_fill_((reset & valid)[:, None], 0)
    if conv_weights:
        triples = zip((query, key, value), conv_weights, conv_states, strict=True)
        query, key, value = (_residual_conv(*triple, valid) for triple in triples)
    if cos is not None and sin is not None:
        cos, sin = cos[:, None].to(dtype), sin[:, None].to(dtype)
        query, key = (rotate(x, cos, sin, turn) for x in (query, key))
    query, key = _l2_norm(query), _l2_norm(key)
    decay, beta = decay.to(dtype), beta.to(dtype)
    if A_log is not None and dt_bias is not None:
        decay = -A_log.to(dtype).exp() * F.softplus(decay + dt_bias.to(dtype))
        beta = beta.sigmoid()
    if valid is not None:
        decay, beta = (x.masked_fill(~valid[:, None], 0) for x in (decay, beta))
    new = state.to(dtype) * decay.exp()[..., None, None]
    write = beta[..., None] * (value - (key[..., None, :] @ new)[..., 0, :])
    new = new + key[..., None] * write[..., None, :]
    o = (query[..., None, :] @ new)[..., 0, :] * (q.shape[-1] ** -0.5 if scale is None else scale)
    state.copy_(new)
    o = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + eps) * gamma.to(dtype)[:, None]
    if gate is not None:
        o = o * (2 * gate.to(dtype).sigmoid())[..., None]
    return o.to(v.dtype)


def _residual_conv(x: Tensor, weight: Tensor, past: Tensor, valid: Tensor | None) -> Tensor:
    """x + conv(x) of one token [B, H, D]; `past` [B, H*D, W-1] moves on by it, if it is no padding."""
    seen = torch.cat([past.to(x.dtype), x.flatten(1)[..., None]], dim=-1)
    moved = seen[..., 1:].to(past.dtype)
    past.copy_(moved if valid is None else torch.where(valid[:, None, None], moved, past))
    return x + (seen * weight.to(x.dtype)).sum(-1).view_as(x)


def _l2_norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPS)

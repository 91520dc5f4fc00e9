"""One token through a layer's linear heads, in plain PyTorch, a step at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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


def forward_heads(
    hidden: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    full: Tensor | None,
    decay_weight: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    beta_weight: Tensor,
    beta_bias: Tensor,
    gate_weight: Tensor | None,
    gamma: Tensor,
    conv_weights: Sequence[Tensor],
    state: Tensor,
    conv_states: Sequence[Tensor],
    valid: Tensor | None = None,
    reset: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    q_heads: Sequence[int],
    kv_heads: Sequence[int],
    slots: Sequence[int],
    scale: float | None,
    eps: float,
    turn: str = "half",
) -> Tensor:
    """All heads' outputs [B, H + Hf, V], from what a layer projects: `forward` with the gates' projections before it, and the full
    heads' outputs [B, Hf, V] beside the linear ones'. As in `hydra::step_heads`."""
    wide = torch.promote_types(hidden.dtype, decay_weight.dtype)
    decay, beta, gate = (
        None if weight is None else F.linear(hidden.to(wide), weight.to(wide))
        for weight in (decay_weight, beta_weight, gate_weight)
    )
    assert decay is not None and beta is not None
    tensors: Any = (gamma, A_log, dt_bias, conv_weights, state, conv_states, valid, reset, cos, sin)
    own = (q[:, list(q_heads)], k[:, list(kv_heads)], v[:, list(kv_heads)])
    o = forward(*own, decay, beta + beta_bias.to(wide), gate, *tensors, scale=scale, eps=eps, turn=turn)
    others = 0 if full is None else full.shape[1]
    dtype = o.dtype if full is None else torch.promote_types(o.dtype, full.dtype)
    out = o.new_empty(len(o), len(slots) + others, o.shape[2], dtype=dtype)
    out[:, list(slots)] = o.to(dtype)
    if full is not None:
        out[:, [slot for slot in range(out.shape[1]) if slot not in slots]] = full.to(dtype)
    return out


def _residual_conv(x: Tensor, weight: Tensor, past: Tensor, valid: Tensor | None) -> Tensor:
    """x + conv(x) of one token [B, H, D]; `past` [B, H*D, W-1] moves on by it, if it is no padding."""
    seen = torch.cat([past.to(x.dtype), x.flatten(1)[..., None]], dim=-1)
    moved = seen[..., 1:].to(past.dtype)
    past.copy_(moved if valid is None else torch.where(valid[:, None, None], moved, past))
    return x + (seen * weight.to(x.dtype)).sum(-1).view_as(x)


def _l2_norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPS)

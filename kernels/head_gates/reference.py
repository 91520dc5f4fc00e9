"""The gates of linear heads from what their projections give, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FORGET = -50.0  # log decay at a document's first token: exp(-50) of the old state is nothing in fp32


def forward(
    raw: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    beta_bias: Tensor,
    valid: Tensor | None,
    reset: Tensor | None,
    *,
    gated: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """decay = -exp(A_log) softplus(a + dt_bias), beta = sigmoid(b + beta_bias), gate = 2 sigmoid(g).

    Args:
        raw: [B, T, N], N at least 3 H (2 H without a gate): the columns of a, b and g.
        A_log, dt_bias, beta_bias: [H].
        valid, reset: [B, T] bool: padding has decay and beta 0, a document's first token decay FORGET. None: all and none.
        gated: whether there is a g.

    Returns:
        decay and beta [B, T, H] in fp32 (fp64 for fp64), gate [B, T, H, 1] in raw's dtype or None.
    """
    a, b, g = _wide(raw, len(A_log), gated)
    decay = -A_log.to(a.dtype).exp() * F.softplus(a + dt_bias.to(a.dtype))
    beta = torch.sigmoid(b + beta_bias.to(a.dtype))
    if valid is not None:
        decay, beta = (x.masked_fill(~valid[..., None], 0) for x in (decay, beta))
    if reset is not None:
        decay = decay.masked_fill(reset[..., None], FORGET)
    return decay, beta, None if g is None else (2 * torch.sigmoid(g)).to(raw.dtype)[..., None]


def backward(
    grad_decay: Tensor,
    grad_beta: Tensor,
    grad_gate: Tensor | None,
    raw: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    beta_bias: Tensor,
    valid: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of raw, and of A_log, dt_bias and beta_bias [3, H] in fp32 (fp64 for fp64)."""
    a, b, g = _wide(raw, len(A_log), grad_gate is not None)
    rate, grad_decay, grad_beta = -A_log.to(a.dtype).exp(), grad_decay.to(a.dtype), grad_beta.to(a.dtype)
    if valid is not None:
        grad_decay, grad_beta = (x.masked_fill(~valid[..., None], 0) for x in (grad_decay, grad_beta))
    if reset is not None:
        grad_decay = grad_decay.masked_fill(reset[..., None], 0)
    before = a + dt_bias.to(a.dtype)
    dA_log = (grad_decay * rate * F.softplus(before)).sum((0, 1))
    da = grad_decay * rate * torch.sigmoid(before)
    beta = torch.sigmoid(b + beta_bias.to(a.dtype))
    db = grad_beta * beta * (1 - beta)
    columns = [da, db]
    if g is not None and grad_gate is not None:
        gate = torch.sigmoid(g)
        columns.append(grad_gate[..., 0].to(a.dtype) * 2 * gate * (1 - gate))
    draw = torch.cat(columns, dim=-1)
    draw = F.pad(draw, (0, raw.shape[-1] - draw.shape[-1])).to(raw.dtype)
    return draw, torch.stack([dA_log, da.sum((0, 1)), db.sum((0, 1))])


def _wide(raw: Tensor, heads: int, gated: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    wide = raw.to(torch.promote_types(raw.dtype, torch.float32))
    a, b = wide[..., :heads], wide[..., heads : 2 * heads]
    return a, b, wide[..., 2 * heads : 3 * heads] if gated else None

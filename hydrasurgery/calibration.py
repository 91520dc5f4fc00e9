"""The best linear stand-in of each softmax head: its decay, write strength and scale, and what it leaves unexplained.

Selection reads the error that is left (a head that converts badly is better kept); transfer starts from the fit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

import hydrasurgery.ops  # noqa: F401  (registers hydra::linear_attention)
from hydrasurgery.layers import l2_norm

HALF_LIVES = (4.0, 16.0, 64.0, 256.0, 1024.0)  # tokens
BETAS = (0.1, 0.25)


@dataclass(frozen=True)
class LinearFit:
    """The calibrated stand-in of H heads, all [H] fp32 on the heads' device.

    Attributes:
        half_life: Tokens after which the state has faded to half; inf for a rule without decay.
        beta: Write strength in (0, 1]; 1 for a rule without one.
        gamma: Scale of the normalised output, gamma * RMSNorm(o).
        error: |o - gamma o^|^2 / |o|^2, from 0 (exact) to 1 (nothing explained).
    """

    half_life: Tensor
    beta: Tensor
    gamma: Tensor
    error: Tensor


@torch.no_grad()
def fit_linear_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    *,
    rule: str = "gated_delta",
    half_lives: Sequence[float] = HALF_LIVES,
    betas: Sequence[float] = BETAS,
    eps: float = 1e-6,
) -> LinearFit:
    """Fit a linear-attention head to each softmax head (paper section 5).

    For each half-life and beta of the grid, o^ = RMSNorm(linear_attention(q / |q|, k / |k|, v)) with constant gates,
    gamma = <o, o^> / <o^, o^> over all batches, tokens and channels, error = |o - gamma o^|^2 / |o|^2; each head takes
    the pair with the smallest error, the first of equals.

    Args:
        q, k, v: [B, H, T, K], [B, H, T, K], [B, H, T, V] as the softmax attention got them (rotated, after q/k-norm).
            k and v may have fewer heads than q; each then serves an equal group of query heads.
        o: [B, T, H, V], the softmax heads' outputs.
        rule: linear, gated, delta or gated_delta. Rules without decay ignore `half_lives`, without beta `betas`.
        eps: Of the RMSNorm.
    """
    groups = q.shape[1] // k.shape[1]
    q, k, v = (x.transpose(1, 2).float() for x in (q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)))
    q, k, o = l2_norm(q), l2_norm(k), o.float()
    gated, writes = "gated" in rule, "delta" in rule
    grid = list(product(half_lives if gated else (math.inf,), betas if writes else (1.0,)))
    power = _per_head(o, o)
    gammas, errors = [], []
    for setting in grid:
        half_life, beta = (q.new_tensor(value) for value in setting)
        out = linear_head(q, k, v, half_life, beta, rule=rule, eps=eps)
        gamma = _per_head(o, out) / _per_head(out, out).clamp_min(torch.finfo(out.dtype).tiny)
        gammas.append(gamma)
        residual = o - gamma[:, None] * out
        errors.append(torch.where(power > 0, _per_head(residual, residual) / power, 0.0))
    error, best = torch.stack(errors).min(0)
    settings = torch.tensor(grid, dtype=torch.float, device=q.device)[best]
    gamma = torch.stack(gammas).gather(0, best[None])[0]
    return LinearFit(settings[:, 0], settings[:, 1], gamma, error)


def linear_head(
    q: Tensor, k: Tensor, v: Tensor, half_life: Tensor, beta: Tensor, *, rule: str = "gated_delta", eps: float = 1e-6
) -> Tensor:
    """o^ = RMSNorm(linear_attention(q, k, v)) with constant gates, [B, T, H, V].

    Args:
        q, k, v: [B, T, H, K], [B, T, H, K], [B, T, H, V] in fp32, q and k L2-normalised.
        half_life, beta: one for all heads, or [H]; what `rule` does not have is ignored.
    """
    constant = q.new_ones(q.shape[:3])
    decay = constant * (-math.log(2) / half_life) if "gated" in rule else None
    out, _ = torch.ops.hydra.linear_attention(
        q, k, v, decay, constant * beta if "delta" in rule else None, None, rule=rule
    )
    return out * torch.rsqrt(out.square().mean(-1, keepdim=True) + eps)


def _per_head(a: Tensor, b: Tensor) -> Tensor:
    """Inner products [B, T, H, V], [B, T, H, V] -> [H]."""
    return (a * b).sum((0, 1, 3))

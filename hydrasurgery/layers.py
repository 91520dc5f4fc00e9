"""The parameters that a linear head adds: gates, short convolution, and the normalisations around the recurrence.

All start so that a head behaves like the plain recurrence over its old q, k and v: gates constant, convolution the
identity, output gate folded into gamma.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hydrasurgery.ops import select_heads

FORGET = -50.0  # log decay at a document's first token: exp(-50) of the old state is nothing in fp32


class DecayGate(nn.Module):
    """Log decay g = -exp(A_log) * softplus(W_a x + dt_bias), [B, T, H] in fp32 (paper section 3)."""

    def __init__(self, hidden_size: int, num_heads: int, half_life: float = 64.0) -> None:
        super().__init__()
        self.a_proj = nn.Linear(hidden_size, num_heads, bias=False)
        self.A_log = nn.Parameter(torch.zeros(num_heads))
        self.dt_bias = nn.Parameter(torch.zeros(num_heads))
        self.set_half_life(torch.full((num_heads,), half_life))

    @torch.no_grad()
    def set_half_life(self, half_life: Tensor) -> None:
        """Start with a constant decay of the given half-lives [H], in tokens."""
        self.a_proj.weight.zero_()
        self.A_log.zero_()
        rate = math.log(2.0) / half_life.double()
        self.dt_bias.copy_(torch.log(torch.expm1(rate)))

    def forward(self, hidden_states: Tensor, valid: Tensor, reset: Tensor) -> Tensor:
        """hidden_states [B, T, C], valid and reset [B, T]: padding leaves the state, a new document forgets it."""
        rate = F.softplus(self.a_proj(hidden_states).float() + self.dt_bias.float())
        decay = -self.A_log.float().exp() * rate * valid.unsqueeze(-1)
        return decay.masked_fill(reset.unsqueeze(-1), FORGET)


class BetaGate(nn.Module):
    """Write strength beta = sigmoid(W_b x + b), [B, T, H]; 0 at padding."""

    def __init__(self, hidden_size: int, num_heads: int, beta: float = 0.25) -> None:
        super().__init__()
        self.b_proj = nn.Linear(hidden_size, num_heads)
        self.set_beta(torch.full((num_heads,), beta))

    @torch.no_grad()
    def set_beta(self, beta: Tensor) -> None:
        """Start with constant write strengths [H] in (0, 1)."""
        self.b_proj.weight.zero_()
        self.b_proj.bias.copy_(torch.logit(beta))

    def forward(self, hidden_states: Tensor, valid: Tensor) -> Tensor:
        """hidden_states [B, T, C], valid [B, T] -> [B, T, H]."""
        return torch.sigmoid(self.b_proj(hidden_states).float()) * valid.unsqueeze(-1)


class OutputGate(nn.Module):
    """Per-head output gate 2 * sigmoid(W_g x), [B, T, H, 1]: 1 at the start (zero weight)."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.g_proj = nn.Linear(hidden_size, num_heads, bias=False)
        nn.init.zeros_(self.g_proj.weight)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states [B, T, C] -> [B, T, H, 1]."""
        return 2 * torch.sigmoid(self.g_proj(hidden_states)).unsqueeze(-1)


class ConvWeight(nn.Module):
    """Depthwise taps of a residual short convolution x + conv(x); zero weights, so that it starts as the identity."""

    def __init__(self, channels: int, width: int = 4) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, width))


def to_tokens(heads: Tensor, valid: Tensor) -> Tensor:
    """[B, H, T, D] -> [B, T, H * D] with padded tokens zeroed (valid [B, T])."""
    # Cloned, not left to flatten: that copies or not by whether T is 1, and an exported graph would exclude one of the two.
    tokens = heads.transpose(1, 2).clone(memory_format=torch.contiguous_format).flatten(2)
    return tokens * valid.unsqueeze(-1).to(tokens.dtype)


def to_heads(tokens: Tensor, num_heads: int) -> Tensor:
    """[B, T, H * D] -> [B, T, H, D]."""
    return tokens.unflatten(-1, (num_heads, -1))


def l2_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(sum x^2 + eps) over the last dimension, in fp32, returned in x's dtype."""
    y = x.float()
    return (y * torch.rsqrt(y.square().sum(-1, keepdim=True) + eps)).to(x.dtype)


def merge_heads(full: Tensor, linear: Tensor, linear_heads: tuple[int, ...]) -> Tensor:
    """Heads of two kinds [B, T, Hf, D] and [B, T, Hl, D] back into their own slots [B, T, H, D]."""
    total = full.shape[2] + linear.shape[2]
    full_heads = [h for h in range(total) if h not in linear_heads]
    order = [*full_heads, *linear_heads]
    slots = tuple(order.index(h) for h in range(total))
    return select_heads(torch.cat([full, linear], dim=2), slots, 2)

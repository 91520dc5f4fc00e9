"""The parameters that a linear head adds: gates, short convolution, and the normalisations around the recurrence.

All start so that a head behaves like the plain recurrence over its old q, k and v: gates constant, convolution the
identity, output gate folded into gamma.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hydrasurgery.kernels.head_gates.reference import FORGET
from hydrasurgery.kernels.rotary import rotate

LOG_LENGTH = 500.0


def wide(x: Tensor) -> Tensor:
    """x in fp32, or as it is in fp64."""
    return x if x.dtype == torch.float64 else x.float()


class Projection(nn.Linear):
    """A linear map whose weight may have another dtype than what it reads: the product is of the weight's."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C] -> [..., H]."""
        return super().forward(x.to(self.weight.dtype))


class DecayGate(nn.Module):
    """Log decay g = -exp(A_log) * softplus(W_a x + dt_bias), [B, T, H] in fp32 or fp64 (paper section 3)."""

    def __init__(self, hidden_size: int, num_heads: int, half_life: float = 64.0) -> None:
        super().__init__()
        self.a_proj = Projection(hidden_size, num_heads, bias=False)
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
        rate = F.softplus(wide(self.a_proj(hidden_states)) + wide(self.dt_bias))
        decay = (-wide(self.A_log).exp() * rate).masked_fill(~valid.unsqueeze(-1), 0)
        return decay.masked_fill(reset.unsqueeze(-1), FORGET)


class BetaGate(nn.Module):
    """Write strength beta = sigmoid(W_b x + b), [B, T, H]; 0 at padding."""

    def __init__(self, hidden_size: int, num_heads: int, beta: float = 0.25) -> None:
        super().__init__()
        self.b_proj = Projection(hidden_size, num_heads)
        self.set_beta(torch.full((num_heads,), beta))

    @torch.no_grad()
    def set_beta(self, beta: Tensor) -> None:
        """Start with constant write strengths [H] in (0, 1)."""
        self.b_proj.weight.zero_()
        self.b_proj.bias.copy_(torch.logit(beta))

    def forward(self, hidden_states: Tensor, valid: Tensor) -> Tensor:
        """hidden_states [B, T, C], valid [B, T] -> [B, T, H]."""
        return torch.sigmoid(wide(self.b_proj(hidden_states))).masked_fill(~valid.unsqueeze(-1), 0)


class OutputGate(nn.Module):
    """Per-head output gate 2 * sigmoid(W_g x), [B, T, H, 1]: 1 at the start (zero weight)."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.g_proj = Projection(hidden_size, num_heads, bias=False)
        nn.init.zeros_(self.g_proj.weight)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states [B, T, C] -> [B, T, H, 1]."""
        return 2 * torch.sigmoid(self.g_proj(hidden_states)).to(hidden_states.dtype).unsqueeze(-1)


class ConvWeight(nn.Module):
    """Depthwise taps of a short convolution.

    All zero for a residual one, x + conv(x), and `current` on the current token for SiLU(conv(x)): both begin with x.
    """

    def __init__(self, channels: int, width: int = 4, current: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, width))
        nn.init.constant_(self.weight[:, -1:], current)


def to_tokens(heads: Tensor, valid: Tensor) -> Tensor:
    """[B, H, T, D] -> [B, T, H * D] with padded tokens zeroed (valid [B, T])."""
    # Cloned, not left to flatten: whether that copies depends on T being 1, and an exported graph would exclude one of the two.
    tokens = heads.transpose(1, 2).clone(memory_format=torch.contiguous_format).flatten(2)
    return tokens.masked_fill(
        ~valid.unsqueeze(-1), 0
    )  # not multiplied: whatever stands at padding, NaN too, stays there


def forget(reset: Tensor, num_heads: int) -> Tensor:
    """The log decay [B, T, H] of a rule that has none: 0, and FORGET where a document starts (reset [B, T])."""
    decay = torch.zeros(reset.shape, device=reset.device).masked_fill(reset, FORGET)
    return decay.unsqueeze(-1).expand(-1, -1, num_heads)


def to_heads(tokens: Tensor, num_heads: int) -> Tensor:
    """[B, T, H * D] -> [B, T, H, D]."""
    return tokens.unflatten(-1, (num_heads, -1))


def cast_like(x: Tensor, like: Tensor) -> Tensor:
    """x in the dtype of `like`."""
    return x.to(like.dtype)


def l2_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(sum x^2 + eps) over the last dimension, in fp32 (fp64 for fp64), returned in x's dtype."""
    y = wide(x)
    return (y * torch.rsqrt(y.square().sum(-1, keepdim=True) + eps)).to(x.dtype)


def rotate_tokens(x: Tensor, cos: Tensor, sin: Tensor, turn: str) -> Tensor:
    """The same for x [B, T, H, D], in x's dtype: some models turn in fp32 whatever their own is."""
    return rotate(x.transpose(1, 2), cos, sin, turn).transpose(1, 2).to(x.dtype)


def scale_by_length(q: Tensor, positions: Tensor, a: float = LOG_LENGTH) -> Tensor:
    """q [B, H, T, D] * log(p + a) / log(a) for positions p [B, T]: logits that grow slowly with the number of keys.

    The coefficient of HALO (thunlp), with its a = 500; 1 at a document's first token.
    """
    coefficient = torch.log(positions.to(torch.promote_types(q.dtype, torch.float32)) + a) / math.log(a)
    return q * coefficient[:, None, :, None].to(q.dtype)


def merge_heads(full: Tensor, linear: Tensor, linear_heads: tuple[int, ...]) -> Tensor:
    """Heads of two kinds [B, T, Hf, D] and [B, T, Hl, D] back into their own slots [B, T, H, D]."""
    total, parts = full.shape[2] + linear.shape[2], []
    first = done = 0  # a run's first slot, and how many linear heads are before it
    for slot in range(1, total + 1):
        is_linear = first in linear_heads
        if slot == total or (slot in linear_heads) != is_linear:
            start = done if is_linear else first - done
            parts.append((linear if is_linear else full).narrow(2, start, slot - first))
            done += (slot - first) * is_linear
            first = slot
    return torch.cat(parts, dim=2)

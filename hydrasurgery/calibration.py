"""The best linear stand-in of each softmax head: its decay, write strength and scale, and what it leaves unexplained.

Selection reads the error that is left (a head that converts badly is better kept); transfer starts from the fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from hydrasurgery.ir.taps import HeadTap, head_taps
from hydrasurgery.layers import l2_norm

HALF_LIVES = (4.0, 16.0, 64.0, 256.0, 1024.0)  # tokens
BETAS = (0.1, 0.25)

Attended = tuple[Tensor, Tensor, Tensor | None]  # k [1, Hk, T, K], v [1, Hk, T, V] and mask of a prompt's attention
Visit = Callable[[str, Tensor, Tensor, Tensor, Tensor], None]


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
            k and v may have fewer heads than q; each then serves as many query heads as there are to one.
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


def fit_model(model: nn.Module, input_ids: Tensor, **options: Any) -> dict[str, LinearFit]:
    """Fit the heads of every attention layer of a teacher on `input_ids` [B, T] (no padding), one layer at a time.

    Options are those of `fit_linear_heads`. The model is run once, as it is, without gradients.
    """
    fits: dict[str, LinearFit] = {}

    def visit(name: str, q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> None:
        fits[name] = fit_linear_heads(q, k, v, o, **options)

    with torch.no_grad(), watch_heads(model, visit):
        run_model(model, input_ids)
    return fits


def run_model(model: nn.Module, input_ids: Tensor, **kwargs: Any) -> Any:
    """Call a decoder on `input_ids` on its own device, without a cache where it knows of one."""
    if hasattr(model, "config"):
        kwargs = {"use_cache": False, **kwargs}
    return model(input_ids.to(next(model.parameters()).device), **kwargs)


@contextmanager
def watch_heads(model: nn.Module, visit: Visit) -> Iterator[None]:
    """While the block lasts, every layer that runs calls visit(name, q, k, v, o).

    q [B, H, T, K], k and v [B, Hk, T, K or V] as the attention op got them (rotated), o [B, T, H, V].
    """
    with head_taps(model) as taps, watch_taps(taps, lambda name, last, out: visit(name, last.q, last.k, last.v, out)):
        yield


@contextmanager
def watch_taps(taps: dict[str, HeadTap], visit: Callable[[str, LastAttention, Tensor], None]) -> Iterator[None]:
    """While the block lasts, every layer that runs calls visit(name, its attention, its heads' outputs [B, T, H, V])."""
    with LastAttention(taps) as last, ExitStack() as stack:
        for name, tap in taps.items():
            hook = tap.register_forward_hook(lambda _tap, _args, out, name=name: visit(name, last, out))
            stack.callback(hook.remove)
        yield


@contextmanager
def behind_past(taps: dict[str, HeadTap], whole: dict[str, Attended], start: int) -> Iterator[None]:
    """While the block lasts, attention runs on a prompt's tokens from `start` on, behind recorded keys and values."""

    def behind(k: Tensor, v: Tensor, mask: Tensor | None) -> Callable[..., Any]:
        def hook(_tap: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            q, later_k, later_v, _, sinks = (*args, None, None)[:5]
            rows = len(q), -1, -1, -1
            together = (
                torch.cat([past[:, :, :start].expand(rows), later], 2) for past, later in ((k, later_k), (v, later_v))
            )
            return q, *together, None if mask is None else mask[:, :, -q.shape[2] :], sinks

        return hook

    with ExitStack() as stack:
        for name, attended in whole.items():
            stack.callback(taps[name].register_forward_pre_hook(behind(*attended)).remove)
        yield


class LastAttention:
    """While its block lasts, what the attention that ran last was called with: for edits, which run behind it.

    q [B, H, T, K], k and v [B, Hk, S, K or V].
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    sinks: Tensor | None
    options: dict[str, Any]

    def __init__(self, taps: dict[str, HeadTap]) -> None:
        self._taps, self._hooks = taps, ExitStack()

    def __enter__(self) -> LastAttention:
        for tap in self._taps.values():
            self._hooks.callback(tap.register_forward_hook(self._note, with_kwargs=True, prepend=True).remove)
        return self

    def __exit__(self, *_error: object) -> None:
        self._hooks.close()

    def _note(self, _tap: nn.Module, args: tuple[Any, ...], options: dict[str, Any], _output: Tensor) -> None:
        self.q, self.k, self.v, self.mask, self.sinks = (*args, None, None)[:5]
        self.options = options

    def weights(self, positions: Tensor) -> Tensor:
        """Attention weights [B, H, P, S] in fp32 of the queries at `positions` [P]."""
        keys, groups = self.k.shape[2], self.q.shape[1] // self.k.shape[1]
        scale, softcap = self.options.get("scale") or self.q.shape[-1] ** -0.5, self.options.get("softcap")
        places = positions.to(self.q.device)
        k = self.k.repeat_interleave(groups, 1).float()
        logits = (self.q[:, :, places].float() @ k.mT) * scale
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        logits = logits + self._bias(places + keys - self.q.shape[2])
        if self.sinks is not None:
            sink = self.sinks.float().view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
            return torch.cat([logits, sink], -1).softmax(-1)[..., :-1]
        return logits.softmax(-1)

    def _bias(self, places: Tensor) -> Tensor:
        """0 where a query may look and -inf elsewhere, or the mask's own numbers: broadcast to [B, H, P, S]."""
        offset = self.k.shape[2] - self.q.shape[2]
        if self.mask is not None:
            rows = self.mask[:, :, places - offset]
            return rows.float() if rows.dtype != torch.bool else torch.where(rows, 0.0, -math.inf)
        key, window = torch.arange(self.k.shape[2], device=places.device), self.options.get("window")
        seen = (
            key <= places[:, None] if self.options.get("causal", True) else torch.ones_like(places[:, None] + key) > 0
        )
        seen = seen if window is None else seen & (key > places[:, None] - window)
        return torch.where(seen, 0.0, -math.inf)

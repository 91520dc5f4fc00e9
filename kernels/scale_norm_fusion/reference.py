"""Scale-normalised fusion of full and linear heads, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def forward(
    o_full: Tensor | None,
    o_linear: Tensor | None,
    gamma: Tensor,
    gate: Tensor | None,
    *,
    linear_heads: Sequence[int],
    norm_full: bool,
    eps: float,
) -> Tensor:
    """Every head in its own slot, scaled as in `hydrasurgery.ops.scale_norm_fusion`; contiguous [B, T, H, D]."""
    out = _empty_slots(o_full, o_linear)
    gamma_full, gamma_linear = _split_gamma(gamma, linear_heads, out.shape[2], norm_full)
    if o_full is not None:
        value = _normalise(o_full, eps)[0] * gamma_full[:, None] if gamma_full is not None else o_full
        _scatter(out, value, _others(linear_heads, out.shape[2]))
    if o_linear is not None:
        value = _normalise(o_linear, eps)[0] * gamma_linear[:, None]
        _scatter(out, value if gate is None else value * gate, linear_heads)
    return out


def backward(
    grad: Tensor,
    o_full: Tensor | None,
    o_linear: Tensor | None,
    gamma: Tensor,
    gate: Tensor | None,
    *,
    linear_heads: Sequence[int],
    norm_full: bool,
    eps: float,
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor | None]:
    """Gradients of o_full, o_linear, gamma and gate.

    With n = o r, r = rsqrt(mean(o^2) + eps) and y = gamma n gate: d gamma = sum dy gate n, d gate = dy gamma n,
    dn = dy gamma gate and do = r (dn - n mean(dn n)).
    """
    heads = grad.shape[2]
    gamma_full, gamma_linear = _split_gamma(gamma, linear_heads, heads, norm_full)
    do_full = do_linear = dgate = None
    dgamma = torch.zeros(heads, dtype=torch.promote_types(grad.dtype, torch.float32), device=grad.device)
    if o_full is not None:
        slots = _others(linear_heads, heads)
        do_full = _gather(grad, slots)
        if gamma_full is not None:
            do_full, part, _ = _scaled_norm_backward(do_full, o_full, gamma_full, None, eps)
            _scatter(dgamma[None, None], part[None, None], slots)
        do_full = do_full.to(o_full.dtype)
    if o_linear is not None:
        taken = _gather(grad, linear_heads)
        do_linear, part, dgate = _scaled_norm_backward(taken, o_linear, gamma_linear, gate, eps)
        _scatter(dgamma[None, None], part[None, None], linear_heads)
        do_linear = do_linear.to(o_linear.dtype)
    if not norm_full:
        dgamma = _gather(dgamma[None, None], linear_heads)[0, 0]
    return do_full, do_linear, dgamma.to(gamma.dtype), dgate


def _normalise(o: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = o.to(torch.promote_types(o.dtype, torch.float32))
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return wide * scale, scale


def _scaled_norm_backward(
    dy: Tensor, o: Tensor, gamma: Tensor, gate: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    n, r = _normalise(o, eps)
    dy, dgate = dy.to(n.dtype), None
    if gate is not None:
        dgate = dy * n * gamma[:, None]
        dgate = (dgate.sum(-1, keepdim=True) if gate.shape[-1] == 1 else dgate).to(gate.dtype)
        dy = dy * gate
    dgamma = (dy * n).sum((0, 1, 3))
    dn = dy * gamma[:, None]
    return r * (dn - n * (dn * n).mean(-1, keepdim=True)), dgamma, dgate


def _empty_slots(o_full: Tensor | None, o_linear: Tensor | None) -> Tensor:
    given = [o for o in (o_full, o_linear) if o is not None]
    batch, length, _, dim = given[0].shape
    dtype = given[0].dtype if len(given) == 1 else torch.promote_types(given[0].dtype, given[1].dtype)
    return given[0].new_empty(batch, length, sum(o.shape[2] for o in given), dim, dtype=dtype)


def _split_gamma(
    gamma: Tensor, linear_heads: Sequence[int], heads: int, norm_full: bool
) -> tuple[Tensor | None, Tensor]:
    gamma = gamma.to(torch.promote_types(gamma.dtype, torch.float32))
    if not norm_full:
        return None, gamma
    slots = gamma[None, None]
    return _gather(slots, _others(linear_heads, heads))[0, 0], _gather(slots, linear_heads)[0, 0]


def _others(heads: Sequence[int], total: int) -> list[int]:
    taken = set(heads)
    return [head for head in range(total) if head not in taken]


def _runs(slots: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(first, slot, length) of each run of consecutive slots: slices need no index tensor, hence no copy to the device."""
    first = 0
    for last in range(1, len(slots) + 1):
        if last == len(slots) or slots[last] != slots[last - 1] + 1:
            yield first, slots[first], last - first
            first = last


def _scatter(out: Tensor, values: Tensor, slots: Sequence[int]) -> None:
    for first, slot, length in _runs(slots):
        out.narrow(2, slot, length).copy_(values.narrow(2, first, length))


def _gather(values: Tensor, slots: Sequence[int]) -> Tensor:
    parts = [values.narrow(2, slot, length) for _, slot, length in _runs(slots)]
    return torch.cat(parts, dim=2) if parts else values.narrow(2, 0, 0)

"""`hydra::scale_norm_fusion`: full and linear heads in one tensor, linear ones brought to scale, with its backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hydrasurgery.dialect.checks import (
    DERIVATIVES,
    expect,
    fake_or_empty,
    full_precision,
    given,
    or_empty,
    refuse_tangents,
    refuse_transforms,
)
from hydrasurgery.dialect.operators import operator
from hydrasurgery.kernels import registry


def scale_norm_fusion(
    o_full: Tensor | None,
    o_linear: Tensor | None,
    gamma: Tensor,
    gate: Tensor | None = None,
    *,
    linear_heads: Sequence[int],
    norm_full: bool = False,
    eps: float = 1e-6,
) -> Tensor:
    """Put full and linear heads in their own slots, linear ones brought to scale: `gamma_h * RMSNorm(o_h) * gate_h`.

    RMSNorm(o) = o / sqrt(mean(o^2) + eps), over the head's own D numbers.

    Args:
        o_full: [B, T, Hf, D], the full heads in slot order; None if there are none.
        o_linear: [B, T, Hl, D], the linear heads in slot order; None if there are none.
        gamma: [Hl], one scale per linear head; with `norm_full` [Hf + Hl], one per slot.
        gate: [B, T, Hl, D] or [B, T, Hl, 1], multiplied onto the linear heads; 1 if None.
        linear_heads: the slots of the linear heads, ascending. The full heads fill the others.
        norm_full: treat full heads alike (without a gate), instead of passing them through.
        eps: added to the mean square.

    Returns:
        [B, T, Hf + Hl, D], contiguous, in the wider dtype of o_full and o_linear.

    Raises:
        ValueError: a shape or slot does not fit; the message names the argument.

    Example:
        >>> full, linear = torch.zeros(1, 1, 1, 4), torch.full((1, 1, 2, 4), 5.0)
        >>> out = scale_norm_fusion(full, linear, torch.tensor([2.0, 3.0]), linear_heads=[0, 2])
        >>> out[0, 0, :, 0].round(decimals=3).tolist()
        [2.0, 0.0, 3.0]
    """
    first = o_full if o_full is not None else o_linear
    if first is None:
        raise ValueError("o_full and o_linear are both None: at least one kind of head is needed")
    expect("o_full" if o_full is not None else "o_linear", first, (None, None, None, None))
    batch, length, _, dim = first.shape
    full = 0 if o_full is None else o_full.shape[2]
    linear = 0 if o_linear is None else o_linear.shape[2]
    if o_linear is not None:
        expect("o_linear", o_linear, (batch, length, None, dim))
    slots = list(linear_heads)
    if len(slots) != linear or slots != sorted(set(slots)) or any(not 0 <= s < full + linear for s in slots):
        raise ValueError(
            f"linear_heads must be {linear} ascending slots below {full + linear} (o_linear has {linear} heads), found {slots}"
        )
    expect("gamma", gamma, (full + linear if norm_full else linear,))
    if gate is not None:
        expect("gate", gate, (batch, length, linear, 1 if gate.shape[-1:] == (1,) else dim))
    refuse_transforms("hydra::scale_norm_fusion", *DERIVATIVES)
    return torch.ops.hydra.scale_norm_fusion.default(
        o_full, o_linear, gamma, gate, linear_heads=slots, norm_full=norm_full, eps=eps
    )


_FUSION_INPUTS = "Tensor? o_full, Tensor? o_linear, Tensor gamma, Tensor? gate=None"
_FUSION_OPTIONS = "int[] linear_heads, bool norm_full=False, float eps=1e-6"


@operator("scale_norm_fusion", f"({_FUSION_INPUTS}, *, {_FUSION_OPTIONS}) -> Tensor")
def _scale_norm_fusion(o_full, o_linear, gamma, gate=None, *, linear_heads, norm_full=False, eps=1e-6):
    refuse_tangents(o_full, o_linear, gamma, gate)
    case = registry.scale_norm_fusion_case("forward", o_full, o_linear)
    forward = registry.kernel("scale_norm_fusion", case, gamma.device).forward
    with full_precision(gamma):
        return forward(o_full, o_linear, gamma, gate, linear_heads=linear_heads, norm_full=norm_full, eps=eps)


@_scale_norm_fusion.register_fake
def _(o_full, o_linear, gamma, gate=None, *, linear_heads, norm_full=False, eps=1e-6):
    given = [o for o in (o_full, o_linear) if o is not None]
    batch, length, _, dim = given[0].shape
    dtype = torch.promote_types(given[0].dtype, given[-1].dtype)
    return given[0].new_empty(batch, length, sum(o.shape[2] for o in given), dim, dtype=dtype)


@operator(
    "scale_norm_fusion_backward",
    f"(Tensor grad, {_FUSION_INPUTS}, *, {_FUSION_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _scale_norm_fusion_backward(grad, o_full, o_linear, gamma, gate=None, *, linear_heads, norm_full=False, eps=1e-6):
    case = registry.scale_norm_fusion_case("backward", o_full, o_linear)
    backward = registry.kernel("scale_norm_fusion", case, gamma.device).backward
    with full_precision(gamma):
        grads = backward(grad, o_full, o_linear, gamma, gate, linear_heads=linear_heads, norm_full=norm_full, eps=eps)
    return tuple(or_empty(part, grad) for part in grads)


@_scale_norm_fusion_backward.register_fake
def _(grad, o_full, o_linear, gamma, gate=None, *, linear_heads, norm_full=False, eps=1e-6):
    return tuple(fake_or_empty(x, grad) for x in (o_full, o_linear, gamma, gate))


def _scale_norm_fusion_grads(ctx, grad):
    inputs = ctx.saved_tensors
    grads = torch.ops.hydra.scale_norm_fusion_backward.default(grad, *inputs, **ctx.options)
    return given(grads, inputs)


_scale_norm_fusion.register_autograd(_scale_norm_fusion_grads)

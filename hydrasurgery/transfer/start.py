"""Start values of a hybrid's heads, fitted to the teacher's own head outputs (paper section 5)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from hydrasurgery.calibration import LinearFit, fit_linear_heads
from hydrasurgery.decoders import run_model
from hydrasurgery.dialect.names import ATTENTION, LINEAR_ATTENTION
from hydrasurgery.ir.region import RegionModule
from hydrasurgery.ir.stitch import region_modules
from hydrasurgery.ir.taps import head_taps


@torch.no_grad()
def calibrate(hybrid: nn.Module, teacher: nn.Module, input_ids: Tensor) -> dict[str, LinearFit]:
    """Give each linear head the half-life, beta and gamma that explain its teacher head best; changes `hybrid` in place.

    Each hybrid layer is fed the teacher's own hidden states: what is fitted is what its recurrences get there, with or without
    rotary embedding and after the short convolution. gamma_h = <o_h, o^_h> / <o^_h, o^_h> with o^ = RMSNorm(o), o_h the
    teacher's; where full heads are normalised too (`full_norm="paper"`), theirs is fitted in the same way to what they give in
    the hybrid.

    Args:
        hybrid: what `rewrite(teacher, plan)` gave, not yet trained.
        teacher: the model it was cut from.
        input_ids: [B, T] tokens without padding.

    Returns:
        The fits of each layer's linear heads, in the order of their slots, by the layer's name.

    Example:
        >>> import hydrasurgery as hs
        >>> from hydrasurgery.demo.teacher import load_teacher
        >>> teacher, _ = load_teacher()
        >>> hybrid = hs.rewrite(teacher, hs.plan_heads(teacher, strategy="all-linear"))
        >>> fits = hs.calibrate(hybrid, teacher, torch.arange(64)[None])
        >>> fits["model.layers.0.self_attn"].half_life.shape
        torch.Size([16])
    """
    fits: dict[str, LinearFit] = {}
    with head_taps(teacher) as taps:
        handles = [
            teacher.get_submodule(name).register_forward_hook(_follow(module, taps[name], fits, name), with_kwargs=True)
            for name, module in region_modules(hybrid).items()
        ]
        try:
            run_model(teacher, input_ids)
        finally:
            for handle in handles:
                handle.remove()
    return fits


class _Heads(TorchDispatchMode):
    """Notes what a layer's full heads gave [B, T, Hf, D], and q, k and v [B, T, Hl, K or V] of its recurrences."""

    full: Tensor | None = None
    linear: tuple[Tensor, Tensor, Tensor] | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is ATTENTION:
            self.full = out
        elif func is LINEAR_ATTENTION:
            self.linear = args[:3]
        return out


def _follow(module: RegionModule, tap: nn.Module, fits: dict[str, LinearFit], name: str) -> Any:
    """A hook of the teacher's layer that runs the hybrid's on the same inputs, and fits it."""
    tapped: list[Tensor] = []
    tap.register_forward_hook(lambda _tap, _args, out: tapped.append(out))

    def hook(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _out: Any) -> None:
        teacher = tapped.pop()[:, :, list(module.region.teacher_heads)]  # in the hybrid's slots
        with _Heads() as heads:
            module(*args, **kwargs)
        fit = _fit(module, heads, teacher)
        if fit is not None:
            fits[name] = fit

    return hook


def _fit(module: RegionModule, heads: _Heads, teacher: Tensor) -> LinearFit | None:
    """Set the layer's start values by its heads and the teacher's outputs [B, T, H, V]."""
    full, linear = ([slot for slot, kind in enumerate(module.kinds) if kind == this] for this in ("full", "linear"))
    added: Any = module.hydra
    fit = None
    if heads.linear is not None:
        q, k, v = (x.transpose(1, 2) for x in heads.linear)
        fit = fit_linear_heads(q, k, v, teacher[:, :, linear], rule=module.region.options["rule"])
        if hasattr(added, "decay"):
            added.decay.set_half_life(fit.half_life)
        if hasattr(added, "beta"):
            added.beta.set_beta(fit.beta)
    if hasattr(added, "gamma"):
        gamma = added.gamma.detach().float()
        normalised = len(gamma) == len(module.kinds)
        if fit is not None:
            gamma[linear if normalised else slice(None)] = fit.gamma
        if normalised and heads.full is not None:
            gamma[full] = _scale(heads.full.float(), teacher[:, :, full].float())
        added.gamma.copy_(gamma)
    return fit


def _scale(o: Tensor, teacher: Tensor) -> Tensor:
    """gamma [H] that brings RMSNorm(o) nearest to the teacher's outputs, [B, T, H, V] each."""
    normed = F.rms_norm(o, o.shape[-1:], eps=1e-6)
    return (teacher * normed).sum((0, 1, 3)) / normed.square().sum((0, 1, 3))

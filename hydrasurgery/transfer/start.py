"""Start values of a hybrid's linear heads, fitted to the teacher's own head outputs (paper section 5)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hydrasurgery.calibration import LinearFit, fit_linear_heads, run_model, watch_heads
from hydrasurgery.regions import RegionModule, region_modules


@torch.no_grad()
def calibrate(hybrid: nn.Module, teacher: nn.Module, input_ids: Tensor) -> dict[str, LinearFit]:
    """Give each linear head the half-life, beta and gamma that explain its teacher head best; changes `hybrid` in place.

    gamma_h = <o_h, o^_h> / <o^_h, o^_h> with o^ = RMSNorm(o); where full heads are normalised too (`full_norm="paper"`)
    theirs is the same fit to their own output.

    Args:
        hybrid: what `rewrite(teacher, plan)` gave, not yet trained.
        teacher: the model it was cut from.
        input_ids: [B, T] tokens without padding.

    Returns:
        The fit of every head of every layer, by the layer's name.
    """
    modules = region_modules(hybrid)
    fits: dict[str, LinearFit] = {}

    def visit(name: str, q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> None:
        module = modules[name]
        fits[name] = fit_linear_heads(q, k, v, o, rule=module.facts["options"].get("rule", "gated_delta"))
        _apply(module, fits[name], o)

    with watch_heads(teacher, visit):
        run_model(teacher, input_ids)
    return fits


def _apply(module: RegionModule, fit: LinearFit, o: Tensor) -> None:
    slots = list(zip(module.teacher_heads, module.kinds, strict=True))
    linear = [head for head, kind in slots if kind == "linear"]
    added: Any = module.hydra
    if hasattr(added, "decay"):
        added.decay.set_half_life(fit.half_life[linear])
    if hasattr(added, "beta"):
        added.beta.set_beta(fit.beta[linear])
    if hasattr(added, "gamma"):
        gamma = fit.gamma.clone()
        for head, kind in slots:
            if kind == "full":
                own = o[:, :, head].float()
                normed = torch.nn.functional.rms_norm(own, own.shape[-1:], eps=1e-6)
                gamma[head] = (own * normed).sum() / normed.square().sum()
        added.gamma.copy_(gamma[list(module.teacher_heads)] if added.gamma.numel() == len(gamma) else gamma[linear])

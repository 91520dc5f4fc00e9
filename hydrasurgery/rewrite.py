"""`rewrite`: the one verb that turns a decoder into a hybrid, by a plan."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

from torch import nn

from hydrasurgery.errors import UnsupportedModelError
from hydrasurgery.passes import run_pipeline
from hydrasurgery.plan import Plan
from hydrasurgery.regions import Region, capture, stitch


def hybrid_pipeline(
    rule: str = "gated_delta", full_norm: str = "exact", conv: int = 4, gate: bool = True, untie: bool = False
) -> str:
    """The passes of a rewrite, as a pipeline string; `untie` gives the linear heads their own q, k and v projections."""
    own = "untie-projections,prune-projections," if untie else ""
    return (
        f"canonicalize-attention,split-heads,{own}linearize-heads{{rule={rule},conv={conv}}},"
        f"fuse-heads{{full_norm={full_norm},gate={gate}}},thread-state,fuse-decode"
    )


def share_copy(model: nn.Module) -> nn.Module:
    """A new tree of modules (and a new config) over the same parameter and buffer tensors."""
    memo: dict[int, Any] = {id(t): t for t in itertools.chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, memo)


def rewrite(
    model: nn.Module,
    plan: Plan,
    *,
    full_norm: str = "exact",
    rule: str = "gated_delta",
    untie: bool = False,
    pipeline: str | None = None,
    example_inputs: Any = None,
    dump: str | Path | None = None,
) -> nn.Module:
    """Turn the heads that `plan` calls linear into linear attention; returns a hybrid, `model` stays the teacher.

    The hybrid is a new tree of modules that shares its parameter tensors with `model`: nothing is copied, and training
    the shared ones trains both. `hydrasurgery.distill` gives the hybrid its own before it trains them.

    Args:
        model: a Hugging Face decoder, or an nn.Module that calls `F.scaled_dot_product_attention`.
        plan: which head is what.
        full_norm: "exact" (full heads pass unchanged) or "paper" (normalised, with a gamma each).
        rule: the recurrence: linear, gated, delta or gated_delta.
        untie: give the linear heads their own q, k and v projections (copies, under `hydra`), and prune each projection
            to the heads that read it where it can be. The pruned ones are new parameters, no longer the teacher's.
        pipeline: other passes than the default, as a string.
        example_inputs: see `hydrasurgery.capture`.
        dump: a folder for the text of every region around every pass.

    Raises:
        UnsupportedModelError, PlanError, PassError: naming the module.
    """
    hybrid = share_copy(model)
    steps = pipeline or hybrid_pipeline(rule, full_norm, untie=untie)
    apply_plan(hybrid, plan, steps, example_inputs, dump)
    config = getattr(hybrid, "config", None)
    if config is not None:
        from hydrasurgery.pretrained import mark

        mark(hybrid, plan, steps)
    hybrid.train(model.training)
    return hybrid


def apply_plan(
    model: nn.Module, plan: Plan, pipeline: str, example_inputs: Any = None, dump: str | Path | None = None
) -> list[Region]:
    """Capture, rewrite and stitch `model` in place."""
    _check_interface(model)
    regions = capture(model, example_inputs)
    plan.validate(regions)
    for region, layer in zip(regions, plan.layers, strict=True):
        region.kinds = layer.kinds
    regions = run_pipeline(regions, pipeline, dump=dump)
    stitch(model, regions)
    return regions


def _check_interface(model: nn.Module) -> None:
    """A region reads complete masks [B, 1, T, S], which flash and flex attention do not make, and its weights in place."""
    hooked = next((name for name, module in model.named_modules() if hasattr(module, "_hf_hook")), None)
    if hooked is not None:
        raise UnsupportedModelError(
            f"{type(model).__name__}: accelerate moves the weights of {hooked or 'the model'} about (device_map over several "
            "devices, or offloading); load the model on one device"
        )
    implementation = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if implementation not in (None, "eager", "sdpa", "hydra"):
        raise UnsupportedModelError(
            f"{type(model).__name__} is set to attn_implementation={implementation!r}, whose masks a region cannot read; "
            "call model.set_attn_implementation('sdpa') first (the hybrid picks its own kernels)"
        )

"""`rewrite`: the one verb that turns a decoder into a hybrid, by a plan."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from hydrasurgery.errors import PlanError, UnsupportedModelError
from hydrasurgery.options import LayerOptions
from hydrasurgery.passes import (
    CanonicalizeAttention,
    CanonicalizeRotary,
    FuseDecode,
    FuseHeads,
    LinearizeHeads,
    Pass,
    PlaceHeads,
    PruneProjections,
    SplitHeads,
    ThreadState,
    UntieProjections,
    parse,
    run_pipeline,
)
from hydrasurgery.plan import Plan
from hydrasurgery.regions import Region, capture, stitch


def hybrid_pipeline(layer: LayerOptions | str = "default") -> str:
    """The passes that build a layer of these options, as a pipeline string."""
    options = LayerOptions.of(layer)
    place = PlaceHeads(options.full_rope, options.linear_rope, options.log_length)
    kind = {"conv": 0} if options.conv == "none" else {"conv_kind": options.conv}
    steps = [
        CanonicalizeAttention(),
        *([CanonicalizeRotary()] if options.moves_rotary else []),
        SplitHeads(),
        *([place] if place != PlaceHeads() else []),
        *([UntieProjections(), PruneProjections()] if options.untie else []),
        LinearizeHeads(options.rule, **kind),
        FuseHeads(options.full_norm, options.gate, options.full_gate),
        ThreadState(),
        FuseDecode(),
    ]
    return ",".join(map(str, steps))


def share_copy(model: nn.Module) -> nn.Module:
    """A new tree of modules (and a new config) over the same parameter and buffer tensors."""
    memo: dict[int, Any] = {id(t): t for t in itertools.chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, memo)


def rewrite(
    model: nn.Module,
    plan: Plan,
    *,
    layer: LayerOptions | str | None = None,
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
        layer: how a layer is built, instead of what the plan says: `hydrasurgery.LayerOptions`, or text such as "hydrahead" (the
            paper's layer) or "untie=true,conv=none". With `untie`, projections are pruned to the heads that read them where they
            can be; the pruned ones are new parameters, no longer the teacher's.
        pipeline: other passes than those of `layer`, as a string.
        example_inputs: see `hydrasurgery.capture`.
        dump: a folder for the text of every region around every pass.

    Raises:
        UnsupportedModelError, PlanError, PassError: naming the module.
    """
    if layer is not None and pipeline is not None:
        raise PlanError("layer and pipeline both say how a layer is built; leave one of them out.")
    if layer is not None:
        plan = replace(plan, layer=LayerOptions.of(layer))
    hybrid = share_copy(model)
    steps = pipeline or hybrid_pipeline(plan.layer)
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
    passes = parse(pipeline)
    regions = run_pipeline(regions, passes, dump=dump)
    _check_rotary(model, regions, passes)
    stitch(model, regions)
    return regions


def _check_rotary(model: nn.Module, regions: list[Region], passes: tuple[Pass, ...]) -> None:
    """A model may have layers without rotary embedding, but to drop what no layer has is a mistake."""
    drops = any(isinstance(step, PlaceHeads) and not (step.full_rope and step.linear_rope) for step in passes)
    if drops and not any(region.options.get("rotary") for region in regions):
        raise PlanError(
            f"{type(model).__name__}: no rotary embedding was recognised in {regions[0].name} or any other attention layer, so "
            "heads cannot do without; leave full_rope and linear_rope true (as in layer='hydrahead,full_rope=true')."
        )


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

"""Surgery: the passes that build a layer of given options, and their run over a whole model by a plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from hydrasurgery.errors import PlanError, UnsupportedModelError
from hydrasurgery.ir.capture import capture
from hydrasurgery.ir.region import Region
from hydrasurgery.ir.stitch import stitch
from hydrasurgery.norms import fuse_norms
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
from hydrasurgery.placement import check_placed
from hydrasurgery.plan import Plan


def hybrid_pipeline(layer: LayerOptions | str = "default") -> str:
    """The passes that build a layer of these options, as a pipeline string."""
    options = LayerOptions.of(layer)
    place = PlaceHeads(options.full_rope, options.linear_rope, options.log_length)
    conv: dict[str, Any] = {"conv": 0} if options.conv == "none" else {"conv_kind": options.conv}
    steps = [
        CanonicalizeAttention(),
        *([CanonicalizeRotary()] if options.moves_rotary else []),
        SplitHeads(),
        *([place] if place != PlaceHeads() else []),
        *([UntieProjections(), PruneProjections()] if options.untie else []),
        LinearizeHeads(options.rule, **conv),
        FuseHeads(options.full_norm, options.gate, options.full_gate),
        ThreadState(),
        FuseDecode(),
    ]
    return ",".join(map(str, steps))


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
    for region in regions:
        region.later = ()  # a checkpoint has the whole pipeline
    stitch(model, regions)
    if any(region.linear_heads for region in regions):
        fuse_norms(model)
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
    check_placed(model)
    implementation = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if implementation not in (None, "eager", "sdpa", "hydra"):
        raise UnsupportedModelError(
            f"{type(model).__name__} is set to attn_implementation={implementation!r}, whose masks a region cannot read; "
            "call model.set_attn_implementation('sdpa') first (the hybrid picks its own kernels)"
        )

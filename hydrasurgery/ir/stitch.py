"""Stitching: a region's module goes into the place of the module it was cut from, and is found there again."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from hydrasurgery.ir.region import Region, RegionModule


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` at path `name` of `model`."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent) if parent else model, leaf, module)


def stitch(model: nn.Module, regions: Iterable[Region]) -> nn.Module:
    """Put each region's module in its place; returns `model`."""
    for region in regions:
        replace_module(model, region.name, region.module)
    return model


def regions(model: nn.Module) -> list[Region]:
    """The regions of a hybrid, for printing and for further passes; empty for any other model.

    They are what the hybrid runs: `run_pipeline(regions(hybrid), "my-pass")` changes the hybrid.

    Args:
        model: what `rewrite` gave, a copy of it, or a loaded checkpoint.

    Example:
        >>> import hydrasurgery as hs
        >>> from hydrasurgery.demo.teacher import load_teacher
        >>> teacher, _ = load_teacher()
        >>> hybrid = hs.rewrite(teacher, hs.plan_heads(teacher, strategy="all-linear"))
        >>> print(str(hs.regions(hybrid)[0]).splitlines()[0])
        region model.layers.0.self_attn: 16 heads (16 linear), 8 KV heads of 16
    """
    found = []
    for name, module in region_modules(model).items():
        module.region.name = name  # a wrapper may have moved it
        found.append(module.region)
    return found


def region_modules(model: nn.Module) -> dict[str, RegionModule]:
    """The stitched attention modules of a model, by name, in order; empty for a model that is no hybrid.

    Args:
        model: what `rewrite` gave, a copy of it, or a loaded checkpoint.

    Example:
        >>> import hydrasurgery as hs
        >>> from hydrasurgery.demo.teacher import load_teacher
        >>> teacher, _ = load_teacher()
        >>> hybrid = hs.rewrite(teacher, hs.plan_heads(teacher, strategy="all-linear"))
        >>> modules = hs.region_modules(hybrid)
        >>> len(modules), set(modules["model.layers.0.self_attn"].kinds)
        (8, {'linear'})
    """
    return {name: m for name, m in model.named_modules() if isinstance(m, RegionModule)}

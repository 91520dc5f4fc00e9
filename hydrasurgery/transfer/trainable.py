"""Which parameters a stage trains."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any, cast

from torch import fx, nn

from hydrasurgery.dialect.names import ATTENTION
from hydrasurgery.errors import PlanError
from hydrasurgery.ir.region import RegionModule
from hydrasurgery.ir.state import extend_kv
from hydrasurgery.ir.stitch import region_modules
from hydrasurgery.transfer.recipe import Stage


def region_names(hybrid: nn.Module) -> set[str]:
    """Names of all parameters inside the hybrid's attention regions."""
    inside = {id(parameter) for region in region_modules(hybrid).values() for parameter in region.parameters()}
    return {name for name, parameter in hybrid.named_parameters() if id(parameter) in inside}


def addition_names(hybrid: nn.Module) -> set[str]:
    """Names of what the surgery put under the regions' `hydra`: what `align` trains unless told otherwise.

    Args:
        hybrid: what `rewrite(teacher, plan)` gave.

    Example:
        >>> import hydrasurgery as hs
        >>> from hydrasurgery.demo.teacher import load_teacher
        >>> teacher, _ = load_teacher()
        >>> hybrid = hs.rewrite(teacher, hs.plan_heads(teacher, strategy="all-linear"))
        >>> names = {name for name, _ in hybrid.named_parameters()}
        >>> addition_names(hybrid) == names - {name for name, _ in teacher.named_parameters()}
        True
    """
    added = {id(parameter) for region in region_modules(hybrid).values() for parameter in region.hydra.parameters()}
    return {name for name, parameter in hybrid.named_parameters() if id(parameter) in added}


def full_query_key_names(hybrid: nn.Module) -> set[str]:
    """Names of the projections that the full heads' queries and keys come from, read off each region's graph.

    Where a linear head reads the same projection, it is frozen for that head too.

    Raises:
        PlanError: a region computes its values from the same matrix.
    """
    frozen: set[str] = set()
    for path, region in region_modules(hybrid).items():
        for node in region.region.find(ATTENTION):
            projections = _matrices_behind(region, node.args[:2])
            fused = projections & _matrices_behind(region, node.args[2:3])
            if fused:
                raise PlanError(
                    f"{path}.{min(fused)} holds queries, keys and values in one matrix, of which "
                    "freeze_full_qk cannot freeze a part; turn it off"
                )
            frozen |= {f"{path}.{name}" for name in projections}
    return frozen


def _matrices_behind(region: RegionModule, nodes: Iterable[Any]) -> set[str]:
    """Names of the matrices that `nodes` of the region's graph are computed from."""
    queue, seen, names = [node for node in nodes if isinstance(node, fx.Node)], set(), set()
    while queue:
        node = queue.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.target is operator.getitem and node.all_input_nodes[0].target is extend_kv:
            _, *key_and_value = node.all_input_nodes[0].args  # one node for both, which stay apart
            node = cast(fx.Node, key_and_value[cast(int, node.args[1])])
        queue.extend(node.all_input_nodes)
        if node.op in ("call_module", "get_attr"):
            inside = f"{node.target}."
            names |= {n for n, p in region.named_parameters() if p.ndim > 1 and f"{n}.".startswith(inside)}
    return names


def trainable_names(hybrid: nn.Module, stage: Stage) -> tuple[set[str], set[str]]:
    """Names of the parameters that `stage` trains: (inside the attention regions, in the body).

    Raises:
        PlanError: nothing is left to train.
    """
    inside = region_names(hybrid)
    names = {name for name, _ in hybrid.named_parameters()}
    if stage.trainable == "additions":
        names = addition_names(hybrid)
    if stage.freeze_full_qk:
        names -= full_query_key_names(hybrid)
    if stage.name == "align" or not stage.body_lr:
        names &= inside
    if not names:
        raise PlanError(f"stage {stage.name!r} has nothing to train: the plan turns no head linear")
    return names & inside, names - inside

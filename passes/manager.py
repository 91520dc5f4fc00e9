"""The manager: runs passes on drafts of regions, verified after each, and takes the drafts if nothing failed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from torch import fx

from hydrasurgery.errors import HydraError, PassError
from hydrasurgery.files import atomic_write_text
from hydrasurgery.ir.region import Region
from hydrasurgery.ir.text import MEANING, format_graph
from hydrasurgery.ir.turns import in_turn
from hydrasurgery.passes.base import Pass
from hydrasurgery.passes.numerics import compare, run_random
from hydrasurgery.passes.pipeline import parse
from hydrasurgery.passes.shapes import ShapeInference
from hydrasurgery.passes.verify import Facts, verify


@in_turn
def run_pipeline(
    regions: Iterable[Region],
    passes: Iterable[Pass] | str,
    *,
    dump: str | Path | None = None,
    tolerance: float | None = None,
) -> list[Region]:
    """Run passes over regions, verified before and after each: all of it, or nothing.

    The passes work on drafts. When every region is done, the regions become what the drafts are, in place: a hybrid that they
    are part of runs the new graphs. If anything fails, regions and model are what they were. A one-token graph whose region's
    graph has changed is made anew, by the pass that made it.

    Args:
        regions: what `capture(model)` or `regions(hybrid)` gives.
        passes: passes, a pipeline string, or a preset's name ("analyze", "hybrid"); see `hydrasurgery.passes.parse`.
        dump: a folder that gets each region's text before the first and after every pass.
        tolerance: the largest difference that an exact pass may make to the region's outputs on random inputs, relative
            to the largest output; None does not run them.

    Returns:
        The regions, in the order given.

    Raises:
        PassError: whatever went wrong; the pass's and the region's names come first.
        PipelineError: the string names an unknown pass or option.

    Example:
        >>> from hydrasurgery.demo.teacher import load_teacher
        >>> from hydrasurgery.ir.capture import capture
        >>> regions = run_pipeline(capture(load_teacher()[0]), "analyze")
        >>> regions[0].options
        {'rotary': 2}
    """
    given = list(regions)
    todo = parse(passes) if isinstance(passes, str) else tuple(passes)
    shapes, drafts, changing = ShapeInference.shared(), list[Region](), set[int]()
    for region in given:
        draft = region.draft()
        changing |= _run(draft, todo, shapes, dump, tolerance)
        draft.recompile()
        drafts.append(draft)
    for region, draft in zip(given, drafts, strict=True):
        draft.later += tuple(str(step) for number, step in enumerate(todo) if number in changing)
        region.adopt(draft)
    return given


def _run(
    region: Region, todo: tuple[Pass, ...], shapes: ShapeInference, dump: str | Path | None, tolerance: float | None
) -> set[int]:
    """Run passes on a draft; returns which of them changed it, by their places."""
    changing = set()
    with _blamed("infer-shapes", region):
        shapes.infer(region)
        _dump(dump, region, 0, "given")
    for number, step in enumerate(todo):
        with _blamed(step.name, region):
            if _apply(step, region, shapes, tolerance):
                changing.add(number)
            _dump(dump, region, number + 1, step.name)
    if region.decoded_by and region.decode is None:
        with _blamed(region.decoded_by, region):
            (maker,) = parse(region.decoded_by)
            _apply(maker, region, shapes, tolerance)
    shapes.forget(region)
    return changing


def _apply(step: Pass, region: Region, shapes: ShapeInference, tolerance: float | None) -> bool:
    """Run one pass on a draft, and check what it promised; says whether it changed anything."""
    step.requires(region)
    facts, before = Facts.of(region), _Fingerprint.of(region)
    output = None if tolerance is None or not step.exact else run_random(region)
    result = step.run(region)
    if result.region is not region:
        raise ValueError("the pass returned another region than the one that it was given: change that one in place")
    now = _Fingerprint.of(region)
    changed = now != before
    if changed and not result.modified:
        raise ValueError("the pass says that it changed nothing, and it changed the region")
    if now.graph != before.graph and now.decode == before.decode:
        region.decode = None  # it was made of the older graph
    shapes.infer(region)
    verify(region, step, facts)
    step.ensures(region)
    if output is not None and tolerance is not None and changed:
        compare(output, run_random(region), tolerance)
    return changed


@contextlib.contextmanager
def _blamed(step: str, region: Region) -> Iterator[None]:
    """Whatever fails inside the block is a PassError that begins with the pass's and the region's names."""
    try:
        yield
    except Exception as error:
        if isinstance(error, PassError) and str(error).startswith(f"{step}: "):
            raise
        reason = str(error) if isinstance(error, (ValueError, HydraError)) else f"{type(error).__name__}: {error}"
        raise PassError(f"{step}: {region.name}: {reason}") from error


class _Fingerprint(NamedTuple):
    """What a pass may change: the graphs, what they call, and what the region and its modules hold."""

    graph: list[Any]
    decode: list[Any]
    facts: dict[str, Any]
    tensors: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, region: Region) -> _Fingerprint:
        facts = {
            key: value for key, value in vars(region).items() if key not in ("module", "_graph", "_decode", "_decoded")
        }
        module = region.module
        tensors = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
        return cls(
            _meaning(region.graph),
            _meaning(region.decode),
            {**facts, "options": dict(region.options)},
            tuple((name, id(tensor)) for name, tensor in tensors),
        )


def _meaning(graph: fx.Graph | None) -> list[Any]:
    if graph is None:
        return []
    return [*format_graph(graph, notes=MEANING), *(node.target for node in graph.nodes)]


def _dump(folder: str | Path | None, region: Region, number: int, name: str) -> None:
    if folder is not None:
        atomic_write_text(Path(folder) / f"{region.name}.{number:02d}-{name}.txt", f"{region}\n")

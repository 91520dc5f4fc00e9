"""Reading: the text of a region becomes the region again."""

from __future__ import annotations

import re

from torch import nn

from hydrasurgery.errors import RegionTextError
from hydrasurgery.ir.region import LETTERS, Inputs, Region, RegionModule
from hydrasurgery.ir.state import STATE
from hydrasurgery.ir.text import Functions, parse_graph, read_options
from hydrasurgery.json_files import shown

_HEAD = re.compile(
    r"region (\S*): ([1-9]\d{0,3}) heads \(\d{1,4} linear\), ([1-9]\d{0,3}) KV heads of ([1-9]\d{0,8})"
    r"(?:, values of (\d{1,9}))?(?:, window (\d{1,15}))?(?:, softcap (\d{1,15}(?:\.\d+)?(?:e[+-]?\d{1,2})?))?(, sinks)?"
)
HEADINGS = ("kinds", "teacher_heads", "options", "later", "call")


def parse_region(text: str, module: nn.Module | None = None, functions: Functions | None = None) -> Region:
    """The region that `str(region)` wrote: the same graphs, notes and facts.

    A text is a program: what it calls runs when the region runs.

    Args:
        text: `str(region)`, or text of that form.
        module: whose children and parameters the graph calls; None for a graph that calls none.
        functions: what `module:name` in the text stands for; functions of this package need no entry.

    Raises:
        RegionTextError: naming the line that is not of that form.

    Example:
        >>> region = parse_region('''
        ... region attention: 2 heads (0 linear), 1 KV heads of 8
        ...   kinds FF
        ...   call
        ...   %q: [B, 2, T, 8] = input q
        ...   %k: [B, 1, T, 8] = input k
        ...   %attention: [B, T, 2, 8] = hydra::attention(%q, %k, %k, scale=0.5)
        ...   return %attention
        ... ''')
        >>> region.num_heads, len(region.graph.nodes)
        (2, 4)
    """
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    head = _HEAD.fullmatch(lines[0]) if lines else None
    if head is None:
        first = lines[0] if lines else ""
        raise RegionTextError(
            f"{shown(first, 200)} is not of the form `region NAME: H heads (L linear), K KV heads of D`"
        )
    name, heads, shared, dim, values, window, softcap, sinks = head.groups()
    given: dict[str, str] = {}
    body = 1
    while body < len(lines) and (word := lines[body].partition(" "))[0] in HEADINGS:
        given[word[0]], body = word[2], body + 1
    split = next((i for i, line in enumerate(lines) if line.startswith("decode by ")), len(lines))
    graph, sources = parse_graph(lines[body:split], functions)
    arguments = [part for part in given.get("call", "").split(", ") if part]
    region = Region(
        name,
        RegionModule(nn.Module() if module is None else module),
        int(heads),
        int(shared),
        int(dim),
        int(values or dim),
        inputs=Inputs(
            tuple(part for part in arguments if "=" not in part),
            tuple((key, _path(path)) for key, path in sources.items() if key != STATE),
            next((part.removeprefix("cache=") for part in arguments if "=" in part), None),
        ),
        window=None if window is None else int(window),
        softcap=None if softcap is None else float(softcap),
        sinks=sinks is not None,
        kinds=_kinds(given.get("kinds", "F" * int(heads)), lines[0]),
        teacher_heads=tuple(map(int, re.findall(r"\d{1,9}", given.get("teacher_heads", "")))),
        options=read_options(given.get("options", "")),
        later=tuple(re.findall(r"[\w-]+(?:\{[^{}]*\})?", given.get("later", ""))),
    )
    if (problem := region.wrong_heads()) is not None:
        raise RegionTextError(f"{lines[0]!r}: {problem}")
    region.graph = graph
    if split < len(lines):
        region.decoded_by = lines[split].removeprefix("decode by ")
    if split + 1 < len(lines):
        region.decode = parse_graph(lines[split + 1 :], functions)[0]
    return region


def _kinds(letters: str, line: str) -> tuple[str, ...]:
    kinds = {letter: kind for kind, letter in LETTERS.items()}
    if not set(letters) <= kinds.keys():
        raise RegionTextError(f"{line!r}: kinds {shown(letters)} are not letters of {', '.join(kinds)}")
    return tuple(kinds[letter] for letter in letters)


def _path(text: str) -> tuple[str | int, ...]:
    return tuple(int(step) if re.fullmatch(r"[0-9]{1,9}", step) else step for step in text.split("."))

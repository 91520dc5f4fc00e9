"""Pipelines written as strings: names of passes with their options, separated by commas."""

from __future__ import annotations

import re
from typing import Any

from hydrasurgery.errors import PipelineError
from hydrasurgery.json_files import shown
from hydrasurgery.passes.base import REGISTRY, Pass, read_option

LONGEST = 10_000  # characters
STEP = re.compile(r"\s*([\w-]+)(?:\{([^{}]*)\})?\s*(?:,|$)")
PRESETS = {
    "analyze": "canonicalize-attention,canonicalize-rotary",
    "hybrid": "canonicalize-attention,split-heads,linearize-heads,fuse-heads,thread-state,fuse-decode",
}


def parse(pipeline: str) -> tuple[Pass, ...]:
    """The passes of a pipeline string.

    Args:
        pipeline: `name{option=value,...},name,...`, or a preset's name ("analyze", "hybrid").

    Returns:
        The passes, in order; options that are left out have their defaults.

    Raises:
        PipelineError: naming the unknown pass or option, or the option's value and what it may be.

    Example:
        >>> [str(step) for step in parse("split-heads,linearize-heads{rule=delta,conv=4},fuse-heads{gate=false}")]
        ['split-heads', 'linearize-heads{rule=delta}', 'fuse-heads{gate=false}']
    """
    if not isinstance(pipeline, str) or len(pipeline) > LONGEST:
        raise PipelineError(f"a pipeline is text of at most {LONGEST} characters, not {shown(pipeline)}")
    text = PRESETS.get(pipeline, pipeline)
    passes, at = [], 0
    while at < len(text):
        step = STEP.match(text, at)
        if step is None:
            raise PipelineError(
                f"pipeline {shown(pipeline)} is not of the form name{{option=value,...}},name,...: {shown(text[at:])}"
            )
        passes.append(_build(step[1], step[2] or ""))
        at = step.end()
    return tuple(passes)


def _build(name: str, options: str) -> Pass:
    if name not in REGISTRY:
        raise PipelineError(f"no pass is called {shown(name)}; known: {', '.join(sorted(REGISTRY))}")
    cls, given = REGISTRY[name], dict[str, Any]()
    for part in filter(str.strip, options.split(",")):
        key, _, text = (word.strip() for word in part.partition("="))
        if key in given:
            raise PipelineError(f"{name}: option {key} is given twice")
        given[key] = read_option(cls, key, text)
    return cls(**given)

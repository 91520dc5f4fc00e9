"""Pipelines written as strings: names of passes with their options, separated by commas."""

from __future__ import annotations

import re

from hydrasurgery.errors import PipelineError
from hydrasurgery.passes.base import REGISTRY, Pass, read_option

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
    text = PRESETS.get(pipeline, pipeline)
    if not re.fullmatch(r"(\s*[\w-]+(\{[^{}]*\})?\s*(,|$))+", text):
        raise PipelineError(f"pipeline {pipeline!r} is not of the form name{{option=value,...}},name,...")
    return tuple(_build(name, options) for name, _, options in re.findall(r"([\w-]+)(\{([^{}]*)\})?", text))


def _build(name: str, options: str) -> Pass:
    if name not in REGISTRY:
        raise PipelineError(f"no pass is called {name!r}; known: {', '.join(sorted(REGISTRY))}")
    parts = [part.partition("=") for part in options.split(",") if part.strip()]
    cls = REGISTRY[name]
    return cls(**{key.strip(): read_option(cls, key.strip(), value.strip()) for key, _, value in parts})

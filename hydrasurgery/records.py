"""Records: dataclasses whose fields say what they may hold, checked when they are made and when they are read from JSON.

    @dataclass(frozen=True)
    class Stage:
        name: Literal["align", "distil"]
        lr: Annotated[float, Bounds(0, 1, "(]")]
        betas: tuple[float, float] = (0.9, 0.95)

        def __post_init__(self) -> None:
            check_record(self, RecipeError, "stage")

    stage = read_record(Stage, load_json(path, RecipeError), path, RecipeError)

Fields are of type bool, int, float, str, `Literal[...]`, `X | None`, a tuple, `dict[str, X]` or a record; others are not checked.
Types are exact: no number is cut to a whole one, true is no number, and no number is NaN or infinite. An error names the file, the
place in it (`stages[1].ce_weight`), what was found there and what to give.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import types
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from hydrasurgery.errors import HydraError
from hydrasurgery.json_files import SHOWN, shown

Record = TypeVar("Record")
Read = Callable[[Any], Any]


@dataclass(frozen=True)
class Bounds:
    """The interval of a number, or of the length of a text, list or object: `Annotated[float, Bounds(0, 1, "[)")]`."""

    low: float
    high: float
    ends: Literal["[]", "(]", "[)", "()"] = "[]"

    def hold(self, value: float) -> bool:
        """Whether `value` lies in the interval; NaN never does."""
        above = value > self.low if self.ends[0] == "(" else value >= self.low
        return above and (value < self.high if self.ends[1] == ")" else value <= self.high)

    def __str__(self) -> str:
        above, below = "above " * (self.ends[0] == "("), "below " * (self.ends[1] == ")")
        return f"from {above}{self.low:.15g} to {below}{self.high:.15g}"


Count = Annotated[int, Bounds(0, 10**15)]  # steps, tokens, bytes
Positive = Annotated[int, Bounds(1, 10**15)]
Seed = Annotated[int, Bounds(0, 2**63 - 1)]  # the random module takes -1 for 1
Name = Annotated[str, Bounds(0, 1000)]


def read_record(
    kind: type[Record], value: Any, source: str, error: type[HydraError], optional: Collection[str] | None = None
) -> Record:
    """A record of class `kind` from JSON data.

    Args:
        kind: the record's class.
        value: what `load_json` gave; a record in it that has been read already is taken as it is.
        source: the file's name, with which errors begin.
        error: the class of errors.
        optional: fields that the data may lack; by default all that have a default. Unknown fields are never taken.

    Returns:
        The record: tuples where JSON has lists, and records in it where its fields are of such a class.

    Example:
        >>> from hydrasurgery.errors import RecipeError
        >>> from hydrasurgery.transfer import Recipe
        >>> stage = {"name": "align", "batch_size": 1, "length": 64, "steps": 1, "lr": None, "lr_end": 0.1}
        >>> read_record(Recipe, {"name": "short", "stages": [stage]}, "recipe.json", RecipeError)
        Traceback (most recent call last):
        ...
        hydrasurgery.errors.RecipeError: recipe.json: stages[0].lr is null; give a number from above 0 to 1000
    """
    try:
        return _fields(kind, value, optional)
    except _Misfit as misfit:
        raise error(f"{source}: {misfit}") from None


def read_value(kind: Any, value: Any, label: str, error: type[HydraError]) -> Any:
    """`value` as the annotation `kind` has it; an `error` that begins with `label` if it is not of that kind.

    Example:
        >>> from hydrasurgery.errors import PlanError
        >>> read_value(tuple[Count, ...], [1, 2], "plan.json: layers", PlanError)
        (1, 2)
    """
    try:
        return _reader(kind)(value)
    except _Misfit as misfit:
        raise error(f"{label}{misfit.path} {misfit.why}") from None


def check_record(record: Any, error: type[HydraError], label: str) -> None:
    """Check each field of a record in its `__post_init__`, and make tuples of lists and floats of whole numbers."""
    cls: Any = type(record)
    for name, kind in _hints(cls).items():
        object.__setattr__(record, name, read_value(kind, getattr(record, name), f"{label}: {name}", error))


def wanted(kind: Any, bounds: Bounds | None = None) -> str:
    """What an annotation allows, in words.

    Example:
        >>> wanted(Annotated[float, Bounds(0, 1, "[)")] | None)
        'a number from 0 to below 1 or null'
    """
    origin, choices = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return wanted(*choices[:2])
    if origin in (Union, types.UnionType):
        return " or ".join("null" if choice is type(None) else wanted(choice) for choice in choices)
    if origin is Literal:
        return f"one of {', '.join(map(str, choices))}"
    if kind in (int, float):
        return f"a {'whole ' * (kind is int)}number" + (f" {bounds}" if bounds else "")
    word = {bool: "true or false", str: "text", tuple: "a list"}.get(origin or kind, "an object")
    if origin is tuple and choices[-1] is not Ellipsis:
        return f"{word} of {len(choices)}"
    return word + (f" of {bounds.low:g} to {bounds.high:g}" + " characters" * (kind is str) if bounds else "")


class _Misfit(Exception):
    """A value that may not stand at `path`, and why not."""

    def __init__(self, why: str, path: str = "") -> None:
        self.why, self.path = why, path

    def inside(self, place: str) -> _Misfit:
        return _Misfit(self.why, place + self.path)

    def __str__(self) -> str:
        return f"{self.path.removeprefix('.')} {self.why}" if self.path else self.why


@cache
def _hints(kind: Any) -> dict[str, Any]:
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _fields(kind: Any, value: Any, optional: Collection[str] | None = None) -> Any:
    if isinstance(value, kind):
        return value
    if not isinstance(value, dict):
        raise _Misfit(f"is {shown(value)}; give an object")
    hints = _hints(kind)
    if optional is None:
        none = dataclasses.MISSING
        optional = {f.name for f in dataclasses.fields(kind) if (f.default, f.default_factory) != (none, none)}
    for name in value:
        if name not in hints:
            raise _Misfit(f"has the unknown field {shown(name)}; known are {', '.join(hints)}")
    found = {}
    for name, hint in hints.items():
        try:
            if name in value:
                found[name] = _reader(hint)(value[name])
            elif name not in optional:
                raise _Misfit(f"is missing; give {wanted(hint)}")
        except _Misfit as misfit:
            raise misfit.inside(f".{name}") from None
    try:
        return kind(**found)
    except HydraError as problem:  # what the record demands of several fields together
        raise _Misfit(f"cannot be taken ({problem})") from problem


@cache
def _reader(kind: Any) -> Read:
    """What gives a value as an annotation has it, or a _Misfit."""
    hint, bounds = kind, None
    if get_origin(kind) is Annotated:
        kind, bounds = get_args(kind)[:2]
    origin, choices = get_origin(kind), get_args(kind)

    def refuse(value: Any) -> NoReturn:
        raise _Misfit(f"is {shown(value)}; give {wanted(hint)}")

    def sized(value: Any) -> Any:
        return value if bounds is None or bounds.hold(len(value)) else refuse(value)

    def plain(value: Any) -> Any:
        return sized(value) if isinstance(value, kind) else refuse(value)

    def number(value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, numbers.Integral if kind is int else numbers.Real):
            refuse(value)
        try:
            exact = kind(value)
        except OverflowError:
            refuse(value)
        return exact if math.isfinite(exact) and (bounds is None or bounds.hold(exact)) else refuse(value)

    def literal(value: Any) -> Any:
        same = [c for c in choices if (type(value) is type(c) or isinstance(value, str)) and value == c]
        return same[0] if same else refuse(value)

    def optional(value: Any) -> Any:
        return None if value is None else _reader(some)(value)

    def items(value: Any) -> Any:
        if not isinstance(value, (list, tuple)) or not (endless or len(value) == len(choices)):
            refuse(value)
        readers = [_reader(choices[0])] * len(sized(value)) if endless else [_reader(choice) for choice in choices]
        found: list[Any] = []
        try:
            for read, item in zip(readers, value, strict=True):
                found.append(read(item))
        except _Misfit as misfit:
            raise misfit.inside(f"[{len(found)}]") from None
        return tuple(found)

    def entries(value: Any) -> Any:
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            refuse(value)
        found: dict[str, Any] = {}
        for key, item in sized(value).items():
            try:
                found[key] = _reader(choices[1])(item)
            except _Misfit as misfit:
                raise misfit.inside(f".{key[:SHOWN]}") from None
        return found

    if dataclasses.is_dataclass(kind):
        return lambda value: _fields(kind, value)
    if origin in (Union, types.UnionType) and len(choices) == 2 and choices[1] is type(None):
        some = choices[0]
        return optional
    endless = choices[-1:] == (Ellipsis,)
    readers = {bool: plain, str: plain, int: number, float: number, Literal: literal, tuple: items, dict: entries}
    return readers.get(origin or kind, lambda value: value)

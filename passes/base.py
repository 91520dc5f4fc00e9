"""The contract of a pass: what it needs, what it does to one region, what it promises, and its options as text."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, get_args, get_origin, get_type_hints

from hydrasurgery.errors import PipelineError, PostconditionError, PreconditionError
from hydrasurgery.ir.region import Region
from hydrasurgery.json_files import parse_json, shown
from hydrasurgery.records import check_record


class PassResult(NamedTuple):
    """What a pass returns.

    Attributes:
        region: the region, rewritten in place.
        modified: whether it differs from the one that went in.

    Example: see `Pass`.
    """

    region: Region
    modified: bool


@dataclass(frozen=True)
class Pass:
    """One rewrite of one region. Subclasses are frozen dataclasses, set `name` and implement `run`; fields are the options.

    `run_pipeline` gives a pass a draft of the region, which it may change in place, and takes the draft only if nothing
    fails. A draft has graphs and modules of its own over the same parameters: a pass gives a module another parameter, and never
    writes into one, which could not be undone. Options are of type bool, int, float, str or `Literal[...]`, or such
    a type with bounds (`Annotated[int, Bounds(0, 9)]`), and are checked when a pass is made.

    Attributes:
        name: as in a pipeline string.
        exact: whether the region gives the same numbers afterwards, up to rounding.
        keeps_shapes: whether each of the region's parameters keeps its shape.

    Raises:
        PipelineError: an option has a value that its type does not allow.

    Example:
        >>> import hydrasurgery as hs
        >>> from hydrasurgery.demo.teacher import load_teacher
        >>> from hydrasurgery.dialect.names import ATTENTION
        >>> @dataclass(frozen=True)
        ... class Soften(Pass):
        ...     name = "soften"
        ...     exact = False
        ...     scale: float = 0.125
        ...     def run(self, region):
        ...         nodes = region.find(ATTENTION)
        ...         for node in nodes:
        ...             node.update_kwarg("scale", self.scale)
        ...         return PassResult(region, bool(nodes))
        >>> region = hs.run_pipeline(hs.capture(load_teacher()[0]), [Soften(0.2)])[0]
        >>> region.find(ATTENTION)[0].kwargs["scale"]
        0.2
    """

    name: ClassVar[str]
    exact: ClassVar[bool] = True
    keeps_shapes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_record(self, PipelineError, self.name)

    def requires(self, region: Region) -> None:
        """Raise PreconditionError (by `need`) if `region` is not in the form that this pass needs."""

    def run(self, region: Region) -> PassResult:
        """Rewrite `region` in place and say whether it changed."""
        raise NotImplementedError

    def ensures(self, region: Region) -> None:
        """Raise PostconditionError (by `promise`) if `region` is not in the form that this pass promises."""

    def need(self, region: Region, condition: bool, message: str) -> None:
        """Unless `condition` holds, raise PreconditionError with `message` after the names of pass and `region`."""
        if not condition:
            raise PreconditionError(f"{self.name}: {region.name}: {message}")

    def promise(self, region: Region, condition: bool, message: str) -> None:
        """Unless `condition` holds, raise PostconditionError with `message` after the names of pass and `region`."""
        if not condition:
            raise PostconditionError(f"{self.name}: {region.name}: {message}")

    def __str__(self) -> str:
        changed = [f for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        options = ",".join(f"{f.name}={_text(getattr(self, f.name))}" for f in changed)
        return f"{self.name}{{{options}}}" if options else self.name


REGISTRY: dict[str, type[Pass]] = {}


def register(cls: type[Pass]) -> type[Pass]:
    """Class decorator: make a pass known to `parse` by its name.

    Args:
        cls: a subclass of `Pass`.

    Returns:
        The class itself.

    Raises:
        PipelineError: an option has a type that text cannot give: none of bool, int, float, str and `Literal[...]`.

    Example:
        >>> from hydrasurgery.passes import parse
        >>> @register
        ... @dataclass(frozen=True)
        ... class Nothing(Pass):
        ...     name = "nothing"
        ...     def run(self, region):
        ...         return PassResult(region, False)
        >>> parse("nothing")
        (Nothing(),)
        >>> del REGISTRY["nothing"]  # and forget it again
    """
    for option, kind in option_types(cls).items():
        if kind not in (bool, int, float, str) and get_origin(kind) is not Literal:
            raise PipelineError(f"pass {cls.name!r}: option {option} is a {kind}, which a pipeline string cannot give")
    REGISTRY[cls.name] = cls
    return cls


def option_types(cls: type[Pass]) -> dict[str, Any]:
    """The options of a pass with their types, in order; bounds left out."""
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def read_option(cls: type[Pass], option: str, text: str) -> Any:
    """An option's value from a pipeline string: `true` or `false`, a number, or one of the choices; text that is none stays text.

    Raises:
        PipelineError: the pass has no such option.
    """
    kinds = option_types(cls)
    if option not in kinds:
        has = ", ".join(sorted(kinds)) or "none"
        raise PipelineError(f"pass {cls.name!r} has no option {shown(option)}; it has: {has}")
    kind = kinds[option]
    if get_origin(kind) is Literal:
        return {str(choice): choice for choice in get_args(kind)}.get(text, text)
    if kind is str:
        return text
    try:
        return parse_json(text.lower(), option, PipelineError)
    except PipelineError:
        return text  # which the pass refuses, with what it wants instead


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)

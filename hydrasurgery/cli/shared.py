"""What the commands share: arguments that several of them take, the device they name, and where tables are printed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from hydrasurgery.json_files import shown

if TYPE_CHECKING:
    from rich.console import Console

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A folder with a model, its name on the hub, or a .gguf file.")
]
LONGEST = 10**8  # tokens of a sequence
TOKENS = 2**32  # of all sequences of a length, which are made at once
Length = Annotated[
    int | None, typer.Option(min=1, max=LONGEST, help="Tokens a probe; by default 4096 or the model's limit.")
]
Count = Annotated[int, typer.Option(min=1, max=100_000, help="Sequences.")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="The same seed gives the same result.")]
LAYER = "How layers are built: default, hydrahead (the paper's), and/or changes, as in hydrahead,conv=none."


def device_of(name: str) -> torch.device:
    """The device called `name`, tried; "auto" is a GPU where there is one.

    Raises:
        typer.BadParameter: there is no such device on this machine, or torch was built without it.

    Example:
        >>> device_of("cpu")
        device(type='cpu')
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        why = str(error).partition("\n")[0].partition(". ")[0]
        raise typer.BadParameter(
            f"{shown(name)}: not on this machine ({why}); give auto, cpu, cuda or cuda:1"
        ) from error
    return device


Device = Annotated[
    torch.device,
    typer.Option(
        "--device",
        parser=device_of,
        metavar="DEVICE",
        help="cpu, cuda, cuda:1, ...; auto takes a GPU where there is one.",
    ),
]
AUTO: Any = "auto"  # what a Device is if it is not given, before it is parsed


def on_device(model: Any, device: torch.device) -> Any:
    """`model`, moved to a device.

    Raises:
        typer.BadParameter: it does not fit there.

    Example:
        >>> on_device(torch.nn.Linear(2, 2), torch.device("cpu")).weight.device
        device(type='cpu')
    """
    try:
        return model.to(device)
    except RuntimeError as error:
        raise typer.BadParameter(f"--device {device}: {error}") from error


def refuse(context: typer.Context, options: Iterable[str], reason: str) -> None:
    """Refuse options that were given although they change nothing, rather than leave them unheard.

    Args:
        context: of the command.
        options: names of its parameters.
        reason: when they would count, as "only counts with ...".

    Raises:
        typer.BadParameter: one of them was given.
    """
    for parameter in context.command.params:
        source = context.get_parameter_source(str(parameter.name))
        if parameter.name in options and source is not None and source.name == "COMMANDLINE":
            raise typer.BadParameter(reason, ctx=context, param_hint=f"--{parameter.name}".replace("_", "-"))


def wide_console() -> Console:
    """A console that is wide enough for the tables even where the output is no terminal."""
    from rich.console import Console

    return Console(width=None if Console().is_terminal else 140)

"""What the commands share: arguments that several of them take, the device they name, and where tables are printed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

if TYPE_CHECKING:
    from rich.console import Console

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A folder with a model, or its name on the hub.")]
Length = Annotated[int | None, typer.Option(min=1, help="Tokens a probe; by default 4096 or the model's limit.")]
Count = Annotated[int, typer.Option(min=1, help="Sequences.")]
Seed = Annotated[int, typer.Option(help="The same seed gives the same result.")]
LAYER = "How layers are built: default, hydrahead (the paper's), and/or changes, as in hydrahead,conv=none."
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU where there is one.")]


def device_of(name: str) -> torch.device:
    """The device called `name`; "auto" is a GPU where there is one.

    Example:
        >>> device_of("cpu")
        device(type='cpu')
    """
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def on_device(model: Any, name: str) -> Any:
    """`model`, moved to the device called `name` (see `device_of`).

    Raises:
        typer.BadParameter: the machine has no such device, or torch was built without it.

    Example:
        >>> on_device(torch.nn.Linear(2, 2), "cpu").weight.device
        device(type='cpu')
    """
    try:
        return model.to(device_of(name))
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise typer.BadParameter(f"--device {name}: {error}") from error


def wide_console() -> Console:
    """A console that is wide enough for the tables even where the output is no terminal."""
    from rich.console import Console

    return Console(width=None if Console().is_terminal else 140)

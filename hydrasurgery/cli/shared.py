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
        raise typer.BadParameter(f"{name}: not on this machine ({why}); give auto, cpu, cuda or cuda:1") from error
    return device


Device = Annotated[
    torch.device,
    typer.Option(
        parser=device_of, metavar="DEVICE", help="cpu, cuda, cuda:1, ...; auto takes a GPU where there is one."
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


def wide_console() -> Console:
    """A console that is wide enough for the tables even where the output is no terminal."""
    from rich.console import Console

    return Console(width=None if Console().is_terminal else 140)

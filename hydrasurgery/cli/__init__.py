"""The command line; the commands are loaded when it runs, so that a signal that comes meanwhile ends it as well as later."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hydrasurgery.cli.signals import idle, stopping

if TYPE_CHECKING:
    from hydrasurgery.cli.commands import COMMANDS as COMMANDS
    from hydrasurgery.cli.commands import app as app

__all__ = ["app", "main"]


def main() -> None:
    """Entry point: expected errors are one red line on standard error, and exit code 1; 130 and 143 after a signal."""
    with stopping():
        with idle():
            from hydrasurgery.cli.commands import app
        app(prog_name="hydrasurgery")


def __getattr__(name: str) -> Any:
    if name not in ("COMMANDS", "app"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from hydrasurgery.cli import commands

    return getattr(commands, name)

"""The command that shows the whole surgery on the shipped teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hydrasurgery.cli.signals import hinting


def demo(
    out: Annotated[Path, typer.Option(help="The folder of everything the demo writes.")] = Path("runs/demo"),
    quick: Annotated[bool, typer.Option("--quick", help="Only the chosen heads and the all-linear hybrid.")] = False,
) -> None:
    """Run the whole surgery on the small teacher that comes with the package.

    Example: hydrasurgery demo --out runs/demo --quick
    """
    from hydrasurgery.demo.run import run_demo

    with hinting("the same command goes on from the checkpoints that were written"):
        run_demo(out, quick)

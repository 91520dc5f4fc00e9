"""The app of commands, in the order in which `--help` lists them."""

from __future__ import annotations

import io
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
import typer
from typer.core import TyperGroup

from hydrasurgery.cli.demonstration import demo
from hydrasurgery.cli.heads import audit, compare, plan, plot, score
from hydrasurgery.cli.machine import bench, kernels
from hydrasurgery.cli.models import distill, evaluate, export, generate, inspect, rewrite
from hydrasurgery.cli.signals import told
from hydrasurgery.errors import HydraError

COMMANDS: dict[str, Callable[..., None]] = {
    "inspect": inspect,
    "score": score,
    "plan": plan,
    "audit": audit,
    "compare": compare,
    "plot": plot,
    "rewrite": rewrite,
    "distill": distill,
    "eval": evaluate,
    "generate": generate,
    "export": export,
    "kernels": kernels,
    "bench": bench,
    "demo": demo,
}


class _Group(TyperGroup):
    """Commands whose expected errors are one red line on standard error and exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (HydraError, OSError, ImportError, MemoryError, RuntimeError) as error:
            if told() or (isinstance(error, RuntimeError) and not _no_memory(error)):
                raise
            what = "out of memory: " if isinstance(error, (MemoryError, RuntimeError)) else ""
            typer.secho(f"error: {what}{' '.join(str(error).split())}", fg="red", err=True)
            raise typer.Exit(1) from error


def _no_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)  # on a GPU, or on a CPU


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Turn a pretrained decoder into a long-context hybrid of softmax and linear attention heads.",
)


@app.callback()
def _quiet() -> None:
    from tqdm import tqdm
    from transformers.utils import logging

    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # not every terminal's encoding has every character
    tqdm.set_lock(threading.RLock())  # rather than a semaphore, which a process that is killed leaves behind
    logging.set_verbosity_error()
    logging.disable_progress_bar()


for _name, _command in COMMANDS.items():
    app.command(_name)(_command)

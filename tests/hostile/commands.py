"""Commands that hostile tests run, in this process or in one of its own, and what a folder looks like before and after."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from hydrasurgery.cli import app

ROOT = Path(__file__).parents[2]
STARTED: list[subprocess.Popen[str]] = []  # by `start`, and perhaps not ended


def run(*args: Any) -> Any:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def succeed(*args: Any) -> str:
    result = run(*args)
    assert result.exit_code == 0, result.output
    return result.stdout


def fail(*args: Any) -> str:
    """The one line that a refused command writes."""
    result = run(*args)
    assert result.exit_code == 1, (result.output, result.exception)
    assert isinstance(result.exception, SystemExit)
    (line,) = result.stderr.splitlines()
    return line.removeprefix("error: ")


def contents(folder: Path) -> dict[str, Any]:
    """Every entry below a folder with what it is: bytes of a file, where a link leads, None for a folder."""
    return {
        str(path.relative_to(folder)): os.readlink(path)
        if path.is_symlink()
        else None
        if path.is_dir()
        else path.read_bytes()
        for path in sorted(folder.rglob("*"))
    }


@contextmanager
def little_room(size: int) -> Iterator[None]:
    """No file grows above `size` bytes in the block."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def start(*args: Any, own: bool = False) -> subprocess.Popen[str]:
    """A process that runs a command of the program, or Python itself if the code is the test's `own`; see `end_started`."""
    command = ["-c", *args] if own else ["-m", "hydrasurgery.cli", *args]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # tests may run in the background
    )
    STARTED.append(process)
    return process


def end_started() -> None:
    """End what a test has started and left running, with all that it started."""
    while STARTED:
        process = STARTED.pop()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def wait_for(what: Callable[[], Any], seconds: float = 60) -> Any:
    """What `what()` gives as soon as it is true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := what():
            return found
        time.sleep(0.01)
    raise AssertionError(f"not within {seconds} s")


def alive(group: int) -> list[int]:
    """The processes of a session that still run."""
    found = []
    for entry in os.listdir("/proc"):
        try:
            fields = Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()
        except (OSError, ValueError):
            continue
        if int(fields[3]) == group and fields[0] != "Z":
            found.append(int(entry))
    return found

"""Ctrl-C and SIGTERM end a command within seconds, with one line on standard error and exit code 128 + the signal's number."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
GRACE = 10.0  # seconds to clean up in


class Stopped(BaseException):
    """The process was told to end.

    Attributes:
        number: of the signal.
        hint: how to go on; see `hinting`.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number, self.hint = number, ""


@contextlib.contextmanager
def stopping() -> Iterator[None]:
    """The first signal of `SIGNALS` in the block raises `Stopped` there, with which the process ends.

    A signal that the process was started to ignore (as `nohup` and shells do for what runs in the background) stays ignored.
    A second signal kills the process, and so does the end of `GRACE` if it is still busy then. What it leaves in that case is
    removed by a later run (see `hydrasurgery.files`).
    """
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _stop)
    try:
        yield
    except Stopped as stop:
        what = "interrupted" if stop.number == signal.SIGINT else "terminated"
        print(f"{what}{stop.hint and ': '}{stop.hint}", file=sys.stderr)
        sys.exit(128 + stop.number)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def hinting(hint: str) -> Iterator[None]:
    """If the process is told to end in the block, its last line says `hint`.

    Example:
        >>> with hinting("add --resume to go on"):
        ...     pass
    """
    try:
        yield
    except Stopped as stop:
        stop.hint = stop.hint or hint
        raise


def _stop(number: int, _frame: Any) -> None:
    for each in SIGNALS:
        signal.signal(each, signal.SIG_DFL)
    end = threading.Timer(GRACE, os._exit, (128 + number,))
    end.daemon = True
    end.start()
    raise Stopped(number)

"""Ctrl-C and SIGTERM end a command within seconds, with one line on standard error and exit code 128 + the signal's number."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM)
AGAIN = signal.SIGURG  # calls the main thread once more to raise `Stopped`; nobody sends it by hand
GRACE = 10.0  # seconds to clean up in


class Stopped(BaseException):
    """The process was told to end.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class _Told:
    """What the process knows of the signal that told it to end.

    Attributes:
        number: of the signal; 0 before one came.
        hint: how to go on; see `hinting`.
        idle: whether nothing has been begun, so that nothing is to be cleaned up.
        done: whether the work is over, so that nothing is left to be stopped.
        raised: the `Stopped` that is on its way, for as long as it is.
        called: whether the main thread has been called to raise one and has not done so yet.
        depth: imports that the work itself is part of.
    """

    def __init__(self, depth: int = 0) -> None:
        self.number, self.hint, self.depth = 0, "", depth
        self.idle = self.done = self.called = False
        self.raised: weakref.ref[Stopped] | None = None

    @property
    def line(self) -> str:
        """The process's last line."""
        what = "interrupted" if self.number == signal.SIGINT else "terminated"
        return f"{what}: {self.hint}" if self.hint else what


_told = _Told()


def told() -> bool:
    """Whether a signal has told the process to end: an error that comes after that is of no interest.

    Example:
        >>> told()
        False
    """
    return _told.number != 0


@contextlib.contextmanager
def stopping() -> Iterator[None]:
    """The first signal of `SIGNALS` in the block raises `Stopped` there, with which the process ends.

    The block is a process's whole work: a signal that comes after it ends the process at once, with the exit code that it
    would have had. One that the process was started to ignore (as `nohup` and shells do for what runs in the background)
    stays ignored.

    No import is broken off, which C++ code may answer by aborting: `Stopped` waits for its end. If it comes to where an
    exception gets lost, as in a `__del__` or in code that C calls, it is raised again. Another error in its wake counts as it.

    A second signal kills the process, and so does the end of `GRACE` if it is still busy then. What it leaves in that case is
    removed by a later run (see `hydrasurgery.files`).
    """
    global _told
    _told = _Told(_imports(sys._getframe()))
    atexit.register(_end_deaf)  # before what the block registers, so it is called after that
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)
    sys.unraisablehook = functools.partial(_unraisable, sys.unraisablehook)
    code = 0
    try:
        try:
            yield
        finally:
            _told.done = True  # from here on nothing is raised
    except BaseException as error:
        code = _exit_code(error)
        if not told() or code == 0:
            raise
        print(_told.line, file=sys.stderr)
        code = 128 + _told.number
        raise SystemExit(code) from None
    finally:
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, functools.partial(_leave, code))


@contextlib.contextmanager
def idle() -> Iterator[None]:
    """In the block, which leaves nothing to be cleaned up, a signal ends the process without waiting for anything."""
    _told.idle = True
    try:
        yield
    finally:
        _told.idle = False


@contextlib.contextmanager
def hinting(hint: str) -> Iterator[None]:
    """If the process is told to end in the block, its last line says `hint`.

    Example:
        >>> with hinting("add --resume to go on"):
        ...     pass
    """
    before, _told.hint = _told.hint, hint
    try:
        yield
    finally:
        if not told():
            _told.hint = before


def _stop(number: int, frame: Any) -> None:
    if _told.done:
        return
    _told.number = number
    if _told.idle:
        _end(_told)
    for each in SIGNALS:
        signal.signal(each, signal.SIG_DFL)
    signal.signal(AGAIN, _raise)
    _told.called = True
    threading.Thread(target=_see_to_it, args=(_told,), daemon=True).start()
    _raise(number, frame)


def _raise(_number: int, frame: Any) -> None:
    if not _told.done and _imports(frame) == _told.depth:
        stop = Stopped(_told.number)
        _told.raised = weakref.ref(stop)
        _told.called = False
        try:
            raise stop
        finally:
            del stop  # which this frame, a part of its traceback, would keep
    _told.called = False


def _imports(frame: Any) -> int:
    """How many frames of the import system a frame is called from."""
    count = 0
    while frame is not None:
        count += frame.f_code.co_filename == "<frozen importlib._bootstrap>"
        frame = frame.f_back
    return count


def _see_to_it(told: _Told) -> None:
    """Call for a `Stopped` as long as none is on its way and the work is not over, and end the process after `GRACE`."""
    end = time.monotonic() + GRACE
    while time.monotonic() < end:
        time.sleep(0.01)
        if not told.done and not told.called and (told.raised is None or told.raised() is None):
            told.called = True
            signal.pthread_kill(threading.main_thread().ident or 0, AGAIN)
    _end(told)


def _end(told: _Told) -> NoReturn:
    """End without cleaning up, with the last line if it has not been written."""
    if not told.done:
        os.write(2, f"{told.line}\n".encode())
    os._exit(128 + told.number)


def _unraisable(otherwise: Callable[[Any], Any], what: Any) -> None:
    if not isinstance(what.exc_value, Stopped):
        otherwise(what)


def _exit_code(error: BaseException) -> int:
    """The code with which a process ends of which `error` is the end."""
    code = error.code if isinstance(error, SystemExit) else 1
    return code if isinstance(code, int) else int(code is not None)


def _end_deaf() -> None:
    """From here on the interpreter calls no handler: a signal would kill a process that has ended well."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _leave(code: int, _number: int, _frame: Any) -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)

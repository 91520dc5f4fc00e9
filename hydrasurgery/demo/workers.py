"""What lets worker processes end with the one that started them, loaded long before what they work with."""

from __future__ import annotations

import contextlib
import importlib
import os
import threading
from multiprocessing.connection import Connection
from typing import Any


class Begin:
    """A call of a function by name, for the beginning of a worker process.

    The worker ends as soon as the other end of `parent` is closed, be it that its process was killed: from when it reads this
    on, before the function's module is imported.

    Args:
        parent: nothing is sent by it.
        module: the full name of the function's module.
        name: the function's.
        arguments: the function's.
    """

    def __init__(self, parent: Connection, module: str, name: str, *arguments: Any) -> None:
        self.parent, self.module, self.name, self.arguments = parent, module, name, arguments

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        threading.Thread(target=_end_with, args=(self.parent,), daemon=True).start()

    def __call__(self) -> None:
        getattr(importlib.import_module(self.module), self.name)(*self.arguments)


def _end_with(parent: Connection) -> None:
    with contextlib.suppress(EOFError, OSError):
        parent.recv_bytes()
    os._exit(1)

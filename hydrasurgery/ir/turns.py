"""One thread at a time, for what traces a model: PyTorch's tracing keeps its modes and patches for the whole process."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
_TURN = threading.RLock()


def in_turn(function: Callable[P, R]) -> Callable[P, R]:
    """The function, during whose calls every other one made by this waits in other threads."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with _TURN:
            return function(*args, **kwargs)

    return call

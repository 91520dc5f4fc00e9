"""A graph as a Python function, one for all graphs of equal text."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

from torch import fx

# By text and the objects that its names stand for. A function keeps those alive, so no entry outlives what its key was made of.
_KNOWN: weakref.WeakValueDictionary[Any, Any] = weakref.WeakValueDictionary()
_LOCK = threading.Lock()


def compiled(graph: fx.Graph) -> Callable[..., Any]:
    """The graph as a function of the module and its inputs.

    Graphs of equal text get the same function, so that torch.compile, which keeps what it compiled by code object, compiles
    equal layers once.
    """
    code = graph.python_code("self")
    key = (code.src, frozenset((name, id(value)) for name, value in code.globals.items()))
    with _LOCK:
        function = _KNOWN.get(key)
        if function is None:
            namespace = dict(code.globals)
            exec(compile(code.src, "<region>", "exec"), namespace)
            function = _KNOWN[key] = namespace["forward"]
        return function

"""Triton's interpreter without work that it repeats: at every call inside a kernel it looks through the whole language again."""

from __future__ import annotations

import functools
from typing import Any


def hasten() -> None:
    """Have a launch prepare each of the language's modules once, and remember NumPy's name of each type."""
    import triton.language as tl
    from triton.runtime import interpreter

    launch, numpy_type = interpreter.GridExecutor.__call__, interpreter._get_np_dtype
    prepared: set[str] = set()
    known: dict[str, Any] = {}

    def launched(self: Any, *args: Any, **kwargs: Any) -> Any:
        prepared.clear()
        return launch(self, *args, **kwargs)

    @functools.cache
    def modules(function: Any) -> set[str]:
        return {value.__name__ for value in function.__globals__.values() if value is tl or value is tl.core}

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not modules(self.fn) <= prepared:
            interpreter._patch_lang(self.fn)
            prepared.update(modules(self.fn))
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    def remembered(kind: Any) -> Any:
        kind = kind.scalar
        if kind.name not in known:
            known[kind.name] = numpy_type(kind)
        return known[kind.name]

    interpreter.GridExecutor.__call__ = launched
    interpreter.InterpretedFunction.__call__ = call
    interpreter._get_np_dtype = remembered

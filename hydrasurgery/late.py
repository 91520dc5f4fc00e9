"""What waits until another package is imported: so that importing this one loads no more than is used."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def when_imported(name: str, action: Callable[[], None]) -> None:
    """Call `action` once, as soon as the module `name` has been imported.

    An action that fails does not make that import fail: it is told as a RuntimeWarning.

    Args:
        name: the module's full name. If it is imported already, `action` is called now.
        action: what is to be done.

    Example:
        >>> when_imported("math", lambda: print("math is there"))
        math is there
    """
    if name in sys.modules:
        action()
    else:
        sys.meta_path.insert(0, _Watch(name, action))


class _Watch(MetaPathFinder):
    """Stands among the finders and finds its module as the others do, with an action after it."""

    def __init__(self, name: str, action: Callable[[], None]) -> None:
        self.name, self.action, self.done = name, action, False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name or self.done:
            return None
        others = [finder for finder in sys.meta_path if not isinstance(finder, _Watch)]
        spec = next((spec for finder in others if (spec := finder.find_spec(fullname, path, target))), None)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def execute_and_act(module: ModuleType) -> None:
                execute(module)
                self.act()

            loader.exec_module = execute_and_act
        return spec

    def act(self) -> None:
        if self.done:
            return
        self.done = True
        try:
            self.action()
        except Exception as error:
            warnings.warn(
                f"after the import of {self.name}: {type(error).__name__}: {error}", RuntimeWarning, stacklevel=2
            )

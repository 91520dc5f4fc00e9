"""Renames in one step that `os` does not have: exchange two paths, and take a free name only."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import uuid
from pathlib import Path

_NO_REPLACE, _EXCHANGE = 1, 2  # flags of Linux's renameat2
_LACKING = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)  # a kernel or a file system that knows no such flag
_HERE = -100  # AT_FDCWD


def rename_new(source: Path, target: Path) -> None:
    """Rename; what is at `target` stays.

    Raises:
        FileExistsError: something is there.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in ("a", "b"):
        ...         _ = Path(folder, name).write_text(name)
        ...     rename_new(Path(folder, "a"), Path(folder, "b"))
        Traceback (most recent call last):
        ...
        FileExistsError: ...
    """
    if not _renamed(source, target, _NO_REPLACE):
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
        os.rename(source, target)


def exchange(new: Path, target: Path) -> None:
    """Let two folders that lie in one folder change their names; at no moment nothing is at `target`, where the system can do so.

    Where it cannot, the old folder is called `<target>.replaced-<hex>` for a moment; that name is no hidden one, so that it is
    found if the process is killed just then.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     a, b = Path(folder, "a"), Path(folder, "b")
        ...     a.mkdir(), (b / "in b").mkdir(parents=True)
        ...     exchange(a, b)
        ...     [path.name for path in a.iterdir()]
        (None, None)
        ['in b']
    """
    if _renamed(new, target, _EXCHANGE):
        return
    old = target.with_name(f"{target.name}.replaced-{uuid.uuid4().hex[:8]}")
    os.rename(target, old)
    try:
        os.rename(new, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.rename(old, target)
        raise
    os.rename(old, new)


def _renamed(source: Path, target: Path, flag: int) -> bool:
    """Whether the system renamed; False if it knows no such way.

    Raises:
        OSError: it knows the way, and failed.
    """
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    call.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    if call(_HERE, os.fsencode(source), _HERE, os.fsencode(target), flag) == 0:
        return True
    number = ctypes.get_errno()
    if number in _LACKING:
        return False
    raise OSError(number, os.strerror(number), str(source), None, str(target))

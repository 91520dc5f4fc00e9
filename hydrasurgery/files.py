"""Files and folders that are either whole or absent: made under a hidden name beside their target, then renamed.

Beside a hidden name lies a lock, which the system lets go of when the process ends, however it ends. What has a lock that nobody
holds was left by a process that was killed; the next one that writes into that folder removes it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import stat
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydrasurgery.errors import ExportError, HydraError, OutputError
from hydrasurgery.renaming import rename_new

Target = str | os.PathLike[str]

_HIDDEN = re.compile(r"(\.hydrasurgery-[0-9a-f]{16})\.lock")
_DESCRIPTOR = re.compile(r"/(?:dev|proc/self)/fd/(\d+)")
_STREAMS = {"/dev/stdout": 1, "/dev/stderr": 2}
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def atomic_write_bytes(path: Target, data: bytes) -> Path:
    """Write `data` to `path`; a reader sees the old file or the whole new one.

    A link stays a link: the file that it leads to is written. Pipes, terminals and /dev/null are written as they are.

    Raises:
        OutputError: the file cannot be written; the message says why.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     atomic_write_bytes(f"{folder}/new/file", b"text").read_bytes()
        b'text'
    """
    with telling(path):
        if is_stream(path):
            _write_stream(path, data)
            return Path(path)
        target = real_path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with hidden(target.parent) as temporary:
            temporary.write_bytes(data)
            if target.exists():
                shutil.copymode(target, temporary)
            os.replace(temporary, target)
    return Path(path)


def atomic_write_text(path: Target, text: str) -> Path:
    """Write `text` in UTF-8 to `path`, as `atomic_write_bytes` does."""
    return atomic_write_bytes(path, text.encode("utf-8"))


def atomic_write_json(path: Target, value: Any) -> Path:
    """Write `value` as indented JSON with a final newline, keys in the order given."""
    return atomic_write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """What `atomic_write_json` writes."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def json_lines(head: dict[str, Any], key: str, rows: list[dict[str, Any]]) -> str:
    """JSON text of `head` with a last entry `key`, a list that has one row on each line."""
    text = json.dumps(head, indent=2, ensure_ascii=False).removesuffix("\n}")
    lines = ",\n".join("    " + json.dumps(row, ensure_ascii=False) for row in rows)
    return f'{text},\n  "{key}": [\n{lines}\n  ]\n}}\n'


@contextlib.contextmanager
def atomic_directory(path: Target) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` when the block ends, and vanishes if the block raises.

    Nothing is replaced; for that see `hydrasurgery.folders.owned_folder`.

    Raises:
        OutputError: `path` is there already and no empty folder, it cannot be written, or the disk is full.
    """
    target = real_path(path)
    with telling(path):
        check_empty(path)
        target.parent.mkdir(parents=True, exist_ok=True)
    with telling(path, inside=True), hidden(target.parent) as temporary:
        temporary.mkdir()
        yield temporary
        with telling(path):
            os.rename(temporary, target)  # takes the place of an empty folder too, and of nothing else


@contextlib.contextmanager
def new_files(path: Target, *others: Path) -> Iterator[Path]:
    """Yield a temporary folder; when the block ends, its files move to the folder of `path`, the one named like it last.

    Args:
        path: the file that the block makes under its own name. It must not exist, nor any of `others`.
        others: files that the block may make as well.

    Raises:
        ExportError: a file exists, no file can be written there, or the disk is full.
    """
    target, moved = Path(path), list[Path]()
    check_new(target, *others)
    with telling(path, ExportError):
        target.parent.mkdir(parents=True, exist_ok=True)
    with telling(path, ExportError, inside=True), hidden(target.parent) as temporary:
        temporary.mkdir()
        yield temporary
        try:
            for file in sorted(temporary.iterdir(), key=lambda f: f.name == target.name):
                rename_new(file, target.with_name(file.name))
                moved.append(target.with_name(file.name))
        except BaseException as error:
            for file in moved:
                file.unlink(missing_ok=True)
            if isinstance(error, FileExistsError):
                raise ExportError(f"{target}: was made by another program meanwhile; give another path") from error
            raise


# --- before anything is written -------------------------------------------------------------------------------------------------


def check_file(path: Target) -> None:
    """Refuse, before the work that makes its contents, a path at which no file can be written; nothing is left there.

    Raises:
        OutputError: it is a folder, a disk or write-protected, or its folder takes no new file.

    Example:
        >>> check_file("/")
        Traceback (most recent call last):
        ...
        hydrasurgery.errors.OutputError: /: is a folder; give the name of a file
    """
    with telling(path):
        if is_stream(path):
            return
        target = real_path(path)
        if target.is_dir():
            raise OutputError(f"{_named(path)}: is a folder; give the name of a file")
        if os.path.lexists(target) and not os.access(target, os.W_OK):
            raise OutputError(f"{path}: is write-protected; give another path")
        check_parent(target)


def check_new(*files: Path) -> None:
    """Refuse paths at which no new file can be made, be it that something is there.

    Raises:
        ExportError: naming the first.
    """
    for file in files:
        if os.path.lexists(file):
            raise ExportError(f"{_named(file)}: exists; give another path or delete it first")
        if not is_utf8(file):
            raise ExportError(f"{file}: the name is not UTF-8, which other programs need; give another path")
        with telling(file, ExportError):
            check_parent(real_path(file))


def check_folder(path: Target) -> None:
    """Refuse a path that is no folder and cannot become one, and the folder in which the program runs.

    Raises:
        OutputError: saying which.
    """
    with telling(path):
        target = real_path(path)
        if Path.cwd().is_relative_to(target):
            raise OutputError(f"{_named(path)}: is or holds the current folder; give the name of a folder of its own")
        if os.path.lexists(target) and not target.is_dir():
            raise OutputError(f"{path}: is no folder; give the name of a folder")
        if not is_utf8(target):
            raise OutputError(f"{path}: the name is not UTF-8, which safetensors need; give another path")
        check_parent(target / "any")


def check_empty(path: Target) -> None:
    """Refuse a path that exists, unless it is an empty folder.

    Raises:
        OutputError: naming the path.
    """
    target = real_path(path)
    if os.path.lexists(target) and not (target.is_dir() and not os.listdir(target)):
        raise OutputError(f"{path}: exists; give the name of a new or an empty folder")


def check_parent(target: Path) -> None:
    """Try whether `target`'s folder, or the one in which that would be made, takes a new file; nothing is left there.

    Raises:
        OSError: it does not.
    """
    with contextlib.suppress(FileNotFoundError):
        os.lstat(target)  # a name that is too long
    parent = next(parent for parent in target.parents if os.path.lexists(parent))
    with hidden(parent):
        pass


def is_stream(path: Target) -> bool:
    """Whether `path` is written as it is, not replaced: a pipe, a terminal, /dev/null, or a descriptor such as /dev/stdout.

    Raises:
        OutputError: it is a disk.

    Example:
        >>> is_stream("/dev/null"), is_stream("/dev/stdout"), is_stream("file")
        (True, True, False)
    """
    if _descriptor(path) is not None:
        return True
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return False
    if stat.S_ISBLK(mode):
        raise OutputError(f"{os.fspath(path)}: is a disk; give the path of a file")
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def is_utf8(text: Target) -> bool:
    """Whether a path or another argument of a command is text in UTF-8; Python keeps bytes that are not as lone surrogates.

    Example:
        >>> is_utf8("caf" + chr(0xE9)), is_utf8("caf" + chr(0xDCE9))
        (True, False)
    """
    try:
        os.fspath(text).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def real_path(path: Target) -> Path:
    """Where links lead: the path that is replaced, so that the links stay."""
    return Path(os.path.realpath(path))


@contextlib.contextmanager
def telling(path: Target, kind: type[HydraError] = OutputError, *, inside: bool = False) -> Iterator[None]:
    """Failures to write in the block are told as `kind`, with the path and, if the disk is full, the bytes that are free.

    Args:
        path: what is written.
        kind: the class of the error.
        inside: the block does other things as well, so that only a full disk is known to be a failure to write.

    Example:
        >>> with telling("results.json"):
        ...     raise PermissionError(13, "Permission denied", ".temporary")
        Traceback (most recent call last):
        ...
        hydrasurgery.errors.OutputError: results.json: cannot be written (Permission denied); give another path
    """
    try:
        yield
    except HydraError:
        raise
    except Exception as error:
        number = _full(error)
        if number is not None:
            raise kind(
                f"{path}: cannot be written ({os.strerror(number)}; {_free(Path(path)):,} bytes are free); nothing was left there"
            ) from error
        if inside or not isinstance(error, OSError):
            raise
        raise kind(f"{path}: cannot be written ({error.strerror or error}); give another path") from error


@contextlib.contextmanager
def hidden(parent: Path) -> Iterator[Path]:
    """Yield a hidden path in the folder `parent`, at which nothing is; what is there after the block is removed.

    What killed processes left in `parent` is removed first.
    """
    _sweep(parent)
    path, lock = _claim(parent)
    try:
        yield path
    finally:
        _discard(path, lock)


def _sweep(parent: Path) -> None:
    try:
        entries = os.listdir(parent)
    except PermissionError:  # a folder may take files and not be listed
        return
    for entry in entries:
        match = _HIDDEN.fullmatch(entry)
        lock = None if match is None else _lock(parent / entry)
        if match is not None and lock is not None:
            _discard(parent / match[1], lock)


def _claim(parent: Path) -> tuple[Path, int]:
    """A fresh name, and the descriptor that holds its lock."""
    while True:
        path = parent / f".hydrasurgery-{uuid.uuid4().hex[:16]}"
        os.close(os.open(f"{path}.lock", os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666))
        lock = _lock(Path(f"{path}.lock"), alone=True)
        if lock is not None:  # else a sweep was faster
            return path, lock


def _lock(file: Path, alone: bool = False) -> int | None:
    """A descriptor that holds the lock; None if another process holds it, has removed the file, or it cannot be told.

    Where the file system has no locks, a process that has just made the file may go on `alone`.
    """
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), os.lstat(file)):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError:
        if alone:
            return descriptor
    os.close(descriptor)
    return None


def _discard(path: Path, lock: int) -> None:
    """Remove what is at a hidden path, then its lock."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
    if not os.path.lexists(path):  # else a later sweep tries again
        Path(f"{path}.lock").unlink(missing_ok=True)
    os.close(lock)


def _write_stream(path: Target, data: bytes) -> None:
    descriptor = _descriptor(path)
    if descriptor is not None:
        sys.stdout.flush()
        descriptor = os.dup(descriptor)
    with open(path if descriptor is None else descriptor, "wb", buffering=0) as stream:
        left = memoryview(data)
        while left:
            left = left[stream.write(left) :]


def _descriptor(path: Target) -> int | None:
    """The number of this process's descriptor that `path` names."""
    name = os.fspath(path)
    match = _DESCRIPTOR.fullmatch(name)
    return _STREAMS.get(name) if match is None else int(match[1])


def _full(error: Exception) -> int | None:
    """The number of an error that says that the disk is full; libraries in Rust tell it in their own classes, in the text."""
    if isinstance(error, OSError) and error.errno in _FULL:
        return error.errno
    return next((number for number in _FULL if f"(os error {number})" in str(error)), None)


def _free(path: Path) -> int:
    return shutil.disk_usage(next(p for p in path.absolute().parents if p.is_dir())).free


def _named(path: Target) -> str:
    """The path in a message; an empty one, which stands for the current folder, would not be seen."""
    return os.fspath(path) or "''"

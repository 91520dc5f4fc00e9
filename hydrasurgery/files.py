"""Files that are either whole or absent: everything is written under a temporary name beside its target, then renamed."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydrasurgery.errors import ExportError


def _beside(target: Path) -> Path:
    """A fresh hidden name in the target's folder; what is made there gets the ordinary permissions."""
    return target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}")


def atomic_write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write `text` to `path`; a reader sees the old file or the whole new one."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(target)
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return target


def atomic_write_json(path: str | os.PathLike[str], value: Any) -> Path:
    """Write `value` as indented JSON with a final newline, keys in the order given."""
    return atomic_write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def json_lines(head: dict[str, Any], key: str, rows: list[dict[str, Any]]) -> str:
    """JSON text of `head` with a last entry `key`, a list that has one row on each line."""
    text = json.dumps(head, indent=2, ensure_ascii=False).removesuffix("\n}")
    lines = ",\n".join("    " + json.dumps(row, ensure_ascii=False) for row in rows)
    return f'{text},\n  "{key}": [\n{lines}\n  ]\n}}\n'


@contextlib.contextmanager
def atomic_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder that takes `path`'s place when the block ends, and vanishes if the block raises."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(target)
    temporary.mkdir()
    try:
        yield temporary
        if target.exists():
            old = _beside(target)
            os.replace(target, old)
            os.replace(temporary, target)
            shutil.rmtree(old)
        else:
            os.replace(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextlib.contextmanager
def new_files(path: str | os.PathLike[str], *others: Path) -> Iterator[Path]:
    """Yield a temporary folder; when the block ends, its files move to the folder of `path`, the one named like it last.

    Args:
        path: the file that the block makes under its own name. It must not exist, nor any of `others`.
        others: files that the block may make as well.

    Raises:
        ExportError: a file exists, or the disk is full.
    """
    target = Path(path)
    for file in (target, *others):
        if file.exists():
            raise ExportError(f"{file}: exists; give another path or delete it first")
    moved: list[Path] = []
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = _beside(target)
        temporary.mkdir()
    except OSError as error:
        raise ExportError(f"{target}: cannot be written there ({error.strerror})") from error
    try:
        yield temporary
        for file in sorted(temporary.iterdir(), key=lambda f: f.name == target.name):
            moved.append(target.with_name(file.name))
            os.replace(file, moved[-1])
    except BaseException as error:
        for file in moved:
            file.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            free = shutil.disk_usage(target.parent).free
            raise ExportError(
                f"{target}: cannot be written ({error.strerror}; {free:,} bytes are free); nothing was left there"
            ) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)

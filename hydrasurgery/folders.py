"""Folders that a later run may replace: each lists its files in a manifest, and is replaced only while it is what was written."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from hydrasurgery.errors import OutputError
from hydrasurgery.files import (
    Target,
    atomic_write_json,
    check_empty,
    check_folder,
    check_parent,
    hidden,
    real_path,
    telling,
)
from hydrasurgery.json_files import load_json
from hydrasurgery.renaming import exchange

MANIFEST = "hydrasurgery-files.json"
FORMAT, VERSION = "hydrasurgery-files", 1
_BLOCK = 1 << 20


@contextlib.contextmanager
def owned_folder(path: Target) -> Iterator[Path]:
    """Yield a temporary folder that takes `path`'s place when the block ends, and vanishes if the block raises.

    A folder that is at `path` is replaced if it is empty, or if this function made it and nothing in it was added, removed or
    changed since. A link to a folder stays a link.

    Raises:
        OutputError: something else is at `path`, it cannot be written, or the disk is full.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     for text in ("first", "second"):
        ...         with owned_folder(f"{parent}/model") as folder:
        ...             _ = (folder / "file").write_text(text)
        ...     Path(parent, "model", "file").write_text("mine")
        ...     check_owned(f"{parent}/model")
        Traceback (most recent call last):
        ...
        hydrasurgery.errors.OutputError: ...: file was changed since it was saved; ...
    """
    target = real_path(path)
    check_owned(path)
    with telling(path):
        target.parent.mkdir(parents=True, exist_ok=True)
    with telling(path, inside=True), hidden(target.parent) as temporary:
        temporary.mkdir()
        yield temporary
        with telling(path):
            files = {name: _digest(temporary / name) for name in sorted(_entries(temporary))}
            atomic_write_json(temporary / MANIFEST, {"format": FORMAT, "version": VERSION, "sha256": files})
            _put(temporary, target, path)


def check_owned(path: Target) -> None:
    """Refuse a path at which `owned_folder` cannot put a folder.

    Raises:
        OutputError: naming what would be lost, or why nothing can be written.
    """
    check_folder(path)
    target = real_path(path)
    with telling(path):
        check_parent(target)
        if not (target / MANIFEST).is_file():
            check_empty(path)
            return
        for name, why in _foreign(target):
            raise OutputError(
                f"{path}: {name} {why}; it would be lost. Give the name of a new or an empty folder, or delete this one yourself"
            )


def _put(new: Path, target: Path, path: Target) -> None:
    """Let `new` take the place of `target`, which then is at `new`, unless it was empty."""
    check_owned(path)  # again: the work may have taken hours
    if not target.is_dir():
        os.rename(new, target)
        return
    shutil.copymode(target, new)
    if (target / MANIFEST).is_file():
        exchange(new, target)
    else:
        os.rename(new, target)  # succeeds on an empty folder only


def _foreign(folder: Path) -> Iterator[tuple[str, str]]:
    """What is not as `owned_folder` left it: a name, and words that say what became of it."""
    try:
        manifest = load_json(folder / MANIFEST, OutputError)
        files = manifest["sha256"] if (manifest["format"], manifest["version"]) == (FORMAT, VERSION) else None
    except (OutputError, KeyError, TypeError):
        files = None
    if not isinstance(files, dict):
        yield MANIFEST, "is not what was saved there"
        return
    found = _entries(folder) - {MANIFEST}
    for name in sorted(found - files.keys()):
        yield name, "was put there by someone else"
    for name in sorted(found & files.keys()):
        if _digest(folder / name) != files[name]:
            yield name, "was changed since it was saved"


def _entries(folder: Path) -> set[str]:
    """Everything in a folder and below, by its relative path; of the folders below only the empty ones."""
    found = set()
    for at, inner, names in os.walk(folder):
        here = Path(at)
        found |= {(here / name).relative_to(folder).as_posix() for name in names}
        found |= {
            (here / name).relative_to(folder).as_posix()
            for name in inner
            if (here / name).is_symlink() or not os.listdir(here / name)
        }
    return found


def _digest(file: Path) -> str:
    """SHA-256 of an ordinary file, in hexadecimal digits; empty for anything else."""
    if file.is_symlink() or not file.is_file():
        return ""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()

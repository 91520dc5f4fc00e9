"""What commands write: looked at before any work, and shown if it cannot be saved after it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import typer

from hydrasurgery.errors import HydraError, OutputError
from hydrasurgery.files import check_file, check_folder, is_stream, real_path
from hydrasurgery.folders import check_owned


def check_outputs(
    inputs: Iterable[str | Path | None],
    *,
    files: Iterable[Path | None] = (),
    pictures: Iterable[Path | None] = (),
    owned: Iterable[Path] = (),
    folders: Iterable[Path] = (),
) -> None:
    """Refuse outputs that cannot be written, that are written twice, or that would overwrite what the command reads.

    Args:
        inputs: paths or hub names that the command reads; None for one that is not given.
        files: single files to write, pictures excepted.
        pictures: files that matplotlib draws.
        owned: folders that are replaced as a whole (see `hydrasurgery.folders`).
        folders: folders that the command writes into.

    Raises:
        OutputError: naming the path.
        ImportError: there is a picture to draw and no matplotlib.
    """
    drawn = [path for path in pictures if path is not None]
    if drawn:
        from hydrasurgery.selection.plots import check_picture, new_figure

        new_figure((1, 1))
        for path in drawn:
            check_picture(path)
    single = [*(path for path in files if path is not None), *drawn]
    whole = list(owned)
    for check, paths in ((check_folder, folders), (check_file, single), (check_owned, whole)):
        for path in paths:
            check(path)
    _check_apart([*single, *whole])
    for name in (given for given in inputs if given):
        for path in single:
            _check_input(path, name)
        for path in whole:
            if real_path(name).is_relative_to(real_path(path)):
                raise OutputError(f"{path}: is or holds {name}, which is read; give another path")


@contextlib.contextmanager
def shown_if_lost(text: Callable[[], str]) -> Iterator[None]:
    """If the block, which saves a result, fails, the result is printed instead."""
    try:
        yield
    except (HydraError, OSError):
        typer.echo(text())
        raise


def _check_apart(paths: list[Path]) -> None:
    """Refuse one path for two outputs."""
    for number, path in enumerate(paths):
        if any(_same(path, other) for other in paths[:number]):
            raise OutputError(f"{path}: is given for two outputs, and one would overwrite the other; give two paths")


def _check_input(path: Path, name: str | Path) -> None:
    """Refuse a file that is an input, or one of the files of a folder that is an input."""
    inside = os.path.isdir(name) and os.path.lexists(path) and real_path(path).is_relative_to(real_path(name))
    if inside or _same(path, name):
        what = f"part of {name}" if inside else str(name)
        raise OutputError(f"{path}: is {what}, which is read, and would be overwritten; give another path")


def _same(one: str | Path, other: str | Path) -> bool:
    """Whether two paths are one file, by their names, links or hard links; pipes and devices can be shared."""
    if is_stream(one):
        return False
    return real_path(one) == real_path(other) or (
        os.path.exists(one) and os.path.exists(other) and os.path.samefile(one, other)
    )

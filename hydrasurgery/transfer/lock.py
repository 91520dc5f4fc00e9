"""One run at a time in a folder."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from hydrasurgery.errors import CheckpointError

LOCK = "run.lock"


@contextlib.contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Hold `folder`, which is made, for the block. The system lets go of it when the process ends, however it ends.

    Raises:
        CheckpointError: another run holds it, whose process the message names, or it cannot be written to.
    """
    import fcntl

    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context((folder / LOCK).open("a+", encoding="utf-8"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise CheckpointError(
                f"{folder}: another run, of process {file.read().strip()}, is writing here (it holds {LOCK}); wait for its "
                "end, or give this run a folder of its own"
            ) from error
        except OSError as error:
            raise CheckpointError(f"{folder}: cannot be written to ({error}); give another folder") from error
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield

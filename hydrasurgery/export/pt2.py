"""`export_pt2`: a decoder as a `torch.export` archive, compiled or not, that needs nothing but the dialect's ops to run."""

from __future__ import annotations

import io
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from hydrasurgery.errors import ExportError
from hydrasurgery.export.stateful import Slot, trace
from hydrasurgery.files import new_files

STATES = "hydrasurgery_states.json"  # a file in the archive that lists the states


@dataclass(frozen=True)
class Pt2Export:
    """What `export_pt2` wrote.

    Attributes:
        path: the file.
        bytes: its size.
        states: in the order of the program's last input.
        aot: whether it is compiled.

    Example: see `export_pt2`.
    """

    path: Path
    bytes: int
    states: tuple[Slot, ...]
    aot: bool = False

    def __str__(self) -> str:
        kind = "an AOTInductor package" if self.aot else "a torch.export program"
        return f"{self.path}: {kind}, {self.bytes:,} bytes, {len(self.states)} states"


def export_pt2(
    model: Any, path: str | os.PathLike[str], *, cache: bool = True, aot: bool = False, verbose: bool = True
) -> Pt2Export:
    """Write `model` as a `.pt2` file; nothing is written if anything fails.

    In a process that has run `import hydrasurgery.ops`, which registers the ops (no model and no pass is needed),

        program = torch.export.load(path).module()
        logits, *present = program(input_ids, attention_mask, position_ids, past)

    takes any batch, length and past length: input_ids and position_ids [B, T], attention_mask [B, P + T], and `past` a tuple
    of the states, which come back as `present`. At the start each has 0 past tokens or is zero: `Slot.empty`. The archive
    lists their names and shapes in the extra file "hydrasurgery_states.json".

    With `aot` the archive holds machine code instead of the program, for this machine's kind of processor and version of torch:
    `program = torch._inductor.aoti_load_package(path)`, which is called in the same way; the list is
    `program.get_metadata()["hydrasurgery_states.json"]`.

    Args:
        model: a Hugging Face decoder or a hybrid of one. The program runs on the device that it is on now.
        path: the file to write, usually `*.pt2`; it must not exist.
        cache: take and give states; without, `past` is an empty tuple and logits are the only output.
        aot: compile by AOTInductor now, which takes a C++ compiler and a path that ends in ".pt2".
        verbose: print what was written.

    Returns:
        What was written.

    Raises:
        ExportError: torch.export or the compiler fails, the path exists, or the disk is full.
        UnsupportedModelError: an architecture that this library refuses.
    """
    path = Path(path)
    if aot and path.suffix != ".pt2":
        raise ExportError(f"{path}: AOTInductor wants a name that ends in .pt2")
    with new_files(path) as folder:
        traced = trace(model, cache)
        slots = traced.slots or ()
        names = [{**asdict(slot), "dtype": str(slot.dtype)} for slot in slots]
        extra = {STATES: json.dumps({"states": names})}
        with _Archive(folder / path.name) as archive:
            if aot:
                _compile(type(model).__name__, traced.program, archive, extra)
            else:
                torch.export.save(traced.program, archive, extra_files=extra)
        size = (folder / path.name).stat().st_size
    written = Pt2Export(path, size, slots, aot)
    if verbose:
        print(written)
    return written


class _Archive(io.FileIO):
    """A file for PyTorch's archive writer, which aborts the process if a write fails: that is told at the end instead."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "w")
        self.failed: OSError | None = None

    def write(self, data: Any) -> int:
        """Write all of `data`, or nothing more once a write has failed."""
        left = memoryview(data).cast("B")
        size = len(left)
        try:
            while left and self.failed is None:
                left = left[super().write(left) :]
        except OSError as error:
            self.failed = error
        return size

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        if self.failed is not None:
            raise self.failed


def _compile(name: str, program: torch.export.ExportedProgram, archive: Any, metadata: dict[str, str]) -> None:
    try:
        torch._inductor.aoti_compile_and_package(
            program, package_path=archive, inductor_configs={"aot_inductor.metadata": metadata}
        )
    except Exception as error:  # a compiler fails in as many ways as there are compilers
        raise ExportError(f"{name} cannot be compiled by AOTInductor (it takes a C++ compiler): {error}") from error


__all__ = ["Pt2Export", "export_pt2"]

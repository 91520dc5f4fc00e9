"""The metrics of a run: one JSON object a line, a line a step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydrasurgery.errors import CheckpointError
from hydrasurgery.json_files import parse_json
from hydrasurgery.records import Count, Name, Positive, read_record


@dataclass(frozen=True)
class _Line:
    """What a line may hold."""

    stage: Name
    stage_index: Count
    step: Positive
    loss: float
    lr: float
    grad_norm: float
    tokens: Count
    seconds: float
    kl: float | None = None
    ce: float | None = None


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records in a file of metrics, which need not exist, without a last line that a crash cut short.

    Raises:
        CheckpointError: any other line is no record of a step, or not later than the one before.
    """
    lines = path.read_bytes().splitlines() if path.exists() else []
    records: list[dict[str, Any]] = []
    last = (-1, -1)
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        try:
            record = parse_json(line, where, CheckpointError)
        except CheckpointError:
            if number == len(lines) and line.startswith(b"{"):
                break
            raise
        read = read_record(_Line, record, where, CheckpointError)
        if (read.stage_index, read.step) <= last:
            raise CheckpointError(f"{where}: its step is not later than that of the line before; give another folder")
        last = (read.stage_index, read.step)
        records.append(record)
    return records

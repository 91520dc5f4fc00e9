"""The metrics of a run: one JSON object a line, a line a step."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from hydrasurgery.errors import CheckpointError

_WHOLE = {"stage_index": 0, "step": 1, "tokens": 0}  # with the least value of each
_REAL = ("loss", "lr", "grad_norm", "seconds")


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records in a file of metrics, which need not exist, without a last line that a crash cut short.

    Raises:
        CheckpointError: any other line is no record of a step, or not later than the one before.
    """
    lines = path.read_bytes().splitlines() if path.exists() else []
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            if number == len(lines) and line.startswith(b"{"):
                break
            raise CheckpointError(_message(path, number, str(error))) from error
        if wrong := _wrong(record):
            raise CheckpointError(_message(path, number, wrong))
        if records and _place(record) <= _place(records[-1]):
            raise CheckpointError(_message(path, number, "it is not later than the line before"))
        records.append(record)
    return records


def _place(record: dict[str, Any]) -> tuple[int, int]:
    return record["stage_index"], record["step"]


def _wrong(record: Any) -> str | None:
    """What is wrong with a record, in words; None if nothing is."""
    if not isinstance(record, dict):
        return "it is no JSON object"
    if not isinstance(record.get("stage"), str):
        return f"stage is {record.get('stage')!r}, not a name"
    for key, least in _WHOLE.items():
        if type(record.get(key)) is not int or record[key] < least:
            return f"{key} is {record.get(key)!r}, not a whole number from {least} on"
    for key in _REAL:
        if type(record.get(key)) not in (int, float) or not -math.inf < record[key] < math.inf:
            return f"{key} is {record.get(key)!r}, not a number"
    return None


def _message(path: Path, number: int, what: str) -> str:
    return (
        f"{path}, line {number}: {what}, so this is not what a run has written; move the file away (a run goes on without it), or "
        "give another folder"
    )

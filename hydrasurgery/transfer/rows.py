"""Rows of tokens with columns beside them (masks, labels, positions): read, checked, and padded into batches."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hydrasurgery.errors import DataError
from hydrasurgery.transfer.identity import hash_tokens
from hydrasurgery.transfer.order import epoch_order, mix_seed
from hydrasurgery.transfer.recipe import Stage

IGNORED = -100  # the label of a token that counts in no loss
IDS, MASK, LABELS, POSITIONS = "input_ids", "attention_mask", "labels", "position_ids"
PADDING = {IDS: 0, MASK: 0, LABELS: IGNORED, POSITIONS: 0}  # what each column holds beyond a row's end
# Columns that tell documents of one row apart in ways that transformers' models do not share.
DOCUMENTS = frozenset(
    {"cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k", "doc_ids", "document_ids", "segment_ids", "seq_idx"}
)


class Rows:
    """Sequences with columns beside the tokens; a step takes `batch_size` of them, and each epoch every one once.

    Rows of a batch that are shorter than its longest one are padded on their right, under a mask.

    Args:
        columns: `input_ids` and, as needed, `attention_mask`, `labels` and `position_ids`, the rows of each one after another.
        ends: where each row ends.
        seed: decides the order.

    Raises:
        DataError: a row has no token that counts; at `batch`, one is longer than the stage's sequences.
    """

    def __init__(self, columns: dict[str, np.ndarray], ends: np.ndarray, *, seed: int = 0) -> None:
        self.columns, self.ends, self.seed = columns, ends, seed
        self.starts = np.concatenate([[0], ends[:-1]])
        counted = np.ones(len(columns[IDS]), np.int64)
        if MASK in columns:
            counted &= columns[MASK] != 0
        if LABELS in columns:
            counted &= columns[LABELS] != IGNORED
        empty = np.flatnonzero(np.add.reduceat(counted, self.starts) == 0)
        if empty.size:
            raise DataError(
                f"row {empty[0]} of the data (and {empty.size - 1} more) has no token that counts: all are padding or have the "
                f"label {IGNORED}; leave it out"
            )

    def batch(self, step: int, stage: Stage, generator: torch.Generator) -> dict[str, Tensor]:
        """The batch of `step` in `stage`: each column int64 [stage.batch_size, longest row]; `generator` is not used."""
        lengths, count = self.ends - self.starts, len(self.ends)
        longest = int(lengths.argmax())
        if lengths[longest] > stage.length:
            raise DataError(
                f"row {longest} of the data has {lengths[longest]} tokens, but a sequence of stage {stage.name!r} takes "
                f"{stage.length}: cut the row, or give the stage a greater length"
            )
        rows = []
        for index in range(step * stage.batch_size, (step + 1) * stage.batch_size):
            _, order = epoch_order(mix_seed(self.seed, stage.name, index // count), count, count, 1)
            rows.append(int(order[index % count]))
        width = int(lengths[rows].max())
        batch = {}
        for name, values in self.columns.items():
            batch[name] = torch.full((len(rows), width), PADDING[name], dtype=torch.int64)
            for place, row in enumerate(rows):
                batch[name][place, : lengths[row]] = torch.from_numpy(values[self.starts[row] : self.ends[row]])
        if MASK not in batch and (lengths[rows] < width).any():
            batch[MASK] = (torch.arange(width) < torch.from_numpy(lengths[rows])[:, None]).long()
        return batch

    def identity(self) -> dict[str, Any]:
        """Which data this is, for `hydrasurgery.transfer.identity`."""
        hashes = {name: hash_tokens(values) for name, values in self.columns.items()}
        return {"source": "Rows", "rows": len(self.ends), "seed": self.seed, **hashes, "ends": hash_tokens(self.ends)}


def read_rows(blocks: Iterable[Mapping[str, Any]]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Read the columns of rows.

    Args:
        blocks: each a row (columns [T]) or a batch of rows (columns [B, T], or lists of B rows).

    Returns:
        The columns that say something, the rows one after another, `input_ids` always; and where each row ends. A mask of ones
        only, labels that are the ids, and positions that count from 0 say nothing.

    Raises:
        DataError: a row has columns of different lengths, or values that a column cannot have.
    """
    parts: dict[str, list[np.ndarray]] = {name: [] for name in PADDING}
    for row, columns in enumerate(_each_row(blocks)):
        ids = _values(columns[IDS], IDS, row)
        defaults = {MASK: np.ones_like(ids), LABELS: ids, POSITIONS: np.arange(len(ids), dtype=np.int64)}
        for name, default in ((IDS, ids), *defaults.items()):
            values = _values(columns[name], name, row) if columns.get(name) is not None else default
            if len(values) != len(ids):
                raise DataError(f"row {row} of the data: {len(ids)} input_ids, but {len(values)} {name}")
            parts[name].append(values)
        if not np.isin(parts[MASK][-1], (0, 1)).all():
            raise DataError(f"row {row} of the data: attention_mask must be 1 for a token and 0 for padding")
    kept = [place for place, ids in enumerate(parts[IDS]) if len(ids)]
    if not kept:
        raise DataError("the training data holds no token")
    columns = {name: np.concatenate([values[place] for place in kept]) for name, values in parts.items()}
    ends = np.cumsum([len(parts[IDS][place]) for place in kept])
    positions = np.concatenate([np.arange(len(parts[IDS][place])) for place in kept])
    silent = {MASK: 1, LABELS: columns[IDS], POSITIONS: positions}
    return {k: v for k, v in columns.items() if k not in silent or (v != silent[k]).any()}, ends


def check_columns(names: Iterable[str]) -> None:
    """Refuse columns that would have to be understood, and tell of others that will not be used.

    Raises:
        DataError: there is no `input_ids`, or a column tells documents apart in a way of its own.
    """
    names = list(names)
    if IDS not in names:
        raise DataError(f"the data has columns {names}, not 'input_ids': tokenize it first")
    if found := sorted(DOCUMENTS & set(names)):
        raise DataError(
            f"the data's column {found[0]!r} tells documents in a row apart; give 'position_ids' that begin again at 0 with each "
            "document, or remove the column"
        )
    if unused := [name for name in names if name not in PADDING]:
        warnings.warn(f"columns of the data that are not used: {', '.join(unused)}", stacklevel=4)


def _each_row(blocks: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for block in blocks:
        columns = {name: block[name] for name in PADDING if name in block}
        if IDS not in columns:
            raise DataError(f"a row of the data has columns {list(block)}, not 'input_ids': tokenize it first")
        ids = columns[IDS]
        if len(ids) and np.ndim(ids[0]) == 0:
            yield columns
            continue
        for name, values in columns.items():
            if values is not None and len(values) != len(ids):
                raise DataError(f"the data has {len(ids)} rows of input_ids, but {len(values)} of {name}")
        for place in range(len(ids)):
            yield {name: None if values is None else values[place] for name, values in columns.items()}


def _values(row: Any, name: str, number: int) -> np.ndarray:
    """One column of a row, int64 [T]."""
    try:
        values = np.asarray(row)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"row {number} of the data: {name} is not a list of whole numbers ({error})") from error
    if values.size == 0:
        return np.empty(0, np.int64)
    if values.ndim != 1 or values.dtype.kind not in "iub":
        raise DataError(
            f"row {number} of the data: {name} must be one list of whole numbers, not {values.dtype} of shape {values.shape}"
        )
    return values.astype(np.int64)

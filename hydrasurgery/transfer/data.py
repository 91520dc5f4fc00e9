"""Training tokens: where they come from, and which of them a step sees.

That is a pure function of the seed, the stage and the step, so that a resumed run repeats nothing and two runs with
equal seeds see equal tokens.
"""

from __future__ import annotations

import codecs
import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from hydrasurgery.errors import DataError
from hydrasurgery.transfer.identity import hash_tokens
from hydrasurgery.transfer.order import epoch_order, mix_seed
from hydrasurgery.transfer.recipe import Stage
from hydrasurgery.transfer.rows import IDS, IGNORED, LABELS, MASK, POSITIONS, Rows, check_columns, read_rows

_BLOCK = 1 << 20  # characters tokenised at a time


@runtime_checkable
class BatchSource(Protocol):
    """What `distill` draws from: any object with this method.

    Example:
        >>> class Noise:
        ...     def batch(self, step, stage, generator):
        ...         return {"input_ids": torch.randint(100, (stage.batch_size, stage.length), generator=generator)}
        >>> isinstance(Noise(), BatchSource)
        True
    """

    def batch(self, step: int, stage: Stage, generator: torch.Generator) -> Mapping[str, Tensor]:
        """What a step trains on; it must depend on nothing but the arguments.

        Args:
            step: counts from 0 within the stage.
            stage: gives `batch_size` and `length`.
            generator: on the CPU, seeded from (seed, stage, step).

        Returns:
            `input_ids` [B, T] and, as needed, `attention_mask` [B, T] (1 = a token, 0 = padding), `labels` [B, T] (input_ids
            with -100 for tokens that count in no loss; the shift by one happens in the loss), `position_ids` (which begin
            again where a document does) and other arguments of both models' forward.

        A source may have a method `identity() -> dict` too: JSON-ready data that says which tokens it gives. A run goes on
        from a checkpoint only with a source of the same identity.
        """
        ...


class TokenStream:
    """A long run of tokens cut into windows of a stage's length; each epoch visits every window once, in its own order.

    Args:
        tokens: [N] integers: a tensor, or a numpy array (an `np.memmap` for a corpus larger than memory).
        seed: decides the order.
        bos: a token put at the start of every window, for models that expect one; None adds nothing.

    Raises:
        DataError: `tokens` is empty or not one run of integers; at `batch`, shorter than one window.

    Example:
        >>> stage = Stage("distil", batch_size=2, length=4, steps=1, lr=1e-3, lr_end=1e-3)
        >>> TokenStream(torch.arange(100), bos=7).batch(0, stage, torch.Generator())["input_ids"][:, 0].tolist()
        [7, 7]
    """

    def __init__(self, tokens: Tensor | np.ndarray, *, seed: int = 0, bos: int | None = None) -> None:
        self.tokens = tokens.cpu().numpy() if isinstance(tokens, Tensor) else tokens
        self.seed, self.bos = seed, bos
        if self.tokens.size == 0:
            raise DataError("the training data holds no token")
        if self.tokens.ndim != 1 or self.tokens.dtype.kind not in "iu":
            raise DataError(f"tokens must be one run of integers, not {self.tokens.dtype} of shape {self.tokens.shape}")

    def identity(self) -> dict[str, Any]:
        """Which data this is, for `hydrasurgery.transfer.identity`: the number of tokens and a hash of them."""
        known = {"source": "TokenStream", "tokens": self.tokens.size, "bos": self.bos, "seed": self.seed}
        return {**known, "blake2b": hash_tokens(self.tokens)}

    def batch(self, step: int, stage: Stage, generator: torch.Generator) -> dict[str, Tensor]:
        """The batch of `step` in `stage`: {"input_ids": int64 [stage.batch_size, stage.length]}; `generator` is not used."""
        width = stage.length - (self.bos is not None)
        count = self.tokens.size // max(1, width)
        if count == 0 or width < 1:
            raise DataError(
                f"the training data holds {self.tokens.size} tokens, but a sequence of stage {stage.name!r} takes "
                f"{stage.length}: give more data or a shorter length"
            )
        input_ids = torch.empty(stage.batch_size, stage.length, dtype=torch.int64)
        for row, index in enumerate(range(step * stage.batch_size, (step + 1) * stage.batch_size)):
            phase, order = epoch_order(mix_seed(self.seed, stage.name, index // count), count, self.tokens.size, width)
            start = phase + int(order[index % count]) * width
            if self.bos is not None:
                input_ids[row, 0] = self.bos
            input_ids[row, -width:] = torch.from_numpy(self.tokens[start : start + width].astype(np.int64))
        return {"input_ids": input_ids}


def as_source(data: Any, *, tokenizer: Any = None, seed: int = 0) -> BatchSource:
    """Turn what a user has into a `BatchSource`.

    Tokens alone, in documents or not, are packed: read in order and cut into windows of a stage's length. Where columns beside
    `input_ids` say something, rows stay rows, padded to the longest of a batch: an `attention_mask` with a 0, `labels`
    that are not the ids (-100 for tokens that count in no loss), `position_ids` that do not just count.

    Args:
        data: an object with `batch`; a tensor or numpy array of tokens (any shape, read in order); a list of token
            lists; a `datasets.Dataset`, a mapping of columns (what a tokenizer gives) or a list of such rows or batches, with
            `input_ids` and as needed the columns above; the path of a text file (needs `tokenizer`) or of a `.npy` file of
            tokens, which is mapped rather than read.
        tokenizer: reads a text file; when it puts a BOS token first, so does every packed window.
        seed: decides the order of the windows or rows.

    Raises:
        DataError: there is no token in `data`, it is of none of these forms, or a row has columns that do not fit each other.

    Example:
        >>> as_source([[1, 2, 3], [4, 5]]).tokens.tolist()
        [1, 2, 3, 4, 5]
        >>> rows = as_source({"input_ids": [[1, 2, 3], [4, 5, 0]], "attention_mask": [[1, 1, 1], [1, 1, 0]]})
        >>> len(rows.ends)
        2
    """
    if isinstance(data, BatchSource) and not hasattr(data, "column_names"):  # a Dataset's `batch` means something else
        return data
    blocks = _blocks(data)
    if blocks is None:
        return TokenStream(_tokens(data, tokenizer), seed=seed, bos=_leading_bos(tokenizer))
    columns, ends = read_rows(blocks)
    if set(columns) == {IDS}:
        return TokenStream(columns[IDS].astype(np.int32), seed=seed, bos=_leading_bos(tokenizer))
    return Rows(columns, ends, seed=seed)


def _blocks(data: Any) -> Iterable[Mapping[str, Any]] | None:
    """The rows of data that has columns, some at a time; None for data that is tokens alone."""
    if hasattr(data, "column_names"):
        check_columns(data.column_names)
        if not hasattr(data, "__len__"):
            raise DataError(
                "a streamed dataset has no order to resume from: take a part of it, or save its tokens as .npy"
            )
        return data.iter(batch_size=1000) if set(data.column_names) & {MASK, LABELS, POSITIONS} else None
    if isinstance(data, Mapping):
        check_columns(data)
        return [data]
    if isinstance(data, Sequence) and len(data) and all(isinstance(row, Mapping) for row in data):
        check_columns(dict.fromkeys(itertools.chain.from_iterable(data)))
        return data
    return None


def _tokens(data: Any, tokenizer: Any) -> np.ndarray:
    if isinstance(data, Tensor):
        return data.reshape(-1).cpu().numpy()
    if isinstance(data, np.ndarray):
        return data.reshape(-1)
    if isinstance(data, (str, os.PathLike)):
        return _file_tokens(Path(data), tokenizer)
    if hasattr(data, "column_names"):
        return _concatenate(itertools.chain.from_iterable(rows[IDS] for rows in data.iter(batch_size=1000)))
    if isinstance(data, Sequence):
        return _concatenate(data)
    raise DataError(
        f"cannot train on a {type(data).__name__}: give an object with batch(step, stage, generator), tokens, "
        "a Dataset with a column 'input_ids', rows with such a column, or the path of a text file"
    )


def _concatenate(documents: Iterable[Any]) -> np.ndarray:
    return np.concatenate([np.empty(0, np.int32), *map(_run, documents)])


def _run(ids: Any) -> np.ndarray:
    """A document's ids as one int32 run, since a vocabulary never needs more and a corpus is long."""
    try:
        return np.asarray(ids, np.int32).reshape(-1)
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"the training data is not made of lists of token ids: {error}") from error


def check_file(path: Path) -> None:
    """Refuse, before any model is loaded, a file from which no training data can be read: only its beginning is looked at.

    Raises:
        DataError: it is missing, no ordinary file, empty, not text, or a `.npy` file of something other than tokens.
    """
    if path.is_dir() or (path.exists() and not path.is_file()):
        raise DataError(f"{path}: is no ordinary file; give a UTF-8 text file, or a .npy file of tokens")
    if not path.is_file():
        raise DataError(f"{path}: no such file; give a UTF-8 text file, or a .npy file of tokens")
    if not path.stat().st_size:
        raise DataError(f"{path}: the file is empty; give a file with some text")
    if path.suffix == ".npy":
        _saved_tokens(path)
        return
    with path.open("rb") as stream:
        head = stream.read(_BLOCK)
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head, final=len(head) < _BLOCK)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: is no text (byte {error.start} is not UTF-8); give a UTF-8 text file, or a .npy file"
        ) from error
    if b"\0" in head:
        raise DataError(
            f"{path}: is no text (byte {head.index(0)} is null); give a UTF-8 text file, or a .npy file of tokens"
        )


def check_tokens(source: BatchSource, known: int | None) -> None:
    """Refuse a token that the model does not know, wherever it stands; a source of the user's own is checked at each batch.

    Raises:
        DataError: naming the token and where it is.
    """
    if not isinstance(source, (TokenStream, Rows)) or known is None:
        return
    tokens = source.tokens if isinstance(source, TokenStream) else source.columns[IDS]
    for start in range(0, tokens.size, _BLOCK):
        block = tokens[start : start + _BLOCK]
        if block.min() < 0 or block.max() >= known:
            place = int(((block < 0) | (block >= known)).argmax())
            raise DataError(
                f"token {start + place} of the training data is {block[place]}, but the model embeds 0 to {known - 1}; tokenize "
                "the data with the model's own tokenizer"
            )


def _saved_tokens(path: Path) -> np.ndarray:
    """The tokens [N] of a `.npy` file that holds one run of them, or rows; mapped rather than read."""
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # a header may be wrong in many ways: numpy raises tokenize.TokenError too
        raise DataError(f"{path}: cannot be read as a .npy file ({error}); save the tokens with numpy.save") from error
    if not isinstance(found, np.ndarray):
        raise DataError(f"{path}: is a .npz archive of several arrays; save the tokens alone with numpy.save")
    if found.dtype.kind not in "iu" or found.ndim not in (1, 2) or not found.size:
        raise DataError(
            f"{path}: holds {found.dtype} of shape {list(found.shape)}; give integers, one run of tokens or rows of them"
        )
    return found.reshape(-1)


def _file_tokens(path: Path, tokenizer: Any) -> np.ndarray:
    try:
        if path.suffix == ".npy":
            return _saved_tokens(path)
        if tokenizer is None:
            raise DataError(f"{path} is text: pass tokenizer=")
        encode = functools.partial(tokenizer, add_special_tokens=False, verbose=False)
        return _concatenate(encode(block)["input_ids"] for block in _text_blocks(path))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise DataError(f"{path} cannot be read as training data: {error}") from error


def _text_blocks(path: Path) -> Iterator[str]:
    """The file's text in blocks that end at a line's end."""
    with path.open(encoding="utf-8") as stream:
        while lines := stream.readlines(_BLOCK):
            yield "".join(lines)


def _leading_bos(tokenizer: Any) -> int | None:
    bos = getattr(tokenizer, "bos_token_id", None)
    return bos if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else None


@dataclass(frozen=True)
class Batch:
    """What one step trains on.

    Attributes:
        inputs: arguments of the model's forward, `input_ids` [B, T] among them.
        mask: bool [B, T], True for tokens that count: neither padding nor of label -100.
        labels: [B, T] token ids, -100 for tokens that are not to be predicted; not shifted.

    Example:
        >>> ids = torch.tensor([[5, 6, 7], [8, 9, 9]])
        >>> batch = Batch({"input_ids": ids}, torch.ones_like(ids).bool(), ids)
        >>> [part.labels.tolist() for part in batch.split(1)]
        [[[5, 6, 7]], [[8, 9, 9]]]
    """

    inputs: dict[str, Any]
    mask: Tensor
    labels: Tensor

    def split(self, size: int | None) -> Iterator[Batch]:
        """The batch in pieces of at most `size` sequences; None leaves it whole."""
        rows = self.mask.shape[0]
        for start in range(0, rows, size or rows):
            part = slice(start, start + (size or rows))
            whole = {
                name: value[part] if isinstance(value, Tensor) and value.ndim and value.shape[0] == rows else value
                for name, value in self.inputs.items()
            }
            yield Batch(whole, self.mask[part], self.labels[part])


class Ahead:
    """A stage's batches in order; the next one may be drawn while a device still works on the one before.

    Args:
        draw: gives the batch of a step.
        first, end: steps from `first` to before `end` are drawn.

    Example:
        >>> batches = Ahead(lambda step: step, 3, 5)
        >>> first = batches.take()
        >>> batches.fetch()
        >>> first, batches.take()
        (3, 4)
    """

    def __init__(self, draw: Callable[[int], Any], first: int, end: int) -> None:
        self._draw, self._step, self._end = draw, first, end
        self._next: Future[Any] | None = None

    def fetch(self) -> None:
        """Draw the next batch, if there is one and it is not drawn. What goes wrong is raised by the `take` of its own step."""
        if self._next is not None or self._step == self._end:
            return
        self._next = Future()
        try:
            self._next.set_result(self._draw(self._step))
        except Exception as error:
            self._next.set_exception(error)
        self._step += 1

    def take(self) -> Any:
        """The next batch."""
        self.fetch()
        assert self._next is not None
        drawn, self._next = self._next, None
        return drawn.result()


def draw(source: BatchSource, step: int, stage: Stage, seed: int, index: int = 0) -> Batch:
    """The checked batch of `step` (from 0) in stage number `index` of a recipe, on the CPU.

    Raises:
        DataError: the batch is empty, no token of it counts, or its shapes or columns disagree.
    """
    generator = torch.Generator().manual_seed(mix_seed(seed, "data", index, step))
    given = source.batch(step, stage, generator)
    inputs = {key: value.cpu() if isinstance(value, Tensor) else value for key, value in given.items()}
    inputs = {key: value for key, value in inputs.items() if value is not None}
    where = f"the batch of stage {stage.name!r}, step {step}"
    ids = inputs.get(IDS)
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.numel() == 0:
        raise DataError(f"{where} must hold input_ids [batch, length] with at least one token")
    padding = inputs.pop(MASK, torch.ones_like(ids))
    labels = inputs.pop(LABELS, ids)
    if padding.shape != ids.shape or labels.shape != ids.shape:
        raise DataError(
            f"{where}: input_ids {list(ids.shape)}, attention_mask {list(padding.shape)} and labels "
            f"{list(labels.shape)} must have the same shape"
        )
    if not ((padding == 0) | (padding == 1)).all():
        raise DataError(f"{where}: attention_mask must be 1 for a token and 0 for padding")
    mask = padding.bool()
    labels = labels.masked_fill(~mask, IGNORED)
    counts = labels != IGNORED
    if not counts.any():
        raise DataError(f"{where} is nothing but padding and labels of {IGNORED}")
    if _needs_mask(mask, inputs.get(POSITIONS), where):
        inputs[MASK] = padding
    return Batch(inputs, counts, labels)


def _needs_mask(mask: Tensor, positions: Tensor | None, where: str) -> bool:
    """Whether the models are to be given `mask` [B, T].

    Not one of ones only; nor one beside positions that begin again inside a row, which transformers takes for documents only
    if there is no mask. Without one, padding on the right is a document of its own, which no token before it sees.

    Raises:
        DataError: positions begin again in rows with padding elsewhere.
    """
    padded = not bool(mask.all())
    if positions is None or positions.shape[-1:] != mask.shape[-1:] or positions.ndim != 2:
        return padded
    both = mask[:, 1:] & mask[:, :-1]
    documents = bool((both & (positions[:, 1:] != positions[:, :-1] + 1)).any())
    if documents and bool((mask[:, 1:] & ~mask[:, :-1]).any()):
        raise DataError(
            f"{where}: position_ids begin again inside rows that are padded on the left; pad rows of several documents on the right"
        )
    return padded and not documents

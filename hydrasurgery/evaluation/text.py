"""Real English text to hide needles in: the user's own file, or the language reference that ships with CPython."""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from hydrasurgery.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HELD_OUT_SHARE = 8  # one paragraph in eight is held out


def load_text(path: str | os.PathLike[str]) -> str:
    """Read a UTF-8 text file.

    Args:
        path: the file.

    Raises:
        DataError: the file is missing, empty (or only white space), or not UTF-8.

    Example:
        >>> load_text("nowhere.txt")
        Traceback (most recent call last):
        ...
        hydrasurgery.errors.DataError: nowhere.txt: cannot be read ...
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file}: byte {error.start} is not UTF-8 text; convert the file to UTF-8, or give another file"
        ) from error
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}); give the path of a readable text file") from error
    if not text.strip():
        raise DataError(f"{file}: the file holds no text; give a file with some paragraphs of plain text")
    return text


def library_text(split: Literal["train", "held-out", "all"] = "all") -> str:
    """The Python language reference (`pydoc_data.topics`), about 330,000 characters of English, each paragraph once.

    A paragraph's side is decided by a checksum of its own text, not by its place: topics repeat each other's
    paragraphs, and differ between Python versions, yet no paragraph is ever in both splits, under any version.

    Args:
        split: "train" (seven paragraphs of eight), "held-out" (the eighth) or "all".

    Raises:
        DataError: another split.

    Example:
        >>> len(library_text("held-out")) < len(library_text("train"))
        True
    """
    if split not in ("train", "held-out", "all"):
        raise DataError(f"library_text: no split {split!r}; choose 'train', 'held-out' or 'all'")
    from pydoc_data.topics import topics

    seen: dict[str, None] = {}
    for name in sorted(topics):
        for paragraph in topics[name].split("\n\n"):
            seen.setdefault(paragraph.strip("\n"))
    chosen = [p for p in seen if p.strip() and split in ("all", _side(p))]
    return "\n\n".join(chosen)


def _side(paragraph: str) -> str:
    words = " ".join(paragraph.split())  # the same words with other line breaks stay on the same side
    return "held-out" if zlib.crc32(words.encode()) % HELD_OUT_SHARE == 0 else "train"


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Token ids of `text`, int64 [N], without special tokens and without a limit on the length.

    Args:
        tokenizer: a tokenizer of transformers.
        text: any text.

    Raises:
        DataError: the text encodes to nothing.

    Example:
        >>> from hydrasurgery.demo.teacher import load_teacher
        >>> tokenizer = load_teacher()[1]
        >>> tokenizer.decode(encode_text(tokenizer, "for x in y"))
        'for x in y'
    """
    ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    if not ids:
        raise DataError("encode_text: the text encodes to no token at all; give a longer text")
    return torch.tensor(ids, dtype=torch.long)

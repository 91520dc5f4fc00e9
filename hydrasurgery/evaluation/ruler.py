"""RULER's synthetic tasks (arXiv 2404.06654) for any tokenizer and length: needles, variable tracking, frequent words.

A sample is a prompt of text with the strings that its answer must hold. The structure and the counts are the paper's, the words
are not. Its two question answering tasks need data sets of others (SQuAD, HotpotQA) and are left out.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Literal
from uuid import UUID

import numpy as np
import torch
from torch import Tensor

from hydrasurgery.errors import DataError, TokenizerError
from hydrasurgery.evaluation.facts import WORDS, tokenizer_name
from hydrasurgery.evaluation.tasks import Seed
from hydrasurgery.evaluation.text import library_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FULL = 4096  # tokens from which variables and common words have a solved example, and common words the paper's counts
NOISE = "Rain falls on the hills. A train leaves the town. The lamp is on. Nothing else happens here."
HOPS = 4  # variables that stand for the one before, in a chain
COMMON = 10  # words asked for in "cwe"
FREQUENT = 3  # words asked for in "fwe"
ZIPF = 2.0
_CODES = 2000  # coded words that a text of "fwe" can have
_LEAST_CODES = 60  # words from which its three most frequent are three

Kind = Literal["words", "number", "uuid"]
Hay = Literal["noise", "essay", "needles"]


@dataclass(frozen=True)
class RulerSample:
    """A prompt with what its answer must hold.

    Attributes:
        task: its name in `RULER`.
        prompt: the text, which ends with the answer's first words.
        input_ids: [T] int64, the prompt's tokens, special ones included; T + `new_tokens` is at most the length asked for.
        references: the strings that a right answer holds, each of them.
        new_tokens: how many tokens an answer may have.

    Example: see `ruler_samples`.
    """

    task: str
    prompt: str
    input_ids: Tensor
    references: tuple[str, ...]
    new_tokens: int


def ruler_samples(
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    length: int,
    count: int,
    seed: Seed,
    *,
    text: str | None = None,
    chat: bool = False,
) -> list[RulerSample]:
    """Samples of one task, filled up to a length and never over it.

    Args:
        tokenizer: counts the tokens.
        task: a name in `RULER`.
        length: tokens of prompt and answer together.
        count: samples.
        seed: the only source of chance; an int or several.
        text: what needles are hidden in and words are taken from; by default the Python reference (`library_text`).
        chat: put the prompt into the tokenizer's chat template, as a user's message.

    Raises:
        DataError: no such task, an empty text, or the task does not fit into `length`.
        TokenizerError: `chat` with a tokenizer that has no chat template.

    Example:
        >>> from hydrasurgery.demo.teacher import load_teacher
        >>> (sample,) = ruler_samples(load_teacher()[1], "niah_single_1", length=512, count=1, seed=0)
        >>> len(sample.input_ids) + sample.new_tokens <= 512, sample.references[0] in sample.prompt
        (True, True)
    """
    if task not in RULER:
        raise DataError(f"ruler: no task {task!r}; choose from {', '.join(RULER)}")
    if chat and not tokenizer.chat_template:
        raise TokenizerError(f"{tokenizer_name(tokenizer)}: has no chat template; leave chat (--chat) out")
    hay = _haystack(text)
    seeds = [*([seed] if isinstance(seed, int) else seed), list(RULER).index(task)]
    return [_sample(tokenizer, task, length, [*seeds, number], hay, chat) for number in range(count)]


@dataclass(frozen=True)
class _Draft:
    """A sample of any size: `body(n)` is its context of n units, at least `least`."""

    instruction: str
    body: Callable[[int], str]
    question: str
    start: str  # the answer's first words
    references: Sequence[str]
    least: int = 0


class _Haystack:
    """A text as words in their order, and as a dictionary."""

    def __init__(self, text: str) -> None:
        self.words = text.split()
        if not self.words:
            raise DataError("ruler: the text holds no word; give some paragraphs of plain text")
        self.dictionary = sorted({*WORDS, *re.findall(r"\b[a-z]{4,12}\b", text)})

    def essay(self, start: float, size: int) -> list[str]:
        """`size` words from a place between 0 and 1 on; a text shorter than that goes round."""
        first = int(start * len(self.words))
        return [self.words[(first + i) % len(self.words)] for i in range(size)]

    def vocabulary(self, size: int, rng: np.random.Generator) -> list[str]:
        """`size` distinct words in a drawn order: the text's, and after them coined ones."""
        known = [self.dictionary[i] for i in rng.permutation(len(self.dictionary)).tolist()][:size]
        return known + _distinct(partial(_codes, rng), size - len(known), set(known))


@lru_cache(maxsize=2)
def _haystack(text: str | None) -> _Haystack:
    return _Haystack(library_text() if text is None else text)


def _sample(
    tokenizer: PreTrainedTokenizerBase, task: str, length: int, seed: Sequence[int], hay: _Haystack, chat: bool
) -> RulerSample:
    make, new_tokens = RULER[task]
    short = length < FULL
    while True:
        draft = make(np.random.default_rng(seed), hay, short)

        def written(size: int, draft: _Draft = draft) -> tuple[str, list[int]]:
            prompt = f"{draft.instruction}\n\n{draft.body(size)}\n\n{draft.question}"
            if chat:
                message = [{"role": "user", "content": prompt}]
                prompt = str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
            prompt += draft.start.lstrip() if chat else draft.start
            return prompt, tokenizer.encode(prompt, add_special_tokens=not chat, verbose=False)

        least = len(written(draft.least)[1]) + new_tokens
        if least <= length:
            break
        if short:
            raise DataError(
                f"{task}: the shortest prompt and {new_tokens} tokens of answer are {least} tokens, but the length is "
                f"{length}; give a greater one"
            )
        short = True
    prompt, ids = written(_largest(lambda size: len(written(size)[1]), draft.least, length - new_tokens))
    return RulerSample(task, prompt, torch.tensor(ids, dtype=torch.long), tuple(draft.references), new_tokens)


def _largest(measure: Callable[[int], int], low: int, bound: int) -> int:
    """A size whose measure is within the bound and the next one's is not; that of `low` is known to be."""
    below, step = measure(low), 16
    while (above := measure(low + step)) <= bound:
        low, below = low + step, above
        rate = max(1, bound - below)  # at most one unit a token is missing
        step = min(2 * step, rate)
    high = low + step
    while high - low > 1:
        guess = low + int((high - low) * (bound - below) / (above - below))
        middle = min(max(guess, low + 1), high - 1)
        tokens = measure(middle)
        if tokens <= bound:
            low, below = middle, tokens
            if low + 1 < high and measure(low + 1) > bound:
                return low
        else:
            high, above = middle, tokens
    return low


def _needles(
    rng: np.random.Generator,
    hay: _Haystack,
    short: bool,
    *,
    within: Hay,
    keys: int = 1,
    values: int = 1,
    asked: int = 1,
    key: Kind = "words",
    value: Kind = "number",
) -> _Draft:
    """Keys with their values, of which the first `asked` are asked for."""
    names = _distinct(partial(_draw, key, rng), keys)
    secrets = _distinct(partial(_draw, value, rng), keys * values)
    kind = "number" if value == "number" else "UUID"
    stated = [f"The secret {kind} of {names[i // values]} is {secret}." for i, secret in enumerate(secrets)]
    depths, start, seed = rng.random(len(stated)), rng.random(), int(rng.integers(2**63))

    def body(size: int) -> str:
        if within == "essay":
            return " ".join(_hide(hay.essay(start, size), stated, depths, sentences=True))
        inner = np.random.default_rng(seed)
        units = [NOISE] * size
        if within == "needles":
            others = (
                _distinct(partial(_draw, key, inner), size, names),
                _distinct(partial(_draw, value, inner), size, secrets),
            )
            units = [f"The secret {kind} of {name} is {secret}." for name, secret in zip(*others, strict=True)]
        return "\n".join(_hide(units, stated, depths))

    which = names[0] if asked == 1 else f"{', '.join(names[: asked - 1])} and {names[asked - 1]}"
    several = asked * values > 1
    return _Draft(
        f"The text below hides one or more secret {kind}s. Remember each of them: a question follows the text.",
        body,
        f"Which secret {kind}{'s' if several else ''} does the text state for {which}?",
        f" As the text says, the secret {kind}{'s' if several else ''} of {which} {'are' if several else 'is'}",
        secrets[: asked * values],
    )


def _variables(rng: np.random.Generator, hay: _Haystack, short: bool) -> _Draft:
    """One chain of variables in noise, with a solved example before it in a prompt of full length."""
    names = _distinct(lambda n: [code[:5].upper() for code in _codes(rng, n)], 2 * (HOPS + 1))
    numbers = _distinct(lambda n: [str(number) for number in rng.integers(10_000, 100_000, n)], 2)
    depths = np.sort(rng.random((2, HOPS + 1)), axis=1)
    chains = names[: HOPS + 1], names[HOPS + 1 :]

    def body(size: int, which: int = 0) -> str:
        values = [numbers[which], *(f"VAR {name}" for name in chains[which])]
        stated = [f"VAR {name} = {value}" for name, value in zip(chains[which], values, strict=False)]
        return "\n".join(_hide([NOISE] * size, stated, depths[which]))

    instruction = "Among other lines, the text below sets variables to values. Follow who has which value."
    question = "Question: which variables have the value {}, by themselves or through others?"
    start = f" Answer: the {HOPS + 1} variables that have the value {{}} are"
    solved = f"{body(5, 1)}\n\n{question.format(numbers[1])}{start.format(numbers[1])} {' '.join(chains[1])}"
    asked = question.format(numbers[0]), start.format(numbers[0]), chains[0]
    return _Draft(instruction if short else f"{instruction}\n\n{solved}\n\n{instruction}", body, *asked)


def _common_words(rng: np.random.Generator, hay: _Haystack, short: bool) -> _Draft:
    """Ten words that a numbered list has often, among words that it has a few times."""
    often, seldom = (6, 1) if short else (30, 3)
    seed = int(rng.integers(2**63))
    common = hay.vocabulary(2 * COMMON, rng)
    example, common = common[COMMON:], common[:COMMON]

    def listed(words: Sequence[str], often: int, seldom: int, size: int, inner: np.random.Generator) -> str:
        drawn = [word for word in hay.vocabulary(size + 2 * COMMON, inner) if word not in (*common, *example)]
        entries = [*words] * often + drawn[:size] * seldom
        return " ".join(f"{i + 1}. {entries[k]}" for i, k in enumerate(inner.permutation(len(entries)).tolist()))

    instruction = (
        "Here is a numbered list of words. Some of them stand in it more often than the others; remember those."
    )
    question = f"Question: which {COMMON} words stand in the list most often?"
    start = f" Answer: the {COMMON} words that stand in the list most often are"
    if not short:
        solved = f"{listed(example, 10, 3, 30, rng)}\n\n{question}{start} {' '.join(example)}"
        instruction = f"{instruction}\n\n{solved}\n\n{instruction}"
    body = lambda size: listed(common, often, seldom, size, np.random.default_rng(seed))  # noqa: E731
    return _Draft(instruction, body, question, start, common, COMMON)


def _frequent_words(rng: np.random.Generator, hay: _Haystack, short: bool) -> _Draft:
    """Coded words whose counts follow Zipf's law; the most frequent is a row of dots, which does not count."""
    words = ["...", *_distinct(partial(_codes, rng), _CODES)]
    seed = int(rng.integers(2**63))

    def body(size: int) -> str:
        shares = np.arange(1, len(words) + 1) ** -ZIPF * (6 / math.pi**2)
        entries = np.repeat(words, (size * shares).astype(np.int64))
        return " ".join(np.random.default_rng(seed).permutation(entries).tolist())

    return _Draft(
        f"The text below is in code words. Count them, but not the rows of dots, and find the {FREQUENT} most frequent.",
        body,
        f"Question: which {FREQUENT} code words does the text have most often?",
        f" Answer: the {FREQUENT} code words that the text has most often are",
        words[1 : 1 + FREQUENT],
        _LEAST_CODES,
    )


def _hide(units: Sequence[str], stated: Sequence[str], depths: np.ndarray, sentences: bool = False) -> list[str]:
    """`units` with each of `stated` put in at its depth, from 0 to 1; if `sentences`, after one that has ended, if any has."""
    cuts = [int(depth * (len(units) + 1)) for depth in depths.tolist()]
    ends = [place for place, unit in enumerate(units, 1) if sentences and unit.endswith((".", "!", "?"))]
    if ends:
        cuts = [[0, *ends][bisect_right(ends, cut)] for cut in cuts]
    whole: list[str] = []
    last = 0
    for number in np.argsort(depths, kind="stable").tolist():
        whole += [*units[last : cuts[number]], stated[number]]
        last = cuts[number]
    return [*whole, *units[last:]]


def _distinct(draw: Callable[[int], Iterable[str]], count: int, taken: Collection[str] = ()) -> list[str]:
    """`count` different strings that are not taken, in the order in which they were drawn."""
    found: dict[str, None] = {}
    while len(found) < count:
        found.update(dict.fromkeys(drawn for drawn in draw(count - len(found)) if drawn not in taken))
    return list(found)


def _draw(kind: Kind, rng: np.random.Generator, count: int) -> list[str]:
    """Keys or values, not all of them different."""
    if kind == "number":
        return [str(number) for number in rng.integers(10**6, 10**7, count)]
    if kind == "uuid":
        return [str(UUID(bytes=rng.bytes(16), version=4)) for _ in range(count)]
    return ["-".join(WORDS[i] for i in row) for row in rng.integers(len(WORDS), size=(count, 3)).tolist()]


def _codes(rng: np.random.Generator, count: int) -> list[str]:
    """Coined words of six letters."""
    return ["".join(map(chr, row)) for row in rng.integers(ord("a"), ord("z") + 1, size=(count, 6)).tolist()]


# By name: how a draft is made, and the tokens of an answer.
RULER: dict[str, tuple[Callable[[np.random.Generator, _Haystack, bool], _Draft], int]] = {
    "niah_single_1": (partial(_needles, within="noise"), 128),
    "niah_single_2": (partial(_needles, within="essay"), 128),
    "niah_single_3": (partial(_needles, within="essay", value="uuid"), 128),
    "niah_multikey_1": (partial(_needles, within="essay", keys=4), 128),
    "niah_multikey_2": (partial(_needles, within="needles"), 128),
    "niah_multikey_3": (partial(_needles, within="needles", key="uuid", value="uuid"), 128),
    "niah_multivalue": (partial(_needles, within="essay", values=4), 128),
    "niah_multiquery": (partial(_needles, within="essay", keys=4, asked=4), 128),
    "vt": (_variables, 30),
    "cwe": (_common_words, 120),
    "fwe": (_frequent_words, 50),
}

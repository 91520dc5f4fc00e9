"""Facts as tokens: a key with its value, stated and asked in the demo's own tokens or in words.

Which of the two is chosen by the tokenizer: with the demo's key and value tokens (`<key_017> <value_03> <value_41>`; a question
is the key once more), or, for any other tokenizer, in words ("The special magic number for river is 48213.").
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from hydrasurgery.errors import DataError, TokenizerError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KEY_TOKENS = tuple(f"<key_{i:03d}>" for i in range(128))
VALUE_TOKENS = tuple(f"<value_{i:02d}>" for i in range(64))
VALUE_LENGTH = 2  # value tokens in one value
_ATTEMPTS = 200  # draws of a number before a tokenizer is given up


@dataclass(frozen=True)
class Fact:
    """One key with its value: stated as `before + value + after`, asked as `question + value`; its name, if in words."""

    before: list[int]
    value: list[int]
    after: list[int]
    question: list[int]
    distractor: list[int]
    name: str = ""


class Writer(Protocol):
    """A way of writing facts; `facts(n, rng)` gives n of them with distinct keys and distinct values.

    `alias(new, old)` states that the key of `new` has the value of `old`'s.
    """

    chance: float

    def facts(self, count: int, rng: np.random.Generator) -> list[Fact]: ...

    def alias(self, new: Fact, old: Fact) -> Fact: ...


class SymbolWriter:
    """Facts in the demo's own tokens: key, then two value tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.keys = _token_ids(tokenizer, KEY_TOKENS)
        self.values = _token_ids(tokenizer, VALUE_TOKENS)
        self.chance = len(self.values) ** -VALUE_LENGTH

    def draw(self, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Distinct keys [count] and distinct values [count, 2], as token ids."""
        if count > len(self.keys):
            raise DataError(f"{count} keys asked for, but the tokenizer has {len(self.keys)}; ask for fewer keys")
        keys = rng.permutation(len(self.keys))[:count]
        codes = rng.choice(len(self.values) ** VALUE_LENGTH, size=count, replace=False)
        return self.keys[keys], self.values[np.stack(np.divmod(codes, len(self.values)), axis=1)]

    def facts(self, count: int, rng: np.random.Generator) -> list[Fact]:
        keys, values = self.draw(count, rng)
        taken = {tuple(v) for v in values.tolist()}
        facts = []
        for key, value in zip(keys.tolist(), values.tolist(), strict=True):
            distractor = value
            while any(a == b for a, b in zip(value, distractor, strict=True)) or tuple(distractor) in taken:
                distractor = rng.choice(self.values, size=VALUE_LENGTH).tolist()
            facts.append(Fact([key], value, [], [key], distractor))
        return facts

    def alias(self, new: Fact, old: Fact) -> Fact:
        return Fact([*new.before, *old.before], [], [], [], [])


class SentenceWriter:
    """Facts in words, for any tokenizer; all numbers have the token count that is commonest with this tokenizer."""

    chance = 9.0**-5  # five digits, none of them 0

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        rng = np.random.default_rng(0)
        tries = [self._try(word, *_two_numbers(rng)) for word in WORDS[:32]]
        lengths = Counter(len(fact.value) for fact in tries if fact is not None)
        self.value_length = lengths.most_common(1)[0][0] if lengths else 0

    def facts(self, count: int, rng: np.random.Generator) -> list[Fact]:
        if count > len(WORDS):
            raise DataError(f"{count} keys asked for, but there are {len(WORDS)} words to name them; ask for fewer")
        words = [WORDS[i] for i in rng.permutation(len(WORDS))[:count]]
        taken: set[tuple[int, ...]] = set()
        facts = []
        for word in words:
            fact = self._fact(word, rng, taken)
            taken.update((tuple(fact.value), tuple(fact.distractor)))
            facts.append(fact)
        return facts

    def alias(self, new: Fact, old: Fact) -> Fact:
        names = (f"The special magic number for {fact.name}" for fact in (new, old))
        return Fact(self._encode(f" {' is '.join(names)}."), [], [], [], [])

    def _fact(self, word: str, rng: np.random.Generator, taken: set[tuple[int, ...]]) -> Fact:
        for _ in range(_ATTEMPTS):
            fact = self._try(word, *_two_numbers(rng))
            if fact is None or len(fact.value) != self.value_length:
                continue
            if taken.isdisjoint((tuple(fact.value), tuple(fact.distractor))):
                return fact
        raise TokenizerError(
            f"{tokenizer_name(self.tokenizer)}: in {_ATTEMPTS} draws no two five-digit numbers had the same token count and a "
            "different token at every place; this tokenizer cannot write the needle task: use needles of your own"
        )

    def _try(self, word: str, number: str, other: str) -> Fact | None:
        """The fact, or None where the tokenizer joins the number to its sentence or the two numbers do not match."""
        sentence = f" The special magic number for {word} is"
        before = self._encode(sentence)
        wholes = [self._encode(f"{sentence} {n}") for n in (number, other)]
        if any(whole[: len(before)] != before for whole in wholes):
            return None
        value, distractor = (whole[len(before) :] for whole in wholes)
        if len(value) != len(distractor):
            return None
        while value and value[0] == distractor[0]:  # a separate token for the blank belongs to the sentence
            before, value, distractor = [*before, value[0]], value[1:], distractor[1:]
        if not value or any(a == b for a, b in zip(value, distractor, strict=True)):
            return None
        question = self._encode(f"\n\nWhat is the special magic number for {word}?")
        return Fact(before, value, self._encode("."), [*question, *before], distractor, word)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)


def has_symbols(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether needles are written with the demo's key tokens, which `tokenizer` then has, and not in words.

    Example:
        >>> from hydrasurgery.demo.teacher import load_teacher
        >>> has_symbols(load_teacher()[1])
        True
    """
    return tokenizer.convert_tokens_to_ids(KEY_TOKENS[0]) not in (None, tokenizer.unk_token_id)


def writer_for(tokenizer: PreTrainedTokenizerBase) -> Writer:
    """How facts are written for a tokenizer."""
    return SymbolWriter(tokenizer) if has_symbols(tokenizer) else SentenceWriter(tokenizer)


def _token_ids(tokenizer: PreTrainedTokenizerBase, names: Sequence[str]) -> np.ndarray:
    ids: Any = tokenizer.convert_tokens_to_ids(list(names))
    for name, token in zip(names, ids, strict=True):
        if token is None or token == tokenizer.unk_token_id:
            raise TokenizerError(
                f"{tokenizer_name(tokenizer)}: token {name} is missing; this task is written with the demo's key and value "
                "tokens: use the demo's tokenizer, or `needles`, which a tokenizer without any of them writes in words"
            )
    return np.array(ids, dtype=np.int64)


def tokenizer_name(tokenizer: PreTrainedTokenizerBase) -> str:
    """What messages call a tokenizer."""
    return f"{type(tokenizer).__name__} ({tokenizer.name_or_path or 'unnamed'})"


def _two_numbers(rng: np.random.Generator) -> tuple[str, str]:
    """Two five-digit numbers that share no digit at any place."""
    digits = rng.permuted(np.tile(np.arange(1, 10), (5, 1)), axis=1)[:, :2]
    return "".join(map(str, digits[:, 0])), "".join(map(str, digits[:, 1]))


WORDS = """
    anchor apple arrow basket beacon bicycle blanket bottle bridge bronze butter button cabin camera candle canyon
    carpet castle cellar circle cloud coffee copper corner cotton cradle crystal desert diamond dolphin dragon
    eagle engine falcon feather fence fiddle forest fountain garden ginger glacier grape hammer harbor helmet
    honey island ivory jacket jungle kettle kitchen ladder lantern lemon letter library lizard magnet maple marble
    meadow mirror monkey mountain needle oasis ocean olive orange orchard oyster paddle palace paper parrot pencil
    pepper piano pillow planet pocket pumpkin puzzle rabbit river rocket saddle sailor salmon shadow silver spider
    spoon spring stable station summer sunset table temple thunder tiger tower tunnel turtle valley velvet village
    violin walnut whistle window winter wizard
""".split()  # noqa: SIM905  (a hundred quoted words would be a hundred lines)

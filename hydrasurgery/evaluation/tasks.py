"""Retrieval tasks with known answers: needles in real text, dense key-value recall, counterfactual pairs of needles.

Every generator takes its seed and nothing else that varies, so that the same call gives the same tensors; none of them
runs a model. `hydrasurgery.evaluation.facts` says how needles are written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from hydrasurgery.errors import DataError
from hydrasurgery.evaluation.facts import (
    KEY_TOKENS,
    VALUE_LENGTH,
    Fact,
    SymbolWriter,
    has_symbols,
    tokenizer_name,
    writer_for,
)
from hydrasurgery.evaluation.text import encode_text, library_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Seed = int | Sequence[int]


@dataclass(frozen=True)
class TaskBatch:
    """Sequences with the answers to predict.

    Attributes:
        task: "needles", "dense" or "text".
        input_ids: [B, T] int64, no padding.
        labels: [B, T] int64, aligned with `input_ids` as transformers has it (the model shifts them); -100 where
            nothing is asked.
        answer_positions: [B, Q, A] int64: position p's logits predict `input_ids[p + 1]`, token A of question Q.
            Empty (Q = A = 0) for plain text.
        chance: the probability that a blind guess of a whole answer is right.

    Example: see `needles`.
    """

    task: str
    input_ids: Tensor
    labels: Tensor
    answer_positions: Tensor
    chance: float


@dataclass(frozen=True)
class Pair:
    """A prompt and its counterfactual, for causal scoring (paper section 2, eq. 9).

    The two differ in the asked key's value where it is stated, and nowhere else: the answer's first tokens, which end the
    prompt, are the clean ones in both, so that every effect starts at the stated value.

    Attributes:
        clean_ids, corrupt_ids: [T] int64.
        answer_positions: [A] int64, positions whose logits predict the answer's tokens.
        answer_ids, distractor_ids: [A] int64, the clean and the counterfactual answer, different at every place.
        value_positions: [A] int64, where the asked value is stated: the only places at which the prompts differ. For
            a question about what is not stated (a fact, a sum), the places of the question's changed part, any number.
        task: the probe that the pair is of, with its length: "needle-4@256".

    Example: see `needle_pairs`.
    """

    clean_ids: Tensor
    corrupt_ids: Tensor
    answer_positions: Tensor
    answer_ids: Tensor
    distractor_ids: Tensor
    value_positions: Tensor
    task: str = ""

    @property
    def stated(self) -> bool:
        """Whether the prompt itself holds the answer, at `value_positions`."""
        return torch.equal(self.clean_ids[self.value_positions], self.answer_ids)


def needles(
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    count: int,
    seed: Seed,
    *,
    num_keys: int = 4,
    questions: int = 1,
    text_ids: Tensor | None = None,
) -> TaskBatch:
    """Facts hidden at random depths in real text; the questions at the end ask `questions` of them.

    Args:
        tokenizer: writes facts with the demo's own tokens where it has them, else in words.
        length: T, tokens per sequence.
        count: B, sequences.
        seed: the only source of chance; an int or several (a run's seed and a step, say).
        num_keys: facts per sequence, of distinct keys and values.
        questions: Q, how many of the facts are asked.
        text_ids: [N] int64, the text to hide them in; by default the Python reference (held-out part for the demo's
            tokenizer).

    Raises:
        TokenizerError: the tokenizer has only some of the demo's tokens, or cannot write matching numbers.
        DataError: the facts and questions do not fit into `length`.

    Example:
        >>> from hydrasurgery.demo.teacher import load_teacher
        >>> tokenizer = load_teacher()[1]
        >>> batch = needles(tokenizer, length=32, count=2, seed=0)
        >>> batch.input_ids.shape, batch.answer_positions.tolist()
        (torch.Size([2, 32]), [[[29, 30]], [[29, 30]]])
        >>> tokenizer.decode(batch.input_ids[0, -3:])
        '<key_125><value_50><value_17>'
    """
    rng = np.random.default_rng(seed)
    writer, text = writer_for(tokenizer), _text(tokenizer, text_ids)
    prefix = _prefix(tokenizer)
    rows = []
    for _ in range(count):
        facts = writer.facts(num_keys, rng)
        rows.append(_needle_row(prefix, facts, _asked(facts, questions, rng), length, text, rng))
    return _batch("needles", [r.ids for r in rows], [r.answers for r in rows], writer.chance)


def needle_pairs(
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    count: int,
    seed: Seed,
    *,
    num_keys: int = 4,
    text_ids: Tensor | None = None,
) -> list[Pair]:
    """Counterfactual pairs for causal scoring.

    The corrupt prompt is the clean one, in which a distractor has the place of the asked key's value: of the same type, of
    as many tokens, different at every place, and the value of no other key.

    Args:
        tokenizer: as in `needles`.
        length: T, tokens per prompt.
        count: pairs.
        seed: as in `needles`.
        num_keys: facts per prompt, of which one is asked.
        text_ids: as in `needles`.

    Raises:
        TokenizerError, DataError: as `needles`.

    Example:
        >>> from hydrasurgery.demo.teacher import load_teacher
        >>> pair = needle_pairs(load_teacher()[1], length=32, count=1, seed=0)[0]
        >>> differing = (pair.clean_ids != pair.corrupt_ids).nonzero().flatten()
        >>> torch.equal(differing, pair.value_positions), torch.equal(pair.clean_ids[differing], pair.answer_ids)
        (True, True)
    """
    rng = np.random.default_rng(seed)
    writer, text = writer_for(tokenizer), Text(tokenizer, text_ids)
    pairs = []
    for _ in range(count):
        facts = writer.facts(num_keys, rng)
        (asked,) = _asked(facts, 1, rng)
        pairs.append(pair_of_facts(text, facts, asked, length, rng, f"needle-{num_keys}"))
    return pairs


def chained_facts(text: Text, chains: int, hops: int, rng: np.random.Generator) -> tuple[list[Fact], int]:
    """Facts, after each `hops` names that stand for the one before, and the number of the fact that is asked.

    The asked fact's question is the last name of its chain; a name is stated after the one it stands for.
    """
    writer = writer_for(text.tokenizer)
    named = writer.facts(chains * (1 + hops), rng)
    roots, others = named[:chains], named[chains:]
    asked = int(rng.integers(chains))
    stated: list[Fact] = []
    for chain, root in enumerate(roots):
        names = [root, *others[chain * hops : (chain + 1) * hops]]
        stated.append(replace(root, question=names[-1].question) if chain == asked else root)
        stated += [writer.alias(new, old) for old, new in pairwise(names)]
    return stated, asked * (1 + hops)


def pair_of_facts(text: Text, facts: list[Fact], asked: int, length: int, rng: np.random.Generator, task: str) -> Pair:
    """The pair that states `facts` in their order, hidden in text, and asks fact number `asked`."""
    # One token longer, without the last: the answer's last token is predicted and never read.
    row = _needle_row(text.prefix, facts, [asked], length + 1, text.ids, rng)
    clean = torch.from_numpy(row.ids[:-1])
    value_positions, distractor = torch.from_numpy(row.stated[0]), torch.tensor(row.asked[0].distractor)
    corrupt = clean.clone()
    corrupt[value_positions] = distractor
    positions, answer = torch.from_numpy(row.answers[0]) - 1, torch.tensor(row.asked[0].value)
    return Pair(clean, corrupt, positions, answer, distractor, value_positions, f"{task}@{length}")


class Text:
    """What a tokenizer's prompts are made of: its own first tokens, and the text that things are hidden in.

    Raises:
        DataError: `text_ids` is no row of tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text_ids: Tensor | None = None) -> None:
        self.tokenizer, self.name = tokenizer, tokenizer_name(tokenizer)
        self.ids, self.prefix = _text(tokenizer, text_ids), _prefix(tokenizer)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, nothing put before them."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def fill(self, length: int, used: int, rng: np.random.Generator, task: str) -> list[int]:
        """The `length - used` tokens that a prompt lacks, from a random place; DataError if `used` is above `length`."""
        if used > length:
            raise DataError(f"{task}: the question needs {used} tokens, but the length is {length}; give a greater one")
        return _window(self.ids, length - used, rng).tolist()


def dense_recall(
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    count: int,
    seed: Seed,
    *,
    num_pairs: int | None = None,
    questions: int | None = None,
    text_ids: Tensor | None = None,
) -> TaskBatch:
    """A sequence full of `key value value`, then questions; only for a tokenizer with the demo's tokens.

    Keys are unique within a sequence, so at most 128 facts fit; the rest of a longer sequence is text between them.

    Args:
        tokenizer: one with the demo's tokens.
        length: T, tokens per sequence.
        count: B, sequences.
        seed: as in `needles`.
        num_pairs: facts; by default as many as fill three quarters of the sequence, at most one per key.
        questions: Q; by default a third of the facts. More than there are facts ask them again, round by round.
        text_ids: as in `needles`.

    Raises:
        TokenizerError: a key or value token is missing.
        DataError: the facts and questions do not fit into `length`.

    Example:
        >>> from hydrasurgery.demo.teacher import load_teacher
        >>> dense_recall(load_teacher()[1], length=64, count=2, seed=0).answer_positions.shape  # [B, Q, A]
        torch.Size([2, 5, 2])
    """
    rng = np.random.default_rng(seed)
    writer, text = SymbolWriter(tokenizer), _text(tokenizer, text_ids)
    prefix = np.array(_prefix(tokenizer), dtype=np.int64)
    size = 1 + VALUE_LENGTH
    pairs = min(len(KEY_TOKENS), (length - len(prefix)) * 3 // 4 // size) if num_pairs is None else num_pairs
    asked = max(1, pairs // 3) if questions is None else questions
    gap = length - len(prefix) - size * (pairs + asked)
    _check_fit("dense recall", length, gap, pairs, asked)
    rows, answers = [], []
    for _ in range(count):
        keys, values = writer.draw(pairs, rng)
        facts = np.concatenate([keys[:, None], values], axis=1)
        cuts = np.sort(rng.integers(0, gap + 1, size=pairs))
        body = np.insert(_window(text, gap, rng), cuts.repeat(size), facts.ravel())
        rounds = [rng.permutation(pairs) for _ in range(-(-asked // pairs))]
        tail = facts[np.concatenate(rounds)[:asked]].ravel()
        rows.append(np.concatenate([prefix, body, tail]))
        start = length - size * asked + 1
        answers.append(start + size * np.arange(asked)[:, None] + np.arange(VALUE_LENGTH))
    return _batch("dense", rows, answers, writer.chance)


def plain_text(
    tokenizer: PreTrainedTokenizerBase, length: int, count: int, seed: Seed, *, text_ids: Tensor | None = None
) -> TaskBatch:
    """Windows of real text from random places; every token but the first is labelled, and no question is asked.

    Args:
        tokenizer: any.
        length: T, tokens per sequence, its own first token (bos) included.
        count: B, sequences.
        seed, text_ids: as in `needles`.

    Raises:
        DataError: `length` leaves no room for text.

    Example:
        >>> from hydrasurgery.demo.teacher import load_teacher
        >>> plain_text(load_teacher()[1], length=32, count=2, seed=0).input_ids.shape
        torch.Size([2, 32])
    """
    rng = np.random.default_rng(seed)
    text = _text(tokenizer, text_ids)
    prefix = np.array(_prefix(tokenizer), dtype=np.int64)
    _check_fit("plain text", length, length - len(prefix) - 1, 0, 0)
    rows = [np.concatenate([prefix, _window(text, length - len(prefix), rng)]) for _ in range(count)]
    input_ids = torch.from_numpy(np.stack(rows))
    labels = input_ids.clone()
    labels[:, 0] = -100
    return TaskBatch("text", input_ids, labels, torch.zeros(count, 0, 0, dtype=torch.long), 1 / len(tokenizer))


@dataclass(frozen=True)
class _Row:
    ids: np.ndarray  # [T]
    answers: np.ndarray  # [Q, A] positions of the answers' tokens
    stated: np.ndarray  # [Q, A] positions at which the asked values are stated
    asked: list[Fact]


def _needle_row(
    prefix: list[int], facts: list[Fact], order: list[int], length: int, text: np.ndarray, rng: np.random.Generator
) -> _Row:
    """A sequence that states `facts` in their order, and asks those that `order` names."""
    asked = [facts[i] for i in order]
    used = len(prefix) + sum(len(f.before + f.value + f.after) for f in facts)
    used += sum(len(f.question + f.value) for f in asked)
    _check_fit("needles", length, length - used, len(facts), len(order))
    window = _window(text, length - used, rng)
    cuts = np.sort(rng.integers(0, length - used + 1, size=len(facts))).tolist()
    ids, stated, answers = list(prefix), [], []
    for fact, start, end in zip(facts, [0, *cuts[:-1]], cuts, strict=True):
        ids += window[start:end].tolist() + fact.before
        stated.append(np.arange(len(ids), len(ids) + len(fact.value)))
        ids += fact.value + fact.after
    ids += window[cuts[-1] :].tolist()
    for fact in asked:
        ids += fact.question
        answers.append(np.arange(len(ids), len(ids) + len(fact.value)))
        ids += fact.value
    return _Row(np.array(ids, dtype=np.int64), np.stack(answers), np.stack([stated[i] for i in order]), asked)


def _asked(facts: list[Fact], questions: int, rng: np.random.Generator) -> list[int]:
    """Numbers of the facts to ask, drawn."""
    if not 1 <= questions <= len(facts):
        raise DataError(f"needles: {questions} questions about {len(facts)} keys; ask between 1 and the number of keys")
    return rng.permutation(len(facts))[:questions].tolist()


def _batch(task: str, rows: list[np.ndarray], answers: list[np.ndarray], chance: float) -> TaskBatch:
    input_ids, places = torch.from_numpy(np.stack(rows)), torch.from_numpy(np.stack(answers))
    labels = torch.full_like(input_ids, -100)
    flat = places.flatten(1)
    labels.scatter_(1, flat, input_ids.gather(1, flat))
    return TaskBatch(task, input_ids, labels, places - 1, chance)


def _check_fit(task: str, length: int, left: int, keys: int, questions: int) -> None:
    if left < 0:
        raise DataError(
            f"{task}: {keys} keys and {questions} questions need {length - left} tokens, but the length is {length}; "
            "give a greater length or fewer keys"
        )


def _window(text: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """`size` tokens from a random place; a text shorter than that goes round."""
    return text[(int(rng.integers(len(text))) + np.arange(size)) % len(text)]


def _text(tokenizer: PreTrainedTokenizerBase, text_ids: Tensor | None) -> np.ndarray:
    if text_ids is None:
        text_ids = encode_text(tokenizer, library_text("held-out" if has_symbols(tokenizer) else "all"))
    if text_ids.ndim != 1 or not len(text_ids):
        raise DataError(f"text_ids: shape {tuple(text_ids.shape)}; give a non-empty row of token ids (encode_text)")
    return text_ids.cpu().numpy()


def _prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens this tokenizer puts before a text (bos, or nothing)."""
    with_special, without = tokenizer.encode("a"), tokenizer.encode("a", add_special_tokens=False)
    return with_special[: with_special.index(without[0])]

"""Probes for causal scoring: counterfactual pairs of one length, by name, for any tokenizer.

Retrieval: needles with one and with several keys, and variable tracking, where the way from the question to the value leads
through other names. Controls, which no retrieval head should matter for: facts that the weights hold (parametric
recall), and sums. Ids are spliced and never encoded anew, so that clean and corrupt prompts align token by token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from hydrasurgery.errors import TokenizerError
from hydrasurgery.evaluation.tasks import (
    Pair,
    Seed,
    Text,
    chained_facts,
    needle_pairs,
    pair_of_facts,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = list[int]
HOPS = 1  # names between the question and the value
SHOTS = 6  # solved examples before a control's question


def variable_pairs(
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    count: int,
    seed: Seed,
    *,
    hops: int = HOPS,
    chains: int = 2,
    text_ids: Tensor | None = None,
) -> list[Pair]:
    """Variable tracking: a name is given a value, another name the first one's, and so on; the last name is asked.

    Several such chains are hidden in the text, of which one is asked; the corrupt prompt has another value at that
    chain's start.

    Args:
        tokenizer: as in `needles`.
        length: T, tokens per prompt.
        count: pairs.
        seed: as in `needles`.
        hops: names that stand for another name, in each chain.
        chains: how many there are.
        text_ids: as in `needles`.

    Raises:
        TokenizerError, DataError: as `needles`.

    Example:
        >>> from hydrasurgery.demo.teacher import load_teacher
        >>> pair = variable_pairs(load_teacher()[1], length=48, count=1, seed=0)[0]
        >>> pair.task, len(pair.clean_ids), pair.stated
        ('variables-1@48', 48, True)
    """
    rng = np.random.default_rng(seed)
    text = Text(tokenizer, text_ids)
    pairs = []
    for _ in range(count):
        facts, asked = chained_facts(text, chains, hops, rng)
        pairs.append(pair_of_facts(text, facts, asked, length, rng, f"variables-{hops}"))
    return pairs


def fact_pairs(
    tokenizer: PreTrainedTokenizerBase, length: int, count: int, seed: Seed, *, text_ids: Tensor | None = None
) -> list[Pair]:
    """Parametric recall: "The capital of Italy is", with other countries as examples; the corrupt prompt asks for another's.

    Args:
        tokenizer: as in `needles`.
        length: T, tokens per prompt.
        count: pairs.
        seed: as in `needles`.
        text_ids: as in `needles`.

    Raises:
        TokenizerError: no two countries and their capitals have the same counts of tokens.
        DataError: the examples do not fit into `length`.

    Example:
        >>> from hydrasurgery.demo.teacher import load_teacher
        >>> pair = fact_pairs(load_teacher()[1], length=256, count=1, seed=0)[0]
        >>> pair.task, pair.stated
        ('facts@256', False)
    """
    lines = [("\nThe capital of", f" {country}", " is", f" {capital}") for country, capital in _CAPITALS]
    return _question_pairs(tokenizer, lines, length, count, seed, "facts", text_ids)


def sum_pairs(
    tokenizer: PreTrainedTokenizerBase, length: int, count: int, seed: Seed, *, text_ids: Tensor | None = None
) -> list[Pair]:
    """Arithmetic: "2 + 3 =", with solved sums as examples; the corrupt prompt has another summand.

    Args:
        tokenizer: as in `needles`.
        length: T, tokens per prompt.
        count: pairs.
        seed: as in `needles`.
        text_ids: as in `needles`.

    Raises:
        TokenizerError, DataError: as `fact_pairs`.

    Example:
        >>> from hydrasurgery.demo.teacher import load_teacher
        >>> tokenizer = load_teacher()[1]
        >>> pair = sum_pairs(tokenizer, length=96, count=1, seed=0)[0]
        >>> tokenizer.decode(pair.clean_ids).splitlines()[-1]
        '1 + 5 = '
    """
    lines = [(f"\n{a} +", f" {b}", " =", f" {a + b}") for a in range(1, 9) for b in range(1, 10 - a)]
    return _question_pairs(tokenizer, lines, length, count, seed, "sums", text_ids)


PROBES: dict[str, Callable[..., list[Pair]]] = {
    "needle-1": partial(needle_pairs, num_keys=1),
    "needle-4": partial(needle_pairs, num_keys=4),
    "variables": variable_pairs,
    "facts": fact_pairs,
    "sums": sum_pairs,
}


def make_pairs(
    tokenizer: PreTrainedTokenizerBase, probes: Sequence[str], lengths: Sequence[int], count: int, seed: int
) -> list[Pair]:
    """Pairs of several probes and lengths, an equal share of each; the same arguments give the same pairs.

    Args:
        tokenizer: as in `needles`.
        probes: names in `PROBES`.
        lengths: tokens per prompt.
        count: pairs in all.
        seed: as in `needles`.

    Raises:
        TokenizerError, DataError: as the probes.

    Example:
        >>> from hydrasurgery.demo.teacher import load_teacher
        >>> pairs = make_pairs(load_teacher()[1], ["needle-1", "needle-4"], [48, 64], count=6, seed=0)
        >>> [pair.task for pair in pairs]
        ['needle-1@48', 'needle-1@48', 'needle-4@48', 'needle-4@48', 'needle-1@64', 'needle-4@64']
    """
    kinds = [(tokens, name) for tokens in lengths for name in probes]
    shares = [count // len(kinds) + (number < count % len(kinds)) for number in range(len(kinds))]
    return [
        pair
        for number, ((tokens, name), share) in enumerate(zip(kinds, shares, strict=True))
        for pair in PROBES[name](tokenizer, tokens, share, (seed, number))
    ]


Line = tuple[str, str, str, str]  # stem, the part that a corruption changes, the rest of the question, answer
Coded = tuple[Ids, ...]  # the same in ids


def _question_pairs(
    tokenizer: PreTrainedTokenizerBase,
    lines: Sequence[Line],
    length: int,
    count: int,
    seed: Seed,
    task: str,
    text_ids: Tensor | None,
) -> list[Pair]:
    """Pairs of questions that differ in one part, with solved lines and text before them."""
    rng, text = np.random.default_rng(seed), Text(tokenizer, text_ids)
    coded = [tuple(map(text.encode, line)) for line in lines]
    end, pairs = text.encode("."), []
    for _ in range(count):
        order = rng.permutation(len(lines)).tolist()
        asked, other = _matching(text, coded, order)
        shots = [part for number in order if number not in (asked, other) for part in (*coded[number], end)]
        front = [*chain.from_iterable(shots[: 5 * SHOTS]), *coded[asked][0]]
        rest, answer, distractor = _answers(coded[asked], coded[other])
        part, changed = coded[asked][1], coded[other][1]
        filler = text.fill(length, len(text.prefix + front + part + rest + answer[:-1]), rng, task)
        clean, corrupt = (
            torch.tensor([*text.prefix, *filler, *front, *words, *rest, *answer[:-1]]) for words in (part, changed)
        )
        places, changes = torch.arange(length - len(answer), length), (clean != corrupt).nonzero().flatten()
        ids = torch.tensor(answer), torch.tensor(distractor)
        pairs.append(Pair(clean, corrupt, places, *ids, changes, f"{task}@{length}"))
    return pairs


def _matching(text: Text, coded: Sequence[Coded], order: Sequence[int]) -> tuple[int, int]:
    """The first two lines that can stand for each other: equal stems, equal token counts, answers that differ throughout."""
    for place, one in enumerate(order):
        for other in order[place + 1 :]:
            a, b = coded[one], coded[other]
            if a[0] == b[0] and list(map(len, a)) == list(map(len, b)):
                _, answer, distractor = _answers(a, b)
                if answer and all(x != y for x, y in zip(answer, distractor, strict=True)):
                    return one, other
    raise TokenizerError(
        f"{text.name}: no two of {len(order)} questions have the same token counts and a different answer at every token; "
        "leave this probe out (probes=...)"
    )


def _answers(one: Coded, other: Coded) -> tuple[Ids, Ids, Ids]:
    """The rest of the question and two answers of one token count; first tokens that they share belong to the question."""
    rest, answer, distractor = one[2], one[3], other[3]
    while answer and answer[0] == distractor[0]:
        rest, answer, distractor = [*rest, answer[0]], answer[1:], distractor[1:]
    return rest, answer, distractor


_CAPITALS = [
    tuple(pair.split(":"))
    for pair in """
    France:Paris Italy:Rome Spain:Madrid Germany:Berlin Japan:Tokyo China:Beijing Russia:Moscow England:London
    Egypt:Cairo Greece:Athens Poland:Warsaw Portugal:Lisbon Austria:Vienna Ireland:Dublin Norway:Oslo Sweden:Stockholm
    Denmark:Copenhagen Finland:Helsinki Hungary:Budapest Turkey:Ankara Iran:Tehran Iraq:Baghdad Kenya:Nairobi
    Cuba:Havana Peru:Lima Chile:Santiago Canada:Ottawa Australia:Canberra Thailand:Bangkok Vietnam:Hanoi India:Delhi
    """.split()
]

__all__ = ["PROBES", "fact_pairs", "make_pairs", "sum_pairs", "variable_pairs"]

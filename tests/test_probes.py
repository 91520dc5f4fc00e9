"""Probes: pairs that differ in one place, are made of what they claim, and depend only on their seed."""

from __future__ import annotations

import pytest
import torch

from hydrasurgery.demo.corpus import build_tokenizer
from hydrasurgery.errors import DataError, ProbeError, TokenizerError
from hydrasurgery.evaluation import PROBES, make_pairs
from hydrasurgery.evaluation.probes import fact_pairs, sum_pairs, variable_pairs
from hydrasurgery.selection import score_heads
from tests.families import tiny
from tests.test_tasks import _byte_level, _metaspace

TOKENIZERS = {"byte-level": _byte_level, "metaspace": _metaspace, "symbols": build_tokenizer}
CONTROLS = ("facts", "sums")


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


@pytest.mark.parametrize("name", PROBES)
def test_pairs_are_of_one_length_and_differ_where_they_say(tokenizer, name):
    pairs = PROBES[name](tokenizer, 360, 4, 7)
    again = PROBES[name](tokenizer, 360, 4, 7)
    other = PROBES[name](tokenizer, 360, 4, 8)
    assert [p.clean_ids.tolist() for p in pairs] == [p.clean_ids.tolist() for p in again]
    assert [p.clean_ids.tolist() for p in pairs] != [p.clean_ids.tolist() for p in other]
    for pair in pairs:
        assert pair.clean_ids.shape == pair.corrupt_ids.shape == (360,)
        differ = (pair.clean_ids != pair.corrupt_ids).nonzero().flatten()
        assert torch.equal(differ, pair.value_positions)
        assert len(differ)
        assert differ[-1] < pair.answer_positions[0] + (name in CONTROLS)
        assert (pair.answer_ids != pair.distractor_ids).all()
        assert int(pair.answer_positions[-1]) == 359
        assert torch.equal(pair.clean_ids[pair.answer_positions[1:]], pair.answer_ids[:-1])
        assert pair.stated == (name not in CONTROLS)
        assert pair.task.startswith(name) and pair.task.endswith("@360")


def decoded(tokenizer, pair):
    return [tokenizer.decode(ids) for ids in (pair.clean_ids, pair.corrupt_ids)], [
        tokenizer.decode(ids).strip() for ids in (pair.answer_ids, pair.distractor_ids)
    ]


def test_a_variable_is_followed_to_its_value():
    tokenizer = _byte_level()
    pair = variable_pairs(tokenizer, 400, 1, 0, hops=2)[0]
    texts, answers = decoded(tokenizer, pair)
    for text, answer in zip(texts, answers, strict=True):
        name = text.rsplit("What is the special magic number for ", 1)[1].split("?")[0]
        for _ in range(2):
            before, after = text.split(f"The special magic number for {name} is The special magic number for ")
            name = after.split(".")[0]
            assert f"number for {name} is" in before  # a name is stated after the one it stands for
        assert f"The special magic number for {name} is {answer}." in text
    assert answers[0] not in texts[1]


def test_a_variable_in_symbols_is_a_key_that_stands_for_a_key():
    tokenizer = build_tokenizer()
    pair = variable_pairs(tokenizer, 64, 1, 3)[0]
    words = tokenizer.convert_ids_to_tokens(pair.clean_ids.tolist())
    asked = words[int(pair.answer_positions[0])]
    root = words[words.index(asked) + 1]
    place = words.index(root)
    assert words[place + 1 : place + 3] == tokenizer.convert_ids_to_tokens(pair.answer_ids.tolist())


def test_controls_say_what_is_true():
    tokenizer = _byte_level()
    for pair in sum_pairs(tokenizer, 200, 5, 0):
        for text, answer in zip(*decoded(tokenizer, pair), strict=True):
            a, b = text.rstrip().rsplit("\n", 1)[1].removesuffix("=").split("+")
            assert int(a) + int(b) == int(answer)
    ((clean, corrupt), (answer, distractor)) = decoded(tokenizer, fact_pairs(tokenizer, 400, 1, 0)[0])
    country, other = (text.rsplit("The capital of ", 1)[1].split(" is")[0] for text in (clean, corrupt))
    assert country != other
    assert clean.replace(country, "") == corrupt.replace(other, "")
    assert len(answer) > 1
    assert answer[0] != distractor[0]


def test_what_does_not_fit_or_match_is_refused():
    with pytest.raises(DataError, match="facts"):
        fact_pairs(_byte_level(), 20, 1, 0)
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"<unk>": 0, "the": 1}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(TokenizerError, match="leave this probe out"):
        sum_pairs(PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>"), 100, 1, 0)


def test_probes_share_the_count_and_are_named_in_the_scores():
    tokenizer = build_tokenizer()
    pairs = make_pairs(tokenizer, ("needle-1", "variables"), (64, 96), 6, 0)
    assert [pair.task for pair in pairs] == [
        *["needle-1@64"] * 2,
        *["variables-1@64"] * 2,
        "needle-1@96",
        "variables-1@96",
    ]
    model = tiny("qwen3", vocab_size=len(tokenizer))
    options = {"length": 160, "count": 4, "progress": False}
    with pytest.raises(ProbeError, match="none of 4 pairs"):
        score_heads(model, tokenizer, probes=("sums",), **options)
    with pytest.raises(ProbeError, match="'magic' is not one of"):
        score_heads(model, tokenizer, probes=("magic",), **options)

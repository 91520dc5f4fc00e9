"""Text, tokenizer and task generators: what each promises, for the demo's tokenizer and for others."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.testing import assert_close
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hydrasurgery.demo.corpus import SPECIAL_TOKENS, TEXT_PIECES, build_tokenizer, training_batch
from hydrasurgery.errors import DataError, TokenizerError
from hydrasurgery.evaluation.facts import KEY_TOKENS, VALUE_TOKENS
from hydrasurgery.evaluation.tasks import TaskBatch, dense_recall, needle_pairs, needles, plain_text
from hydrasurgery.evaluation.text import encode_text, library_text, load_text


@pytest.fixture(scope="module")
def symbols():
    return build_tokenizer()


@functools.cache
def _byte_level() -> PreTrainedTokenizerFast:
    """Like GPT-2 and Qwen: no bos, the blank before a number joins or precedes it."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, show_progress=False)
    numbers = " ".join(str(n) for n in range(1000))  # so that numbers have pieces of one to three digits
    core.train_from_iterator([library_text("train")[:100_000], *[numbers] * 20], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core)


@functools.cache
def _metaspace() -> PreTrainedTokenizerFast:
    """Like Llama 2: a bos token, a mark before every word, one token a digit."""
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Digits(True)])
    trainer = trainers.BpeTrainer(vocab_size=800, special_tokens=["<unk>", "<s>"], show_progress=False)
    core.train_from_iterator([library_text("train")[:100_000], "0 1 2 3 4 5 6 7 8 9"], trainer)
    bos = core.token_to_id("<s>")
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", unk_token="<unk>")


@pytest.fixture(scope="module", params=["symbols", "byte-level", "metaspace"])
def tokenizer(request, symbols):
    return {"symbols": lambda: symbols, "byte-level": _byte_level, "metaspace": _metaspace}[request.param]()


def _tensors(value):
    return [v for v in dataclasses.astuple(value) if isinstance(v, torch.Tensor)]


# --- text ---------------------------------------------------------------------------------------------------------


def test_library_text_splits_are_disjoint_and_complete():
    train, held_out, everything = (library_text(s).split("\n\n") for s in ("train", "held-out", "all"))
    words = [{" ".join(p.split()) for p in side} for side in (train, held_out)]
    assert not words[0] & words[1]
    assert sorted(train + held_out) == sorted(everything)
    assert 0.05 < len(held_out) / len(everything) < 0.25
    with pytest.raises(DataError, match="held-out"):
        library_text("test")


@pytest.mark.parametrize("content", [b"", b" \n\t ", b"\xff\xfe\x00bad"])
def test_load_text_refuses_files_without_text(tmp_path, content):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.txt"):
        load_text(path)


def test_load_text_reads_a_file_and_names_a_missing_one(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("a würd\n", encoding="utf-8")
    assert load_text(path) == "a würd\n"
    with pytest.raises(DataError, match=r"none\.txt"):
        load_text(tmp_path / "none.txt")


# --- tokenizer ----------------------------------------------------------------------------------------------------


def test_the_demo_tokenizer_has_its_parts_in_order(symbols, tmp_path):
    assert len(symbols) == TEXT_PIECES + len(KEY_TOKENS) + len(VALUE_TOKENS) + len(SPECIAL_TOKENS)
    ids = symbols.convert_tokens_to_ids([*KEY_TOKENS, *VALUE_TOKENS, *SPECIAL_TOKENS])
    assert ids == list(range(TEXT_PIECES, len(symbols)))
    symbols.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    batch = loaded(["a longer text", "b"], padding=True, return_tensors="pt")
    assert loaded.padding_side == "left"
    assert batch.attention_mask[1, 0] == 0
    assert batch.input_ids[0, 0] == loaded.bos_token_id
    assert loaded.get_vocab() == symbols.get_vocab()


@settings(max_examples=100, deadline=None)
@given(text=st.text())
def test_the_demo_tokenizer_round_trips_any_unicode(symbols, text):
    ids = symbols.encode(text, add_special_tokens=False)
    assert symbols.decode(ids) == text


def test_the_demo_tokenizer_is_the_same_each_time(symbols):
    assert build_tokenizer().get_vocab() == symbols.get_vocab()


# --- every task ---------------------------------------------------------------------------------------------------

TASKS = {
    "needles": lambda tokenizer, seed: needles(tokenizer, 300, 4, seed, num_keys=3, questions=2),
    "text": lambda tokenizer, seed: plain_text(tokenizer, 300, 4, seed),
    "pairs": lambda tokenizer, seed: needle_pairs(tokenizer, 300, 4, seed, num_keys=3),
}


@pytest.mark.parametrize("task", TASKS)
def test_a_seed_decides_everything(tokenizer, task):
    first, again, other = (TASKS[task](tokenizer, seed) for seed in (3, 3, (3, 1)))
    if isinstance(first, TaskBatch):
        first, again, other = [first], [again], [other]
    for a, b in zip(first, again, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(_tensors(a), _tensors(b), strict=True))
    assert not torch.equal(_tensors(first[0])[0], _tensors(other[0])[0])


def test_no_task_touches_the_global_seed(symbols):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    TASKS["needles"](symbols, 1)
    assert_close(torch.rand(3), expected, rtol=0, atol=0)


def _check_labels(batch: TaskBatch) -> None:
    positions = batch.answer_positions.flatten(1)
    labelled = torch.zeros_like(batch.input_ids, dtype=torch.bool).scatter_(1, positions + 1, True)
    assert torch.equal(batch.labels != -100, labelled)
    assert torch.equal(batch.labels[labelled], batch.input_ids[labelled])


def test_needles_label_the_answers_and_nothing_else(tokenizer):
    batch = needles(tokenizer, 300, 5, 0, num_keys=3, questions=2)
    assert batch.input_ids.shape == batch.labels.shape == (5, 300)
    assert batch.answer_positions.shape[:2] == (5, 2)
    _check_labels(batch)
    assert int(batch.answer_positions.max()) == 298  # the sequence ends with the last answer


def test_every_answer_is_stated_before_it_is_asked(tokenizer):
    batch = needles(tokenizer, 400, 5, 0, num_keys=3, questions=3)
    for ids, questions in zip(batch.input_ids.tolist(), batch.answer_positions.tolist(), strict=True):
        for places in questions:
            answer = [ids[p + 1] for p in places]
            found = [i for i in range(places[0] + 1) if ids[i : i + len(answer)] == answer]
            assert found, "the answer is nowhere in the text"


def test_dense_recall_has_unique_keys_and_true_answers(symbols):
    batch = dense_recall(symbols, 512, 3, 0)
    _check_labels(batch)
    first_key, first_value = symbols.convert_tokens_to_ids([KEY_TOKENS[0], VALUE_TOKENS[0]])
    for ids, questions in zip(batch.input_ids.tolist(), batch.answer_positions.tolist(), strict=True):
        start = questions[0][0]  # the first question's key
        stated = {ids[i]: ids[i + 1 : i + 3] for i in range(start) if first_key <= ids[i] < first_value}
        assert len(stated) == sum(first_key <= token < first_value for token in ids[:start])  # no key twice
        assert len(stated) > 100
        asked = [ids[p[0]] for p in questions]
        assert len(set(asked)) == len(asked)
        assert all(ids[p[0] + 1 : p[0] + 3] == stated[ids[p[0]]] for p in questions)


def test_dense_recall_longer_than_its_keys_is_filled_with_text(symbols):
    batch = dense_recall(symbols, 1024, 2, 0)
    assert (batch.input_ids < TEXT_PIECES).sum() > 500
    assert batch.answer_positions.shape[1] == len(KEY_TOKENS) // 3


def test_dense_recall_asks_again_in_rounds(symbols):
    batch = dense_recall(symbols, 64, 2, 0, num_pairs=5, questions=12)
    keys = batch.input_ids.gather(1, batch.answer_positions[:, :, 0])
    for row in keys.tolist():
        assert set(row[:5]) == set(row[5:10])
        assert len(set(row[:5])) == 5
    _check_labels(batch)


def test_plain_text_is_one_window_of_the_given_text(symbols):
    text = torch.arange(100) + 10
    batch = plain_text(symbols, 20, 8, 0, text_ids=text)
    assert (batch.input_ids[:, 0] == symbols.bos_token_id).all()
    steps = batch.input_ids[:, 2:] - batch.input_ids[:, 1:-1]
    assert ((steps == 1) | (steps == -99)).all()
    assert torch.equal(batch.labels[:, 1:], batch.input_ids[:, 1:])
    assert (batch.labels[:, 0] == -100).all()


def test_needles_hide_at_every_depth(symbols):
    batch = needles(symbols, 256, 100, 0, num_keys=1)
    answers = batch.labels[:, -2]
    depths = (batch.input_ids[:, :250] == answers[:, None]).float().argmax(1)
    assert depths.min() < 40
    assert depths.max() > 210


# --- pairs --------------------------------------------------------------------------------------------------------


def test_pairs_differ_in_the_stated_value_and_nowhere_else(tokenizer):
    for pair in needle_pairs(tokenizer, 300, 6, 0, num_keys=3):
        assert pair.clean_ids.shape == pair.corrupt_ids.shape == (300,)
        differ = (pair.clean_ids != pair.corrupt_ids).nonzero().flatten()
        assert torch.equal(differ, pair.value_positions)
        assert torch.equal(pair.clean_ids[differ], pair.answer_ids)
        assert torch.equal(pair.corrupt_ids[differ], pair.distractor_ids)
        assert int(pair.answer_positions[-1]) == 299  # the last position predicts the last token
        assert torch.equal(pair.clean_ids[pair.answer_positions[1:]], pair.answer_ids[:-1])
        assert differ[-1] < pair.answer_positions[0]


def test_a_pair_is_decoded_into_what_it_claims():
    tokenizer = _byte_level()
    pair = needle_pairs(tokenizer, 200, 1, 0, num_keys=2)[0]
    clean, corrupt = (tokenizer.decode(ids) for ids in (pair.clean_ids, pair.corrupt_ids))
    answer, distractor = (tokenizer.decode(ids).strip() for ids in (pair.answer_ids, pair.distractor_ids))
    word = clean.rsplit("number for ", 1)[1].split(" ")[0]
    assert f"The special magic number for {word} is {answer}." in clean
    assert f"The special magic number for {word} is {distractor}." in corrupt
    assert distractor not in clean
    assert len(answer) == len(distractor) == 5


def test_distractors_are_values_of_no_other_key(symbols):
    for pair in needle_pairs(symbols, 512, 20, 0, num_keys=32):
        ids = pair.clean_ids.tolist()
        assert pair.distractor_ids.tolist() not in [ids[i : i + 2] for i in range(len(ids))]


# --- errors -------------------------------------------------------------------------------------------------------


def test_a_missing_token_is_named(symbols):
    core = Tokenizer.from_str(symbols.backend_tokenizer.to_str())
    spec = core.to_str().replace("<value_07>", "<other>")
    broken = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(spec))
    for make in (needles, needle_pairs, dense_recall):
        with pytest.raises(TokenizerError, match="<value_07>"):
            make(broken, 128, 1, 0)


def test_dense_recall_needs_the_demo_tokens():
    with pytest.raises(TokenizerError, match="<key_000>"):
        dense_recall(_byte_level(), 128, 1, 0)


def test_a_tokenizer_without_digits_is_refused():
    core = Tokenizer(models.WordLevel({"<unk>": 0, "the": 1}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(TokenizerError, match="five-digit"):
        needles(PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>"), 128, 1, 0)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (needles, {"num_keys": 200}),
        (needles, {"num_keys": 40}),
        (needles, {"questions": 0}),
        (needles, {"questions": 5}),
        (needle_pairs, {"num_keys": 40}),
        (dense_recall, {"num_pairs": 40}),
        (dense_recall, {"questions": 40}),
        (needles, {"text_ids": torch.zeros(0, dtype=torch.long)}),
        (needles, {"text_ids": torch.zeros(2, 9, dtype=torch.long)}),
    ],
)
def test_what_does_not_fit_is_refused(symbols, make, options):
    with pytest.raises(DataError):
        make(symbols, 64, 1, 0, **options)


def test_text_that_is_no_token_is_refused(symbols):
    with pytest.raises(DataError):
        encode_text(symbols, "")


# --- training mixture ---------------------------------------------------------------------------------------------


def test_training_batches_fill_the_step_and_repeat_by_seed(symbols):
    text = encode_text(symbols, library_text("train"))
    for length in (16, 32, 64, 128, 256, 512, 1024):
        input_ids, labels = training_batch(symbols, text, length, 2048, (0, length))
        assert input_ids.shape == labels.shape == (2048 // length, length)
        answers = labels != -100
        assert torch.equal(labels[answers], input_ids[answers])
        assert (labels[answers] >= TEXT_PIECES).all()
        again, _ = training_batch(symbols, text, length, 2048, (0, length))
        assert torch.equal(input_ids, again)

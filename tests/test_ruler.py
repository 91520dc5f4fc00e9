"""RULER's tasks: a reader of the prompt alone finds every answer, no prompt is too long, and the command measures models."""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch

from hydrasurgery.demo import corpus
from hydrasurgery.errors import DataError, SequenceLengthError, TokenizerError
from hydrasurgery.evaluation import RULER, evaluate_ruler, ruler_answers, ruler_samples, ruler_score
from hydrasurgery.evaluation.ruler_scores import scaled_limit
from tests.families import tiny
from tests.test_cli import fail, run, succeed
from tests.test_tasks import _byte_level, _metaspace

build_tokenizer = functools.cache(corpus.build_tokenizer)
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


@pytest.fixture(scope="module", params=["symbols", "byte-level", "metaspace"])
def tokenizer(request):
    return {"symbols": build_tokenizer, "byte-level": _byte_level, "metaspace": _metaspace}[request.param]()


def read(task: str, prompt: str) -> str:
    """An answer found by reading the prompt, nothing else."""
    if task.startswith("niah"):
        body, _, question = prompt.rpartition("\n\n")
        stated = re.findall(r"The secret (?:number|UUID) of (\S+) is (\S+)\.", body)
        assert stated
        return " ".join(value for key, value in stated if key in question)
    body = prompt.rpartition("Question: ")[0].rpartition("Answer: ")[2]  # behind the solved example, if there is one
    if task == "vt":
        (wanted,) = re.findall(r"Question: which variables have the value (\d+)", prompt)[-1:]
        values: dict[str, str] = {}
        for name, value in re.findall(r"^VAR (\w+) = (?:VAR )?(\w+)$", body, re.MULTILINE):
            values[name] = values.get(value, value)
        return " ".join(name for name, value in values.items() if value == wanted)
    if task == "cwe":
        return " ".join(word for word, _ in Counter(re.findall(r"\d+\. (\w+)", body)).most_common(10))
    text = body.split("\n\n")[-2]
    counts = Counter(word for word in text.split() if word != "...").most_common(4)
    assert counts[2][1] > counts[3][1]
    return " ".join(word for word, _ in counts[:3])


@pytest.mark.parametrize("task", RULER)
@pytest.mark.parametrize("length", [1400, 4400])
def test_a_reader_finds_every_answer_and_the_length_is_filled_and_kept(tokenizer, task, length):
    for sample in ruler_samples(tokenizer, task, length, 1, seed=3):
        assert ruler_score(read(task, sample.prompt), sample.references) == 1.0
        assert ruler_score("", sample.references) == 0.0
        assert sample.input_ids.tolist() == tokenizer.encode(sample.prompt)
        used = len(sample.input_ids) + sample.new_tokens
        assert length - 160 < used <= length
        assert len(set(sample.references)) == len(sample.references)


@pytest.mark.parametrize("task", RULER)
def test_a_seed_decides_everything(task):
    tokenizer = build_tokenizer()
    first, again, other = (ruler_samples(tokenizer, task, 1000, 2, seed) for seed in (1, 1, 2))
    assert [s.prompt for s in first] == [s.prompt for s in again]
    assert len({s.prompt for s in (*first, *other)}) == len({s.references for s in (*first, *other)}) == 4


def test_the_tasks_have_the_papers_counts():
    count = {task: len(ruler_samples(build_tokenizer(), task, 6000, 1, 0)[0].references) for task in RULER}
    assert [n for task, n in count.items() if n > 1] == [4, 4, 5, 10, 3]
    (words,) = ruler_samples(_byte_level(), "cwe", 6000, 1, 0)
    listed = Counter(re.findall(r"\d+\. (\w+)", words.prompt.rpartition("Answer: ")[0].rpartition("Answer: ")[2]))
    assert {listed[word] for word in words.references} == {30}
    assert {n for word, n in listed.items() if word not in words.references} == {3}


def test_needles_stand_in_the_users_text_after_sentences():
    text = "One two three. Four five six seven! " * 50
    (sample,) = ruler_samples(build_tokenizer(), "niah_multivalue", 900, 1, 0, text=text)
    for before in re.findall(r"(\S+) The secret", sample.prompt):
        assert before[-1] in ".!"
    assert "Four five six seven!" in sample.prompt
    with pytest.raises(DataError, match="holds no word"):
        ruler_samples(build_tokenizer(), "vt", 900, 1, 0, text=" ")


def test_what_does_not_fit_and_what_is_no_task_is_refused():
    with pytest.raises(DataError, match=r"cwe: the shortest prompt .* the length is 300"):
        ruler_samples(build_tokenizer(), "cwe", 300, 1, 0)
    with pytest.raises(DataError, match="no task 'qa_1'; choose from niah_single_1"):
        ruler_samples(build_tokenizer(), "qa_1", 300, 1, 0)


def test_a_chat_template_holds_the_question_and_the_answer_begins_after_it():
    tokenizer = corpus.build_tokenizer()
    with pytest.raises(TokenizerError, match="no chat template"):
        ruler_samples(tokenizer, "vt", 900, 1, 0, chat=True)
    tokenizer.chat_template = CHAT
    (sample,) = ruler_samples(tokenizer, "vt", 900, 1, 0, chat=True)
    assert sample.prompt.startswith("<user>Among")
    assert "<assistant>Answer: the 5" in sample.prompt
    assert len(sample.input_ids) + sample.new_tokens <= 900


def test_the_score_is_the_share_of_references_found():
    assert ruler_score("it is abc, DEF", ["ABC", "def", "ghi", "jkl"]) == 0.5


def test_batches_are_padded_without_a_trace():
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    model = tiny("qwen3", vocab_size=720).train()
    config = model.generation_config
    samples = [replace(sample, new_tokens=6) for sample in ruler_samples(tokenizer, "fwe", 450, 3, 0)]
    assert len({len(sample.input_ids) for sample in samples}) > 1
    together, alone = (ruler_answers(model, tokenizer, samples, batch_size=size) for size in (3, 1))
    assert together == alone
    assert model.training and model.generation_config is config


def test_scaled_positions_reach_further():
    model = tiny("qwen3", vocab_size=720, max_position_embeddings=512)
    with pytest.raises(SequenceLengthError, match=r"600 tokens, the model's position limit is 512"):
        evaluate_ruler({"model": model}, build_tokenizer(), (600,), count=1, progress=False)
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256, "rope_theta": 10000.0}
    for rope, limit in ((yarn, 1024), ({**yarn, "factor": 1.5}, 512), ({**yarn, "rope_type": "dynamic"}, None)):
        model.config.rope_parameters = rope
        assert scaled_limit(model) == limit


def test_nothing_to_measure_is_refused():
    with pytest.raises(DataError, match="nothing to measure"):
        evaluate_ruler({}, build_tokenizer())


def test_the_command_measures_model_and_teacher(tmp_path):
    tokenizer = build_tokenizer()
    tiny("qwen3", vocab_size=720, max_position_embeddings=2048).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("A statement is run when it is reached. " * 40, encoding="utf-8")
    common = ("eval", tmp_path / "model", "--out", tmp_path / "out.json")
    ruler = (*common, "--suite", "ruler", "--count", 2, "--lengths", "640")
    table = succeed(*ruler, "--teacher", tmp_path / "model", "--tasks", "vt", "--text", tmp_path / "text.txt")
    assert re.search(r"vt +│ +640 │ +2 │ 0\.000 │ +0\.000", table)
    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert (found["suite"], found["tasks"], found["count"]) == ("ruler", ["vt"], 2)
    assert found["results"]["model"] == found["results"]["teacher"]
    assert found["results"]["model"].keys() == {"vt"}
    assert "position limit is 2048" in fail(*common, "--suite", "ruler")
    assert "no chat template" in fail(*ruler, "--chat")
    assert "cwe: the shortest prompt" in fail(*ruler)
    for options in (("--tasks", "vt"), ("--suite", "x"), ("--suite", "ruler", "--tasks", "qa"), ("--batch-size", 2)):
        assert run(*common, *options).exit_code == 2

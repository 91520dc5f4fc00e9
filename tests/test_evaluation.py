"""Metrics on models whose every answer is known, and the shipped teacher."""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen3Config, Qwen3ForCausalLM

from hydrasurgery.decoders import evaluating
from hydrasurgery.demo.corpus import build_tokenizer
from hydrasurgery.demo.teacher import (
    SHIPPED,
    Phase,
    Recipe,
    build_teacher,
    load_teacher,
    round_to_half,
    save_teacher,
    train,
)
from hydrasurgery.errors import DataError, DivergedError, SequenceLengthError
from hydrasurgery.evaluation.metrics import evaluate, kl_to_teacher, perplexity, recall
from hydrasurgery.evaluation.tasks import dense_recall, needles, plain_text
from hydrasurgery.evaluation.text import encode_text, library_text


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


class Recaller(nn.Module):
    """Predicts what followed the last two tokens (else the last one) when they stood together before.

    `wrong` is the count of tokens, 1 or 2, whose look-up goes astray.
    """

    def __init__(self, vocabulary: int, wrong: int | None = None) -> None:
        super().__init__()
        self.vocabulary, self.wrong, self.dropout = vocabulary, wrong, nn.Dropout()
        self.calls: list[tuple[int, ...]] = []

    def forward(self, input_ids: Tensor, logits_to_keep: Tensor | None = None) -> SimpleNamespace:
        assert not self.training
        places = range(input_ids.shape[1]) if logits_to_keep is None else logits_to_keep.tolist()
        guesses = torch.tensor([[self._guess(row, p) for p in places] for row in input_ids.tolist()])
        self.calls.append((*guesses.shape, self.vocabulary))
        return SimpleNamespace(logits=F.one_hot(guesses, self.vocabulary).float() * 9)

    def _guess(self, row: list[int], place: int) -> int:
        for width in (2, 1):
            for i in range(place - 1, width - 2, -1):
                if row[i - width + 1 : i + 1] == row[place - width + 1 : place + 1]:
                    return (row[i + 1] + (self.wrong == width)) % self.vocabulary
        return 0


class Table(nn.Module):
    """Logits that depend on the current token only."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.table = nn.Embedding.from_pretrained(logits)

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table(input_ids))


def _tiny(limit: int = 128) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=707,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=limit,
    )
    return Qwen3ForCausalLM(config)


# --- recall -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [needles, dense_recall])
def test_recall_is_one_for_a_model_that_looks_back_and_zero_if_either_token_is_wrong(tokenizer, make):
    batch = make(tokenizer, 96, 4, 0, questions=2)
    vocabulary = len(tokenizer)
    assert recall(Recaller(vocabulary), batch) == 1.0
    assert recall(Recaller(vocabulary, wrong=1), batch) == 0.0  # the value's first token
    assert recall(Recaller(vocabulary, wrong=2), batch) == 0.0  # its second


def test_recall_counts_questions(tokenizer):
    batch = needles(tokenizer, 96, 4, 0, questions=2)
    batch.input_ids[0, batch.answer_positions[0, 1, 1] + 1] = 3  # the truth of one question of eight is now another
    assert recall(Recaller(len(tokenizer)), batch) == 7 / 8


def test_recall_holds_its_memory_bound_and_the_result(tokenizer):
    batch = needles(tokenizer, 96, 5, 0, questions=2)
    model = Recaller(len(tokenizer))
    bound = 3 * 4 * len(tokenizer)
    assert recall(model, batch, memory_bytes=bound) == 1.0
    assert all(4 * math.prod(shape) <= bound for shape in model.calls)
    assert len(model.calls) > 5


def test_recall_refuses_a_batch_without_questions(tokenizer):
    with pytest.raises(DataError, match="text"):
        recall(Recaller(len(tokenizer)), plain_text(tokenizer, 32, 1, 0))


# --- perplexity and divergence ------------------------------------------------------------------------------------


def test_perplexity_of_a_uniform_model_is_its_vocabulary():
    model = Table(torch.zeros(50, 50))
    assert perplexity(model, torch.arange(50)) == pytest.approx(50)
    assert perplexity(model, torch.arange(50).view(5, 10), memory_bytes=1) == pytest.approx(50)


def test_perplexity_equals_the_loss_that_transformers_gives(tokenizer):
    model, ids = _tiny(), plain_text(tokenizer, 64, 6, 0).input_ids
    expected = model(input_ids=ids, labels=ids).loss.exp().item()
    for memory in (2**30, 4 * 707 * 10):
        assert perplexity(model, ids, memory_bytes=memory) == pytest.approx(expected, rel=1e-5)


def test_perplexity_cuts_a_long_row_into_windows():
    model = Table(torch.randn(50, 50))
    ids = torch.randint(50, (105,))
    assert perplexity(model, ids, window=10) == pytest.approx(perplexity(model, ids[:100].view(10, 10)))
    assert perplexity(model, ids[:7], window=10) == pytest.approx(perplexity(model, ids[None, :7]))
    for empty in (ids[:0], ids[:1], ids.view(1, 3, 35)):
        with pytest.raises(DataError):
            perplexity(model, empty)


def test_divergence_is_zero_to_itself_and_known_to_a_uniform_student():
    table = torch.randn(50, 50)
    teacher, ids = Table(table), torch.randint(50, (4, 20))
    assert kl_to_teacher(teacher, teacher, ids) == 0.0
    log_p = table.log_softmax(-1)[ids]
    expected = (log_p.exp() * log_p).sum(-1).mean() + math.log(50)
    assert kl_to_teacher(Table(torch.zeros(50, 50)), teacher, ids) == pytest.approx(expected.item(), rel=1e-5)
    shifted = Table(table + 3)  # logits are defined up to a constant
    assert kl_to_teacher(shifted, teacher, ids) == pytest.approx(0, abs=1e-6)


def test_divergence_is_not_symmetric_and_takes_the_teacher_as_truth():
    sharp, flat = Table(torch.eye(2) * 20), Table(torch.zeros(2, 2))
    ids = torch.tensor([[0, 1]])
    assert kl_to_teacher(flat, sharp, ids) == pytest.approx(math.log(2), rel=1e-4)
    assert kl_to_teacher(sharp, flat, ids) > 5


# --- modes, limits, the whole ------------------------------------------------------------------------------------


def test_modes_are_put_back_module_by_module(tokenizer):
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), nn.Linear(2, 2)))
    model.train()
    model[1].eval()
    with contextlib.suppress(KeyError), evaluating(model):
        assert not any(m.training for m in model.modules())
        raise KeyError
    assert [m.training for m in model.modules()] == [True, True, False, False, False]
    recaller = Recaller(len(tokenizer)).train()
    recall(recaller, needles(tokenizer, 64, 1, 0))
    assert recaller.training
    assert recaller.dropout.training


def test_metrics_record_no_gradient():
    model = _tiny()
    assert isinstance(perplexity(model, torch.arange(64)), float)
    assert all(p.grad is None for p in model.parameters())


def test_a_sequence_over_the_position_limit_names_both_numbers(tokenizer):
    model, ids = _tiny(limit=128), torch.zeros(1, 129, dtype=torch.long)
    for call in (
        lambda: perplexity(model, ids),
        lambda: kl_to_teacher(model, model, ids),
        lambda: recall(model, needles(tokenizer, 129, 1, 0)),
        lambda: evaluate(model, tokenizer, lengths=(64, 129), count=1, progress=False),
    ):
        with pytest.raises(SequenceLengthError, match=r"129.*128"):
            call()


def test_evaluate_reports_every_task_at_every_length(tokenizer, capsys):
    model = _tiny()
    results = evaluate(model, tokenizer, lengths=(64, 96), count=2, teacher=model)
    assert set(results) == {"needles", "dense", "perplexity", "kl", "chance"}
    for name in ("needles", "dense", "perplexity", "kl"):
        assert set(results[name]) == {"64", "96"}
    assert results["kl"] == {"64": 0.0, "96": 0.0}
    assert results["chance"]["needles"] == 64**-2
    assert json.loads(json.dumps(results)) == results
    assert capsys.readouterr().out == ""  # progress goes to standard error
    assert "kl" not in evaluate(model, tokenizer, lengths=(64,), count=2, progress=False)


# --- the teacher --------------------------------------------------------------------------------------------------

SMALL = Recipe(
    layers=1, hidden=32, heads=2, kv_heads=1, feed_forward=32, steps=4, tokens=256, curriculum=(Phase(64, 1.0),)
)


def test_training_repeats_by_seed_and_survives_saving(tokenizer, tmp_path):
    first, reached = train(SMALL, tokenizer, tmp_path / "a.jsonl")
    again, _ = train(SMALL, tokenizer, tmp_path / "b.jsonl")
    untrained = build_teacher(SMALL, tokenizer)
    for a, b, c in zip(first.parameters(), again.parameters(), untrained.parameters(), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
    assert reached["steps"] == 4
    round_to_half(first)
    save_teacher(first, tokenizer, tmp_path / "teacher", {"seed": 0})
    loaded, its_tokenizer = load_teacher(tmp_path / "teacher")
    assert its_tokenizer.get_vocab() == tokenizer.get_vocab()
    ids = torch.arange(64)[None]
    assert torch.equal(loaded(input_ids=ids).logits, first(input_ids=ids).logits)


def test_training_stops_on_a_loss_that_is_not_finite(tokenizer, tmp_path):
    with pytest.raises(DivergedError, match="step"):
        train(replace(SMALL, embedding_rate=float("inf")), tokenizer, tmp_path / "a.jsonl")


def test_the_recipe_grows_its_length_and_lets_its_rate_fall():
    recipe = Recipe(steps=100, curriculum=(Phase(32, 0.5, 0.6), Phase(64, 1.0)))
    assert recipe.advances(phase=0, steps=20, step=20, answer_loss=0.5)  # learned
    assert not recipe.advances(phase=0, steps=19, step=19, answer_loss=0.5)  # too few steps to say
    assert not recipe.advances(phase=0, steps=49, step=49, answer_loss=3.0)
    assert recipe.advances(phase=0, steps=50, step=50, answer_loss=3.0)  # no time left
    assert not recipe.advances(phase=1, steps=50, step=100, answer_loss=0.0)  # the last length
    rates = [recipe.rate(s) for s in range(100)]
    assert max(rates) == 1.0
    assert 0 < rates[-1] < 0.1


@pytest.fixture(scope="module")
def shipped():
    return load_teacher()


def test_the_shipped_teacher_recalls(shipped):
    model, tokenizer = shipped
    assert recall(model, needles(tokenizer, 256, 32, 5)) >= 0.95
    assert recall(model, dense_recall(tokenizer, 256, 8, 5)) >= 0.95


def test_the_shipped_teacher_is_small_and_says_where_it_comes_from(shipped):
    model, tokenizer = shipped
    files = {file.name: file.stat().st_size for file in SHIPPED.iterdir()}
    assert set(files) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "training.json",
    }
    assert sum(files.values()) < 4 * 2**20
    training = json.loads((SHIPPED / "training.json").read_text())
    assert training["parameters"] == sum(p.numel() for p in model.parameters())
    assert model.config.max_position_embeddings >= 2 * training["training_length"]
    assert tokenizer.padding_side == "left"


def test_the_shipped_teacher_reads_held_out_text(shipped):
    model, tokenizer = shipped
    ids = encode_text(tokenizer, library_text("held-out"))[: 8 * 512]
    assert perplexity(model, ids) < len(tokenizer) / 10

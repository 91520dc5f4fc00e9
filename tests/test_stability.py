"""How far a ranking of heads depends on what it was measured on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from hydrasurgery.cli import app
from hydrasurgery.demo import teacher
from hydrasurgery.errors import DataError
from hydrasurgery.selection import HeadScores
from hydrasurgery.selection.scores import LayerScores

LAYERS, HEADS = 4, 8
FOLDER = Path(teacher.__file__).with_suffix("")


def made(
    noise: float, pairs: int = 12, seed: int = 0, lengths: tuple[int, ...] = (48,), flip: bool = False
) -> HeadScores:
    """Scores of heads that matter more and more, each pair's off by `noise`; `flip`: the other way round at the last length."""
    generator = np.random.default_rng(seed)
    truth = np.linspace(0, 1, LAYERS * HEADS)
    asked = [lengths[pair % len(lengths)] for pair in range(pairs)]
    rows = [truth[::-1] if flip and length == lengths[-1] else truth for length in asked]
    samples = np.array(rows) + noise * generator.standard_normal((pairs, len(truth)))
    layers = []
    for number in range(LAYERS):
        own = samples[:, number * HEADS : (number + 1) * HEADS]
        place = (f"layers.{number}", HEADS, 16, 16, None)
        layers.append(LayerScores(*place, tuple(own.mean(0)), tuple(own.std(0)), None, tuple(map(tuple, own.tolist()))))
    tasks = tuple(f"needle-1@{length}" for length in asked)
    return HeadScores(tuple(layers), "activation-patching", seed=seed, length=lengths, pairs=pairs, tasks=tasks)


def test_pairs_that_agree_rank_alike():
    rows = made(0.0).stability().rows
    assert [row.what for row in rows] == [f"{n} pairs / {n} others" for n in (1, 2, 4, 6)]
    assert all(row.spearman == pytest.approx((1, 0)) and row.jaccard == pytest.approx((1, 0)) for row in rows)


def test_more_pairs_agree_better_and_draws_are_the_same_each_time():
    scores = made(0.5)
    found = scores.stability()
    ranks = [row.spearman[0] for row in found.rows]
    assert ranks == sorted(ranks) and ranks[0] < 0.6 < ranks[-1] < 1
    assert found == scores.stability()
    assert "rank correlation" in str(found) and str(found).count("\n") == len(found.rows)


def test_lengths_and_seeds_are_compared_where_there_are_several():
    scores = made(0.01, lengths=(48, 96, 1024), flip=True)
    rows = {row.what: row for row in scores.stability(made(0.01, seed=1), made(0.01, seed=2)).rows}
    assert rows["48 / 96 tokens"].spearman[0] > 0.95 and rows["48 / 1,024 tokens"].spearman[0] < -0.95
    assert rows["48 / 1,024 tokens"].jaccard[0] == 0
    assert rows["3 seeds, each two"].compared == 3
    assert not any("seeds" in row.what for row in scores.stability().rows)


@pytest.mark.parametrize(
    ("change", "others", "said"),
    [
        (
            {"layers": tuple(replace(layer, samples=()) for layer in made(0.1).layers)},
            (),
            "keeps no score of each pair",
        ),
        ({}, (replace(made(0.1), method="echo"),), "not those of the same heads and method"),
        ({}, (replace(made(0.1), layers=made(0.1).layers[:2]),), "not those of the same heads and method"),
    ],
    ids=["samples", "method", "heads"],
)
def test_what_cannot_be_told_is_said(change, others, said):
    with pytest.raises(DataError, match=said):
        replace(made(0.1), **change).stability(*others)
    with pytest.raises(DataError, match="is no share of the heads"):
        made(0.1).stability(share=1.0)


def test_one_pair_has_nothing_to_agree_with():
    assert made(0.1, pairs=1).stability().rows == ()


def test_the_command_prints_it(tmp_path):
    command = ["score", str(FOLDER), "--out", str(tmp_path / "s.json"), "--length", "48", "--count", "4", "--stability"]
    found = CliRunner().invoke(app, command)
    assert found.exit_code == 0, found.output
    assert "2 pairs / 2 others" in found.output and (tmp_path / "s.json").is_file()

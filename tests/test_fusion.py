"""Fusion of capabilities and confidence, against the formula written out and against what resampling must give."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hydrasurgery.errors import ProbeError
from hydrasurgery.selection.fusion import confidence, fuse_scores, split_half
from hydrasurgery.selection.scores import HeadScores, LayerScores


def scores(samples, tasks, method="activation-patching"):
    """HeadScores of two layers of half the heads each; samples [P][heads]."""
    rows = np.array(samples, dtype=float)
    layers = []
    for number, part in enumerate(np.split(rows, 2, axis=1)):
        mean, spread = tuple(part.mean(0)), tuple(part.std(0))
        layers.append(LayerScores(f"l{number}", 1, 8, 8, None, mean, spread, None, tuple(map(tuple, part))))
    return HeadScores(tuple(layers), method, pairs=len(rows), tasks=tuple(tasks))


def flat(fused):
    return np.concatenate([layer.importance for layer in fused.layers])


def test_the_formula_on_a_small_table():
    receiver = scores([[0.5, 0.0, 0.2, 0.0], [0.3, 0.0, 0.0, 0.0]], ["a", "b"])
    sender = scores([[0.0, 0.4, 0.0, 0.0], [0.0, 0.6, 0.0, 0.0]], ["a", "b"], "sender-patching")
    other = scores([[0.0, 0.0, 0.0, 0.8]], ["c"])
    # max: .4 .5 .1 0; kappa: 1 1 .5 0 -> .4 .5 .05 0; min-max: .8 1 .1 0
    fused = fuse_scores({"retrieval": [receiver, sender], "sums": other}, draws=0)
    np.testing.assert_allclose(flat(fused), [0.4, 0.5, 0.05, 0.5])
    heavy = fuse_scores({"retrieval": [receiver, sender], "sums": other}, weights={"sums": 3}, draws=0)
    np.testing.assert_allclose(flat(heavy), [0.2, 0.25, 0.025, 0.75])
    most = fuse_scores({"retrieval": [receiver, sender], "sums": other}, how="max", draws=0)
    np.testing.assert_allclose(flat(most), [0.8, 1.0, 0.1, 1.0])
    assert fused.method == "mean of retrieval (activation-patching|sender-patching), sums (activation-patching)"
    assert (fused.pairs, fused.tasks) == (3, ("a", "b", "c"))


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 6), st.integers(0, 1000), st.sampled_from(["mean", "max"]))
def test_scores_are_between_none_and_whole_and_depend_on_the_seed_alone(pairs, seed, how):
    rows = np.random.default_rng(seed).normal(size=(pairs, 6))
    one, two = (fuse_scores({"a": scores(rows, ["t"] * pairs)}, how=how, draws=5, seed=seed) for _ in range(2))
    assert one == two
    assert flat(one).min() >= 0
    assert flat(one).max() <= 1
    assert HeadScores.from_json(one.to_json()) == one


def test_the_spread_is_that_of_the_pairs():
    steady = scores([[1.0, 0.5, 0.0, 0.2]] * 8, ["t"] * 8)
    assert max(max(layer.spread) for layer in fuse_scores({"a": steady}).layers) < 1e-9
    rows = [[1.0, 0.0 if i % 2 else 0.8, 0.0, 0.2] for i in range(8)]
    fused = fuse_scores({"a": scores(rows, ["t"] * 8)}, draws=400)
    # Head 1 is a mean of 8 draws of 0 or 0.8: its standard deviation is 0.4 / sqrt(8).
    assert fused.layers[0].spread[1] == pytest.approx(0.4 / 8**0.5, rel=0.15)
    assert fused.layers[0].spread[0] < 1e-9


def test_resampling_stays_within_a_sub_probe():
    rows = [[1.0, 0.0, 0.0, 0.0]] * 3 + [[0.0, 1.0, 0.0, 0.0]] * 3
    fused = fuse_scores({"a": scores(rows, ["t"] * 3 + ["u"] * 3)})
    assert max(max(layer.spread) for layer in fused.layers) < 1e-9


def test_confidence_counts_how_often_a_head_is_chosen():
    rows = [[1.0, 0.6 if i % 2 else 0.0, 0.3, 0.0] for i in range(6)]
    sure = confidence(scores(rows, ["t"] * 6), 2, draws=300)
    assert sure[0][0] == 1
    assert sure[1][1] == 0
    assert 0.3 < sure[0][1] < 0.8
    assert sure[0][1] + sure[1][0] == pytest.approx(1)
    assert confidence(scores(rows, ["t"] * 6), 2, draws=300) == sure


def test_halves_agree_on_a_signal_and_not_on_noise():
    rng = np.random.default_rng(0)
    signal = np.tile(rng.normal(size=20), (8, 1))
    assert split_half(scores(signal + 0.01 * rng.normal(size=signal.shape), ["t"] * 8)) > 0.99
    assert abs(split_half(scores(rng.normal(size=signal.shape), ["t"] * 8))) < 0.4
    with pytest.raises(ProbeError, match="two pairs"):
        split_half(scores(signal[:1], ["t"]))


def test_what_cannot_be_fused_is_refused():
    one = scores([[0.1, 0.2, 0.3, 0.4]], ["t"])
    bare = HeadScores(tuple(LayerScores("l", 1, 8, 8, None, (0.1,), (0.0,)) for _ in range(2)), "reconstruction")
    for capabilities, options, said in (
        ({}, {}, "at least one"),
        ({"a": []}, {}, "at least one"),
        ({"a": one}, {"how": "median"}, "median"),
        ({"a": one}, {"weights": {"b": 1}}, "weights names 'b'"),
        ({"a": one}, {"weights": {"a": 0}}, "above 0"),
        ({"a": bare}, {}, "no samples"),
        ({"a": one, "b": bare}, {}, "another model"),
        ({"a": [one, scores([[0.1, 0.2, 0.3, 0.4]], ["u"])]}, {}, "same pairs"),
    ):
        with pytest.raises(ProbeError, match=said):
            fuse_scores(capabilities, **options)

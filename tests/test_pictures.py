"""Pictures, the ablation curve that is the control of scores, and their commands."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hydrasurgery.choose import plan_heads
from hydrasurgery.errors import DataError, ProbeError
from hydrasurgery.selection import ablation_curve, score_heads
from hydrasurgery.selection.plots import coverage, draw_plan
from hydrasurgery.selection.scores import PICTURES
from tests.planted import Planted, planted_pairs


@pytest.fixture(scope="module")
def planted():
    model = Planted(0)
    pairs = planted_pairs(model)
    return model, pairs, score_heads(model, pairs=pairs, method="mean-ablation", progress=False)


@pytest.mark.parametrize("kind", PICTURES)
def test_every_kind_is_one_png(planted, tmp_path, kind):
    pytest.importorskip("matplotlib")
    path = planted[2].plot(tmp_path / "deep" / "picture.png", kind)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in path.parent.iterdir()] == ["picture.png"]


def test_an_unknown_kind_or_no_matplotlib_is_said(planted, tmp_path, monkeypatch):
    with pytest.raises(DataError, match="map, groups, histogram, coverage"):
        planted[2].plot(tmp_path / "x.png", "pie")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for kind in PICTURES:
        with pytest.raises(ImportError, match=r"hydrasurgery\[plot\]"):
            planted[2].plot(tmp_path / "x.png", kind)
    assert not list(tmp_path.iterdir())


def test_a_plan_is_drawn(planted, tmp_path):
    pytest.importorskip("matplotlib")
    assert draw_plan(plan_heads(planted[2]), tmp_path / "plan.png").stat().st_size


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=9))
def test_coverage_rises_to_the_whole(values):
    covered = coverage(values)
    assert covered[0] == 0
    assert covered == sorted(covered)
    assert covered[-1] == pytest.approx(1.0 if max(values) > 0 else 0.0)


def test_ablating_planted_heads_hurts_and_others_do_not(planted):
    """The positive control: without the two planted heads no answer is right. The negative: the ten others do nothing."""
    model, pairs, scores = planted
    curve = ablation_curve(model, scores, pairs, counts=(0, 2, 10, 12), draws=6, rows=5)
    assert curve.accuracy["top"][0] == curve.accuracy["bottom"][0] == curve.accuracy["random"][0] == 1
    assert curve.accuracy["top"][1] < 0.5
    assert curve.accuracy["bottom"][2] == 1
    assert curve.accuracy["top"][1] < curve.accuracy["random"][1] <= 1
    assert curve.accuracy["top"][3] == curve.accuracy["bottom"][3] == curve.accuracy["random"][3]
    assert curve.spread[0] == curve.spread[3] == 0
    assert ablation_curve(model, scores, pairs, counts=(0, 2, 10, 12), draws=6, batch_size=1) == curve
    assert str(curve).splitlines()[1].split() == ["0", "1.000", "1.000", "1.000"]
    with pytest.raises(ProbeError, match="12 heads"):
        ablation_curve(model, scores, pairs, counts=(13,))


def test_the_curve_is_drawn(planted, tmp_path):
    pytest.importorskip("matplotlib")
    model, pairs, scores = planted
    assert ablation_curve(model, scores, pairs, draws=1).plot(tmp_path / "curve.png").stat().st_size

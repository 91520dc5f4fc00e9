"""Score files of other tools: what they look like, what comes back, and what a wrong shape is told."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hydrasurgery.choose import plan_heads
from hydrasurgery.errors import DataError
from hydrasurgery.selection import HeadScores, read_scores, write_scores
from tests.test_plan import regions, scores

FORMATS = ("duo-attention", "prulong", "retrieval-head", "qrhead")


def importance(found):
    return [list(layer.importance) for layer in found.layers]


def test_published_shapes_are_read(tmp_path):
    model = regions(2, 4, 2)
    (tmp_path / "duo").mkdir()
    (tmp_path / "duo" / "full_attention_heads.tsv").write_text("1.000e+00\t2.5e-01\n0\t0.5\n")
    (tmp_path / "duo" / "config.json").write_text('{"sink_size": 64, "recent_size": 256}')
    duo = read_scores(tmp_path / "duo", model, format="duo-attention")
    assert importance(duo) == [[1.0, 1.0, 0.25, 0.25], [0.0, 0.0, 0.5, 0.5]]
    assert duo.unit == "kv-group"
    (tmp_path / "mask.tsv").write_text("1\t0\n0\t1\n")
    assert importance(read_scores(tmp_path / "mask.tsv", model, format="prulong")) == [[1, 1, 0, 0], [0, 0, 1, 1]]
    trials = {f"{layer}-{head}": [0.1 * head, 0.3 * head] for layer in (1, 0) for head in range(4)}
    (tmp_path / "heads.json").write_text(json.dumps(trials))
    heads = read_scores(tmp_path / "heads.json", model, format="retrieval-head")
    assert (heads.unit, heads.pairs) == ("head", 2)
    np.testing.assert_allclose(importance(heads), [[0, 0.2, 0.4, 0.6]] * 2)
    np.testing.assert_allclose(heads.layers[1].spread, [0, 0.1, 0.2, 0.3])
    (tmp_path / "qr.json").write_text(json.dumps([[key, values[0]] for key, values in trials.items()]))
    np.testing.assert_allclose(
        importance(read_scores(tmp_path / "qr.json", model, format="qrhead")), [[0, 0.1, 0.2, 0.3]] * 2
    )


shapes = st.sampled_from([(2, 8, 4), (3, 4, 4), (1, 6, 1)])


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shapes, st.integers(0, 999), st.sampled_from(["duo-attention", "retrieval-head", "qrhead"]))
def test_what_is_written_comes_back(tmp_path, shape, seed, format):
    layers, heads, shared = shape
    table = np.random.default_rng(seed).normal(size=(layers, heads)).tolist()
    given_scores = scores(table, shared=shared)
    path = write_scores(given_scores, tmp_path / "scores", format=format)
    found = read_scores(path, given_scores, format=format)
    size = heads // shared
    if format == "duo-attention":
        table = [[max(row[h // size * size : (h // size + 1) * size]) for h in range(heads)] for row in table]
    assert importance(found) == table
    again = write_scores(found, tmp_path / "again", format=format)
    assert again.read_bytes() == path.read_bytes()
    assert HeadScores.from_json(found.to_json()) == found


def test_a_plan_is_written_as_a_mask_and_read_into_the_same_plan(tmp_path):
    plan = plan_heads(regions(), ratio="3:1", unit="kv-group", strategy="random", seed=2)
    path = write_scores(plan, tmp_path / "mask.tsv", format="prulong")
    assert {word for line in path.read_text().splitlines() for word in line.split("\t")} == {"0", "1"}
    again = plan_heads(read_scores(path, regions(), format="prulong"), ratio="3:1", unit="kv-group", strategy="global")
    assert [layer.kinds for layer in again.layers] == [layer.kinds for layer in plan.layers]


@pytest.mark.parametrize(
    ("format", "text", "said"),
    [
        ("duo-attention", "1\t0\t0\t0\n", "expected 2 layers of 4 KV heads, found 1 layers of 4 columns"),
        ("duo-attention", "1\t0\n1\t0\n", "expected 2 layers of 4 KV heads, found 2 layers of 2 columns"),
        ("duo-attention", "1\t0\t0\tx\n" * 2, "expected finite numbers, found 'x'"),
        ("duo-attention", "1\t0\t0\tnan\n" * 2, "found 'nan'"),
        ("duo-attention", "", "found 0 layers of no columns"),
        ("prulong", "1\t0\t0\t0.5\n" * 2, "expected a table of 0 and 1"),
        ("retrieval-head", "[1]", 'expected {"layer-head": \\[scores\\]}, found'),
        ("retrieval-head", "{", "not JSON"),
        ("retrieval-head", '{"0-0": [1]}', "2 layers of 8 query heads, 16 in all, found 1 entries; '0-1' is missing"),
        ("retrieval-head", json.dumps({f"{i}-{j}": [1] for i in range(3) for j in range(8)}), "'2-0' is unknown"),
        (
            "retrieval-head",
            json.dumps({f"{i}-{j}": [1] * (1 + j) for i in range(2) for j in range(8)}),
            "as many scores",
        ),
        ("qrhead", '{"0-0": [1]}', 'expected \\[\\["layer-head", score\\]'),
        ("qrhead", '[["0-0", 1]]', "found 1 entries"),
    ],
)
def test_a_wrong_shape_names_the_file_expected_and_found(tmp_path, format, text, said):
    path = tmp_path / "foreign"
    path.write_text(text)
    with pytest.raises(DataError, match=said) as caught:
        read_scores(path, regions(2), format=format)
    assert str(path) in str(caught.value)


def test_what_cannot_be_written_or_read_is_refused(tmp_path):
    plan = plan_heads(regions(), strategy="random")
    for value, format in ((plan, "qrhead"), (scores([[0.0] * 8]), "prulong")):
        with pytest.raises(DataError, match=format):
            write_scores(value, tmp_path / "x", format=format)
    with pytest.raises(DataError, match="is not one of duo-attention"):
        read_scores(tmp_path / "x", regions(), format="csv")
    with pytest.raises(DataError, match="cannot be read"):
        read_scores(tmp_path / "x", regions(), format="qrhead")
    assert not list(tmp_path.iterdir())

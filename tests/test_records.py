"""Records and JSON that may come from anywhere: what fits is taken as it is, anything else is refused by its place."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hydrasurgery.errors import DataError, PlanError
from hydrasurgery.json_files import DEPTH, load_json, parse_json
from hydrasurgery.records import Bounds, Name, Positive, Seed, check_record, read_record


@dataclass(frozen=True)
class Inner:
    rate: Annotated[float, Bounds(0, 1, "(]")]
    kind: Literal["a", "b"] | None = None
    flag: bool = False

    def __post_init__(self) -> None:
        check_record(self, PlanError, "inner")
        if self.kind == "b" and self.flag:
            raise PlanError("b has no flag")


@dataclass(frozen=True)
class Outer:
    name: Name
    inner: tuple[Inner, ...]
    pair: tuple[int, float] = (0, 0.0)
    words: Annotated[dict[str, str], Bounds(0, 2)] | None = None
    sizes: Annotated[tuple[Positive, ...], Bounds(1, 3)] = (1,)
    seed: Seed = 0


GOOD = {
    "name": "x",
    "inner": [{"rate": 1}, {"rate": 0.5, "kind": "a", "flag": True}],
    "pair": [-1, 2],
    "words": {"a": "b"},
    "sizes": [1, 2],
    "seed": 2**63 - 1,
}


def test_what_fits_is_taken() -> None:
    found = read_record(Outer, GOOD, "file", DataError)
    assert found == Outer("x", (Inner(1.0), Inner(0.5, "a", True)), (-1, 2.0), {"a": "b"}, (1, 2), 2**63 - 1)
    assert type(found.inner[0].rate) is float
    assert read_record(Outer, {"name": "x", "inner": [Inner(1.0)]}, "file", DataError).inner == (Inner(1.0),)


BAD = {
    "name": [None, 1, ["x"], "x" * 1001],
    "inner": [None, {}, [None], [[]], [{}], [{"rate": 1, "speed": 2}], [{"rate": 1, "kind": "b", "flag": True}]],
    "inner[0].rate": [None, 0, 1.5, True, "1", [1], -0.0, 10**99, math.nan, math.inf],
    "inner[0].kind": ["c", 0, True, ["a"]],
    "inner[0].flag": [None, 0, 1, "true"],
    "pair": [[1], [1, 2, 3], [1.0, 2], [True, 2], [1, False], {"0": 1}],
    "words": [{"a": 1}, {"a": "", "b": "", "c": ""}, ["a"], {1: "a"}],
    "sizes": [[], [1, 2, 3, 4], [0], [1.0], ["1"]],
    "seed": [-1, 2**63, 0.5, None, 1e30],
}


@pytest.mark.parametrize(
    ("place", "value"),
    [(place, value) for place, values in BAD.items() for value in values],
    ids=lambda value: repr(value)[:20],
)
def test_what_does_not_fit_is_refused_by_its_place(place: str, value: object) -> None:
    data = json.loads(json.dumps(GOOD))
    top, _, inner = place.partition("[0].")
    if inner:
        data[top][0][inner] = value
    else:
        data[top] = value
    with pytest.raises(DataError, match="^file: ") as caught:
        read_record(Outer, data, "file", DataError)
    assert place in str(caught.value)
    assert len(str(caught.value)) < 300


def test_fields_that_are_missing_or_unknown_are_named() -> None:
    with pytest.raises(DataError, match=r"^file: inner is missing; give a list$"):
        read_record(Outer, {"name": "x"}, "file", DataError)
    with pytest.raises(DataError, match=r"^file: seed is missing"):
        read_record(Outer, {"name": "x", "inner": []}, "file", DataError, optional=("pair", "words", "sizes"))
    with pytest.raises(DataError, match=r"^file: has the unknown field 'sede'; known are name, inner, pair"):
        read_record(Outer, {**GOOD, "sede": 1}, "file", DataError)
    with pytest.raises(DataError, match=r"^file: is a list of 0; give an object"):
        read_record(Outer, [], "file", DataError)


@pytest.mark.parametrize(
    "value", [math.nan, True, None, "0.5", torch.tensor(0.5), 1j, pytest.param(10**5000, id="huge")]
)
def test_a_record_that_is_made_is_checked_alike(value: object) -> None:
    with pytest.raises(PlanError, match="^inner: rate is .*; give a number from above 0 to 1$"):
        Inner(value)  # type: ignore[arg-type]


def test_numbers_of_other_kinds_are_taken_for_their_values() -> None:
    for value in (np.float32(0.5), np.float64(0.5), Fraction(1, 2)):
        assert type(Inner(value).rate) is float  # type: ignore[arg-type]
        assert Inner(value) == Inner(0.5)  # type: ignore[arg-type]


HURTS = {
    "nested": "[" * 100_000,
    "nested and closed": "[" * 100_000 + "]" * 100_000,
    "objects nested": '{"a":' * 5000 + "1" + "}" * 5000,
    "a level too many": "[" * (DEPTH + 1) + "1" + "]" * (DEPTH + 1),
    "digits": '{"a": ' + "9" * 5000 + "}",
    "few digits more than fit": "1" + "0" * 100,
    "NaN": "[NaN]",
    "Infinity": '{"a": -Infinity}',
    "a float that overflows": "1e999",
    "a key twice": '{"a": 1, "b": 2, "a": 1}',
    "byte order mark": "\ufeff{}",
    "half a surrogate pair": '{"a": "\\ud800"}',
    "nothing": "",
    "two values": "{} {}",
    "a comma": "[1,]",
    "many values": "[" + "0," * 10_000_001 + "0]",
}


@pytest.mark.parametrize("text", HURTS.values(), ids=HURTS)
def test_json_that_hurts_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="^source: not JSON that can be read") as caught:
        parse_json(text, "source", DataError)
    assert len(str(caught.value)) < 200
    file = tmp_path / "file.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=r"file\.json: not JSON"):
        load_json(file, DataError)


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "utf-16.json").write_text("{}", encoding="utf-16")
    (tmp_path / "large.json").write_text(" " * 101)
    for name, limit in (
        ("none.json", 9),
        (".", 9),
        ("nul\0l", 9),
        ("large.json", 100),
        ("utf-16.json", 9),
        ("x" * 999, 9),
    ):
        with pytest.raises(DataError, match="read"):
            load_json(tmp_path / name, DataError, limit)
    with pytest.raises(DataError, match="no ordinary file"):
        load_json("/dev/zero", DataError)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@settings(derandomize=True, deadline=None, max_examples=50)
@given(values)
def test_values_of_ordinary_files_come_back(value: object) -> None:
    try:
        text = json.dumps(value, ensure_ascii=False)
        text.encode()
    except UnicodeEncodeError:
        return
    assert parse_json(text, "source", DataError) == value


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.sampled_from(sorted(GOOD)), values)
def test_any_value_in_any_field_is_taken_or_refused(field: str, value: object) -> None:
    try:
        found = read_record(Outer, {**GOOD, field: value}, "file", DataError)
    except DataError as error:
        assert field in str(error)
    else:
        assert read_record(Outer, {**GOOD, field: getattr(found, field)}, "file", DataError) == found

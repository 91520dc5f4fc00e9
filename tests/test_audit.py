"""What a plan drops: by capability, beside random plans, with the heads that would save it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

import hydrasurgery as hs
from hydrasurgery.cli import app
from hydrasurgery.demo import teacher as shipped
from hydrasurgery.errors import PlanError, ProbeError
from hydrasurgery.plan import Plan
from hydrasurgery.selection import audit, probe_pairs
from hydrasurgery.selection.auditing import _shuffled, with_full

FOLDER = Path(shipped.__file__).with_suffix("")
FEW = {"length": 48, "count": 2, "progress": False}


@pytest.fixture(scope="module")
def model():
    return shipped.load_teacher()


def test_a_plan_that_drops_everything_is_told_what_to_keep(model):
    teacher, tokenizer = model
    plan = hs.plan_heads(teacher, strategy="all-linear")
    found = audit(teacher, plan, tokenizer, probes=("needle-1", "facts"), randoms=2, **FEW)
    needle, facts = found.capabilities
    assert (
        needle.plan.lead < 0.5 < 1 and len(needle.randoms) == 2 and needle.randoms[0] == needle.plan
    )  # no full head to draw
    assert len(needle.dropped) == 4 and needle.kept.lead > needle.plan.lead
    importance = [value for _, value in needle.dropped]
    assert importance == sorted(importance, reverse=True) and importance[-1] > 0.01
    assert facts.plan is None and "48" in facts.why
    assert found.keep == sorted(head for head, _ in needle.dropped)
    text = str(found)
    assert "not measured: facts: the question needs" in text and text.splitlines()[-1].startswith("keep ")
    again = hs.plan_heads(teacher, ratio="7:1", strategy="random", keep=found.keep)
    assert all(again.layers[layer].kinds[head] == "full" for layer, head in found.keep)


def test_a_plan_that_drops_nothing_is_fine(model):
    teacher, tokenizer = model
    found = audit(
        teacher, hs.plan_heads(teacher, strategy="all-full"), tokenizer, probes=("needle-1",), randoms=0, **FEW
    )
    (needle,) = found.capabilities
    assert (
        needle.plan.accuracy == 1
        and needle.plan.lead == pytest.approx(1)
        and not needle.dropped
        and needle.kept is None
    )
    assert str(found).endswith("no head that a capability needs is dropped")


def test_prompts_of_ones_own(model):
    teacher, tokenizer = model
    pairs = {"mine": probe_pairs(teacher, tokenizer, length=48, count=2)}
    found = audit(teacher, hs.plan_heads(teacher, strategy="all-linear"), pairs=pairs, randoms=1, progress=False)
    assert [(each.name, each.pairs) for each in found.capabilities] == [("mine", 2)]


@pytest.mark.parametrize("unit", ["head", "kv-group"])
def test_random_plans_are_as_large(model, unit):
    plan = hs.plan_heads(model[0], ratio="7:1", strategy="random", unit=unit, min_full_per_layer=0)
    drawn = [_shuffled(plan, seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(each.num_full == plan.num_full for each in drawn)
    Plan.from_json(drawn[2].to_json())  # which checks that groups are whole


def test_a_group_is_kept_whole(model):
    plan = hs.plan_heads(model[0], strategy="all-linear", unit="kv-group")
    kept = with_full(plan, [(2, 5)])
    assert kept.layers[2].full_heads == (4, 5) and kept.num_full == 2


def test_wrong_calls_are_refused(model):
    teacher, tokenizer = model
    plan = hs.plan_heads(teacher, strategy="all-linear")
    with pytest.raises(ProbeError, match="needs a tokenizer"):
        audit(teacher, plan)
    with pytest.raises(ProbeError, match="'haystack' is not one of"):
        audit(teacher, plan, tokenizer, probes=("haystack",))
    with pytest.raises(PlanError, match="randoms=-1"):
        audit(teacher, plan, tokenizer, randoms=-1)
    with pytest.raises(PlanError):
        audit(teacher, replace(plan, layers=plan.layers[:-1]), tokenizer, probes=("needle-1",), **FEW)


def test_the_command_prints_it(model, tmp_path):
    plan = hs.plan_heads(model[0], strategy="all-linear")
    plan.save(tmp_path / "plan.json")
    command = [
        "audit",
        str(FOLDER),
        "--plan",
        str(tmp_path / "plan.json"),
        "--probes",
        "needle-1",
        "--length",
        "48",
        "--count",
        "2",
    ]
    found = CliRunner().invoke(app, command)
    assert found.exit_code == 0, found.output
    assert "needed and dropped" in found.output and "keep " in found.output

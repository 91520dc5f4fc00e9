"""The demo's report: every number in it comes from the arms, and so does what it says of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import hydrasurgery as hs
from hydrasurgery.demo.arms import LENGTHS, Arm, Mixture, continuation
from hydrasurgery.demo.run import _check_export, _export, draw_recall, findings, report
from hydrasurgery.demo.teacher import load_teacher
from hydrasurgery.errors import DemoError
from hydrasurgery.evaluation import encode_text, library_text
from hydrasurgery.transfer import RECIPES, as_source
from hydrasurgery.transfer.data import draw


def arm(name: str, plan: hs.Plan, needles: float, dense: float) -> Arm:
    by_length = {"needles": needles, "dense": dense, "kl": 1 - dense, "perplexity": 12.0}
    return Arm(name, plan, result={key: dict.fromkeys(map(str, LENGTHS), value) for key, value in by_length.items()})


@pytest.fixture(scope="module")
def arms() -> list[Arm]:
    teacher, _ = load_teacher()
    chosen = hs.plan_heads(teacher, ratio="7:1", strategy="random", seed=3)
    return [
        arm("teacher", hs.plan_heads(teacher, strategy="all-full"), 1.0, 0.8),
        arm("rewritten, untrained", chosen, 0.1, 0.0),
        arm("chosen heads", chosen, 1.0, 0.76),
        arm("all linear", hs.plan_heads(teacher, strategy="all-linear"), 0.2, 0.1),
        arm("random heads", chosen, 0.9, 0.4),
        arm("layer-wise", hs.plan_heads(teacher, ratio="7:1", strategy="layerwise"), 1.0, 0.8),
    ]


def test_findings_are_computed_from_the_arms(arms: list[Arm]) -> None:
    first, random, layerwise = findings(arms)
    assert "chosen heads keep 100% (needles) and 95% (dense)" in first
    assert "all-linear keeps 20% (needles) and 12% (dense)" in first
    assert "random heads plan (16 full heads) does worse" in random
    assert "layer-wise plan (16 full heads) does as well" in layerwise
    rounded = [arm("random heads", a.plan, 0.999, 0.76) if a.name == "random heads" else a for a in arms]
    assert "random heads plan (16 full heads) does as well" in findings(rounded)[1]
    worse = [replace(a, result=arms[3].result) if a.name == "layer-wise" else a for a in arms]
    assert "layer-wise plan (16 full heads) does worse" in findings(worse)[2]


def test_the_report_has_a_row_for_each_arm(arms: list[Arm], tmp_path: Path) -> None:
    text = report(arms, RECIPES["demo"], "and so on", "Exported.", 3.0)
    assert "> 'and so on'\n\nExported.\n" in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + len(arms)
    assert "data seed 0" in text
    assert "evaluation seed 1" in text
    assert "| 200 KiB | 200 KiB |" in next(row for row in rows if "all linear (0)" in row)
    assert "| 4 MiB | 4 GiB |" in rows[1]  # 8 layers x 8 KV heads x 2 x 16 numbers of 4 bytes per token
    draw_recall(arms, tmp_path / "recall.png")
    assert (tmp_path / "recall.png").read_bytes().startswith(b"\x89PNG")


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    _, tokenizer = load_teacher()
    source = as_source(Mixture(tokenizer, encode_text(tokenizer, library_text("train"))))
    stage = RECIPES["demo"].stages[0]
    first, again, other = (draw(source, step, stage, 0).inputs["input_ids"] for step in (3, 3, 4))
    assert (first == again).all()
    assert (first != other).any()
    steps = [draw(source, step, stage, 0, index=1) for step in range(40)]  # one of them has rows of text only
    assert all(step.mask.all() for step in steps)


def test_the_export_gives_the_text_of_the_saved_model(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    teacher, tokenizer = load_teacher()
    teacher.model.layers = teacher.model.layers[:1]  # eight would take a minute
    teacher.config.num_hidden_layers, teacher.config.layer_types = 1, teacher.config.layer_types[:1]
    hybrid = hs.rewrite(teacher, hs.plan_heads(teacher, ratio="7:1", strategy="random", seed=3))
    assert set(hs.regions(hybrid)[0].kinds) == {"full", "linear"}
    hybrid.save_pretrained(tmp_path / "hybrid")
    tokens = continuation(hybrid, encode_text(tokenizer, library_text("held-out")))
    said = _export(tmp_path / "hybrid", tmp_path / "hybrid.onnx", tokens)
    assert said.endswith("it gives the same text in ONNX Runtime.")
    with pytest.raises(DemoError, match="other tokens"):
        _check_export(tmp_path / "hybrid.onnx", (*tokens[:-1], tokens[-1] + 1))

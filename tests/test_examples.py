"""The examples run as they stand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from hydrasurgery.demo.teacher import SHIPPED
from hydrasurgery.evaluation import library_text
from hydrasurgery.transfer import Recipe, Stage

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, *arguments: str, cwd: Path | None = None) -> str:
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=cwd)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_own_module() -> None:
    out = run("own_module.py")
    losses = [float(line.split()[-1]) for line in out.splitlines() if ": loss" in line]
    first, last = losses[0], losses[-1]
    assert last < 0.5 * first
    assert "hydra::linear_attention" in out


def test_own_pass() -> None:
    out = run("own_pass.py")
    assert "before training: 0.0" in out
    assert "model.layers.1.self_attn.hydra.temperature.tau" in out


def test_convert(tmp_path: Path) -> None:
    stages = [
        Stage(name, batch_size=1, length=64, steps=2, lr=1e-3, lr_end=1e-3, warmup=0) for name in ("align", "distil")
    ]
    Recipe("short", tuple(stages)).save(tmp_path / "recipe.json")
    (tmp_path / "corpus.txt").write_text(library_text("train")[:20000], encoding="utf-8")
    options = ("--out", "hybrid", "--recipe", "recipe.json", "--length", "256")
    out = run("convert.py", str(SHIPPED), "corpus.txt", *options, cwd=tmp_path)
    assert "full 16 of 128 heads" in out
    assert (tmp_path / "hybrid" / "model.safetensors").is_file()
    assert (tmp_path / "hybrid-run" / "heads.png").is_file()

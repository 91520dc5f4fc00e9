"""Files from elsewhere, or damaged on the way: each is refused by its name, in a line and in seconds, and none runs code."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import hydrasurgery as hs
from hydrasurgery.cli import app
from hydrasurgery.demo.corpus import build_tokenizer
from hydrasurgery.errors import DataError, HydraError, PipelineError, PlanError, RecipeError
from hydrasurgery.passes import parse
from hydrasurgery.plan import Plan
from hydrasurgery.selection import read_scores
from hydrasurgery.selection.scores import HeadScores, LayerScores
from hydrasurgery.transfer import RECIPES, Recipe, Stage
from hydrasurgery.transfer.data import as_source
from tests.families import tiny

SECONDS = 20.0
NESTED = b"[" * 100_000
WEIGHT = "model.layers.0.self_attn.q_proj.weight"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
Damage = Callable[[Path], None]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of one file of each kind, as the package writes them."""
    folder = tmp_path_factory.mktemp("whole")
    model, tokenizer = tiny("qwen3", vocab_size=720, num_hidden_layers=1), build_tokenizer()
    plan = hs.plan_heads(model, ratio="1:1", strategy="random")
    plan.save(folder / "plan.json")
    layer = LayerScores("l0", 2, 16, 16, None, (0.5, 0.25, 0.125, 0.0), (0.0,) * 4, None, ((0.5, 0.25, 0.125, 0.0),))
    HeadScores((layer,), "activation-patching", pairs=1, tasks=("needle-1",)).save(folder / "scores.json")
    RECIPES["demo"].save(folder / "recipe.json")
    (folder / "data.txt").write_text("A statement is executed when it is reached. " * 40, encoding="utf-8")
    for name, saved in (("teacher", model), ("hybrid", hs.rewrite(model, plan))):
        saved.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


# --- kinds of damage ---------------------------------------------------------------------------------------------------


def write(data: bytes | str) -> Damage:
    return lambda file: file.write_bytes(data.encode() if isinstance(data, str) else data)


def cut(share: float) -> Damage:
    return lambda file: file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])


def put(*place_and_value: Any) -> Damage:
    """Another value at a place in a JSON file."""
    *place, value = place_and_value

    def damage(file: Path) -> None:
        whole = json.loads(file.read_text())
        inner = whole
        for step in place[:-1]:
            inner = inner[step]
        inner[place[-1]] = value
        file.write_text(json.dumps(whole))

    return damage


def insert(text: str, *place: Any) -> Damage:
    """Text that is no value of Python's at a place in a JSON file."""

    def damage(file: Path) -> None:
        put(*place, "@here@")(file)
        file.write_text(file.read_text().replace('"@here@"', text))

    return damage


def recoded(encoding: str) -> Damage:
    return lambda file: file.write_bytes(file.read_text().encode(encoding))


def folder_instead(file: Path) -> None:
    file.unlink()
    file.mkdir()


# What no JSON file of ours may be.
NO_JSON: dict[str, Damage] = {
    "empty": write(""),
    "cut": cut(0.6),
    "zeros": write(b"\0" * 500),
    "nested": write(NESTED),
    "nested-and-closed": write(NESTED + b"]" * 100_000),
    "null": write("null"),
    "list": write("[]"),
    "a-pickle": write(pickle.dumps({"a": 1})),
    "utf-16": recoded("utf-16"),
    "byte-order-mark": recoded("utf-8-sig"),
    "a-folder": folder_instead,
}

PLAN: dict[str, Damage] = {
    **NO_JSON,
    "heads-1e9": put("layers", 0, "num_heads", 10**9),
    "layers-many": lambda file: put("layers", json.loads(file.read_text())["layers"] * 5000)(file),
    "full-giant": put("layers", 0, "full", list(range(100_000))),
    "digits": insert("9" * 5000, "seed"),
    "head-dim-0": put("layers", 0, "head_dim", 0),
    "head-dim-half": put("layers", 0, "head_dim", 16.5),
    "heads-true": put("layers", 0, "num_heads", True),
    "window-negative": put("layers", 0, "window", -1),
    "layer-list": put("layers", 0, []),
    "version-true": put("version", True),
    "unknown-field": put("seeed", 3),
    "keep-deep": put("keep", [[[0]]]),
    "name-giant": put("layers", 0, "name", "x" * 10**6),
    "half-a-character": insert('"\\ud800"', "model", "architecture"),
    "conv-null": put("layer", "conv", None),
    "versions-nested": put("versions", {"torch": {"a": 1}}),
    "nan": insert("NaN", "min_full_per_layer"),
}
SCORES: dict[str, Damage] = {
    **NO_JSON,
    "importance-null": put("layers", 0, "importance", None),
    "importance-text": put("layers", 0, "importance", ["a"] * 4),
    "importance-true": put("layers", 0, "importance", [True] * 4),
    "importance-infinite": insert("[1e999, 0, 0, 0]", "layers", 0, "importance"),
    "importance-short": put("layers", 0, "importance", [0.5]),
    "samples-ragged": put("layers", 0, "samples", [[0.5, 1.0]]),
    "kv-heads-0": put("layers", 0, "num_key_value_heads", 0),
    "no-layer": put("layers", []),
    "unit": put("unit", ["head"]),
    "model-null": put("model", None),
    "seed-huge": put("seed", 10**30),
}
RECIPE: dict[str, Damage] = {
    **NO_JSON,
    "ce-weight-null": put("stages", 1, "ce_weight", None),
    "warmup-infinite": insert("Infinity", "stages", 0, "warmup"),
    "warmup-endless": put("stages", 0, "warmup", 10**8),
    "steps-fraction": put("stages", 0, "steps", 2.5),
    "steps-true": put("stages", 0, "steps", True),
    "steps-1e30": put("stages", 0, "steps", 10**30),
    "lr-null": put("stages", 0, "lr", None),
    "lr-text": put("stages", 0, "lr", "0.1"),
    "lr-huge": put("stages", 0, "lr", 1e300),
    "batch-0": put("stages", 0, "batch_size", 0),
    "length-list": put("stages", 0, "length", [512]),
    "betas-one": put("stages", 0, "betas", [0.9]),
    "betas-null": put("stages", 0, "betas", None),
    "freeze-1": put("stages", 0, "freeze_full_qk", 1),
    "trainable": put("stages", 0, "trainable", {}),
    "stage-text": put("stages", 0, "align"),
    "stages-null": put("stages", None),
    "stages-none": put("stages", []),
    "autocast": put("autocast", "float8"),
    "every-0": put("checkpoint_every", 0),
    "name-number": put("name", 5),
    "unknown-field": put("stages", 0, "learning_rate", 1.0),
    "twice": lambda file: file.write_text(file.read_text().replace('"autocast"', '"name": "b", "autocast"')),
}
CONFIG: dict[str, Damage] = {
    **NO_JSON,
    "hidden-text": put("hidden_size", "abc"),
    "hidden-null": put("hidden_size", None),
    "hidden-negative": put("hidden_size", -64),
    "hidden-huge": put("hidden_size", 10**12),
    "hidden-other": put("hidden_size", 128),
    "layers-0": put("num_hidden_layers", 0),
    "layers-1e9": put("num_hidden_layers", 10**9),
    "layers-list": put("num_hidden_layers", [1]),
    "heads-0": put("num_attention_heads", 0),
    "kv-heads-true": put("num_key_value_heads", True),
    "head-dim-text": put("head_dim", "a"),
    "vocabulary-negative": put("vocab_size", -1),
    "activation": put("hidden_act", "nope"),
    "rope-type": put("rope_parameters", {"rope_type": "nope"}),
    "model-type": put("model_type", "nope"),
    "model-type-number": put("model_type", 5),
    "dtype": put("dtype", "float99"),
    "epsilon-text": put("rms_norm_eps", "x"),
    "quantization": put("quantization_config", 5),
    "eos": put("eos_token_id", {"a": 1}),
    "digits": insert("9" * 5000, "hidden_size"),
}
STEPS = "canonicalize-attention,split-heads,linearize-heads,fuse-heads,thread-state,fuse-decode".split(",")
PIPELINE = {
    "null": None,
    "number": 5,
    "minus-signs": "-" * 100_000,
    "nested": "linearize-heads{conv=" + "[" * 5000 + "}",
    "unknown": "no-such-pass",
    "unknown-option": STEPS[0] + ",split-heads{colour=red}",
    "option-twice": "linearize-heads{conv=2,conv=4}",
    "conv-huge": "linearize-heads{conv=" + "9" * 4400 + "}",
    "conv-negative": "linearize-heads{conv=-1}",
    "many": ",".join(STEPS * 1000),
    "brace": "split-heads{",
    "comma": "split-heads,,fuse-heads",
    "swapped-first": ",".join([STEPS[1], STEPS[0], *STEPS[2:]]),
    "swapped-last": ",".join([*STEPS[:4], STEPS[5], STEPS[4]]),
    "reversed": ",".join(reversed(STEPS)),
    "a-pass-less": ",".join([*STEPS[:1], *STEPS[2:]]),
    "nothing": "",
}


def header(text: bytes, size: int | None = None, tail: bytes = b"") -> Damage:
    """A safetensors file that begins with this header, said to be of `size` bytes."""
    return write(struct.pack("<Q", len(text) if size is None else size) + text + tail)


def tensors(**shown: Any) -> bytes:
    return json.dumps({name: {"dtype": "F32", **entry} for name, entry in shown.items()}).encode()


SAFETENSORS: dict[str, Damage] = {
    "empty": write(""),
    "cut": cut(0.5),
    "cut-in-the-header": cut(0.0001),
    "header-huge": header(b"{}", 2**63),
    "header-longer-than-the-file": header(b"{}", 1000),
    "header-nested": header(NESTED),
    "header-null": header(b"null"),
    "offsets-beyond": header(tensors(a={"shape": [4], "data_offsets": [0, 10**12]}), tail=b"\0" * 16),
    "offsets-overlap": header(
        tensors(a={"shape": [4], "data_offsets": [0, 16]}, b={"shape": [4], "data_offsets": [8, 24]}), tail=b"\0" * 24
    ),
    "offsets-backwards": header(tensors(a={"shape": [4], "data_offsets": [16, 0]}), tail=b"\0" * 16),
    "shape-overflows": header(tensors(a={"shape": [2**62, 2**62], "data_offsets": [0, 16]}), tail=b"\0" * 16),
    "dtype-unknown": header(
        json.dumps({"a": {"dtype": "F3", "shape": [4], "data_offsets": [0, 16]}}).encode(), tail=b"\0" * 16
    ),
    "no-tensor": header(b"{}"),
    "a-pickle": write(pickle.dumps({"a": 1})),
}
INDEXES: dict[str, Damage] = {
    **{name: NO_JSON[name] for name in ("empty", "nested", "list", "null", "utf-16")},
    "no-map": write("{}"),
    "map-list": put("weight_map", []),
    "map-numbers": put("weight_map", {"a": 5}),
    "outside": put("weight_map", {"a": "../teacher/model.safetensors"}),
    "absolute": put("weight_map", {"a": "/etc/passwd"}),
    "parent": put("weight_map", {"a": ".."}),
    "missing-shard": put("weight_map", {"a": "model-00001-of-00002.safetensors"}),
}
TOKENIZER: dict[str, Damage] = {
    **{name: NO_JSON[name] for name in ("empty", "cut", "nested", "list", "null", "zeros")},
    "model-null": put("model", None),
    "model-unknown": put("model", "type", "Nope"),
    "vocabulary-numbers": put("model", "vocab", {"a": "b"}),
    "decoder-list": put("decoder", [1]),
}


# --- through the command line -----------------------------------------------------------------------------------------


def refused(*arguments: Any) -> str:
    """What a command that is refused in time writes: one line, or of a wrong option what typer writes."""
    begun = time.process_time()
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert time.process_time() - begun < SECONDS
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    lines = result.stderr.splitlines()
    assert len(lines) <= 2 and lines[-1].startswith("error: "), result.stderr
    assert len(lines[-1]) < 2000
    return lines[-1]


def cases(damages: dict[str, Any]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("damage", damages.values(), ids=damages)


@pytest.fixture
def copied(work: Path, tmp_path: Path) -> Iterator[Path]:
    """The folder of whole files again, to damage one of them."""
    yield Path(shutil.copytree(work, tmp_path / "copied"))


@cases(PLAN)
def test_plans(copied: Path, damage: Damage) -> None:
    file = copied / "plan.json"
    damage(file)
    said = refused("rewrite", copied / "teacher", "--plan", file, "--out", copied / "out")
    assert str(file) in said
    assert not (copied / "out").exists()


@cases(SCORES)
def test_scores(copied: Path, damage: Damage) -> None:
    file = copied / "scores.json"
    damage(file)
    assert str(file) in refused("plan", "--scores", file, "--out", copied / "out.json")
    assert str(file) in refused("compare", copied / "plan.json", file)
    assert not (copied / "out.json").exists()


@cases(RECIPE)
def test_recipes(copied: Path, damage: Damage) -> None:
    file = copied / "recipe.json"
    damage(file)
    options = ("--teacher", copied / "teacher", "--data", copied / "data.txt", "--out", copied / "run")
    said = refused("distill", copied / "hybrid", *options, "--recipe", file)
    assert file.name in said
    assert not (copied / "run").exists()


@cases(CONFIG)
def test_configs(copied: Path, damage: Damage) -> None:
    damage(copied / "teacher" / "config.json")
    assert str(copied / "teacher") in refused("inspect", copied / "teacher")


def test_every_command_refuses_a_config_by_its_name(copied: Path) -> None:
    put("hidden_size", "abc")(copied / "teacher" / "config.json")
    bad, out = copied / "teacher", copied / "out"
    for arguments in (
        ("score", bad, "--out", out),
        ("plan", "--model", bad, "--strategy", "random", "--out", out),
        ("plot", copied / "scores.json", "--kind", "ablation", "--model", bad, "--out", copied / "out.png"),
        ("rewrite", bad, "--plan", copied / "plan.json", "--out", out),
        ("distill", copied / "hybrid", "--teacher", bad, "--data", copied / "data.txt", "--out", out),
        ("eval", bad, "--out", out),
        ("eval", copied / "hybrid", "--teacher", bad, "--out", out),
        ("generate", bad, "--prompt", "a"),
        ("export", bad, "--out", copied / "out.onnx"),
        ("bench", "model", "--model", bad, "--device", "cpu"),
    ):
        assert f"{bad / 'config.json'}: hidden_size is 'abc'" in refused(*arguments)


@cases(PIPELINE)
def test_pipelines_of_checkpoints(copied: Path, damage: Any) -> None:
    put("hydrasurgery", "pipeline", damage)(copied / "hybrid" / "config.json")
    assert str(copied / "hybrid") in refused("inspect", copied / "hybrid")


@cases({name: PLAN[name] for name in ("heads-1e9", "window-negative", "layer-list", "version-true", "conv-null")})
def test_plans_of_checkpoints(copied: Path, damage: Damage) -> None:
    file = copied / "hybrid" / "config.json"
    values = json.loads(file.read_text())
    inner = copied / "inner.json"
    inner.write_text(json.dumps(values["hydrasurgery"]["plan"]))
    damage(inner)
    put("hydrasurgery", "plan", json.loads(inner.read_text()))(file)
    assert str(copied / "hybrid") in refused("generate", copied / "hybrid", "--prompt", "a")


@cases(SAFETENSORS)
def test_weights(copied: Path, damage: Damage) -> None:
    damage(copied / "teacher" / WEIGHTS)
    assert str(copied / "teacher") in refused("inspect", copied / "teacher")


def value(change: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    """A weight of a layer, changed."""

    def damage(file: Path) -> None:
        held = load_file(file)
        held[WEIGHT] = change(held[WEIGHT])
        save_file(held, file, {"format": "pt"})

    return damage


@cases(
    {
        "no-number": value(lambda weight: weight.index_fill(0, torch.tensor([3]), float("nan"))),
        "infinite": value(lambda weight: weight.index_fill(0, torch.tensor([3]), float("-inf"))),
        "too-large-for-half": value(lambda weight: (weight * 1e9).half()),
        "integers": value(lambda weight: (weight * 100).to(torch.int8)),
        "flags": value(lambda weight: weight > 0),
        "complex": value(lambda weight: torch.complex(weight, weight)),
    }
)
@pytest.mark.filterwarnings("ignore:Casting complex values")
def test_values_of_weights(copied: Path, damage: Damage) -> None:
    for name in ("teacher", "hybrid"):
        damage(copied / name / WEIGHTS)
        said = refused("generate", copied / name, "--prompt", "a")
        assert str(copied / name) in said and WEIGHT in said
    out = copied / "earlier.json"
    out.write_text("[]")
    options = ("--case", "prefill", "--size", 16, "--device", "cpu", "--out", out)
    assert WEIGHT in refused("bench", "model", "--model", copied / "teacher", *options)
    assert out.read_text() == "[]"


@cases(INDEXES)
def test_indexes(copied: Path, damage: Damage) -> None:
    (copied / "teacher" / WEIGHTS).unlink()
    file = copied / "teacher" / INDEX
    file.write_text(json.dumps({"weight_map": {"a": "a.safetensors"}}))
    damage(file)
    said = refused("inspect", copied / "teacher")
    assert str(file) in said or "model-00001-of-00002.safetensors" in said


def test_a_prompt_that_is_no_text(copied: Path) -> None:
    assert "--prompt: is not UTF-8" in refused("generate", copied / "teacher", "--prompt", "caf\udce9")


@cases(TOKENIZER)
def test_tokenizers(copied: Path, damage: Damage) -> None:
    damage(copied / "teacher" / "tokenizer.json")
    assert str(copied / "teacher") in refused("generate", copied / "teacher", "--prompt", "a")


GENERATION: dict[str, Damage] = {
    **{name: NO_JSON[name] for name in ("empty", "nested", "list", "utf-16")},
    "eos-text": put("eos_token_id", "a"),
    "eos-list": put("eos_token_id", [2, None]),
    "pad-text": put("pad_token_id", "a"),
    "cache": put("cache_implementation", "nope"),
    "digits": insert("9" * 5000, "eos_token_id"),
}


@cases(GENERATION)
def test_generation_configs(copied: Path, damage: Damage) -> None:
    damage(copied / "teacher" / "generation_config.json")
    said = refused("generate", copied / "teacher", "--prompt", "a", "--max-new-tokens", 2)
    assert str(copied / "teacher") in said or "generation_config.json" in said


@cases(
    {
        "penalty": put("repetition_penalty", 1e9),
        "sampling": put("do_sample", True),
        "beams": put("num_beams", 5),
        "suppressed": put("suppress_tokens", "a"),
        "shortest": put("min_new_tokens", "x"),
        "watch": put("max_time", "x"),
        "code": put("custom_generate", "someone/code"),
    }
)
def test_generation_takes_the_likeliest_token_whatever_the_file_says(copied: Path, damage: Damage) -> None:
    def text() -> str:
        ran = CliRunner().invoke(app, ["generate", str(copied / "teacher"), "--prompt", "a", "--max-new-tokens", "8"])
        assert ran.exit_code == 0, ran.output
        return ran.stdout

    wanted = text()
    damage(copied / "teacher" / "generation_config.json")
    assert text() == wanted


# --- state of a run ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def begun(work: Path) -> Path:
    """The folder of a run of two steps, of which one checkpoint was kept."""
    steps = Stage("align", batch_size=1, length=16, lr=1e-3, lr_end=1e-3, steps=2, warmup=0)
    Recipe("short", (steps,), checkpoint_every=1).save(work / "short.json")
    arguments = ("--teacher", work / "teacher", "--data", work / "data.txt", "--recipe", work / "short.json")
    result = CliRunner().invoke(app, list(map(str, ("distill", work / "hybrid", *arguments, "--out", work / "run"))))
    assert result.exit_code == 0, result.output
    shutil.rmtree(work / "run" / "model")
    return work


STATE: dict[str, Damage] = {
    **{name: NO_JSON[name] for name in ("empty", "nested", "null", "utf-16", "a-pickle")},
    "step-text": put("step", "2"),
    "step-huge": put("step", 10**30),
    "stage-true": put("stage", False),
    "version-true": put("version", 1.5),
    "seed-null": put("seed", None),
    "recipe-list": put("recipe", []),
    "recipe-steps-null": put("recipe", "stages", 0, "lr", None),
}


@cases(STATE)
def test_states_of_runs(begun: Path, copied: Path, damage: Damage) -> None:
    (checkpoint,) = (copied / "run" / "checkpoints").iterdir()
    damage(checkpoint / "state.json")
    options = ("--teacher", copied / "teacher", "--data", copied / "data.txt", "--recipe", copied / "short.json")
    said = refused("distill", copied / "hybrid", *options, "--out", copied / "run", "--resume")
    assert checkpoint.name in said


# --- data -------------------------------------------------------------------------------------------------------------


class Bomb:
    """Unpickled, it leaves a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return (open, (str(self.file), "w"))


def numpy_file(text: str, data: bytes = b"") -> bytes:
    """A `.npy` file whose header is this text."""
    padded = text.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(padded)) + padded + data


def archive() -> bytes:
    stream = io.BytesIO()
    np.savez(stream, a=np.arange(4))
    return stream.getvalue()


NPY = {
    "empty": b"",
    "zeros": b"\0" * 200,
    "magic-only": b"\x93NUMPY",
    "header-no-dict": numpy_file("[]"),
    "header-nested": numpy_file("(" * 100),
    "header-cut": numpy_file("{'descr': '<i8', "),
    "header-call": numpy_file("{'descr': exit(), 'fortran_order': False, 'shape': (4,)}"),
    "shape-beyond-the-file": numpy_file("{'descr': '<i8', 'fortran_order': False, 'shape': (10**12,)}"),
    "shape-huge": numpy_file("{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000000,)}"),
    "shape-negative": numpy_file("{'descr': '<i8', 'fortran_order': False, 'shape': (-4,)}", b"\0" * 32),
    "shape-text": numpy_file("{'descr': '<i8', 'fortran_order': False, 'shape': 'a'}", b"\0" * 32),
    "floats": numpy_file("{'descr': '<f8', 'fortran_order': False, 'shape': (4,)}", b"\0" * 32),
    "no-dtype": numpy_file("{'descr': 'nope', 'fortran_order': False, 'shape': (4,)}", b"\0" * 32),
    "nothing": numpy_file("{'descr': '<i8', 'fortran_order': False, 'shape': (0,)}"),
    "archive": archive(),
}


@pytest.mark.parametrize("data", NPY.values(), ids=NPY)
def test_arrays_of_tokens(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokens.npy").write_bytes(data)
    with pytest.raises(DataError):
        as_source(tmp_path / "tokens.npy")


def test_no_array_runs_code(tmp_path: Path) -> None:
    mark = tmp_path / "it ran"
    np.save(tmp_path / "object.npy", np.array([Bomb(mark)], dtype=object), allow_pickle=True)
    (tmp_path / "pickle.npy").write_bytes(pickle.dumps(Bomb(mark)))
    for file in ("object.npy", "pickle.npy"):
        with pytest.raises(DataError, match=file):
            as_source(tmp_path / file)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Bomb(mark))).close()
    assert mark.exists()  # it would have been seen


OTHERS = {
    "duo-empty": ("duo-attention", ""),
    "duo-nan": ("duo-attention", "nan\t0.5\n"),
    "duo-wide": ("duo-attention", "0.5\t" * 100_000),
    "prulong-half": ("prulong", "0.5\t1\n"),
    "list-nested": ("retrieval-head", "[" * 100_000),
    "list-digits": ("retrieval-head", '{"0-0": [' + "9" * 5000 + "]}"),
    "list-null": ("retrieval-head", '{"0-0": [null], "0-1": [1], "0-2": [1], "0-3": [1]}'),
    "list-true": ("retrieval-head", '{"0-0": [true], "0-1": [1], "0-2": [1], "0-3": [1]}'),
    "qr-twice": ("qrhead", '[["0-0", 1], ["0-0", 2], ["0-1", 1], ["0-2", 1], ["0-3", 1]]'),
    "qr-null": ("qrhead", "null"),
}


@pytest.mark.parametrize(("format", "text"), OTHERS.values(), ids=OTHERS)
def test_scores_of_other_tools(work: Path, tmp_path: Path, format: str, text: str) -> None:
    file = tmp_path / "heads"
    file.write_text(text)
    with pytest.raises(DataError, match="heads") as caught:
        read_scores(file, HeadScores.load(work / "scores.json"), format=format)
    assert len(str(caught.value)) < 1000


# --- ONNX -------------------------------------------------------------------------------------------------------------


ONNX: dict[str, bytes] = {
    "empty": b"",
    "zeros": b"\0" * 100,
    "json": b"{}",
    "fields-cut": b"\x08\x09\x12\xff\xff\xff\xff\x0f",
    "nested": b"\x3a\xff\xff\x03" * 1000,
}


@pytest.mark.parametrize("data", [*ONNX.values(), None], ids=[*ONNX, "no-decoder"])
def test_onnx_files(copied: Path, data: bytes | None) -> None:
    pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    if data is None:
        x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
        y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
        graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "g", [x], [y])
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
        data = model.SerializeToString()
    file = copied / "model.onnx"
    file.write_bytes(data)
    assert str(file) in refused("generate", copied / "teacher", "--onnx", file, "--prompt", "a")


# --- anything ---------------------------------------------------------------------------------------------------------


leaves = (
    st.none()
    | st.booleans()
    | st.integers(-3, 5)
    | st.sampled_from([10**9, 10**30, -(10**30), 0.5, 1e300, -0.0])
    | st.text(max_size=3)
)
values = st.recursive(
    leaves, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=3), x, max_size=3), max_leaves=6
)


@st.composite
def edits(draw: st.DrawFn, whole: Any) -> Any:
    """A JSON value with another value at one place."""
    if isinstance(whole, (dict, list)) and whole and draw(st.integers(0, 5)):
        keys = sorted(whole) if isinstance(whole, dict) else range(len(whole))
        key = draw(st.sampled_from(list(keys)))
        copied: Any = whole.copy()
        if draw(st.integers(0, 7)):
            copied[key] = draw(edits(whole[key]))
        else:
            del copied[key]
        return copied
    return draw(values)


def small_plan() -> dict[str, Any]:
    model = [LayerScores(f"l{i}", 2, 8, 8, None, (0.1, 0.2, 0.3, 0.4), (0.0,) * 4) for i in range(2)]
    return hs.plan_heads(HeadScores(tuple(model), "any"), ratio="1:1").to_dict()


@settings(derandomize=True, deadline=None, max_examples=150, database=None)
@given(edits(small_plan()))
def test_any_edit_of_a_plan_is_read_or_refused(value: Any) -> None:
    begun = time.process_time()
    try:
        plan = Plan.from_json(json.dumps(value))
    except PlanError as error:
        assert len(str(error)) < 1000
    else:
        assert Plan.from_json(plan.to_json()) == plan
        assert str(plan) and hs.forecast(plan, length=1000)
    assert time.process_time() - begun < SECONDS


@settings(derandomize=True, deadline=None, max_examples=150, database=None)
@given(edits(RECIPES["demo"].to_json()))
def test_any_edit_of_a_recipe_is_read_or_refused(value: Any) -> None:
    try:
        recipe = Recipe.from_json(value, "recipe.json")
    except RecipeError as error:
        assert str(error).startswith("recipe.json: ")
    else:
        assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe
        for stage in recipe.stages:
            assert all(0 <= stage.rate(step) <= 1000 for step in (0, stage.num_steps // 2, stage.num_steps - 1))


words = st.sampled_from(
    [*STEPS, "place-heads", "hybrid", "conv", "a", "full_rope", "true", "-1", "4", "1e9", "{", "}", "=", ","]
)


@settings(derandomize=True, deadline=None, max_examples=200, database=None)
@given(st.lists(words | st.text(max_size=2), max_size=8).map("".join))
def test_any_text_is_a_pipeline_or_refused(text: str) -> None:
    try:
        steps = parse(text)
    except PipelineError:
        return
    assert parse(",".join(map(str, steps))) == steps


@pytest.mark.slow
@settings(derandomize=True, deadline=None, max_examples=60, database=None)
@given(
    st.permutations([*STEPS, "canonicalize-rotary", "place-heads", "untie-projections", "prune-projections"]),
    st.integers(2, 10),
)
def test_passes_in_any_order_run_or_say_which_failed(order: list[str], count: int) -> None:
    regions = hs.capture(tiny("qwen3", num_hidden_layers=1))
    for region in regions:
        region.kinds = ("full", "linear") * 2
    try:
        hs.run_pipeline(regions, ",".join(order[:count]))
    except HydraError as error:
        assert "Error: " not in str(error) and "StopIteration" not in str(error)  # noqa: PT017

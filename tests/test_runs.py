"""A run of the transfer knows what it is, keeps its folder to itself, and refuses what it would train wrongly."""

from __future__ import annotations

import copy
import functools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import hydrasurgery as hs
from hydrasurgery.errors import CheckpointError, DataError, PlanError, RecipeError
from hydrasurgery.transfer import Recipe, Stage, TokenStream, as_source, distill
from hydrasurgery.transfer.data import draw
from hydrasurgery.transfer.identity import hash_tensors, hash_tokens
from hydrasurgery.transfer.losses import SplitModel, language_loss
from tests.families import PLAIN, PlainDecoder, tiny

ALIGN = Stage("align", batch_size=2, length=16, steps=4, lr=1e-2, lr_end=1e-3, warmup=0)
DISTIL = Stage("distil", batch_size=2, length=16, steps=4, lr=1e-3, lr_end=1e-3, warmup=0)
DATA = 3 + torch.randint(1, 4, (2048,), generator=torch.Generator().manual_seed(0)).cumsum(0) % 90


def plan_of(teacher: Any, full: tuple[int, ...]) -> hs.Plan:
    plan = hs.plan_heads(teacher, ratio="1:1", strategy="random")
    kinds = tuple("full" if head in full else "linear" for head in range(4))
    return replace(plan, layers=tuple(replace(layer, kinds=kinds) for layer in plan.layers))


@functools.cache
def made(full: tuple[int, ...]) -> tuple[Any, Any]:
    teacher = tiny("qwen3")
    return teacher, hs.rewrite(teacher, plan_of(teacher, full))


def pair(*full: int) -> tuple[Any, Any]:
    return copy.deepcopy(made(full or (0, 1)))


def run(hybrid: Any, teacher: Any, *stages: Stage, data: Any = DATA, **options: Any) -> Any:
    recipe = Recipe("test", stages or (ALIGN,), checkpoint_every=2)
    return distill(hybrid, teacher, data, progress=False, **{"recipe": recipe, **options})


class Stop(Exception):
    """Raised by a test in the middle of a run."""


def stop_after(step: int, stage: str = "align") -> Callable[[dict[str, Any]], None]:
    def callback(record: dict[str, Any]) -> None:
        if (record["stage"], record["step"]) == (stage, step):
            raise Stop

    return callback


@functools.cache
def template() -> Path:
    """A run of ALIGN and DISTIL that stopped after step 3 of ALIGN: one checkpoint, of step 2."""
    import tempfile

    folder = Path(tempfile.mkdtemp())
    with pytest.raises(Stop):
        run(*reversed(pair()), ALIGN, DISTIL, out=folder, callback=stop_after(3))
    return folder


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    shutil.copytree(template(), tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def checkpoint(stopped: Path) -> Path:
    return stopped / "checkpoints" / "0-align-00000002"


def resume(folder: Path, *stages: Stage, full: tuple[int, ...] = (), change: Any = None, **options: Any) -> Any:
    teacher, hybrid = pair(*full)
    if change is not None:
        teacher, hybrid = change(teacher, hybrid)
    return run(hybrid, teacher, *(stages or (ALIGN, DISTIL)), out=folder, **options)


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "run.lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# --- what a run is ----------------------------------------------------------------------------------------------------


def other_teacher(teacher: Any, hybrid: Any) -> Any:
    with torch.no_grad():
        teacher.model.embed_tokens.weight[5, 7] += 2**-20  # one bit of one weight
    return teacher, hybrid


def other_buffer(teacher: Any, hybrid: Any) -> Any:
    teacher.register_buffer("more", torch.ones(1))
    return teacher, hybrid


def other_layer(teacher: Any, _hybrid: Any) -> Any:
    return teacher, hs.rewrite(teacher, plan_of(teacher, (0, 1)), layer="rule=delta")


def other_scale(teacher: Any, _hybrid: Any) -> Any:  # an option without parameters
    return teacher, hs.rewrite(teacher, plan_of(teacher, (0, 1)), layer="log_length=true")


def late_token() -> Tensor:
    data = DATA.clone()
    data[-1] = 3 if data[-1] != 3 else 4
    return data


class Custom:
    """A source of the user's own, which says nothing of itself."""

    def __init__(self, add: int) -> None:
        self.add = add

    def batch(self, step: int, stage: Stage, generator: torch.Generator) -> dict[str, Tensor]:
        return {"input_ids": torch.randint(3, 90, (stage.batch_size, stage.length), generator=generator) + self.add}


class Named(Custom):
    """One that does, and whose first batches are always the same."""

    def identity(self) -> dict[str, Any]:
        return {"add": self.add}

    def batch(self, step: int, stage: Stage, generator: torch.Generator) -> dict[str, Tensor]:
        batch = super().batch(step, stage, generator)
        return {"input_ids": batch["input_ids"] - self.add}


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "plan": ({"full": (2, 3)}, r'plan\.model\.layers\.0\.self_attn\.kinds was "FFll", is "llFF"'),
    "rule": ({"change": other_layer}, r'options\.rule was "gated_delta", is "delta"'),
    "scale by length": ({"change": other_scale}, r"layer\.model\.layers\.0\.self_attn"),
    "teacher's weight": ({"change": other_teacher}, r"teacher\.blake2b was"),
    "teacher's buffer": ({"change": other_buffer}, r"teacher\.tensors was \d+, is \d+"),
    "teacher's dtype": ({"change": lambda t, h: (t.bfloat16(), h)}, r"teacher\.blake2b was"),
    "last token": ({"data": late_token()}, r"data\.blake2b was"),
    "fewer tokens": ({"data": DATA[:-1]}, r"data\.tokens was 2048, is 2047"),
    "rows": (
        {"data": {"input_ids": [[5, 6, 7]], "labels": [[5, -100, 7]]}},
        r'data\.source was "TokenStream", is "Rows"',
    ),
    "bos": ({"data": TokenStream(DATA, bos=1)}, r"data\.bos was null, is 1"),
    "order": ({"data": TokenStream(DATA, seed=3)}, r"data\.seed was 0, is 3"),
    "seed": ({"seed": 3}, "seed 0, not 3: pass seed=0"),
    "autocast": ({"recipe": Recipe("test", (ALIGN, DISTIL), autocast="bfloat16")}, 'autocast was null, is "bfloat16"'),
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_run_is_refused_with_what_differs(stopped: Path, other: str) -> None:
    options, words = OTHERS[other]
    before = content(stopped)
    with pytest.raises(CheckpointError, match=words) as caught:
        resume(stopped, **options)
    assert "state.json" in str(caught.value)
    assert content(stopped) == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lr": 1e-3}, r"stage 0\.lr was 0\.01, is 0\.001"),
        ({"length": 8}, r"stage 0\.length was 16, is 8"),
        ({"batch_size": 1}, r"stage 0\.batch_size was 2, is 1"),
        ({"trainable": "all"}, r'stage 0\.trainable was "additions", is "all"'),
        ({"clip": None}, r"stage 0\.clip was 1\.0, is null"),
        ({"steps": 8}, "steps was 4, is 8, and with it the learning rates"),
        ({"steps": 1}, "the stage has only 1 steps now"),
    ],
)
def test_a_recipe_that_would_have_gone_otherwise_is_refused(stopped: Path, change: Any, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        resume(stopped, replace(ALIGN, **change), DISTIL)


def test_what_the_steps_done_do_not_depend_on_may_change(stopped: Path) -> None:
    later = replace(DISTIL, lr=5e-4, steps=2)
    recipe = Recipe("another name", (replace(ALIGN, micro_batch=1), later), checkpoint_every=3)
    result = resume(stopped, recipe=recipe)
    assert len(result.history) == ALIGN.num_steps + later.num_steps
    assert Recipe.load(stopped / "recipe.json") == recipe


def test_a_finished_run_with_a_constant_rate_goes_on_for_longer(tmp_path: Path) -> None:
    longer = replace(DISTIL, steps=7)
    teacher, hybrid = pair()
    expected = run(hybrid, teacher, ALIGN, longer)
    resume(tmp_path, ALIGN, DISTIL)
    result = resume(tmp_path, ALIGN, longer)
    assert [record["loss"] for record in result.history] == [record["loss"] for record in expected.history]
    with pytest.raises(CheckpointError, match="only 5 steps"):
        resume(tmp_path, ALIGN, replace(DISTIL, steps=5))


def test_a_stage_that_another_followed_cannot_be_made_longer(tmp_path: Path) -> None:
    constant = replace(ALIGN, lr_end=ALIGN.lr, warmup=0)
    with pytest.raises(Stop):
        resume(tmp_path, constant, DISTIL, callback=stop_after(1, "distil"))
    with pytest.raises(CheckpointError, match="after the stage's end"):
        resume(tmp_path, replace(constant, steps=9), DISTIL)


@pytest.mark.parametrize(("kind", "words"), [(Custom, r"data\.first_batches was"), (Named, r"data\.add was 0, is 1")])
def test_a_source_of_the_users_own_is_told_apart(tmp_path: Path, kind: Any, words: str) -> None:
    with pytest.raises(Stop):
        resume(tmp_path, data=kind(0), callback=stop_after(3))
    with pytest.raises(CheckpointError, match=words):
        resume(tmp_path, data=kind(1))
    assert len(resume(tmp_path, data=kind(0)).history) == 8


def test_equal_tokens_in_another_form_are_the_same_data(stopped: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", DATA.numpy().astype(np.uint16))
    assert len(resume(stopped, data=tmp_path / "ids.npy").history) == 8


def test_resuming_does_not_depend_on_the_weights_of_the_hybrid_that_is_given(stopped: Path) -> None:
    teacher, fresh = pair()
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.add_(0.1)
    used = resume(stopped, change=lambda _teacher, _hybrid: (teacher, fresh)).history
    teacher, hybrid = pair()
    expected = run(hybrid, teacher, ALIGN, DISTIL).history
    assert [record["loss"] for record in used] == [record["loss"] for record in expected]


def test_hashes_see_every_bit_and_nothing_else() -> None:
    values = torch.randn(5, 4)
    assert hash_tensors({"a": values.t().contiguous().t()}) == hash_tensors({"a": values})
    assert hash_tensors({"a": -torch.zeros(2)}) != hash_tensors({"a": torch.zeros(2)})
    assert hash_tensors({"a": values.view(4, 5)}) != hash_tensors({"a": values})
    assert hash_tensors({"a": torch.tensor(1.0), "b": torch.empty(0)}) != hash_tensors({"b": torch.tensor(1.0)})
    tokens = np.arange(100_000)
    assert hash_tokens(tokens) == hash_tokens(tokens.astype(np.int32))
    assert hash_tokens(tokens) != hash_tokens(np.where(tokens == 70_000, 3, tokens))
    assert hash_tokens(tokens) != hash_tokens(tokens[:-1])


def test_a_large_corpus_is_sampled_from_its_first_to_its_last_token() -> None:
    corpus = np.broadcast_to(np.int16(7), (2**29,))  # of two bytes

    class Counting:
        size, read = 2**29, 0

        def __getitem__(self, part: slice) -> np.ndarray:
            Counting.read += 1
            Counting.last = part.stop
            return corpus[part]

    hash_tokens(Counting())  # type: ignore[arg-type]
    assert Counting.read == 4096
    assert Counting.last == Counting.size


@pytest.mark.parametrize("seed", [1.0, "3", None])
def test_a_seed_is_a_whole_number(seed: Any) -> None:
    with pytest.raises(RecipeError, match="whole number"):
        run(*reversed(pair()), seed=seed)


def test_a_seed_of_numpy_is_a_whole_number_too(tmp_path: Path) -> None:
    teacher, hybrid = pair()
    run(hybrid, teacher, replace(ALIGN, steps=1), seed=np.int64(3), out=tmp_path)
    state = json.loads((tmp_path / "checkpoints" / "0-align-00000001" / "state.json").read_text())
    assert state["seed"] == 3


# --- one run in a folder ----------------------------------------------------------------------------------------------

HOLDER = """
import sys, time
from pathlib import Path
from hydrasurgery.transfer.lock import only_run
with only_run(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_folder_belongs_to_one_run_until_its_process_is_killed(stopped: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(stopped)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        before = content(stopped)
        for again in (True, False):
            with pytest.raises(CheckpointError, match=f"another run, of process {holder.pid}"):
                resume(stopped, resume=again)
        assert content(stopped) == before
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert len(resume(stopped).history) == 8


def test_a_run_inside_a_run_is_refused(tmp_path: Path) -> None:
    def callback(_record: dict[str, Any]) -> None:
        resume(tmp_path)

    with pytest.raises(CheckpointError, match=f"of process {os.getpid()}"):
        resume(tmp_path, callback=callback)
    assert len(resume(tmp_path, resume=False).history) == 8


def test_a_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match=r"file: cannot be written to"):
        resume(tmp_path / "file")


# --- files that a run has not written ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("stage", value) for value in (-1, True, 0.0, "0", None, 10**30)],
        *[("step", value) for value in (0, -2, True, 2.0, 3, 10**30, [2])],
        *[("seed", value) for value in (True, 0.0, None, "0")],
        *[("recipe", value) for value in (None, [], {}, {"name": "a", "stages": []}, {"name": "a", "stages": [3]})],
        *[("identity", value) for value in (None, [], {}, {"data": {"first_batches": 3}}, True)],
        *[("version", value) for value in (1, 3, True, None)],
        *[("format", value) for value in (None, "other", 2)],
    ],
)
def test_wrong_entries_of_a_state_are_refused(checkpoint: Path, key: str, value: Any) -> None:
    state = json.loads((checkpoint / "state.json").read_text())
    (checkpoint / "state.json").write_text(json.dumps({**state, key: value}))
    with pytest.raises(CheckpointError, match=r"state\.json"):
        resume(checkpoint.parents[1])
    assert len(resume(checkpoint.parents[1], resume=False).history) == 8


@pytest.mark.parametrize("text", ["[]", "null", "{", "[" * 100_000, '{"stage": ' + "9" * 5000 + "}", "\ud800"])
def test_a_state_that_is_no_object_is_refused(checkpoint: Path, text: str) -> None:
    (checkpoint / "state.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(CheckpointError, match=r"state\.json"):
        resume(checkpoint.parents[1])


def test_a_state_in_the_folder_of_another_step_is_refused(checkpoint: Path) -> None:
    checkpoint.rename(checkpoint.with_name("0-align-00000003"))
    with pytest.raises(CheckpointError, match="step 2 in a folder named 0-align-00000003"):
        resume(checkpoint.parents[1])


STATE: dict[str, Callable[[dict[str, Tensor], str], Any]] = {
    "shape": lambda t, key: t.update({key: t[key][:1].clone()}),
    "dtype": lambda t, key: t.update({key: t[key].double()}),
    "whole numbers": lambda t, key: t.update({key: torch.ones_like(t[key], dtype=torch.int64)}),
    "nan": lambda t, key: t[key].view(-1)[:1].fill_(float("nan")),
    "infinity": lambda t, key: t[key].view(-1)[:1].fill_(float("inf")),
    "missing": lambda t, key: t.pop(key),
    "more": lambda t, key: t.update({f"{key}_more": torch.ones(1)}),
}


@pytest.mark.parametrize("change", STATE)
@pytest.mark.parametrize("entry", ["exp_avg", "exp_avg_sq", "step"])
def test_wrong_tensors_of_an_optimiser_are_refused(checkpoint: Path, entry: str, change: str) -> None:
    tensors = load_file(checkpoint / "optimizer.safetensors")
    key = next(name for name in tensors if name.endswith(f":{entry}") and "a_proj" in name)
    if change == "shape" and entry == "step":
        tensors[key] = torch.ones(2)
    elif change == "dtype" and entry == "step":
        tensors[key] = torch.tensor(2)
    else:
        STATE[change](tensors, key)
    save_file(tensors, checkpoint / "optimizer.safetensors")
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors"):
        resume(checkpoint.parents[1])


@pytest.mark.parametrize("value", [3.0, -2.0, 0.0])
def test_an_optimiser_of_another_step_is_refused(checkpoint: Path, value: float) -> None:
    tensors = load_file(checkpoint / "optimizer.safetensors")
    tensors[next(name for name in tensors if name.endswith(":step"))].fill_(value)
    save_file(tensors, checkpoint / "optimizer.safetensors")
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors.*is not the number 2"):
        resume(checkpoint.parents[1])


def test_negative_squares_are_refused(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "optimizer.safetensors")
    tensors[next(name for name in tensors if name.endswith(":exp_avg_sq"))].view(-1)[0] = -1.0
    save_file(tensors, checkpoint / "optimizer.safetensors")
    with pytest.raises(CheckpointError, match=r"exp_avg_sq has values that no gradient gives"):
        resume(checkpoint.parents[1])


def bad_line(**changes: Any) -> str:
    numbers = {"loss": 1.0, "lr": 1.0, "grad_norm": 1.0, "tokens": 3, "seconds": 1.0}
    return json.dumps({"stage": "align", "stage_index": 0, "step": 1, **numbers, **changes})


BAD_LINES = {
    "list": "[1, 2]",
    "number": "7",
    "null": "null",
    "text": "hello",
    "empty": "{}",
    "blank": "",
    "cut": '{"stage": "al',
    "stage": bad_line(stage=3),
    "index": bad_line(stage_index=-1),
    "true": bad_line(step=True),
    "zero": bad_line(step=0),
    "real": bad_line(step=1.0),
    "loss": bad_line(loss=None),
    "nan": bad_line(loss=float("nan")),
    "huge": bad_line(lr=0).replace('"lr": 0', '"lr": 1e999'),
    "tokens": bad_line(tokens=True),
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_line_of_the_metrics_that_is_no_record_is_named(stopped: Path, line: str) -> None:
    lines = (stopped / "metrics.jsonl").read_text().splitlines()
    for place in (0, 1):
        text = "\n".join([*lines[:place], BAD_LINES[line], *lines[place:]]) + "\n"
        (stopped / "metrics.jsonl").write_text(text)
        before = content(stopped)
        for again in (True, False):
            with pytest.raises(CheckpointError, match=rf"metrics\.jsonl, line {place + 1}"):
                resume(stopped, resume=again)
        assert content(stopped) == before


def test_lines_out_of_order_are_named(stopped: Path) -> None:
    lines = (stopped / "metrics.jsonl").read_text().splitlines()
    (stopped / "metrics.jsonl").write_text("\n".join([lines[1], lines[0], lines[2]]) + "\n")
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl, line 2: its step is not later"):
        resume(stopped)


@pytest.mark.parametrize("rest", ['{"stage": "al', "{", '{"stage": "align", "step": 4, "loss": 0.', "{\udcff"])
def test_the_line_that_a_crash_cut_short_is_dropped(stopped: Path, rest: str) -> None:
    with (stopped / "metrics.jsonl").open("ab") as stream:
        stream.write(rest.encode("utf-8", "surrogateescape"))
    assert [record["step"] for record in resume(stopped).history] == [1, 2, 3, 4, 1, 2, 3, 4]


# --- what is the user's -----------------------------------------------------------------------------------------------

KEPT = (
    "0-align-00000002.bak",
    "0-align-00000001.1",
    ".0-align-00000002.mine",
    "00-align-00000001",
    "0-align-1",
    "notes",
)


def test_nothing_else_in_the_folder_counts_or_is_deleted(stopped: Path) -> None:
    for name in KEPT:
        shutil.copytree(stopped / "checkpoints" / "0-align-00000002", stopped / "checkpoints" / name)
    shutil.copytree(stopped / "checkpoints", stopped / "elsewhere")
    (stopped / "checkpoints" / "9-distil-00000009").with_suffix(".txt").write_text("mine")
    kept = {name: content(stopped / "checkpoints" / name) for name in KEPT}
    for again in (True, False):
        assert len(resume(stopped, resume=again).history) == 8
        assert {name: content(stopped / "checkpoints" / name) for name in KEPT} == kept
        assert (stopped / "checkpoints" / "9-distil-00000009.txt").read_text() == "mine"
        assert len(content(stopped / "elsewhere")) == 3 * (len(KEPT) + 1)


def test_a_file_that_was_put_into_a_checkpoint_stays(checkpoint: Path) -> None:
    (checkpoint / "notes.txt").write_text("mine")
    resume(checkpoint.parents[1])
    assert content(checkpoint) == {"notes.txt": b"mine"}
    assert len(resume(checkpoint.parents[1]).history) == 8
    with pytest.raises(CheckpointError, match="0-align-00000002: is named like a checkpoint"):
        resume(checkpoint.parents[1], resume=False)
    assert content(checkpoint) == {"notes.txt": b"mine"}


@pytest.mark.parametrize("again", [True, False])
def test_a_link_named_like_a_checkpoint_is_refused(stopped: Path, tmp_path: Path, again: bool) -> None:
    (stopped / "checkpoints" / "1-distil-00000002").symlink_to(stopped / "checkpoints" / "0-align-00000002")
    with pytest.raises(CheckpointError, match="1-distil-00000002: is named like a checkpoint"):
        resume(stopped, resume=again)


@pytest.mark.parametrize(("name", "text"), [("metrics.jsonl", "my own\n"), ("recipe.json", '{"flour": 3}')])
@pytest.mark.parametrize("again", [True, False])
def test_a_folder_with_files_of_the_users_own_is_refused(tmp_path: Path, name: str, text: str, again: bool) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=name):
        resume(tmp_path, resume=again)
    assert content(tmp_path) == {name: text.encode()}


# --- rows with columns ------------------------------------------------------------------------------------------------

ROWS = [[5, 6, 7, 8], [9, 10, 11, 12, 13, 14], [20, 21, 22]]


def padded(side: str, width: int = 8) -> dict[str, list[list[int]]]:
    def fill(row: list[int], value: int) -> list[int]:
        rest = [value] * (width - len(row))
        return rest + row if side == "left" else row + rest

    return {
        "input_ids": [fill(row, 0) for row in ROWS],
        "attention_mask": [fill([1] * len(row), 0) for row in ROWS],
        "labels": [fill([-100, *row[1:]], -100) for row in ROWS],
    }


def as_forms(columns: dict[str, list[list[int]]]) -> dict[str, Any]:
    from datasets import Dataset
    from transformers import BatchEncoding

    rows = [{name: values[place] for name, values in columns.items()} for place in range(len(ROWS))]
    tensors = {name: torch.tensor(values) for name, values in columns.items()}
    return {
        "dataset": Dataset.from_dict(columns),
        "dataset of tensors": Dataset.from_dict(columns).with_format("torch"),
        "columns": columns,
        "tensors": tensors,
        "encoding": BatchEncoding(tensors),
        "rows": rows,
        "rows of tensors": [{name: torch.tensor(values) for name, values in row.items()} for row in rows],
        "collated": [{k: v[:2] for k, v in tensors.items()}, {k: v[2:] for k, v in tensors.items()}],
    }


STAGE = replace(ALIGN, batch_size=3, length=8, steps=2)


@pytest.mark.parametrize("side", ["left", "right"])
def test_every_form_of_rows_gives_the_same_batch(side: str) -> None:
    batches = {name: draw(as_source(form), 0, STAGE, 0) for name, form in as_forms(padded(side)).items()}
    first = batches["columns"]
    assert first.mask.sum() == sum(len(row) - 1 for row in ROWS)  # neither padding nor the label of -100
    assert first.inputs["attention_mask"].sum() == sum(map(len, ROWS))
    for name, batch in batches.items():
        for key in ("input_ids", "attention_mask"):
            assert torch.equal(batch.inputs[key], first.inputs[key]), name
        assert torch.equal(batch.mask, first.mask)
        assert torch.equal(batch.labels, first.labels)


def test_rows_of_unequal_length_are_padded_under_a_mask() -> None:
    labels = [[-100, *row[1:]] for row in ROWS]
    source = as_source([{"input_ids": row, "labels": label} for row, label in zip(ROWS, labels, strict=True)])
    batch = draw(source, 0, STAGE, 0)
    assert batch.inputs["input_ids"].shape == (3, 6)
    rows = sorted(ids[mask.bool()].tolist() for ids, mask in zip(*batch.inputs.values(), strict=True))
    assert rows == sorted(ROWS)
    assert batch.mask.sum() == sum(len(row) - 1 for row in ROWS)


def test_columns_that_say_nothing_leave_documents_to_be_packed() -> None:
    plain = as_source(ROWS)
    ones = {"attention_mask": [[1] * len(row) for row in ROWS], "position_ids": [list(range(len(r))) for r in ROWS]}
    source = as_source({"input_ids": ROWS, "labels": ROWS, **ones})
    assert isinstance(source, TokenStream)
    assert source.identity() == plain.identity()


def test_every_row_comes_once_in_an_epoch() -> None:
    source = as_source(padded("right"))
    stage = replace(STAGE, batch_size=1)
    seen = [tuple(draw(source, step, stage, 0).inputs["input_ids"][0].tolist()) for step in range(6)]
    assert len(set(seen[:3])) == len(set(seen[3:])) == 3


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["align", "distil", "lengthen"])
def test_padding_and_ignored_labels_count_in_no_loss(name: Any, side: str) -> None:
    """Rows alone, without padding, give the losses of the padded batch."""
    teacher, hybrid = pair()
    with torch.no_grad():
        for parameter in hybrid.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    stage = replace(STAGE, name=name, steps=1, trainable="all", ce_weight=0.5)
    data = padded(side)
    data["position_ids"] = [[max(0, sum(mask[: t + 1]) - 1) for t in range(8)] for mask in data["attention_mask"]]
    record = run(copy.deepcopy(hybrid), teacher, stage, data=data).history[0]
    assert record["tokens"] == sum(len(row) - 1 for row in ROWS)
    kl = ce = 0.0
    errors = []
    with torch.no_grad():
        for row in ROWS:
            ids = torch.tensor([row])
            student, wanted = (model(ids).logits[0].log_softmax(-1) for model in (hybrid, teacher))
            kl += (wanted.exp() * (wanted - student)).sum(-1)[1:].sum().item()
            ce += torch.nn.functional.nll_loss(student[:-1], ids[0, 1:], reduction="sum").item()
            errors.append(layer_errors(hybrid, teacher, ids))
    count = sum(len(row) - 1 for row in ROWS)
    if name == "align":
        sums = torch.stack(errors).sum(0)  # [layers, 2]
        assert record["loss"] == pytest.approx((sums[:, 0] / sums[:, 1]).mean().item(), rel=1e-4)
    else:
        assert record["ce"] == pytest.approx(ce / count, rel=1e-4)
        expected = ce / count if name == "lengthen" else kl / count + 0.5 * ce / count
        assert record["loss"] == pytest.approx(expected, rel=1e-4)


def layer_errors(hybrid: Any, teacher: Any, ids: Tensor) -> Tensor:
    """[layers, 2]: |y^ - y|^2 and |y|^2 of the row's tokens but the first."""
    found = []

    def follow(region: nn.Module) -> Any:
        def hook(_module: Any, args: Any, kwargs: Any, output: Any) -> None:
            ours = region(*args, **{**kwargs, "past_key_values": None})[0][0, 1:]
            theirs = output[0][0, 1:]
            found.append(torch.stack([(ours - theirs).square().sum(), theirs.square().sum()]))

        return hook

    hooks = [
        teacher.get_submodule(name).register_forward_hook(follow(region), with_kwargs=True)
        for name, region in hs.region_modules(hybrid).items()
    ]
    teacher(ids, use_cache=False)
    for handle in hooks:
        handle.remove()
    return torch.stack(found)


def test_the_token_before_the_first_answer_counts_in_the_cross_entropy_only() -> None:
    teacher, student = tiny("qwen3", seed=1), tiny("qwen3", seed=2)
    labels = [[-100, -100, -100, 8, 9, 10]]
    batch = draw(as_source({"input_ids": [[5, 6, 7, 8, 9, 10]], "labels": labels}), 0, replace(STAGE, batch_size=1), 0)
    _, parts = language_loss(SplitModel(student), SplitModel(teacher), batch, chunk=2)
    with torch.no_grad():
        ours, theirs = (model(batch.inputs["input_ids"]).logits[0].log_softmax(-1) for model in (student, teacher))
    kl = (theirs.exp() * (theirs - ours)).sum(-1)[3:].mean()
    ce = torch.nn.functional.nll_loss(ours[2:5], torch.tensor([8, 9, 10]))
    torch.testing.assert_close(parts["kl"], kl)
    torch.testing.assert_close(parts["ce"], ce)


def test_documents_told_by_positions_do_not_see_each_other() -> None:
    one, two = [5, 6, 7, 8], [9, 10, 11]
    positions = [*range(4), *range(3)]
    packed = {"input_ids": [one + two, two], "position_ids": [positions, list(range(3))]}
    batch = draw(as_source(packed), 0, replace(STAGE, batch_size=2), 0)
    assert "attention_mask" not in batch.inputs
    assert batch.mask.sum() == 10
    teacher, hybrid = pair()
    for model in (teacher, hybrid):
        with torch.no_grad():
            logits = model(**batch.inputs, use_cache=False).logits
            row = next(i for i in range(2) if batch.mask[i].all())
            torch.testing.assert_close(logits[row, :4], model(torch.tensor([one])).logits[0], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(logits[row, 4:], model(torch.tensor([two])).logits[0], atol=1e-5, rtol=1e-4)


def test_documents_in_rows_that_are_padded_on_the_left_are_refused() -> None:
    data = {
        "input_ids": [[0, 5, 6, 7, 8]],
        "attention_mask": [[0, 1, 1, 1, 1]],
        "position_ids": [[0, 0, 1, 0, 1]],
    }
    with pytest.raises(DataError, match="position_ids begin again inside rows that are padded on the left"):
        draw(as_source(data), 0, replace(STAGE, batch_size=1), 0)
    counted = {**data, "position_ids": [[0, 0, 1, 2, 3]]}
    batch = draw(as_source(counted), 0, replace(STAGE, batch_size=1), 0)
    assert set(batch.inputs) == {"input_ids", "attention_mask", "position_ids"}


@pytest.mark.parametrize("form", ["dataset", "columns", "rows"])
def test_unknown_columns_are_told_once(form: str) -> None:
    data = as_forms({**padded("right"), "length": [[4], [6], [3]], "source": [[1], [2], [3]]})[form]
    with pytest.warns(UserWarning, match="not used: length, source") as caught:
        source = as_source(data)
        draw(source, 0, STAGE, 0)
    assert len([warning for warning in caught if "not used" in str(warning.message)]) == 1


@pytest.mark.parametrize("column", ["seq_idx", "document_ids", "cu_seqlens"])
def test_columns_of_documents_are_refused_by_name(column: str) -> None:
    with pytest.raises(DataError, match=f"'{column}' tells documents in a row apart"):
        as_source({**padded("right"), column: [[0], [0], [0]]})


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"input_ids": [[1, 2], [3]], "labels": [[1, 2]]}, "2 rows of input_ids, but 1 of labels"),
        ({"input_ids": [[1, 2], [3]], "labels": [[1, -100], [3, 4]]}, "row 1 of the data: 1 input_ids, but 2 labels"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1, 2]]}, "row 0 .* must be 1 for a token"),
        ({"input_ids": [[1, 2]], "attention_mask": [[0, 0]]}, "row 0 .* no token that counts"),
        ({"input_ids": [[1, 2], [3]], "labels": [[1, 2], [-100]]}, "row 1 .* no token that counts"),
        ({"input_ids": [[1.5, 2.0]], "labels": [[1, 2]]}, "input_ids must be one list of whole numbers"),
        ({"input_ids": [], "labels": []}, "holds no token"),
        ({"labels": [[1]]}, "not 'input_ids'"),
        ([{"input_ids": [1, 2]}, {"labels": [3]}], "not 'input_ids'"),
    ],
)
def test_rows_that_do_not_fit_are_named(data: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        as_source(data)


def test_a_token_that_the_model_does_not_know_is_named_wherever_its_row_is() -> None:
    teacher, hybrid = pair()
    rows = [[5, 6, 7]] * 40 + [[5, 96, 7]]
    data = {"input_ids": rows, "labels": [[-100, *row[1:]] for row in rows]}
    with pytest.raises(DataError, match="token 121 of the training data is 96, but the model embeds 0 to 95"):
        run(hybrid, teacher, replace(ALIGN, batch_size=1, steps=1), data=data)


def test_a_row_that_is_too_long_is_named_before_the_first_step(tmp_path: Path) -> None:
    teacher, hybrid = pair()
    long = replace(DISTIL, length=7)
    with pytest.raises(DataError, match="row 0 of the data has 8 tokens, but a sequence of stage 'distil' takes 7"):
        run(hybrid, teacher, STAGE, long, data=padded("right"), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --- models that do not fit -------------------------------------------------------------------------------------------


class Inside(nn.Module):
    """Wraps a model as torch's and other libraries' wrappers do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def adapted(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM"))


def with_adapter(model: Any) -> Any:
    from peft import LoraConfig

    model.add_adapter(LoraConfig(target_modules=["up_proj"], r=2))
    return model


def compiled_layer(model: Any) -> Any:
    model.model.layers[1] = torch.compile(model.model.layers[1])
    return model


WRAPPED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "peft": (adapted, "PEFT"),
    "add_adapter": (with_adapter, "PEFT"),
    "compiled": (torch.compile, "OptimizedModule; give the model inside"),
    "a compiled layer": (compiled_layer, r"model\.layers\.1 is a OptimizedModule"),
    "DataParallel": (nn.DataParallel, "DataParallel; give the model inside"),
    "DeepSpeed": (type("DeepSpeedEngine", (Inside,), {}), "DeepSpeedEngine; give the model inside"),
}


@pytest.mark.parametrize("wrapper", WRAPPED)
@pytest.mark.parametrize("role", ["hybrid", "teacher"])
def test_a_wrapped_model_is_refused_by_name(wrapper: str, role: str) -> None:
    teacher, hybrid = pair()
    wrap, words = WRAPPED[wrapper]
    models = {"teacher": teacher, "hybrid": hybrid}
    models[role] = wrap(models[role])
    with pytest.raises(PlanError, match=f"{role}: .*{words}"):
        run(models["hybrid"], models["teacher"], DISTIL)


def test_a_hybrid_of_a_teacher_with_an_adapter_is_refused() -> None:
    teacher = adapted(tiny("qwen3"))
    hybrid = hs.rewrite(teacher, hs.plan_heads(teacher, ratio="1:1", strategy="random"))
    with pytest.raises(PlanError, match="merge the adapter first"):
        run(hybrid, teacher, DISTIL)
    with pytest.raises(PlanError, match="merge the adapter first"):
        run(hybrid, None, replace(DISTIL, name="lengthen"))


def test_two_models_over_one_tensor_are_refused() -> None:
    teacher, hybrid = pair()
    hybrid.model.layers[1].mlp.up_proj.weight = teacher.model.layers[1].mlp.up_proj.weight
    with pytest.raises(PlanError, match=r"up_proj\.weight, one tensor in both models"):
        run(hybrid, teacher, DISTIL)
    teacher, hybrid = pair()
    hybrid.model.norm.weight.data = teacher.model.norm.weight.data
    with pytest.raises(PlanError, match=r"model\.norm\.weight of the hybrid is the teacher's model\.norm\.weight"):
        run(hybrid, teacher, DISTIL)


def _one_of_two(rank: int, address: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    teacher, hybrid = pair()
    with pytest.raises(PlanError, match="torch.distributed has 2"):
        run(hybrid, teacher, ALIGN)


def test_several_processes_are_refused(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    address = f"file://{tmp_path / 'meet'}"
    made((0, 1))  # before the fork
    processes = [context.Process(target=_one_of_two, args=(rank, address)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]


MISFITS: dict[str, tuple[Callable[[], Any], tuple[Stage, ...], str]] = {
    "smaller vocabulary": (lambda: tiny("qwen3", vocab_size=95), (ALIGN,), "embeds 96 tokens and the teacher 95"),
    "larger vocabulary": (lambda: tiny("qwen3", vocab_size=97), (DISTIL,), "embeds 96 tokens and the teacher 97"),
    "fewer layers": (lambda: tiny("qwen3", num_hidden_layers=1), (ALIGN,), r"model\.layers\.1\.self_attn is a region"),
    "more layers": (
        lambda: tiny("qwen3", num_hidden_layers=3),
        (ALIGN,),
        r"model\.layers\.2\.self_attn of the teacher",
    ),
    "wider": (lambda: tiny("qwen3", hidden_size=128), (DISTIL, ALIGN), "layers of one width"),
    "fewer heads": (lambda: tiny("qwen3", num_attention_heads=2), (ALIGN,), "layers of one width"),
    "another family": (lambda: tiny("gpt2"), (ALIGN,), r"model\.layers\.0\.self_attn is a region of the hybrid"),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_a_teacher_that_does_not_fit_is_refused_before_the_first_step(tmp_path: Path, misfit: str) -> None:
    make, stages, words = MISFITS[misfit]
    _, hybrid = pair()
    with pytest.raises(PlanError, match=words):
        run(hybrid, make(), *stages, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("change", [{"num_hidden_layers": 3}, {"hidden_size": 128}, {"num_attention_heads": 2}])
def test_another_teacher_of_the_same_vocabulary_can_be_followed(tmp_path: Path, change: dict[str, Any]) -> None:
    _, hybrid = pair()
    assert run(hybrid, tiny("qwen3", **change), DISTIL, out=tmp_path).history[0]["kl"] > 0
    saved = load_file(tmp_path / "checkpoints" / "0-distil-00000004" / "model.safetensors")
    assert saved.keys() == dict(hybrid.named_parameters()).keys()


def test_plain_models_of_other_vocabularies_are_refused() -> None:
    teacher = PlainDecoder(PLAIN[0])
    hybrid = hs.rewrite(teacher, hs.plan_heads(teacher, ratio="1:1", strategy="random"))
    teacher.head = nn.Linear(32, 95)
    with pytest.raises(PlanError, match="gives 96 logits and the teacher 95"):
        run(hybrid, teacher, DISTIL)


def test_columns_that_a_models_forward_does_not_take_are_refused() -> None:
    teacher = PlainDecoder(PLAIN[0])
    hybrid = hs.rewrite(teacher, hs.plan_heads(teacher, ratio="1:1", strategy="random"))
    with pytest.raises(PlanError, match="PlainDecoder cannot be run on the data's input_ids, attention_mask"):
        run(hybrid, teacher, STAGE, data=padded("left"))


# --- dtypes -----------------------------------------------------------------------------------------------------------

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}


@pytest.mark.filterwarnings("ignore:.*half-precision:UserWarning")
@pytest.mark.parametrize("autocast", [None, "bfloat16"])
@pytest.mark.parametrize("ours", ["bf16", "fp32", "fp64"])
@pytest.mark.parametrize("theirs", DTYPES)
def test_a_hybrid_follows_a_teacher_of_any_dtype(theirs: str, ours: str, autocast: Any) -> None:
    teacher, hybrid = pair()
    stages = replace(ALIGN, steps=1), replace(DISTIL, steps=1)
    expected = run(copy.deepcopy(hybrid), teacher, *stages).history
    hybrid, teacher = hybrid.to(DTYPES[ours]), teacher.to(DTYPES[theirs])
    found = run(hybrid, teacher, recipe=Recipe("test", stages, autocast=autocast)).history
    rounds = autocast or {"bf16", "fp16"} & {ours, theirs}
    assert found[0]["loss"] == pytest.approx(expected[0]["loss"], rel=0.02 if rounds else 1e-4)
    assert found[1]["ce"] == pytest.approx(expected[1]["ce"], rel=0.02 if rounds else 1e-4)
    assert {p.dtype for p in hybrid.parameters()} == {DTYPES[ours]}
    assert {p.dtype for p in teacher.parameters()} == {DTYPES[theirs]}


def test_a_hybrid_in_float16_is_refused() -> None:
    teacher, hybrid = pair()
    with pytest.raises(PlanError, match=r"embed_tokens\.weight is float16, in which AdamW's eps"):
        run(hybrid.half(), teacher, ALIGN)


def test_a_body_and_additions_of_two_dtypes_train_as_additions_of_one_do() -> None:
    teacher, hybrid = pair()
    hybrid.bfloat16()
    for name, parameter in hybrid.named_parameters():
        if ".hydra." in name:
            parameter.data = parameter.data.float()
    expected = run(*pair()[::-1], ALIGN).losses("align")
    assert torch.allclose(torch.tensor(run(hybrid, teacher, ALIGN).losses("align")), torch.tensor(expected), rtol=0.1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("devices", [("cpu", "cuda"), ("cuda", "cpu")])
def test_teacher_and_hybrid_on_two_devices(devices: tuple[str, str]) -> None:
    teacher, hybrid = pair()
    expected = run(*copy.deepcopy((hybrid, teacher)), ALIGN, DISTIL).history
    found = run(hybrid.to(devices[0]), teacher.to(devices[1]), ALIGN, DISTIL).history
    assert [r["loss"] for r in found] == pytest.approx([r["loss"] for r in expected], rel=1e-2)

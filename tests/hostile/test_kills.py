"""Killed at any moment, the program leaves what was there or what is new, whole, and no process; a later run clears up after it."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import hydrasurgery as hs
from hydrasurgery.demo.teacher import load_teacher
from hydrasurgery.folders import check_owned, owned_folder
from hydrasurgery.loading import load_model
from hydrasurgery.transfer import Recipe, Stage
from tests.families import tiny
from tests.hostile.commands import alive, contents, end_started, start, succeed, wait_for

ENDS = {signal.SIGKILL: -signal.SIGKILL, signal.SIGINT: 130, signal.SIGTERM: 143}
WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
each_signal = pytest.mark.parametrize("number", ENDS, ids=lambda number: number.name)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Commands in processes of their own have one thread (see `start`), so this one too: with more, sums add up otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def nothing_left():
    yield
    end_started()


def end(process, number, seconds=15):
    """Send a signal to a process and see that it, and all that it started, ends as it should; returns its last words."""
    process.send_signal(number)
    _, said = process.communicate(timeout=seconds)
    if process.returncode == 0:
        pytest.skip("it was done before it was killed")
    assert process.returncode == ENDS[number], said
    assert "Traceback" not in said, said
    wait_for(lambda: not alive(process.pid), seconds)
    lines = said.strip().splitlines()
    if number in WORDS:
        assert lines[-1].startswith(WORDS[number]), said
    return lines[-1] if lines else ""


def workers_of(group):
    """The worker processes of a session, in whatever state."""
    return [pid for pid in alive(group) if b"spawn_main" in read(pid, "cmdline")]


def catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal."""
    (mask,) = (
        line.split()[1] for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt")
    )
    return bool(int(mask, 16) >> (number - 1) & 1)


def has_loaded(pid, library):
    return library.encode() in read(pid, "maps")


def read(pid, name):
    """What the system says of a process; nothing if it has ended."""
    try:
        return Path("/proc", str(pid), name).read_bytes()
    except OSError:
        return b""


# --- without a model: quick -------------------------------------------------------------------------------------------------------

REPLACE = """
import sys
from hydrasurgery.folders import owned_folder
for number in range(1, 10**6):
    with owned_folder(sys.argv[1]) as folder:
        for name in "abc":
            (folder / name).write_text(str(number) * 1000)
    print(number, flush=True)
"""


@pytest.mark.parametrize("seed", range(4))
def test_a_folder_that_is_being_replaced_is_always_whole(tmp_path, seed):
    target = tmp_path / "model"
    for _ in range(3):
        process = start(REPLACE, target, own=True)
        process.stdout.readline()
        time.sleep(random.Random(seed).uniform(0, 0.1))
        process.kill()
        process.communicate()
        check_owned(target)  # what is there is what was written, all of one time
        assert len({(target / name).read_text() for name in "abc"}) == 1
    with owned_folder(target) as folder:
        (folder / "a").touch()
    assert os.listdir(tmp_path) == ["model"]


WAIT = """
import sys, time
from pathlib import Path
from hydrasurgery.cli.signals import hinting, stopping
from hydrasurgery.files import hidden
with stopping(), hinting("go on so"), hidden(Path(sys.argv[1])) as path:
    path.mkdir()
    {work}
"""
SLEEP = """print("ready", flush=True)
    time.sleep(60)"""
LOST = """class Deaf:
        def __del__(self):
            print("ready", flush=True)
            time.sleep(60)
    Deaf()
    time.sleep(60)"""
OTHER = """try:
        print("ready", flush=True)
        time.sleep(60)
    except BaseException:
        raise OSError("not there") from None"""
IMPORT = """(path / "slow.py").write_text('import time; print("ready", flush=True); time.sleep(1); print("whole", flush=True)')
    sys.path.insert(0, str(path))
    import slow
    time.sleep(60)"""
STUBBORN = """try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        time.sleep(60)"""
AFTER = """
import atexit, sys, time
from hydrasurgery.cli.signals import stopping
def late():
    print("ready", flush=True)
    time.sleep(60)
with stopping():
    atexit.register(late)
    sys.exit(int(sys.argv[1]))
"""


@pytest.mark.parametrize("work", [SLEEP, LOST, OTHER], ids=["sleep", "lost", "other"])
@pytest.mark.parametrize("number", WORDS, ids=lambda number: number.name)
def test_a_signal_ends_the_work_and_clears_up(tmp_path, number, work):
    process = start(WAIT.format(work=work), tmp_path, own=True)
    process.stdout.readline()
    process.send_signal(number)
    _, said = process.communicate(timeout=15)
    assert (process.returncode, said) == (ENDS[number], f"{WORDS[number]}: go on so\n")
    assert not os.listdir(tmp_path)


def test_a_signal_waits_for_the_end_of_an_import(tmp_path):
    process = start(WAIT.format(work=IMPORT), tmp_path, own=True)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=15) == ("whole\n", "interrupted: go on so\n")
    assert process.returncode == 130
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("code", [0, 3])
def test_a_signal_after_the_work_leaves_its_outcome(code):
    process = start(AFTER, code, own=True)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=15) == ("", "")
    assert process.returncode == code


def test_a_second_signal_ends_what_does_not_heed_the_first(tmp_path):
    process = start(WAIT.format(work=STUBBORN), tmp_path, own=True)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    wait_for(lambda: not catches(process.pid, signal.SIGINT))  # or both would be one
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(5) == -signal.SIGINT
    process.communicate()


@pytest.mark.slow
def test_what_does_not_heed_a_signal_ends_all_the_same(tmp_path):
    process = start(WAIT.format(work=STUBBORN), tmp_path, own=True)
    process.stdout.readline()
    assert end(process, signal.SIGTERM) == "terminated: go on so"


@pytest.mark.parametrize("library", ["libtorch_cpu", "_multiarray_umath", "_regex"])
def test_a_signal_while_the_program_starts_gives_no_traceback(tmp_path, library):
    process = start("plan", "--model", tmp_path / "none", "--out", tmp_path / "plan.json")
    wait_for(lambda: has_loaded(process.pid, library))
    assert end(process, signal.SIGINT) == "interrupted"
    assert process.returncode == 130
    assert not os.listdir(tmp_path)


# --- commands ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with the shipped teacher as `teacher`, and `plan.json`, `data.txt` and `recipe.json`; a tiny pair in `tiny`."""
    folder = tmp_path_factory.mktemp("kills")
    model, tokenizer = load_teacher()
    small = tiny("qwen3", vocab_size=720)
    for name, saved in (("teacher", model), ("tiny/teacher", small)):
        saved.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    hs.plan_heads(model, strategy="random").save(folder / "plan.json")
    hs.plan_heads(small, strategy="random", ratio="1:1").save(folder / "tiny" / "plan.json")
    succeed(*_rewrite(folder / "tiny", folder / "tiny" / "hybrid"))
    (folder / "data.txt").write_text("A statement is executed when it is reached. " * 400, encoding="utf-8")
    stages = (
        Stage("align", batch_size=2, length=64, lr=1e-2, lr_end=1e-3, steps=40, warmup=1),
        Stage("distil", batch_size=2, length=64, lr=1e-3, lr_end=1e-3, steps=40, warmup=1),
    )
    Recipe("tiny", stages, checkpoint_every=5).save(folder / "recipe.json")
    return folder


def _rewrite(folder, out):
    return ("rewrite", folder / "teacher", "--plan", folder / "plan.json", "--out", out)


def is_writing(folder: Path) -> bool:
    """Whether a process is making something in a folder: it has a hidden name with something in it."""
    return any(path.is_dir() and os.listdir(path) for path in folder.glob(".hydrasurgery-*[0-9a-f]"))


@pytest.mark.slow
@each_signal
@pytest.mark.parametrize("moment", [5.0, "writing"])
def test_rewrite(work, tmp_path, number, moment):
    succeed(*_rewrite(work / "tiny", tmp_path / "hybrid"))
    before = contents(tmp_path)
    process = start(*_rewrite(work, tmp_path / "hybrid"))
    if moment == "writing":
        wait_for(lambda: is_writing(tmp_path))
    else:
        time.sleep(moment)
    end(process, number)
    after = {name: value for name, value in contents(tmp_path).items() if not name.startswith(".")}
    if after != before:  # the signal came when it was done
        check_owned(tmp_path / "hybrid")
        assert len(load_model(tmp_path / "hybrid").model.layers) == 8
    succeed(*_rewrite(work / "tiny", tmp_path / "hybrid"))
    assert contents(tmp_path) == before


@pytest.mark.slow
@each_signal
def test_score_and_plan(work, tmp_path, number):
    for moment, command in (
        (6, ("score", work / "teacher", "--length", 256, "--out", tmp_path / "out.json")),
        (3, ("plan", "--model", work / "teacher", "--strategy", "all-linear", "--out", tmp_path / "out.json")),
    ):
        (tmp_path / "out.json").write_text("{}")
        process = start(*command)
        time.sleep(moment)
        end(process, number)
        assert (tmp_path / "out.json").read_text() == "{}"
        assert not [
            name for name in os.listdir(tmp_path) if name != "out.json" and not name.startswith(".hydrasurgery-")
        ]


@pytest.fixture(scope="module")
def whole_run(work):
    """What a run that nobody disturbs gives."""
    succeed(*_distill(work, work / "whole"))
    return work / "whole"


def _distill(work, out):
    data = ("--data", work / "data.txt", "--recipe", work / "recipe.json", "--device", "cpu", "--out", out)
    return ("distill", work / "tiny" / "hybrid", "--teacher", work / "tiny" / "teacher", *data)


def records(run: Path):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


@pytest.mark.slow
@each_signal
@pytest.mark.parametrize("moment", ["checkpoints/0-align-*", "checkpoints/.hydrasurgery-*/*", "checkpoints/1-distil-*"])
def test_distill_goes_on_as_if_it_had_not_been_killed(work, whole_run, tmp_path, number, moment):
    run = tmp_path / "run"
    process = start(*_distill(work, run))
    wait_for(lambda: process.poll() is not None or any(run.glob(moment)))
    said = end(process, number)
    if number in WORDS:
        assert "--resume" in said
    succeed(*_distill(work, run), "--resume")
    assert not [path for path in run.rglob("*") if path.name.startswith(".hydrasurgery-")]
    assert records(run) == records(whole_run)
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (run, whole_run))
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == theirs[name]).all() for name in ours)


@pytest.mark.slow
@each_signal
@pytest.mark.parametrize("kind", ["onnx", "pt2"])
def test_export(work, tmp_path, number, kind):
    out = tmp_path / f"model.{kind}"
    process = start("export", work / "tiny" / "teacher", "--out", out)
    wait_for(lambda: any(tmp_path.iterdir()))
    time.sleep(random.Random(number).uniform(0, 1))  # of more than two that the export takes
    end(process, number)
    assert not out.exists()
    succeed("export", work / "tiny" / "teacher", "--out", out)
    assert os.listdir(tmp_path) == [out.name]


# The program, with scores for its demo that take no time.
HASTY = """
from hydrasurgery.cli import main
from hydrasurgery.demo import run
from hydrasurgery.selection import score_heads
run.score_heads = lambda *models, **_: score_heads(*models, method="reconstruction", length=64, count=1)
main()
"""
MOMENTS = [
    *(("starting", number) for number in WORDS),
    *((moment, number) for moment in ("loading", "training") for number in ENDS),
]


@pytest.mark.slow
@pytest.mark.parametrize(("moment", "number"), MOMENTS, ids=lambda value: getattr(value, "name", value))
def test_the_demos_workers_end_with_it(tmp_path, number, moment):
    process = start(HASTY, "demo", "--quick", "--out", tmp_path / "demo", own=True)
    wait_for(lambda: process.poll() is not None or (tmp_path / "demo" / "plan.json").exists())
    wait_for(lambda: len(alive(process.pid)) >= 3)  # the program, its tracker of resources and a worker
    if moment == "loading":
        wait_for(lambda: [pid for pid in workers_of(process.pid) if has_loaded(pid, "libtorch_cpu")])
    if moment == "training":
        wait_for(lambda: any((tmp_path / "demo" / "runs").glob("*/metrics.jsonl")))
    end(process, number, seconds=10)


def test_a_demo_whose_worker_is_killed_says_so(tmp_path):
    """Without the scoring and the training: the arms alone, the teacher's own among them."""
    script = """
import sys
from pathlib import Path
from rich.console import Console
import hydrasurgery as hs
from hydrasurgery.demo.arms import Arm, run_arms
from hydrasurgery.demo.teacher import load_teacher
from hydrasurgery.errors import DemoError
if __name__ == "__main__":
    plan = hs.plan_heads(load_teacher()[0], strategy="all-full")
    try:
        run_arms([Arm("teacher", plan)], Path(sys.argv[1]), Console(stderr=True))
    except DemoError as error:
        print(error)
"""
    (tmp_path / "script.py").write_text(script)
    process = start(
        "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')",
        tmp_path / "script.py",
        tmp_path / "runs",
        own=True,
    )
    workers = wait_for(lambda: [pid for pid in workers_of(process.pid) if has_loaded(pid, "libtorch_cpu")])
    os.kill(workers[0], signal.SIGKILL)
    said, _ = process.communicate(timeout=15)
    assert said.startswith("a worker process was killed")
    wait_for(lambda: not alive(process.pid))

"""What the program writes destroys nothing, is whole or absent, and is refused before the work."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import hydrasurgery as hs
from hydrasurgery import renaming
from hydrasurgery.demo.corpus import build_tokenizer
from hydrasurgery.demo.run import draw_recall, run_demo
from hydrasurgery.errors import DataError, ExportError, OutputError, PlanError, SequenceLengthError
from hydrasurgery.evaluation import kl_to_teacher
from hydrasurgery.files import atomic_directory, atomic_write_bytes, atomic_write_text, check_file, hidden
from hydrasurgery.folders import MANIFEST, check_owned, owned_folder
from hydrasurgery.selection.plots import draw_plan
from hydrasurgery.transfer import Recipe, Stage, as_source, distill
from hydrasurgery.transfer.data import check_tokens
from tests.families import tiny
from tests.hostile.commands import ROOT, contents, fail, little_room, run, start, succeed

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with `teacher`, `plan.json`, `scores.json`, `hybrid`, `data.txt` and `recipe.json`."""
    folder = tmp_path_factory.mktemp("outputs")
    model, tokenizer = tiny("qwen3", vocab_size=720, num_hidden_layers=1), build_tokenizer()
    model.save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    hs.plan_heads(model, strategy="random", ratio="1:1").save(folder / "plan.json")
    options = ("--method", "reconstruction", "--length", 32, "--count", 1)
    succeed("score", folder / "teacher", *options, "--out", folder / "scores.json")
    succeed("rewrite", folder / "teacher", "--plan", folder / "plan.json", "--out", folder / "hybrid")
    (folder / "data.txt").write_text("A statement is executed when it is reached. " * 40, encoding="utf-8")
    stage = Stage("align", batch_size=1, length=32, lr=1e-2, lr_end=1e-3, steps=2, warmup=1)
    Recipe("tiny", (stage,), checkpoint_every=1).save(folder / "recipe.json")
    return folder


def rewrite(work, out):
    return ("rewrite", work / "teacher", "--plan", work / "plan.json", "--out", out)


# --- a folder is replaced only while it is what was written there -----------------------------------------------------------------


def add_file(folder):
    (folder / "notes.txt").write_text("mine")


def add_hidden_file(folder):
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("mine")


def add_model(folder):
    shutil.copytree(folder, folder / "teacher", ignore=shutil.ignore_patterns("teacher"))


def add_empty_folder(folder):
    (folder / "later").mkdir()


def add_link(folder):
    (folder / "link").symlink_to("/etc/hostname")


def train(folder):
    weights = bytearray((folder / WEIGHTS).read_bytes())
    weights[-1] ^= 1  # of equal size
    (folder / WEIGHTS).write_bytes(weights)


def edit(folder):
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")


def lose_manifest(folder):
    (folder / MANIFEST).unlink()


def break_manifest(folder):
    (folder / MANIFEST).write_text("[")


def link_weights(folder):
    (folder / WEIGHTS).rename(folder.parent / "weights")
    (folder / WEIGHTS).symlink_to(folder.parent / "weights")


CHANGES = {
    add_file: "notes.txt was put there",
    add_hidden_file: ".git/HEAD was put there",
    add_model: "teacher/config.json was put there",
    add_empty_folder: "later was put there",
    add_link: "link was put there",
    train: f"{WEIGHTS} was changed",
    edit: "config.json was changed",
    lose_manifest: "exists",
    break_manifest: f"{MANIFEST} is not what was saved",
    link_weights: f"{WEIGHTS} was changed",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_was_added_to_or_changed_in_a_saved_model_is_not_lost(work, tmp_path, change):
    out = tmp_path / "model"
    shutil.copytree(work / "hybrid", out)
    check_owned(out)  # a copy is as good as what was saved
    change(out)
    before = contents(tmp_path)
    line = fail(*rewrite(work, out))
    assert line.startswith(f"{out}: {CHANGES[change]}"), line
    assert contents(tmp_path) == before
    with pytest.raises(OutputError), owned_folder(out):
        raise AssertionError("the work began")


def test_a_model_that_others_saved_is_not_replaced(work, tmp_path):
    shutil.copytree(work / "teacher", tmp_path / "theirs")
    before = contents(tmp_path)
    assert "theirs: exists" in fail(*rewrite(work, tmp_path / "theirs"))
    run_folder = tmp_path / "run"
    shutil.copytree(work / "teacher", run_folder / "model")
    data = ("--teacher", work / "teacher", "--data", work / "data.txt", "--recipe", work / "recipe.json")
    assert "run/model: exists" in fail("distill", work / "hybrid", *data, "--out", run_folder)
    shutil.rmtree(run_folder)
    assert contents(tmp_path) == before


def test_a_saved_model_is_replaced_and_a_link_to_it_stays(work, tmp_path):
    (tmp_path / "link").symlink_to("model")
    for options in ((), ("--layer", "untie=true")):
        succeed(*rewrite(work, tmp_path / "link"), *options)
        assert sorted(os.listdir(tmp_path)) == ["link", "model"]
        assert os.readlink(tmp_path / "link") == "model"
    assert "untie=true" in succeed("inspect", tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").unlink()  # nothing is lost with what is left
    (tmp_path / "model").chmod(0o700)
    succeed(*rewrite(work, tmp_path / "model"))
    assert stat.S_IMODE((tmp_path / "model").stat().st_mode) == 0o700
    (tmp_path / "empty").mkdir()
    succeed(*rewrite(work, tmp_path / "empty"))


def make(folder, text):
    with owned_folder(folder) as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner" / "file").write_text(text)


def test_what_appears_during_the_work_is_kept(tmp_path):
    make(tmp_path / "model", "old")
    with pytest.raises(OutputError, match="inner/mine was put there"), owned_folder(tmp_path / "model"):
        (tmp_path / "model" / "inner" / "mine").write_text("mine")
    for name, kind in (("a", owned_folder), ("b", atomic_directory)):
        with pytest.raises(OutputError, match=rf"{name}: "), kind(tmp_path / name) as temporary:
            (temporary / "file").write_text("new")
            (tmp_path / name).mkdir()
            (tmp_path / name / "mine").write_text("mine")
    assert contents(tmp_path)["model/inner/file"] == b"old"
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "model"]
    with pytest.raises(ExportError, match="made by another program meanwhile"), _new_file(tmp_path / "c"):
        (tmp_path / "c").write_text("mine")
    assert (tmp_path / "c").read_text() == "mine"


def _new_file(path):
    from contextlib import contextmanager

    from hydrasurgery.files import new_files

    @contextmanager
    def block():
        with new_files(path) as folder:
            (folder / path.name).write_text("new")
            yield

    return block()


def test_at_no_moment_is_there_nothing(tmp_path):
    target = tmp_path / "model"
    make(target, "0")
    missing, stop = [], threading.Event()

    def watch():
        while not stop.is_set():
            if not os.path.isfile(target / "inner" / "file"):
                missing.append(True)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for number in range(100):
        make(target, str(number))
    stop.set()
    watcher.join()
    assert not missing
    assert sorted(os.listdir(tmp_path)) == ["model"]


def test_where_folders_cannot_be_exchanged_a_failure_brings_the_old_one_back(tmp_path, monkeypatch):
    monkeypatch.setattr(renaming, "_renamed", lambda *_: False)  # as on a file system without the call
    make(tmp_path / "model", "old")
    make(tmp_path / "model", "new")
    assert contents(tmp_path)["model/inner/file"] == b"new"
    with pytest.raises(FileNotFoundError):
        renaming.exchange(tmp_path / "nothing", tmp_path / "model")
    assert contents(tmp_path)["model/inner/file"] == b"new"
    assert os.listdir(tmp_path) == ["model"]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError):
        renaming.rename_new(tmp_path / "model", tmp_path / "file")


# --- outputs that are inputs ------------------------------------------------------------------------------------------------------


def test_no_output_overwrites_an_input_or_another_output(work, tmp_path):
    here = tmp_path / "work"
    shutil.copytree(work, here)
    scores, plan, teacher = here / "scores.json", here / "plan.json", here / "teacher"
    os.link(scores, here / "hard.json")
    (here / "soft.json").symlink_to("scores.json")
    (here / "soft").symlink_to("teacher")
    data = ("--teacher", teacher, "--data", here / "run" / "metrics.jsonl", "--recipe", here / "recipe.json")
    (here / "run").mkdir()
    shutil.copy(here / "data.txt", here / "run" / "metrics.jsonl")
    before = contents(here)
    commands = [
        *(
            ("plot", scores, "--out", out)
            for out in [scores, here / "hard.json", here / "soft.json", here / "." / "scores.json"]
        ),
        ("plan", "--scores", scores, "--out", scores),
        ("plan", "--scores", scores, "--out", here / "new.json", "--plot", here / "hard.json"),
        ("plan", "--scores", here / "soft.json", "--out", scores),
        ("plan", "--model", teacher, "--strategy", "all-full", "--out", teacher / "config.json"),
        ("plan", "--model", teacher, "--strategy", "all-full", "--out", here / "new", "--plot", here / "new"),
        ("score", teacher, "--out", here / "soft" / WEIGHTS),
        ("score", teacher, "--out", here / "new.json", "--plot", here / "." / "new.json"),
        ("eval", teacher, "--out", teacher / "tokenizer.json"),
        ("eval", here / "hybrid", "--teacher", teacher, "--out", teacher / "config.json"),
        ("bench", "fusion-forward", "--device", "cpu", "--out", here / "b", "--plot", here / "b"),
        ("bench", "model", "--model", teacher, "--device", "cpu", "--out", teacher / "config.json"),
        ("bench", "model", "--model", teacher, "--device", "cpu", "--plot", teacher / WEIGHTS),
        ("rewrite", here / "hybrid", "--plan", plan, "--out", here / "hybrid"),
        ("rewrite", teacher, "--plan", here / "hybrid" / "config.json", "--out", here / "hybrid"),
        ("rewrite", teacher, "--plan", plan, "--out", here / "soft"),
        ("distill", here / "hybrid", *data, "--out", here / "run"),
    ]
    for command in commands:
        fail(*command)
        assert contents(here) == before, command


def test_links_pipes_and_devices_are_written_through(work, tmp_path, capfd):
    plan = ("plan", "--scores", work / "scores.json", "--ratio", "1:1", "--out")
    succeed(*plan, tmp_path / "plain.json")
    expected = (tmp_path / "plain.json").read_bytes()
    for name, where in (("there", "plain.json"), ("dangling", "new.json")):
        (tmp_path / name).symlink_to(where)
        (tmp_path / where).unlink(missing_ok=True)
        succeed(*plan, tmp_path / name)
        assert os.readlink(tmp_path / name) == where
        assert (tmp_path / where).read_bytes() == expected
    succeed(*plan, "/dev/null")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    capfd.readouterr()
    for name in ("/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"):
        succeed(*plan, name)
        assert capfd.readouterr().out.encode() == expected
    os.mkfifo(tmp_path / "pipe")
    got = []
    reader = threading.Thread(target=lambda: got.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    succeed(*plan, tmp_path / "pipe")
    reader.join()
    assert got == [expected]
    assert stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode)


def test_a_replaced_file_keeps_its_mode(tmp_path):
    private = tmp_path / "private"
    private.touch(0o600)
    atomic_write_text(private, "new")
    assert stat.S_IMODE(private.stat().st_mode) == 0o600


def test_redirected_output_is_appended_to_and_not_replaced(tmp_path):
    script = "from hydrasurgery.files import atomic_write_text as w; print('1'); w('/dev/stdout', '2\\n'); print('3')"
    with (tmp_path / "all").open("w") as out:
        subprocess.run([sys.executable, "-c", script], stdout=out, check=True, cwd=ROOT)
    assert (tmp_path / "all").read_text() == "1\n2\n3\n"


# --- a full disk ------------------------------------------------------------------------------------------------------------------


def test_a_full_disk_is_told_and_nothing_is_left(work, tmp_path):
    model = load(work / "teacher")
    before = contents(tmp_path)
    with little_room(60_000):
        for refused in (
            lambda: fail(*rewrite(work, tmp_path / "hybrid")),
            lambda: fail("export", work / "teacher", "--out", tmp_path / "model.pt2"),
        ):
            line = refused()
            assert "cannot be written (File too large; " in line
            assert "bytes are free); nothing was left there" in line
        with pytest.raises(OutputError, match="picture"):
            atomic_write_bytes(tmp_path / "picture", b"0" * 100_000)
        with pytest.raises(OutputError, match="checkpoint"), atomic_directory(tmp_path / "checkpoint") as folder:
            model.save_pretrained(folder)
    assert contents(tmp_path) == before
    with pytest.raises(OutputError, match=r"/dev/full: cannot be written \(No space left on device"):
        atomic_write_text("/dev/full", "text")


def load(folder):
    from hydrasurgery.loading import load_model

    return load_model(folder)


def test_a_checkpoint_for_which_there_is_no_room_leaves_the_one_before(work, tmp_path):
    teacher, hybrid = load(work / "teacher"), load(work / "hybrid")
    recipe = Recipe.load(work / "recipe.json")
    room = []

    def shrink(record):
        room.append(little_room(2_000))
        room[0].__enter__()

    try:
        with pytest.raises(OutputError, match="bytes are free"):
            distill(
                hybrid, teacher, torch.arange(512), recipe=recipe, out=tmp_path / "run", progress=False, callback=shrink
            )
    finally:
        room[0].__exit__(None, None, None)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["0-align-00000001"]


@pytest.mark.slow
@pytest.mark.parametrize("size", ["64k", "512k"])
def test_a_small_disk_is_told_of_by_every_writer(work, tmp_path, size):
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], capture_output=True).returncode
    ):
        pytest.skip("no file system can be mounted")
    try:
        (disk / "filler").write_bytes(b"0" * 1024 * (int(size[:-1]) - 32))
        for command in (
            rewrite(work, disk / "hybrid"),
            *(("export", work / "teacher", "--out", disk / f"model.{kind}") for kind in ("pt2", "onnx")),
        ):
            assert "No space left on device" in fail(*command)
            assert os.listdir(disk) == ["filler"]
    finally:
        subprocess.run(["umount", disk], check=True)


# --- early refusals ---------------------------------------------------------------------------------------------------------------


def bad_files(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    return [tmp_path / "folder", tmp_path / "file" / "below", tmp_path / ("n" * 300), "/proc/none/x", "/", ".", ""]


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_loaded(tmp_path):
    bad = bad_files(tmp_path)
    before = contents(tmp_path)
    none = tmp_path / "none"  # no model: were it looked at first, the message would name it
    for out in bad:
        for command in (
            ("score", none, "--out", out),
            ("score", none, "--out", tmp_path / "s", "--plot", out),
            ("plan", "--model", none, "--out", out),
            ("plan", "--model", none, "--out", tmp_path / "s", "--plot", out),
            ("plot", none, "--kind", "ablation", "--model", none, "--out", out),
            ("eval", none, "--out", out),
            ("bench", "--device", "cpu", "--out", out),
            ("bench", "--device", "cpu", "--plot", out),
        ):
            line = fail(*command)
            assert line.startswith(f"{out or '.'}: "), line
            assert str(none) not in line
    assert contents(tmp_path) == before


def test_a_folder_that_cannot_be_made_is_refused_before_anything_is_loaded(work, tmp_path):
    bad = [path for path in bad_files(tmp_path) if Path(path).name != "folder"] + [tmp_path / "file", "/dev/null", ".."]
    bad.append("caf\udce9")  # a name in Latin-1, as Python has it, which safetensors cannot write
    before = contents(tmp_path)
    none = tmp_path / "none"
    for out in bad:
        for command in (
            ("rewrite", none, "--plan", work / "plan.json", "--out", out),
            ("distill", none, "--teacher", none, "--data", work / "data.txt", "--recipe", "demo", "--out", out),
            ("demo", "--out", out),
        ):
            line = fail(*command)
            assert line.startswith(f"{out or '.'}".encode(errors="backslashreplace").decode()), line
            assert str(none) not in line
    assert contents(tmp_path) == before
    for out in ("x.onnx", "x.pt2"):
        assert "cannot be written" in fail("export", none, "--out", tmp_path / "file" / out)
        assert "is not UTF-8" in fail("export", none, "--out", tmp_path / f"caf\udce9{out}")


@pytest.mark.parametrize("name", ["a.pdf", "a.SVG", "a.b.jpg"])
def test_a_name_of_another_kind_of_picture_is_refused(work, tmp_path, name):
    for command in (
        ("score", tmp_path / "none", "--out", tmp_path / "s", "--plot", tmp_path / name),
        ("plan", "--scores", work / "scores.json", "--out", tmp_path / "s", "--plot", tmp_path / name),
        ("plot", work / "scores.json", "--out", tmp_path / name),
        ("bench", "--device", "cpu", "--plot", tmp_path / name),
    ):
        assert "drawn as PNG" in fail(*command)
    with pytest.raises(OutputError, match="drawn as PNG"):
        draw_plan(hs.Plan.load(work / "plan.json"), tmp_path / name)
    assert not contents(tmp_path)


def test_no_hybrid_is_its_own_teacher(work, tmp_path):
    (tmp_path / "link").symlink_to(work / "hybrid")
    options = ("--data", work / "data.txt", "--recipe", work / "recipe.json", "--out", tmp_path / "run")
    assert "hybrid and teacher in one" in fail("distill", work / "hybrid", "--teacher", tmp_path / "link", *options)


def test_a_disk_is_no_file(tmp_path):
    if os.geteuid():
        pytest.skip("needs root")
    os.mknod(tmp_path / "disk", 0o600 | stat.S_IFBLK, os.makedev(7, 200))
    with pytest.raises(OutputError, match="is a disk"):
        check_file(tmp_path / "disk")


def test_a_measurement_that_cannot_be_saved_is_printed(work, tmp_path):
    succeed("plan", "--scores", work / "scores.json", "--ratio", "1:1", "--out", tmp_path / "plan.json")
    sizes = ("--lengths", 32, "--count", 1)
    succeed("eval", work / "teacher", *sizes, "--out", tmp_path / "result.json")
    kept = contents(tmp_path)
    with little_room(100):
        for command, name in (
            (("plan", "--scores", work / "scores.json", "--ratio", "1:1"), "plan.json"),
            (("eval", work / "teacher", *sizes), "result.json"),
        ):
            result = run(*command, "--out", tmp_path / name)
            assert result.exit_code == 1
            assert json.loads(result.stdout) == json.loads(kept[name])
            assert f"{tmp_path / name}: cannot be written" in result.stderr
    assert contents(tmp_path) == kept


def test_an_encoding_that_lacks_characters_loses_no_output(work, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "iso8859-5")
    plan = ("plan", "--scores", work / "scores.json", "--ratio", "1:1", "--out", tmp_path / "plan.json")
    process = start(*plan)
    out, error = process.communicate()
    assert (process.returncode, error) == (0, "")
    assert "\\u2588" in out and "At 32,768 tokens" in out


@pytest.mark.parametrize(
    "failing",
    [lambda: torch.empty(2**60, dtype=torch.uint8), lambda: bytearray(2**62)],
    ids=["of-torch", "of-python"],
)
def test_a_lack_of_memory_is_told_in_a_line(tmp_path, monkeypatch, failing):
    monkeypatch.setattr("hydrasurgery.cli.models.load_model", lambda *args: failing())
    assert fail("inspect", tmp_path).startswith("out of memory")


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta", "cpu:x", "", "gpu:0"])
def test_a_device_that_is_not_there_is_refused_before_anything_is_loaded(tmp_path, device):
    for command in (
        ("score", tmp_path / "none", "--out", tmp_path / "s"),
        ("generate", tmp_path / "none", "--prompt", "a"),
        ("kernels",),
    ):
        result = run(*command, "--device", device)
        assert result.exit_code == 2, result.output
        assert "not on this machine" in " ".join(result.stderr.replace("│", " ").split())


def test_data_that_is_none_is_refused_before_anything_is_loaded(work, tmp_path):
    kinds = {
        "archive.npz": lambda path: np.savez(path, tokens=np.arange(9)),
        "floats.npy": lambda path: np.save(path, np.ones(99)),
        "flags.npy": lambda path: np.save(path, np.ones(99, bool)),
        "cube.npy": lambda path: np.save(path, np.ones((4, 4, 4), int)),
        "number.npy": lambda path: np.save(path, np.array(7)),
        "nothing.npy": lambda path: np.save(path, np.empty(0, int)),
        "objects.npy": lambda path: np.save(path, np.array([{}], dtype=object), allow_pickle=True),
        "text.npy": lambda path: path.write_text("some text"),
        "weights.txt": lambda path: shutil.copy(work / "teacher" / WEIGHTS, path),
        "zeros.txt": lambda path: path.write_bytes(bytes(100)),
        "latin.txt": lambda path: path.write_bytes("é".encode("latin-1")),
        "folder.txt": lambda path: path.mkdir(),
        "renamed.npy": lambda path: (
            np.savez(path.with_suffix(".npz"), a=np.arange(9)),
            path.with_suffix(".npz").rename(path),
        ),
    }
    for name, make_it in kinds.items():
        make_it(tmp_path / name)
        options = ("--teacher", tmp_path / "none", "--recipe", "demo", "--out", tmp_path / "run")
        assert fail("distill", tmp_path / "none", *options, "--data", tmp_path / name).startswith(
            f"{tmp_path / name}: "
        ), name
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("token", "place"), [(-1, 0), (720, 1), (2**40, 70), (-(2**31), 99)])
def test_a_token_that_the_model_does_not_know_is_found_wherever_it_stands(work, tmp_path, token, place):
    tokens = np.zeros(100, np.int64)
    tokens[place] = token
    np.save(tmp_path / "data.npy", tokens)
    options = ("--teacher", work / "teacher", "--recipe", work / "recipe.json", "--out", tmp_path / "run")
    line = fail("distill", work / "hybrid", *options, "--data", tmp_path / "data.npy")
    assert f"token {place} of the training data is {token}, but the model embeds 0 to 719" in line
    assert str(tmp_path / "data.npy") in line
    check_tokens(as_source(np.arange(720)), 720)
    with pytest.raises(DataError, match="token 719"):
        check_tokens(as_source(np.arange(720)), 719)


def test_a_teacher_of_another_vocabulary_is_refused_before_the_measuring(work, tmp_path):
    tokenizer = build_tokenizer()
    for name, size in (("small", 710), ("large", 800)):
        tiny("qwen3", vocab_size=size, num_hidden_layers=1).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        sizes = ("--lengths", 32, "--count", 1, "--out", tmp_path / "result.json")
        line = fail("eval", work / "hybrid", "--teacher", tmp_path / name, *sizes)
        assert f"embeds 720 tokens and its teacher, a Qwen3ForCausalLM, {size}" in line
    with pytest.raises(PlanError, match="embeds 720"):
        kl_to_teacher(load(work / "hybrid"), load(tmp_path / "small"), torch.zeros(1, 4, dtype=torch.long))
    assert not (tmp_path / "result.json").exists()


def test_an_export_knows_the_models_position_limit(tmp_path):
    pytest.importorskip("onnxruntime")
    model, tokenizer = tiny("qwen3", vocab_size=720, max_position_embeddings=24, num_hidden_layers=1), build_tokenizer()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    succeed("export", tmp_path / "model", "--out", tmp_path / "model.onnx")
    options = ("generate", tmp_path / "model", "--prompt", "for statement", "--max-new-tokens")
    onnx = ("--onnx", tmp_path / "model.onnx")
    assert fail(*options, 24) == fail(*options, 24, *onnx)
    assert "the model's position limit is 24" in fail(*options, 24, *onnx)
    decoder = hs.OnnxDecoder(tmp_path / "model.onnx")
    ids = np.ones((1, 20), np.int64)
    assert decoder.generate(ids, max_new_tokens=4, eos_token_ids=()).shape == (1, 24)
    with pytest.raises(SequenceLengthError, match="25 tokens"):
        decoder.generate(ids, max_new_tokens=5)


# --- temporary names --------------------------------------------------------------------------------------------------------------


def test_no_temporary_name_can_be_foreseen(work, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in (".plan.png.part", ".plan.png.tmp.png", "plan.png.tmp", ".recall.png.tmp.png", ".recall.png.part"):
        (folder / name).symlink_to(victim)
    before = contents(folder)
    draw_plan(hs.Plan.load(work / "plan.json"), folder / "plan.png")
    draw_recall([], folder / "recall.png")
    assert victim.read_text() == "mine"
    assert contents(folder).keys() - before.keys() == {"plan.png", "recall.png"}


def test_a_folder_of_other_things_is_no_demo(tmp_path):
    (tmp_path / "report.md").write_text("mine")
    with pytest.raises(OutputError, match="holds other things than a demo"):
        run_demo(tmp_path)
    assert contents(tmp_path) == {"report.md": b"mine"}


HOLD = """
import sys
from hydrasurgery.files import hidden
from pathlib import Path
with hidden(Path(sys.argv[1])) as path:
    path.mkdir()
    (path / "part").write_text("half of")
    print(path, flush=True)
    sys.stdin.read()
    import time; time.sleep(60)
"""


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path):
    dead, alive = start(HOLD, tmp_path, own=True), start(HOLD, tmp_path, own=True)
    left, used = (Path(process.stdout.readline().strip()) for process in (dead, alive))
    dead.kill()
    dead.wait()
    (tmp_path / ".hydrasurgery-0123").mkdir()
    (tmp_path / ".hydrasurgery-0123456789abcdef").mkdir()  # without a lock
    (tmp_path / ".model.0123456789ab").mkdir()
    (tmp_path / "x.lock").touch()
    before = set(os.listdir(tmp_path))
    assert left.name in before
    try:
        atomic_write_text(tmp_path / "new", "text")
        assert before ^ set(os.listdir(tmp_path)) == {"new", left.name, f"{left.name}.lock"}
        assert (used / "part").read_text() == "half of"
    finally:
        alive.kill()
        alive.wait()


def test_two_that_write_at_once_do_not_take_each_others_files(tmp_path):
    failures = []

    def write(number):
        try:
            for _ in range(50):
                atomic_write_text(tmp_path / "file", str(number) * 1000)
                with hidden(tmp_path) as path:
                    path.mkdir()
                    (path / "part").touch()
                    assert (path / "part").exists()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert os.listdir(tmp_path) == ["file"]
    assert len(set((tmp_path / "file").read_text())) == 1

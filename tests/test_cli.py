"""The command line on a tiny model in a folder: every command leaves what the next one needs, and errors are one line."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import hydrasurgery as hs
from hydrasurgery.choose import plan_heads
from hydrasurgery.cli import app, main
from hydrasurgery.demo.corpus import build_tokenizer
from hydrasurgery.loading import load_model
from hydrasurgery.plan import Plan
from hydrasurgery.sharing import share_parameters
from hydrasurgery.transfer import Recipe, Stage, addition_names
from tests.families import tiny

COMMANDS = """
inspect score plan compare plot rewrite distill eval generate export kernels bench demo
""".split()
WEIGHTS = "model.safetensors"


def run(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def succeed(*args):
    result = run(*args)
    assert result.exit_code == 0, result.output
    return result.stdout


def fail(*args):
    """The one line that a refused command writes."""
    result = run(*args)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with `teacher`, `plan.json`, `hybrid` and `data.txt`, made by the command line where it makes them."""
    folder = tmp_path_factory.mktemp("cli")
    tokenizer = build_tokenizer()
    for target, saved in (("teacher", tiny("qwen3", vocab_size=720)), ("other", tiny("gpt2", vocab_size=720))):
        saved.save_pretrained(folder / target)
        tokenizer.save_pretrained(folder / target)
    (folder / "data.txt").write_text("A statement is executed when it is reached. " * 40, encoding="utf-8")
    options = ("--strategy", "random", "--ratio", "1:1", "--keep", "1:2", "--length", 4096)
    text = succeed("plan", "--model", folder / "teacher", *options, "--out", folder / "plan.json")
    assert "At 4,096 tokens" in text
    succeed("rewrite", folder / "teacher", "--plan", folder / "plan.json", "--out", folder / "hybrid")
    return folder


@pytest.fixture
def broken(work, tmp_path):
    """A copy of the teacher to damage."""
    return shutil.copytree(work / "teacher", tmp_path / "broken")


def test_every_command_explains_itself_with_an_example():
    for command in COMMANDS:
        assert f"Example: hydrasurgery {command}" in " ".join(succeed(command, "--help").split())


def test_inspect_shows_the_variant_and_the_verdict(work):
    text = succeed("inspect", work / "teacher")
    assert "model.layers.1.self_attn" in text
    assert "rope, qk-norm" in text
    assert text.count("supported") == 2
    assert "a hybrid already" in succeed("inspect", work / "hybrid")


def test_inspect_gives_the_reason_for_an_unsupported_model(tmp_path):
    tiny("bloom", n_head=4, n_layer=1).save_pretrained(tmp_path / "bloom")
    assert "ALiBi" in fail("inspect", tmp_path / "bloom")


def test_layer_options_go_from_plan_to_hybrid_and_can_be_changed(work, tmp_path):
    common = ("--model", work / "teacher", "--strategy", "random", "--ratio", "1:1", "--out", tmp_path / "plan.json")
    assert "layer hydrahead,conv=none" in succeed("plan", *common, "--layer", "hydrahead,conv=none")
    for layer, shown in ((None, "hydrahead,conv=none"), ("untie=true", "default,untie=true")):
        given = () if layer is None else ("--layer", layer)
        out = tmp_path / f"hybrid-{layer}"
        succeed("rewrite", work / "teacher", "--plan", tmp_path / "plan.json", "--out", out, *given)
        text = succeed("inspect", out)
        assert f"layer {shown}\n" in text
        assert "passes" not in text
    assert "conv is 'x'; give one of residual-unrotated, residual, native, none" in fail(
        "plan", *common, "--layer", "conv=x"
    )


def test_plan_file_is_what_the_library_makes(work):
    plan = Plan.load(work / "plan.json")
    wanted = plan_heads(load_model(work / "teacher"), strategy="random", ratio="1:1", keep=[(1, 2)])
    assert plan == wanted
    assert plan.layers[1].kinds[2] == "full"


def test_scores_feed_a_plan(work, tmp_path):
    scores, picture, out = tmp_path / "scores.json", tmp_path / "heads.png", tmp_path / "plan.json"
    probes = ("--method", "reconstruction", "--length", 64, "--count", 2)
    succeed("score", work / "teacher", *probes, "--out", scores, "--plot", picture)
    assert picture.stat().st_size
    succeed("plan", "--scores", scores, "--ratio", "3:1", "--unit", "kv-group", "--out", out)
    assert Plan.load(out).unit == "kv-group"
    more = ("--budget", "kv-bytes", "--never", "0:1", "--min-full", 0, "--plot", tmp_path / "plan.png")
    other = tmp_path / "other.json"
    succeed("plan", "--scores", scores, "--ratio", "3:1", *more, "--out", other)
    made = Plan.load(other)
    assert (made.budget, made.never, made.min_full_per_layer) == ("kv-bytes", ((0, 1),), 0)
    assert (tmp_path / "plan.png").stat().st_size
    assert len(succeed("compare", out, other, scores).splitlines()) == 4
    for kind in ("groups", "histogram", "coverage"):
        succeed("plot", scores, "--kind", kind, "--out", tmp_path / f"{kind}.png")
        assert (tmp_path / f"{kind}.png").stat().st_size
    assert "none of 2 pairs" in fail(
        *("plot", scores, "--kind", "ablation", "--model", work / "teacher", "--length", 64, "--count", 2),
        *("--out", tmp_path / "curve.png"),
    )


def test_saved_hybrid_generates_and_is_evaluated(work, tmp_path):
    hybrid = load_model(work / "hybrid")
    assert sum(name.endswith("gamma") for name, _ in hybrid.named_parameters()) == 2
    prompt = "for statement"
    assert succeed("generate", work / "hybrid", "--prompt", prompt, "--max-new-tokens", 4).startswith(prompt)
    sizes = ("--lengths", "64,96", "--count", 2)
    succeed("eval", work / "hybrid", "--teacher", work / "teacher", *sizes, "--out", tmp_path / "result.json")
    results = json.loads((tmp_path / "result.json").read_text())["results"]
    assert set(results["perplexity"]) == set(results["kl"]) == {"64", "96"}
    assert min(results["kl"].values()) > 0


def test_export_and_generate_in_onnx_runtime(work, tmp_path):
    pytest.importorskip("onnxruntime")
    out, hybrid, model = (
        tmp_path / "model.onnx",
        tmp_path / "hybrid",
        tiny("qwen3", vocab_size=720, num_hidden_layers=1),
    )
    hs.rewrite(model, plan_heads(model, strategy="random", ratio="1:1")).save_pretrained(hybrid)
    build_tokenizer().save_pretrained(hybrid)
    assert succeed("export", hybrid, "--out", out).startswith(f"{out}: ONNX opset 23 for onnxruntime")
    options = ("--prompt", "for statement", "--max-new-tokens", 6)
    assert succeed("generate", hybrid, "--onnx", out, *options) == succeed("generate", hybrid, *options)
    assert f"{out}: exists" in fail("export", hybrid, "--out", out)
    assert "ONNX Runtime cannot load it" in fail("generate", hybrid, "--onnx", work / "plan.json", *options)
    assert "known: onnxruntime, opset27" in fail("export", hybrid, "--out", tmp_path / "b.onnx", "--target", "x")


def test_a_loaded_hybrid_shares_all_but_its_additions_again(work):
    teacher, hybrid = (
        copy.deepcopy(load_model(work / "teacher")),
        load_model(work / "hybrid"),
    )  # a copy is no map of a file
    shared = share_parameters(hybrid, teacher)
    assert shared == {name for name, _ in teacher.named_parameters(remove_duplicate=False)}
    assert all(".hydra." in name for name in addition_names(hybrid))


def test_rewrite_calibrates_on_a_text(work, tmp_path):
    out = tmp_path / "calibrated"
    options = ("--plan", work / "plan.json", "--calibrate-text", work / "data.txt", "--out", out)
    succeed("rewrite", work / "teacher", *options)
    plain, fitted, teacher = (load_file(path / WEIGHTS) for path in (work / "hybrid", out, work / "teacher"))
    assert any(not torch.equal(plain[name], value) for name, value in fitted.items() if name.endswith("gamma"))
    assert all(torch.equal(fitted[name], value) for name, value in teacher.items())


def test_distill_trains_saves_and_resumes(work, tmp_path):
    recipe, out = tmp_path / "recipe.json", tmp_path / "run"
    stages = (
        Stage("align", batch_size=1, length=32, lr=1e-2, lr_end=1e-3, steps=2, warmup=1),
        Stage("distil", batch_size=1, length=32, lr=1e-3, lr_end=1e-3, steps=1, warmup=1),
    )
    Recipe("tiny", stages).save(recipe)
    options = ("--teacher", work / "teacher", "--data", work / "data.txt", "--recipe", recipe, "--out", out)
    succeed("distill", work / "hybrid", *options)
    trained = load_model(out / "model").state_dict()
    before = load_model(work / "hybrid").state_dict()
    assert any(not torch.equal(before[name], value) for name, value in trained.items() if ".hydra." in name)
    assert "--resume" in fail("distill", work / "hybrid", *options)
    succeed("distill", work / "hybrid", *options, "--resume")
    again = load_model(out / "model").state_dict()
    assert all(torch.equal(again[name], value) for name, value in trained.items())


def test_truncated_weights_are_named(broken):
    whole = (broken / WEIGHTS).read_bytes()
    (broken / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    assert str(broken / WEIGHTS) in fail("inspect", broken)


def test_missing_files_are_named(broken):
    (broken / WEIGHTS).unlink()
    assert str(broken / WEIGHTS) in fail("generate", broken, "--prompt", "a")
    (broken / "config.json").write_text("{")
    assert str(broken / "config.json") in fail("generate", broken, "--prompt", "a")
    assert str(broken / "none") in fail("generate", broken / "none", "--prompt", "a")


def test_a_missing_or_foreign_tokenizer_is_refused(work, broken, tmp_path):
    for file in broken.glob("tokenizer*"):
        file.unlink()
    assert str(broken) in fail("generate", broken, "--prompt", "a")
    small = shutil.copytree(work / "teacher", tmp_path / "small")
    tiny("qwen3").save_pretrained(small)
    assert "707 tokens" in fail("generate", small, "--prompt", "a")


def test_missing_tensor_is_named(broken):
    name = "model.layers.1.self_attn.k_proj.weight"
    save_file({k: v for k, v in load_file(broken / WEIGHTS).items() if k != name}, broken / WEIGHTS, {"format": "pt"})
    line = fail("inspect", broken)
    assert name in line
    assert str(broken) in line


def test_additions_without_their_plan_are_refused(work, tmp_path):
    bare = shutil.copytree(work / "hybrid", tmp_path / "bare")
    shutil.copy(work / "teacher" / "config.json", bare / "config.json")
    assert ".hydra." in fail("generate", bare, "--prompt", "a")


def test_bad_plans_are_named(work, tmp_path):
    bad = tmp_path / "plan.json"
    bad.write_text("not a plan")
    assert str(bad) in fail("rewrite", work / "teacher", "--plan", bad, "--out", tmp_path / "out")
    line = fail("rewrite", work / "other", "--plan", work / "plan.json", "--out", tmp_path / "out")
    assert str(work / "plan.json") in line
    assert "another architecture" in line
    assert not (tmp_path / "out").exists()


def test_empty_data_is_named(work, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.touch()
    options = ("--teacher", work / "teacher", "--recipe", "demo", "--out", tmp_path / "run")
    assert str(empty) in fail("distill", work / "hybrid", "--data", empty, *options)
    options = ("--plan", work / "plan.json", "--out", tmp_path / "out")
    assert str(empty) in fail("rewrite", work / "teacher", "--calibrate-text", empty, *options)


def test_a_folder_of_other_things_is_not_replaced(work, tmp_path):
    (tmp_path / "letters.txt").write_text("keep me")
    assert str(tmp_path) in fail("rewrite", work / "teacher", "--plan", work / "plan.json", "--out", tmp_path)
    assert (tmp_path / "letters.txt").read_text() == "keep me"
    fail("rewrite", work / "teacher", "--plan", work / "plan.json", "--out", work / "teacher")
    assert (work / "teacher" / WEIGHTS).exists()


def test_main_exits_with_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.argv", ["hydrasurgery", "inspect", str(tmp_path / "none")])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    assert capsys.readouterr().err.count("\n") == 1


# --- kernels ------------------------------------------------------------------------------------------------------------------


def test_kernels_says_what_runs_and_why_the_rest_does_not():
    text = succeed("kernels", "--device", "cpu")
    for op in ("attention", "linear_attention", "causal_conv", "scale_norm_fusion", "decode_step"):
        assert op in text
    assert "triton: needs a CUDA device" in text


def test_bench_writes_what_it_prints(tmp_path):
    options = ("--device", "cpu", "--dtype", "float32", "--size", 4, "--size", 8)
    text = succeed("bench", "fusion-forward", *options, "--out", tmp_path / "b.json", "--plot", tmp_path / "b.png")
    rows = json.loads((tmp_path / "b.json").read_text())
    timed = [row for row in rows if "ms" in row]
    assert [(row["contender"], row["size"]) for row in timed] == [
        (name, size) for size in (4, 8) for name in ("hydra", "plain PyTorch")
    ]
    assert all(row["ms"] > 0 and row["floor_ms"] > 0 for row in timed)
    assert (tmp_path / "b.png").stat().st_size > 0
    assert "of the floor" in text


@pytest.mark.parametrize(("arguments", "message"), [(("nothing",), "no suite"), (("--dtype", "int8"), "give one of")])
def test_bench_refuses_what_it_does_not_know(arguments, message):
    result = run("bench", *arguments, "--device", "cpu")
    assert result.exit_code == 2
    assert message in result.stderr


# --- options ------------------------------------------------------------------------------------------------------------------

HUGE = "9" * 5000
WRONG = {
    "bench --skip nope": "--skip 'nope': the suites' contenders are",
    "bench decode --skip hydra --skip nope": "--skip 'nope'",
    "bench --cold --device cpu": "--cold times first calls on CUDA",
    "bench --size 1000000000000 --device cpu": "'--size'",
    "kernels --head-dim 1000000000": "'--head-dim'",
    "kernels --device gpu": "not on this machine",
    "kernels --device meta": "not on this machine",
    "eval m --out o.json --count 1e30": "'--count'",
    "eval m --out o.json --count 1000000000000": "'--count'",
    "eval m --out o.json --seed -1": "'--seed'",
    f"eval m --out o.json --seed {HUGE}": "'--seed'",
    "eval m --out o.json --lengths 1000000000000": "--lengths '1000000000000': give positive numbers up to",
    f"eval m --out o.json --lengths {HUGE}": "--lengths '9999",
    "eval m --out o.json --lengths 256,0": "--lengths '256,0'",
    "eval m --out o.json --lengths 256,256": "a length stands there twice",
    "eval m --out o.json --lengths \u0663": "--lengths",
    "eval m --out o.json --lengths 100000000 --count 10000": "more than 4,294,967,296 tokens",
    "generate m --prompt a --max-new-tokens 10000000000": "'--max-new-tokens'",
    "generate m --prompt a --onnx m.onnx --device cpu": "only counts without --onnx",
    "export m --out m.pt2 --target onnxruntime": "only counts for *.onnx",
    "export m --out m.pt2 --target bogus": "only counts for *.onnx",
    "score m --out o.json --length 1000000000000": "'--length'",
    "plan --model m --out o.json --strategy all-linear --ratio 3:1": "only counts with the strategies constrained,",
    "plan --model m --out o.json --strategy all-full --budget heads": "only counts with the strategies constrained,",
    "plan --model m --out o.json --strategy layerwise --min-full 2": "only counts with the strategies constrained, random,",
    "plan --scores s --out o.json --strategy global --min-full 0": "only counts with the strategies constrained, random,",
    "plan --scores s --out o.json --seed 3": "only counts with the strategies random, fixed",
    "plan --model m --out o.json --strategy random --tie 0.1": "only counts with the strategies constrained, global,",
    "plan --scores s --out o.json --group-score mean": "only counts with --unit kv-group",
    "plan --scores s --out o.json --keep 1": "--keep '1': give layer:head",
    f"plan --scores s --out o.json --keep {HUGE}:0": "--keep '9999",
    "plan --scores s --out o.json --never 0:-1": "--never '0:-1'",
    "plan --scores s --out o.json --min-full 1000000000": "'--min-full'",
    "plot s --out o.png --count 3": "only counts with --kind ablation",
    "plot s --out o.png --kind groups --model m": "only counts with --kind ablation",
    "plot s --out o.png --kind map --device cpu": "only counts with --kind ablation",
}


@pytest.mark.parametrize(("line", "message"), WRONG.items(), ids=[line[:60] for line in WRONG])
def test_options_out_of_range_or_without_effect_are_refused(line, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*line.split())
    assert result.exit_code == 2, result.output
    said = " ".join(result.stderr.replace("│", " ").split())  # typer breaks lines in a box
    assert message in said
    assert len(said) < 1000 or HUGE in line and message == "'--seed'"  # which typer reads itself
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ratio", ["7", "x" * 10**6, f"{HUGE}:1", "1e9:1", "-1:1", "0:0", "nan:1", "\u0663:1", "inf:1"])
def test_ratios_are_two_numbers(ratio, tmp_path, work):
    line = fail(
        "plan", "--model", work / "teacher", "--strategy", "random", "--out", tmp_path / "o", f"--ratio={ratio}"
    )
    assert "is not 'L:F', linear heads to full heads" in line
    assert len(line) < 300


@pytest.mark.parametrize(
    "layer", ["x" * 10**6, "conv=none," * 100_000, "conv=" + "-" * 100_000, "conv=none,conv=native"]
)
def test_layer_texts_are_short_words(layer, tmp_path, work):
    line = fail("plan", "--model", work / "teacher", "--strategy", "random", "--out", tmp_path / "o", "--layer", layer)
    assert "layer" in line and len(line) < 400

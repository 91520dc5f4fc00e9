"""What the documents say is so: examples and code blocks run, commands exist, and parameters are explained."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import inspect
import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

import hydrasurgery as hs
from hydrasurgery import ops
from hydrasurgery import selection as sel
from hydrasurgery.cli import COMMANDS, app
from hydrasurgery.demo.teacher import load_teacher
from hydrasurgery.evaluation import library_text
from hydrasurgery.transfer import RECIPES, Recipe, Stage
from tests.families import tiny
from tests.test_layout import ROOT, files

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
DOCUMENTS = ("README.md", "docs/evaluation.md", "docs/export.md", "docs/layer.md", "docs/selection.md")
LIMIT = 48  # tokens: what the README's model says that it takes, so that probes of the default length are short

# --- examples ---------------------------------------------------------------------------------------------------------


def examples() -> Iterator[doctest.DocTest]:
    """The examples of every docstring, in the modules whose text holds any."""
    for name, path in files().items():
        if ">>>" in path.read_text(encoding="utf-8"):
            yield from (test for test in doctest.DocTestFinder().find(importlib.import_module(name)) if test.examples)


@pytest.mark.parametrize("example", list(examples()), ids=lambda example: example.name)
def test_examples_run(example: doctest.DocTest) -> None:
    torch.manual_seed(0)
    said = io.StringIO()
    doctest.DocTestRunner(optionflags=FLAGS).run(example, out=said.write)
    assert not said.getvalue(), said.getvalue()


# --- public names -----------------------------------------------------------------------------------------------------


def public_names() -> dict[str, Any]:
    """What users call or make, by name: hydrasurgery's own, the operators, and those of five packages."""
    found = {name: getattr(hs, name) for name in hs.PLACES}
    for package in ("ops", "passes", "selection", "transfer", "evaluation", "export"):
        module = importlib.import_module(f"hydrasurgery.{package}")
        found |= {name: getattr(module, name) for name in module.__all__}
    return {name: value for name, value in found.items() if callable(value)}


PUBLIC = public_names()


def methods(value: Any) -> Iterator[Any]:
    """The public functions and properties of a class, as it defines them itself."""
    for name, member in vars(value).items() if inspect.isclass(value) else ():
        member = getattr(member, "__func__", getattr(member, "fget", member))
        if not name.startswith("_") and inspect.isfunction(member):
            yield member


def parameters(value: Any) -> list[str]:
    """The names of what a caller gives."""
    if dataclasses.is_dataclass(value):
        return [field.name for field in dataclasses.fields(value)]
    if inspect.isclass(value) and "__init__" not in vars(value):
        return []
    return [name for name in inspect.signature(value).parameters if name not in ("self", "cls", "args", "kwargs")]


def explains(text: str, name: str) -> bool:
    """Whether a docstring has an entry `name: ...`, by itself or in a list of names, or writes the name as code."""
    entry = rf"^\s*(\w+, )*{name}(, \w+)*: "
    return re.search(rf"{entry}|`{name}`", text, re.MULTILINE) is not None


@pytest.mark.parametrize("name", PUBLIC)
def test_every_parameter_is_explained(name: str) -> None:
    for value in (PUBLIC[name], *methods(PUBLIC[name])):
        if value.__name__ in ("run", "requires", "ensures") and name != "Pass":
            continue  # a pass's, explained by the base class
        text = inspect.cleandoc(value.__doc__ or "")
        assert text, f"{value.__qualname__} has no docstring"
        missing = [parameter for parameter in parameters(value) if not explains(text, parameter)]
        assert not missing, f"{value.__qualname__}: {missing}"


def shown(name: str, blocks: str) -> bool:
    """Whether a name has an example, names what has it, or is used in the documents."""
    texts = [value.__doc__ or "" for value in (PUBLIC[name], *methods(PUBLIC[name]))]
    other = re.search(r"Example: see `(\w+)[.\w]*`", texts[0])
    return any(">>>" in text for text in texts) or name in blocks or (other is not None and shown(other[1], blocks))


def test_every_public_name_has_an_example() -> None:
    blocks = "\n".join(block for document in DOCUMENTS for block in code_blocks(document))
    built_in = {name for name, value in PUBLIC.items() if value.__module__.startswith("hydrasurgery.passes.")}
    built_in -= {"Pass", "PassResult", "parse", "register", "run_pipeline"}  # pipelines name the passes themselves
    assert [name for name in PUBLIC.keys() - built_in if not shown(name, blocks)] == []
    assert all(">>>" in getattr(ops, name).__doc__ for name in ops.__all__ if name != "RULES")


# --- documents --------------------------------------------------------------------------------------------------------


FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def code_blocks(document: str, language: str = "python") -> list[str]:
    text = (ROOT / document).read_text(encoding="utf-8")
    return [block for name, block in FENCE.findall(text) if name == language]


def small_hybrid() -> Any:
    model = tiny("qwen3", num_hidden_layers=1)
    return hs.rewrite(model, hs.plan_heads(model, ratio="1:1", strategy="random"))


def given_readme() -> dict[str, Any]:
    """A model with its tokenizer in a folder, a text, a file of text, and scores of another tool."""
    model, tokenizer = load_teacher()
    model.config.max_position_embeddings = LIMIT
    for part in (model, tokenizer):
        part.save_pretrained("model")
    Path("corpus.txt").write_text(library_text("train")[:20000], encoding="utf-8")
    scores = hs.score_heads(model, tokenizer, method="reconstruction", count=1, progress=False)
    Path("duo").mkdir()
    sel.write_scores(scores, "duo/full_attention_heads.tsv", format="duo-attention")
    return {"name": "model", "text": library_text("held-out")[:400]}


def given_layer() -> dict[str, Any]:
    tokenizer = load_teacher()[1]
    model = tiny("qwen3", vocab_size=len(tokenizer))
    scores = hs.score_heads(model, tokenizer, method="reconstruction", length=LIMIT, count=1, progress=False)
    return {"model": model, "scores": scores}


def given_export() -> dict[str, Any]:
    pytest.importorskip("onnxruntime")  # which has no wheel for Python 3.10
    ids = torch.arange(3, 13).view(2, 5).numpy()
    return {"hybrid": small_hybrid(), "ids": ids, "mask": ids > 0}


GIVEN: dict[str, Callable[[], dict[str, Any]]] = {
    "README.md": given_readme,
    "docs/evaluation.md": dict,
    "docs/export.md": given_export,
    "docs/layer.md": given_layer,
    "docs/selection.md": dict,
}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_code_blocks_run(document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they are written, one after the other. Recipes are of one step a stage; a hybrid of one layer is exported."""
    monkeypatch.chdir(tmp_path)
    stages = [
        Stage(stage.name, batch_size=1, length=LIMIT, steps=1, lr=1e-4, lr_end=1e-4, warmup=0)
        for stage in RECIPES["hydrahead"].stages
    ]
    monkeypatch.setitem(RECIPES, "hydrahead", Recipe("hydrahead", tuple(stages)))
    namespace = {"hs": hs, "torch": torch, **GIVEN[document]()}
    for number, block in enumerate(code_blocks(document)):
        if "export_onnx" in block:
            namespace["hybrid"] = small_hybrid()  # eight layers would take a minute
        exec(compile(block, f"{document}, block {number}", "exec"), namespace)


def test_the_readme_prints_what_capture_prints() -> None:
    """The region before and after: lines in order, some left out; how nodes are numbered depends on the release of torch."""
    model = tiny("qwen3")
    plan = hs.plan_heads(model, ratio="1:1", strategy="fixed")
    regions = hs.capture(model)[0], hs.regions(hs.rewrite(model, plan))[0]
    printed = [block for block in code_blocks("README.md", "") if block.startswith("region ")]
    assert len(printed) == 2
    for region, block in zip(regions, printed, strict=True):
        wanted = iter(unnumbered(str(region)))
        for line in unnumbered(block):
            assert line == "..." or line in wanted, line


def unnumbered(text: str) -> list[str]:
    return [re.sub(r"(%\w*?)_\d+\b", r"\1", line.strip()) for line in text.splitlines()]


def commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """(subcommand, options) of each call of `hydrasurgery`, in code spans and code blocks."""
    blocks = [block for language, block in FENCE.findall(text) if not language]
    for line in "\n".join([*blocks, *re.findall(r"`([^`]*)`", FENCE.sub("", text))]).splitlines():
        for call in re.finditer(r"(?<![\w.])hydrasurgery (?=[a-z])([^#|]*)", line):
            name = call[1].split()[0]
            yield name, re.findall(r"(?<=\s)--[\w-]+", call[1])


@pytest.mark.parametrize("document", [*DOCUMENTS, "BENCHMARKS.md"])
def test_commands_exist(document: str) -> None:
    check_commands((ROOT / document).read_text(encoding="utf-8"))


def test_every_command_is_listed_and_its_example_is_one() -> None:
    listed = re.search(r"`hydrasurgery (inspect \|.*?)`", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert listed is not None and re.findall(r"\w+", listed[1]) == list(COMMANDS)
    for name, command in COMMANDS.items():
        (example,) = re.findall(r"Example: (hydrasurgery .*)", command.__doc__ or "")
        assert example.split()[1] == name
        check_commands(f"`{example}`")


def check_commands(text: str) -> None:
    known = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for name, options in commands(text):
        assert name in known, name
        have = {flag for parameter in known[name].params for flag in parameter.opts} | {"--help"}
        assert set(options) <= have, (name, set(options) - have)

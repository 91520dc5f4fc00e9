"""How the files stand to each other: no circle, no hidden module, one job and a readable size each."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

import hydrasurgery

ROOT = Path(__file__).parents[1]
PACKAGE = "hydrasurgery"
LINKED = ("passes", "kernels")  # folders at the top that are packages of hydrasurgery
LINES = 500


def files() -> dict[str, Path]:
    """Every Python file of the package by the module's name, from the tree: no link is followed."""
    found = {}
    for top in (PACKAGE, *LINKED):
        prefix = () if top == PACKAGE else (PACKAGE,)
        for folder, _, names in os.walk(ROOT / top):
            for file in (Path(folder) / name for name in names if name.endswith(".py")):
                parts = (*prefix, *file.relative_to(ROOT).with_suffix("").parts)
                found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return dict(sorted(found.items()))


def imported(module: str, known: dict[str, Path]) -> set[str]:
    """The modules of `known` that a file's statements name, wherever they stand: at its top, in a function, for types only."""
    found = set()
    for node in ast.walk(ast.parse(known[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{known[module]}: line {node.lineno} imports by a relative name"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in known else str(node.module))
    return (found & known.keys()) - {module}


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """A shortest circle a -> b -> ... (-> a) through each module that is in one, unless it is in one of those before it."""
    found: list[list[str]] = []
    for start in edges:
        circle = _back(start, edges)
        if circle and not any(start in other for other in found):
            found.append(circle)
    return found


def _back(start: str, edges: dict[str, set[str]]) -> list[str]:
    """The shortest way from a module to itself; empty if there is none."""
    ways, seen = [[start]], set()
    while ways:
        longer = []
        for way in ways:
            for module in sorted(edges[way[-1]]):
                if module == start:
                    return way
                if module not in seen:
                    seen.add(module)
                    longer.append([*way, module])
        ways = longer
    return []


def hidden(known: dict[str, Path]) -> Iterator[str]:
    """A line for each module that cannot be reached as its package's attribute, after all have been imported."""
    modules = {name: importlib.import_module(name) for name in known}
    for name, module in modules.items():
        package, _, own = name.rpartition(".")
        if package and own != "__main__" and getattr(modules[package], own, None) is not module:
            yield f"{package}.{own} is a {type(getattr(modules[package], own, None)).__name__}, not the module"


def found_by_import(package: types.ModuleType) -> set[Path]:
    """Every Python file below a package's `__path__`, links followed, as type checkers look for them."""
    found = set()
    for top in package.__path__:
        for folder, inner, names in os.walk(top, followlinks=True):
            inner[:] = [name for name in inner if (Path(folder) / name / "__init__.py").is_file()]
            found |= {(Path(folder) / name).resolve() for name in names if name.endswith(".py")}
    return found


def test_a_circle_is_found_and_a_diamond_is_none() -> None:
    assert circles({"a": {"b", "c"}, "b": {"d"}, "c": {"d"}, "d": set()}) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}) == [["b", "c"]]
    assert circles({"a": {"b"}, "b": {"a"}, "c": {"d"}, "d": {"c"}}) == [["a", "b"], ["c", "d"]]


def test_no_files_import_each_other_in_a_circle() -> None:
    known = files()
    found = circles({module: imported(module, known) for module in known})
    assert not found, "\n".join(" -> ".join([*circle, circle[0]]) for circle in found)


def test_every_file_says_its_job_in_one_sentence() -> None:
    wrong = []
    for module, file in files().items():
        first = (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").partition("\n")[0]
        if not first.endswith(".") or re.search(r"[.!?] [A-Z]", first):
            wrong.append(f"{module}: {first!r}")
    assert not wrong, "\n".join(wrong)


def test_nothing_hides_a_module() -> None:
    found = list(hidden(files()))
    assert not found, "\n".join(found)


def test_type_checkers_find_every_file() -> None:
    assert found_by_import(hydrasurgery) == {file.resolve() for file in files().values()}


def test_no_file_is_too_long_to_read_at_once() -> None:
    long = {module: len(file.read_text(encoding="utf-8").splitlines()) for module, file in files().items()}
    assert not {module: lines for module, lines in long.items() if lines > LINES}


def test_every_package_is_installed() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.findall(r'"([\w.]+)"', re.search(r"^packages = \[(.*?)\]", text, re.M | re.S)[1])  # type: ignore[index]
    assert sorted(listed) == [module for module, file in files().items() if file.name == "__init__.py"]


def test_the_walks_of_the_map_lead_over_files_that_are_there_once_each() -> None:
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8").partition("## Three walks")[2]
    walks = [re.findall(r"^\d+\. `([^`]+\.py)`", walk, re.M) for walk in re.split(r"\n\n(?=[A-Z`])", text)]
    walks = [walk for walk in walks if walk]
    assert [len(walk) for walk in walks] == [16, 11, 12]
    for walk in walks:
        assert len(set(walk)) == len(walk)
        assert all((ROOT / step).is_file() for step in walk), walk


@pytest.mark.parametrize(("module", "needless"), [("hydrasurgery", "torch"), ("hydrasurgery.ops", "triton")])
def test_importing_loads_no_more_than_is_used(module: str, needless: str) -> None:
    left_out = (needless, "transformers", "rich", "matplotlib")
    script = f"import {module}, sys; print(*[m for m in {left_out} if m in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert ran.stdout.strip() == ""


def test_the_operators_take_little_longer_to_import_than_torch() -> None:
    """A consumer of `.pt2` files imports these and nothing else."""

    script = (
        "import time; begun = time.process_time(); import torch; torch = time.process_time() - begun\n"
        "import hydrasurgery.ops; print(torch, time.process_time() - begun)"
    )

    def seconds() -> list[float]:
        ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
        return [float(word) for word in ran.stdout.split()]

    runs = [seconds() for _ in range(5)]
    assert min(ours for _, ours in runs) < 1.5 * min(torch for torch, _ in runs), runs


def test_a_saved_hybrid_loads_after_importing_the_package_only() -> None:
    script = (
        "import hydrasurgery, sys; assert 'transformers' not in sys.modules\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained('tests/data/hybrid-default')\n"
        "print(len(hydrasurgery.region_modules(model)), model.set_attn_implementation('hydra'))"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert ran.stdout.strip() == "2 None", ran.stderr

"""The dialect's files: names for all operators, and imports in one direction."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import torch

import hydrasurgery
from hydrasurgery.dialect import names

ROOT = Path(hydrasurgery.__file__).parent
FILES = sorted(path for folder in ("dialect", "kernels") for path in (ROOT / folder).rglob("*.py"))


def module_of(path: Path) -> str:
    return ".".join(("hydrasurgery", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


def imported(path: Path) -> set[str]:
    """Modules of this library that a file imports, lazily or for types too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & {module_of(each) for each in FILES}
            found |= inner or {str(node.module)}
    return {name for name in found if name.startswith("hydrasurgery")}


def test_kernels_know_no_operator_and_no_file_is_in_a_circle() -> None:
    graph = {module_of(path): imported(path) for path in FILES}
    for name, others in graph.items():
        known = ("hydrasurgery.kernels",) if ".kernels" in name else ("hydrasurgery.kernels", "hydrasurgery.dialect")
        assert all(other.startswith(known) for other in others), name
    list(TopologicalSorter(graph).static_order())  # raises a CycleError


def test_names_are_those_of_registered_operators() -> None:
    targets = [value for value in vars(names).values() if isinstance(value, torch._ops.OpOverload)]
    assert len(targets) == 11
    assert {str(x) for x in targets if x.namespace == "hydra"} == {
        f"hydra.{name}.default"
        for name in (
            "attention linear_attention causal_conv scale_norm_fusion token_positions previous_tokens decode_step linear_heads "
            "step_heads rotate"
        ).split()
    }
    assert set(names.DECAY_RULES) | set(names.DELTA_RULES) < set(names.RULES)


def test_a_result_without_a_derivative_says_so_whichever_input_asks() -> None:
    q, state, taps = torch.randn(1, 2, 4), torch.zeros(1, 2, 4, 4), torch.zeros(3, 1, 8, 3)
    weights = [torch.randn(8, 4, requires_grad=place == 1) for place in range(3)]  # in a list, and not the first of it
    out = torch.ops.hydra.decode_step(
        q, q, q, -q[..., 0].abs(), q[..., 0], None, torch.ones(2), None, None, weights, state, list(taps)
    )
    with pytest.raises(RuntimeError, match="hydra::decode_step has no derivative"):
        out.sum().backward()

"""select-kernels notes what runs, and touches nothing else."""

from __future__ import annotations

import pytest
import torch

import hydrasurgery as hs
from hydrasurgery.errors import PipelineError, PreconditionError
from hydrasurgery.kernels import registry
from hydrasurgery.kernels.attention.reach import OPEN
from hydrasurgery.kernels.registry import Machine
from hydrasurgery.passes import parse, run_pipeline
from hydrasurgery.passes import select_kernels as module
from hydrasurgery.surgery import hybrid_pipeline
from tests.families import tiny
from tests.test_families import half_plan

HOPPER = Machine("cuda", (9, 0), frozenset({("triton", "3.6.0"), ("fa3_fwd_interface", "0.0.3")}))


def hybrid_region(family: str = "qwen3", **sizes: int) -> hs.Region:
    region = hs.capture(tiny(family, **sizes))[0]
    region.kinds = ("full", "linear", "linear", "full")
    return run_pipeline([region], hybrid_pipeline())[0]


def noted(region: hs.Region) -> dict[str, str]:
    return {node.name: node.meta["kernel"] for node in region.graph.nodes if "kernel" in node.meta}


def test_a_stitched_hybrid_tells_what_it_runs():
    hybrid = hs.rewrite(tiny("qwen3"), half_plan(tiny("qwen3")))
    for region in run_pipeline(hs.regions(hybrid), "select-kernels"):
        assert set(noted(region).values()) == {"reference"}


def test_a_cpu_runs_the_references():
    region = hybrid_region()
    code = region.graph.python_code("self").src
    run_pipeline([region], "select-kernels")
    assert noted(region) == dict.fromkeys(
        ("o_full", "q_conv", "k_conv", "v_conv", "linear_attention", "fused_heads"), "reference"
    )
    assert region.graph.python_code("self").src == code
    assert all(
        "kernel=reference}" in line for line in str(region).split("\ndecode by")[0].splitlines() if "hydra::" in line
    )


@pytest.mark.parametrize(
    ("options", "attention", "conv"),
    [
        ("dtype=bfloat16", "fa3", "triton"),
        ("dtype=bfloat16,mode=backward", "sdpa", "triton"),
        ("dtype=bfloat16,mode=decode", "fa3", "triton"),
        ("dtype=bfloat16,masked=True", "triton, blocks", "triton"),
        ("dtype=float64", "reference", "reference"),
    ],
)
def test_another_machine_runs_others(monkeypatch, options, attention, conv):
    monkeypatch.setattr(module, "machine_of", lambda device: HOPPER)
    region = hybrid_region(head_dim=64)
    run_pipeline([region], f"select-kernels{{{options}}}")
    assert noted(region)["o_full"] == attention
    assert noted(region)["q_conv"] == noted(region)["fused_heads"] == conv


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_what_is_noted_is_what_a_call_takes(monkeypatch, family):
    """The pass and the operators see the same case: same mode, sizes and features."""
    monkeypatch.setattr(registry, "FEW_TOKENS", 0)  # the pass says what long sequences take
    region = hybrid_region(family)
    seen, wanted = [], []
    monkeypatch.setattr(module, "choose", lambda op, case, m: wanted.append((op, case)) or registry.choose(op, case, m))
    run_pipeline([region], "select-kernels{masked=True}")
    monkeypatch.setattr(
        registry, "kernel", lambda op, case, device: seen.append((op, case)) or registry._kernel(op, case, Machine())
    )
    x = torch.randn(2, 5, region.module.hydra.decay.a_proj.in_features)
    arguments = []
    for node in region.graph.nodes:
        if node.op == "placeholder":
            shape = node.meta.get("shape")
            named = None if shape is None else [{"B": 2, "T": 5}.get(size, size) for size in shape]
            mask = named is not None and len(named) == 4
            arguments.append(
                None
                if named is None
                else x
                if node is region.source
                else torch.full((2, 1, 1, 6), OPEN, dtype=torch.int32).index_fill(3, torch.tensor(5), 0)
                if mask
                else torch.randn(named)
            )
    region.module._run(region.module, *arguments)
    assert len(seen) == len(wanted) == 6
    for (op, call), (expected_op, case) in zip(seen, wanted, strict=True):
        assert (op, call.mode, call.dtype, call.features) == (expected_op, case.mode, case.dtype, case.features)
        assert set(call.sizes) <= set(case.sizes)


@pytest.mark.parametrize(("options", "error"), [("mode=training", PipelineError), ("dtype=float7", PreconditionError)])
def test_refused_options(options, error):
    with pytest.raises(error, match="select-kernels"):
        run_pipeline([hybrid_region()], parse(f"select-kernels{{{options}}}"))

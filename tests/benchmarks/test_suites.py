"""Every suite of `hydrasurgery bench`, tiny on a CPU and at its smallest size on a GPU: right first, then timed."""

from __future__ import annotations

import pytest
import torch

from hydrasurgery.bench import SUITES, Layer, bench

CUDA = torch.cuda.is_available()
DEVICE, DTYPE = (torch.device("cuda"), torch.bfloat16) if CUDA else (torch.device("cpu"), torch.float32)
LAYER = Layer() if CUDA else Layer(full=1, linear=3, kv_heads=2, dim=16)


@pytest.mark.parametrize(
    ("suite", "contender"),
    [(suite, c) for suite in SUITES.values() for c in suite.contenders if not c.cuda_only],
    ids=lambda part: part.name,
)
def test_contender(benchmark, suite, contender):
    inputs = suite.inputs(LAYER, min(suite.sizes) if CUDA else 16, DEVICE, DTYPE)

    def run():
        out = contender.run(inputs)
        if CUDA:
            torch.cuda.synchronize()
        return out

    assert all(torch.isfinite(x).all() for x in benchmark.pedantic(run, rounds=3, warmup_rounds=1) if x is not None)


@pytest.mark.parametrize("name", SUITES)
def test_suite_reports_every_contender(name):
    rows = list(bench([name], DEVICE, dtype=DTYPE, layer=LAYER, sizes=[5]))
    machine, *rest = rows
    assert machine["copy_TBs"] > 0
    assert machine["matmul_TFLOPs"] > 0
    for contender in SUITES[name].contenders:
        own = [row for row in rest if row["contender"] == contender.name]
        assert all("why" in row for row in own) or own[-1]["ms"] > 0
        assert all(row["error"] < 1e-3 for row in own if "error" in row) or CUDA


def test_a_wrong_kernel_is_not_timed(monkeypatch):
    from hydrasurgery.kernels.scale_norm_fusion import reference

    right = reference.forward

    def wrong(*args, **kwargs):
        out = right(*args, **kwargs)
        return out if out.dtype == torch.float64 else 2 * out  # what is exact stays so

    monkeypatch.setattr(reference, "forward", wrong)
    rows = list(bench(["fusion-forward"], torch.device("cpu"), dtype=torch.float32, layer=LAYER, sizes=[5]))
    assert [row["why"] for row in rows[1:]] == ["wrong: relative error 1"] * 2

"""Runs suites: nothing is timed before it has been found right on fresh random inputs."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from hydrasurgery.bench.cases import SUITES, Contender, Inputs, Layer, Suite
from hydrasurgery.bench.timing import copy_bandwidth, matmul_rate, median_ms
from hydrasurgery.kernels import registry

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 5e-3}

COLD = """
import time, torch
start = time.perf_counter()
from hydrasurgery.bench.cases import SUITES, Layer
suite = SUITES[{suite!r}]
contender = next(c for c in suite.contenders if c.name == {contender!r})
inputs = suite.inputs(Layer(), {size}, torch.device("cuda"), torch.bfloat16)
torch.cuda.synchronize()
ready = time.perf_counter()
contender.run(inputs)
torch.cuda.synchronize()
print("cold", ready - start, time.perf_counter() - ready)
"""


def bench(
    suites: Iterable[str],
    device: torch.device,
    *,
    dtype: torch.dtype = torch.bfloat16,
    layer: Layer | None = None,
    sizes: Iterable[int] | None = None,
    skip: Collection[str] = (),
) -> Iterator[dict[str, Any]]:
    """One row per contender and size, as it is measured: suite, size, contender, ms, floor_ms and error, or why there is none.

    `sizes` replaces the suites' own, which a CPU cuts at 1024; `skip` names contenders to leave out. The floor is the larger of
    bytes over the measured copy bandwidth and operations over the measured matmul rate.
    """
    layer, sizes = layer or Layer(), tuple(sizes or ())
    small = device.type != "cuda"
    bandwidth = copy_bandwidth(device, 1 << (24 if small else 30))
    rate = matmul_rate(device, dtype, 256 if small else 8192)
    yield {"suite": "machine", "device": _name(device), "copy_TBs": bandwidth / 1e12, "matmul_TFLOPs": rate / 1e12}
    for name in suites:
        suite = SUITES[name]
        ready = []
        for contender in suite.contenders:
            if contender.name in skip:
                continue
            verdict = _gate(suite, contender, layer, device, dtype)
            yield {"suite": name, "contender": contender.name, **verdict}
            if "error" in verdict:
                ready.append(contender)
        own = sorted({min(size, 1024) for size in suite.sizes}) if small else suite.sizes
        for size in sizes or own:
            inputs = suite.inputs(layer, size, device, dtype)
            moved, work = suite.floor(layer, size)
            floor = 1e3 * max(moved / bandwidth, work / rate)
            for contender in ready:
                row = {"suite": name, "size": size, "contender": contender.name, "floor_ms": floor}
                yield {**row, **_time(suite, contender, inputs, device)}
            del inputs


def cold(suite: str, contender: str, size: int = 4096) -> dict[str, Any]:
    """Seconds of the first call in a fresh process whose Triton cache is empty; CUDA only."""
    script = COLD.format(suite=suite, contender=contender, size=size)
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "TRITON_CACHE_DIR": folder}
        done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    row = {"suite": f"cold {suite}", "size": size, "contender": contender}
    words = [line.split() for line in done.stdout.splitlines() if line.startswith("cold ")]
    if done.returncode or not words:
        return {**row, "why": _short(done.stderr)}
    return {**row, "import_s": float(words[0][1]), "first_call_s": float(words[0][2])}


def _gate(suite: Suite, contender: Contender, layer: Layer, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The largest relative error of its outputs against fp64, or why it cannot run."""
    machine = registry.machine_of(device)
    if contender.cuda_only and device.type != "cuda":
        return {"why": "needs a CUDA device"}
    missing = None if contender.package is None else registry.missing(contender.package, machine)
    if missing:
        return {"why": missing}
    inputs = suite.inputs(layer, suite.gate_size, device, dtype)
    exact = (contender.exact or suite.exact)(_wide(inputs))
    try:
        found = contender.run(copy.copy(inputs))
    except Exception as error:  # a peer may fail in any way: that is a result
        return {"why": _short(f"{type(error).__name__}: {error}")}
    worst = max(_error(*pair) for pair in zip(found, exact, strict=False) if pair[1] is not None)
    if not worst <= TOLERANCE[dtype]:
        return {"why": f"wrong: relative error {worst:.2g}"}
    return {"error": worst}


def _time(suite: Suite, contender: Contender, inputs: Inputs, device: torch.device) -> dict[str, Any]:
    try:
        return {"ms": median_ms(lambda: contender.run(inputs), device, graph=suite.graph)}
    except Exception as error:
        return {"why": _short(f"{type(error).__name__}: {error}")}


def _wide(inputs: Inputs) -> Inputs:
    def widen(x: Any) -> Any:
        if isinstance(x, list):
            return [widen(part) for part in x]
        return x.detach().double() if isinstance(x, Tensor) else x

    return {name: widen(x) for name, x in inputs.items()}


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found.detach().double() - exact).norm() / exact.norm())


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _short(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return (lines[-1] if lines else "no message")[:160]

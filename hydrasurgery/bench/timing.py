"""Clocks: device events or graph replays on CUDA, the host's clock elsewhere; and the two rates that floors are made of."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

BUDGET_MS = 300.0  # of measuring for each number; a call that takes longer is still made MINIMUM times
MINIMUM, MAXIMUM = 3, 100
REPLAYED = 20  # calls in one graph, at most


def median_ms(call: Callable[[], object], device: torch.device, *, graph: bool = False) -> float:
    """Median milliseconds of `call`, warmed up. With `graph`, of one of many calls replayed as a CUDA graph: no launch gaps."""
    if device.type != "cuda":
        return _host_ms(call)
    call()
    torch.cuda.synchronize()
    if graph:
        calls = max(1, min(REPLAYED, int(BUDGET_MS / _events(call, 1)[0])))
        return _event_ms(_captured(call, calls).replay) / calls
    return _event_ms(call)


def copy_bandwidth(device: torch.device, size: int = 1 << 30) -> float:
    """Bytes a second, read plus written, of a copy of `size` bytes."""
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * size / (1e-3 * median_ms(lambda: target.copy_(source), device))


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int = 8192) -> float:
    """Floating-point operations a second of a square product in `dtype`."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / (1e-3 * median_ms(lambda: a @ b, device))


def _captured(call: Callable[[], object], calls: int) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    return graph


def _event_ms(call: Callable[[], object]) -> float:
    first = _events(call, 1)[0]
    return statistics.median(_events(call, _count(first)))


def _events(call: Callable[[], object], count: int) -> list[float]:
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) for start, stop in zip(marks, marks[1:], strict=False)]


def _host_ms(call: Callable[[], object]) -> float:
    def once() -> float:
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)

    once()
    return statistics.median(once() for _ in range(_count(once())))


def _count(ms: float) -> int:
    return int(min(MAXIMUM, max(MINIMUM, BUDGET_MS / max(ms, 1e-3))))

"""Sizes and decoding speed of ONNX exports against eager PyTorch on this CPU: `python -m tests.onnx_speed`, on one thread.

Hybrids with two of four heads linear of the tiny families, and the demo's teacher at 7:1; batch 2, a left-padded prompt of 130
tokens, then 20 steps. Each time is the best of three runs, prompt and steps together.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import hydrasurgery as hs
from hydrasurgery.demo.teacher import load_teacher
from tests.test_families import stir
from tests.test_onnx import ONNX_FAMILIES, difference, make, onnx_decode, prompt, torch_decode

LENGTH, STEPS = 130, 20


def models() -> Iterator[tuple[str, Any]]:
    yield from ((family, make(family)) for family in ONNX_FAMILIES)
    teacher, _ = load_teacher()
    yield "demo 7:1", stir(hs.rewrite(teacher, hs.plan_heads(teacher, ratio="7:1", strategy="random", seed=0)))


def best(run: Callable[[], Any]) -> float:
    """Tokens a second."""
    times = []
    for _ in range(3):
        begun = time.perf_counter()
        run()
        times.append(time.perf_counter() - begun)
    return 2 * STEPS / min(times)


def main() -> None:
    torch.set_num_threads(1)
    print("| model | weights | target | file | largest difference | PyTorch eager, tokens/s | ONNX Runtime, tokens/s |")
    print("|---|---|---|---|---|---|---|")
    for name, model in models():
        ids, mask = prompt(LENGTH)
        _, tokens = torch_decode(model, ids, mask, STEPS)
        eager = best(lambda: torch_decode(model, ids, mask, STEPS))  # noqa: B023
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        for target in ("onnxruntime", "opset27"):
            with tempfile.TemporaryDirectory() as folder:
                written = hs.export_onnx(model, Path(folder) / "model.onnx", target=target, verbose=False)
                decoder = hs.OnnxDecoder(written.path, threads=1)
                worst = max(difference(model, decoder, length) for length in (1, 7, LENGTH))
                fast = best(lambda: onnx_decode(decoder, tokens.numpy(), mask.numpy(), STEPS))  # noqa: B023
            row = (name, f"{weights:,}", target, f"{written.bytes:,}", f"{worst:.1e}", f"{eager:.0f}", f"{fast:.0f}")
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()

"""The real compiler takes every Triton kernel. It runs in a process of its own, for here kernels may be the interpreter's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed: pip install hydrasurgery[kernels]")
PTXAS = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"

from tests.compile_kernels import kernel_modules  # noqa: E402


@pytest.mark.skipif(
    not PTXAS.exists(), reason="this Triton comes without NVIDIA's ptxas, whose version its compiler asks for"
)
@pytest.mark.parametrize("module", kernel_modules())
def test_every_kernel_compiles_for_gpus(module: str) -> None:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.compile_kernels", module]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=900, env=env)
    assert ran.returncode == 0, ran.stdout + ran.stderr

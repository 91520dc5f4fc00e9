"""The real compiler takes every Triton kernel. It runs in a process of its own, for here kernels may be the interpreter's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Timer
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed: pip install hydrasurgery[kernels]")
PTXAS = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"

from tests.compile_kernels import kernel_modules  # noqa: E402


class Compiler:
    """A process that compiles for one test after the other, so that Python, torch and triton are loaded once."""

    def __init__(self, errors: Path) -> None:
        self.errors = errors
        self.process: Any = None

    def check(self, module: str) -> None:
        if self.process is None or self.process.poll() is not None:
            self.start()
        timer = Timer(900, self.process.kill)
        timer.start()
        self.process.stdin.write(f"{module}\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        timer.cancel()
        errors = self.errors.read_text(encoding="utf-8", errors="replace")
        assert answer, f"the compiler's process has ended\n{errors}"
        fine, said = json.loads(answer)
        assert fine, f"{said}\n{errors}"

    def start(self) -> None:
        env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        command = [sys.executable, "-m", "tests.compile_kernels", "-"]
        pipe = subprocess.PIPE
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=errors, text=True, env=env)

    def stop(self) -> None:
        if self.process is not None:
            self.process.communicate()  # no more lines: it ends


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compiler]:
    found = Compiler(tmp_path_factory.mktemp("compiler") / "errors")
    yield found
    found.stop()


@pytest.mark.skipif(
    not PTXAS.exists(), reason="this Triton comes without NVIDIA's ptxas, whose version its compiler asks for"
)
@pytest.mark.parametrize("module", kernel_modules())
def test_every_kernel_compiles_for_gpus(module: str, compiler: Compiler) -> None:
    compiler.check(module)

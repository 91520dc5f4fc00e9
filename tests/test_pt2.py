"""A `.pt2` made here and run in another process, which has imported the ops and built no model."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version

import hydrasurgery as hs
from hydrasurgery.errors import ExportError
from hydrasurgery.export.stateful import StatefulDecoder, exportable
from tests.families import tiny
from tests.test_families import half_plan, stir

RUN = """
import json, sys, traceback, torch
import hydrasurgery.ops

def run(path, calls, aot):
    extra = {"hydrasurgery_states.json": ""}
    if aot:
        program = torch._inductor.aoti_load_package(path)
        extra = program.get_metadata()
    else:
        program = torch.export.load(path, extra_files=extra).module()
    states = json.loads(extra["hydrasurgery_states.json"])["states"]
    results = []
    with torch.no_grad():
        for ids, mask, positions, past in torch.load(calls):
            assert len(past) == len(states)
            results.append(program(ids, mask, positions, past))
    torch.save(results, calls)

for line in sys.stdin:
    try:
        run(*json.loads(line))
        print("ran", flush=True)
    except Exception:
        print(json.dumps(traceback.format_exc()), flush=True)
"""


@functools.cache
def make(family: str, layers: int) -> Any:
    """A hybrid shared by the tests, none of which changes it."""
    model = tiny(family, num_hidden_layers=layers)
    return stir(hs.rewrite(model, half_plan(model)))


@pytest.fixture(scope="module")
def another_process() -> Iterator[Callable[..., None]]:
    """Runs one program after another: `another_process(path, calls, aot)` puts the results in the place of the calls."""
    process = subprocess.Popen([sys.executable, "-c", RUN], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(path: Path, calls: Path, aot: bool) -> None:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps([str(path), str(calls), aot]) + "\n")
        process.stdin.flush()
        assert process.stdout.readline() == "ran\n"  # or what was raised

    yield run
    process.communicate()


@pytest.mark.parametrize(("family", "aot"), [("qwen3", False), ("gemma2", False), ("mixtral", False), ("qwen3", True)])
def test_another_process_gives_the_same_numbers(
    family: str, aot: bool, tmp_path: Path, another_process: Callable[..., None]
) -> None:
    if aot and shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    if aot and Version(torch.__version__) < Version("2.13"):
        pytest.skip("Inductor of torch 2.11 writes C++ for this program that does not compile")
    layers = 2 if family == "gemma2" else 1  # its layers are of two kinds
    hybrid = make(family, layers)
    written = hs.export_pt2(hybrid, tmp_path / "model.pt2", aot=aot, verbose=False)
    assert len(written.states) == 6 * layers
    calls, expected = [], []
    with torch.no_grad(), exportable(hybrid):
        decoder = StatefulDecoder(hybrid, written.states)
        for batch in (1, 4):
            past = tuple(slot.empty(batch) for slot in written.states)
            mask = torch.ones(batch, 0, dtype=torch.long)
            for length in (9, 1, 1, 30):  # a prompt, two single tokens, more of them
                ids = torch.randint(3, 90, (batch, length))
                mask = torch.cat([mask, torch.ones_like(ids)], 1)
                if length == 9:
                    mask[0, : 3 * (batch > 1)] = 0
                positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -length:].contiguous()
                calls.append((ids, mask, positions, past))
                kept = tuple(value.clone() for value in past)  # eager decoding writes its states in place
                expected.append(decoder(ids, mask, positions, kept))
                past = expected[-1][1:]
    torch.save(calls, tmp_path / "calls")
    another_process(written.path, tmp_path / "calls", aot)
    for got, wanted in zip(torch.load(tmp_path / "calls"), expected, strict=True):
        for a, b in zip(got, wanted, strict=True):
            assert torch.allclose(a, b, atol=5e-6 if aot else 1e-6, rtol=0)


def test_an_existing_file_is_kept(tmp_path: Path) -> None:
    (tmp_path / "model.pt2").write_text("mine")
    with pytest.raises(ExportError, match="exists"):
        hs.export_pt2(tiny("llama", num_hidden_layers=1), tmp_path / "model.pt2")
    assert (tmp_path / "model.pt2").read_text() == "mine"
    with pytest.raises(ExportError, match=r"model: AOTInductor wants a name that ends in \.pt2"):
        hs.export_pt2(tiny("llama", num_hidden_layers=1), tmp_path / "model", aot=True)

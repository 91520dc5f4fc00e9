"""Hybrids that an earlier version saved still load: same names, same bits, same logits.

`tests/data/hybrid-*` were written by `save_pretrained`, and `expected.safetensors` beside them holds input ids and logits of then.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import hydrasurgery as hs

FOLDERS = sorted(Path(__file__).with_name("data").glob("hybrid-*"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_an_earlier_checkpoint_loads_bit_equal(folder: Path) -> None:
    saved, expected = load_file(folder / "model.safetensors"), load_file(folder / "expected.safetensors")
    hybrid = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert len(hs.region_modules(hybrid)) == 2
    loaded = hybrid.state_dict()
    assert saved.keys() <= loaded.keys()
    for name, value in saved.items():
        assert torch.equal(loaded[name], value), name
    with torch.no_grad():
        logits = hybrid(expected["input_ids"], use_cache=False).logits
    assert torch.allclose(logits, expected["logits"], rtol=1e-5, atol=1e-5)


def test_there_are_earlier_checkpoints() -> None:
    assert [folder.name for folder in FOLDERS] == ["hybrid-default", "hybrid-hydrahead"]

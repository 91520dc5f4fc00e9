"""Compiled and exported hybrids leave padding out as eager ones do."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from transformers import StaticCache

import hydrasurgery as hs
from tests.families import tiny
from tests.test_families import half_plan, stir
from tests.test_padding import LENGTH, compacted, differ, drawn, places, run


@pytest.mark.parametrize(("layer", "target"), [("default", "onnxruntime"), ("hydrahead", "opset27")])
def test_an_onnx_file_leaves_padding_out(layer: str, target: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    model = tiny("qwen3", num_hidden_layers=1)
    hybrid = stir(hs.rewrite(model, half_plan(model), layer=layer))
    path = hs.export_onnx(hybrid, tmp_path / "model.onnx", target=target, verbose=False).path
    decoder = hs.OnnxDecoder(path, threads=1)
    for seed in range(2):
        ids, mask = drawn(seed)
        wanted = compacted(hybrid, ids, mask)
        for splits in ((LENGTH,), (5, LENGTH), (9, 10, LENGTH)):
            states, parts, first = None, [], 0
            for last in splits:
                logits, states = decoder.step(ids[:, first:last].numpy(), mask[:, :last].numpy(), states)
                parts.append(torch.from_numpy(logits))
                first = last
            assert differ(torch.cat(parts, 1), wanted, mask) < 1e-4, splits


@torch.no_grad()
def test_a_program_of_torch_export_leaves_padding_out(tmp_path: Path) -> None:
    model = tiny("qwen3", num_hidden_layers=1)
    hybrid = stir(hs.rewrite(model, half_plan(model)))
    written = hs.export_pt2(hybrid, tmp_path / "model.pt2", verbose=False)
    program = torch.export.load(written.path).module()
    ids, mask = drawn(0)
    past, parts = tuple(slot.empty(len(ids)) for slot in written.states), []
    for first, last in itertools.pairwise((0, 5, 6, LENGTH)):
        call = (ids[:, first:last], mask[:, :last], places(mask)[:, first:last].contiguous(), past)
        logits, *past = program(*call[:3], tuple(past))
        parts.append(logits)
    assert differ(torch.cat(parts, 1), compacted(hybrid, ids, mask), mask) < 1e-4


@torch.no_grad()
def test_a_compiled_hybrid_leaves_padding_out() -> None:
    torch._dynamo.reset()
    model = tiny("qwen3", num_hidden_layers=1)
    hybrid = stir(hs.rewrite(model, half_plan(model)))
    compiled = torch.compile(hybrid, backend="aot_eager", fullgraph=True)
    ids, mask = drawn(0)
    wanted = compacted(hybrid, ids, mask)
    assert differ(run(compiled, ids, mask, ()), wanted, mask) < 1e-4
    cache = StaticCache(config=hybrid.config, max_cache_len=LENGTH)
    parts = [run(hybrid, ids[:, :8], mask[:, :8], (7,), cache)]
    for place in range(8, LENGTH):
        call = {"attention_mask": mask[:, : place + 1], "position_ids": places(mask)[:, place : place + 1]}
        parts.append(compiled(ids[:, place : place + 1], **call, past_key_values=cache).logits)
    assert differ(torch.cat(parts, 1), wanted, mask) < 1e-4
    torch._dynamo.reset()

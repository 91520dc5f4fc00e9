"""ONNX exports against PyTorch, token by token, and what is refused without leaving a file."""

from __future__ import annotations

import copy
import functools
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache

import hydrasurgery as hs
from hydrasurgery import ops
from hydrasurgery.errors import ExportError, UnsupportedModelError
from tests.families import FusedAttention, PlainDecoder, tiny
from tests.test_families import half_plan, stir

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
import onnx_ir  # noqa: E402

from hydrasurgery.export import onnx_file  # noqa: E402
from hydrasurgery.export.lowering import Lowering  # noqa: E402  (imports onnx)

ONNX_FAMILIES = "qwen3 llama gemma2 gemma3_text phi3 mixtral gpt2 olmo2".split()
TWO_LAYERS = ("gemma2", "gemma3_text")  # they have layers of two kinds


@functools.cache
def make(family: str, dtype: torch.dtype = torch.float32, layers: int = 1) -> Any:
    """A hybrid shared by the tests, none of which changes it."""
    model = tiny(family, num_hidden_layers=layers).to(dtype)
    return stir(hs.rewrite(model, half_plan(model)))


def prompt(length: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows of tokens and their mask; the first is padded on the left by a third."""
    generator = torch.Generator().manual_seed(seed + length)
    ids = torch.randint(3, 90, (2, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, : length // 3] = 0
    return ids, mask


@torch.no_grad()
def torch_decode(
    model: Any, ids: torch.Tensor, mask: torch.Tensor, steps: int
) -> tuple[list[np.ndarray], torch.Tensor]:
    """Logits of the prompt and of each step of greedy decoding, and all tokens."""
    cache, new, logits = DynamicCache(config=model.config), ids, []
    for _ in range(steps + 1):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -new.shape[1] :]
        call = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache, "use_cache": True}
        logits.append(model(new, **call).logits)
        new = logits[-1][:, -1:].argmax(-1)
        ids, mask = torch.cat([ids, new], 1), torch.cat([mask, torch.ones_like(new)], 1)
    return [x.numpy() for x in logits], ids


def loaded(path: Path) -> hs.OnnxDecoder:
    """Where a file can be written and checked but not run, a test that comes here is skipped."""
    pytest.importorskip("onnxruntime")
    return hs.OnnxDecoder(path, threads=1)


def onnx_decode(decoder: hs.OnnxDecoder, tokens: np.ndarray, mask: np.ndarray, steps: int) -> list[np.ndarray]:
    """Logits of the prompt and of each step, fed with the given tokens."""
    length, states, logits = mask.shape[1], None, []
    for step in range(steps + 1):
        new = tokens[:, :length] if step == 0 else tokens[:, length + step - 1 : length + step]
        seen = np.concatenate([mask, np.ones((len(mask), step), mask.dtype)], 1)
        out, states = decoder.step(new, seen, states)
        logits.append(out)
    return logits


def difference(model: Any, decoder: hs.OnnxDecoder, length: int, steps: int = 20) -> float:
    """The largest difference of a logit at a real token; fails if any token differs."""
    ids, mask = prompt(length)
    expected, tokens = torch_decode(model, ids, mask, steps)
    actual = onnx_decode(decoder, tokens.numpy(), mask.numpy(), steps)
    generated = decoder.generate(ids.numpy(), mask.numpy(), max_new_tokens=steps + 1, eos_token_ids=())
    assert (generated == tokens.numpy()).all()
    real = mask.bool().numpy()
    worst = np.abs(actual[0] - expected[0])[real].max()
    return float(max(worst, *(np.abs(a - e).max() for a, e in zip(actual[1:], expected[1:], strict=True))))


@functools.cache
def drawn_once(model: Any) -> tuple[onnx_file.Drawn, Any]:
    drawn = onnx_file.draw(model, True)
    return drawn, onnx_ir.to_proto(drawn.graph)


def draw_once(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    """From here on an export of `model` finds its graph, which no target has a part in, ready made."""
    drawn, made = drawn_once(model)

    def again(asked: Any, cache: bool) -> onnx_file.Drawn:
        assert (asked, cache) == (model, True)
        return replace(drawn, graph=onnx_ir.from_proto(made))

    monkeypatch.setattr(onnx_file, "draw", again)


@pytest.mark.parametrize("family", ONNX_FAMILIES)
def test_hybrids_give_the_same_logits_and_tokens(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hybrid = make(family, layers=2 if family in TWO_LAYERS else 1)
    draw_once(monkeypatch, hybrid)
    domains = {"onnxruntime": "com.microsoft", "opset27": ""}
    for target, domain in domains.items():
        path = tmp_path / f"{target}.onnx"
        written = hs.export_onnx(hybrid, path, target=target, verbose=False)
        graph = onnx.load(path)
        found = {(n.domain, n.op_type) for n in graph.graph.node}
        assert {(domain, "LinearAttention"), (domain, "CausalConvWithState"), ("", "RMSNormalization")} <= found
        assert (("", "Attention") in found) == (family != "gemma2")
        assert list(written.fallbacks.values()) == ([2] if family == "gemma2" else [])
        assert {i.domain: i.version for i in graph.opset_import}[""] == written.opset == {"opset27": 27}.get(target, 23)
        assert str(Path.cwd()) not in str(graph)  # no trace of where it was made
    for target in domains:
        decoder = loaded(tmp_path / f"{target}.onnx")
        for length in (1, 7, 130):
            assert difference(hybrid, decoder, length) < 1e-4


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_teachers_export_alike(family: str, tmp_path: Path) -> None:
    model = tiny(family, num_hidden_layers=1)
    written = hs.export_onnx(model, tmp_path / "teacher.onnx", verbose=False)
    assert all(name.endswith(("key", "value")) for name in written.states)
    assert difference(model, loaded(written.path), 7) < 1e-4


def test_all_linear_keeps_no_keys_and_float16_runs(tmp_path: Path) -> None:
    model = tiny("qwen3", num_hidden_layers=1)
    hybrid = stir(hs.rewrite(model, hs.plan_heads(model, strategy="all-linear"))).half()
    written = hs.export_onnx(hybrid, tmp_path / "half.onnx", external_data=True, verbose=False)
    assert not any(name.endswith(("key", "value")) for name in written.states)
    assert (tmp_path / "half.onnx.data").stat().st_size > written.path.stat().st_size
    decoder = loaded(written.path)
    ids, mask = prompt(9)
    logits, states = decoder.step(ids.numpy(), mask.numpy())
    assert logits.dtype == np.float16
    assert states["past_key_values.0.recurrent"].dtype == np.float32
    expected = hybrid.float()(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits
    real = mask.bool().numpy()
    assert np.abs(logits - expected.detach().numpy())[real].max() < 2e-2


@torch.no_grad()
@pytest.mark.parametrize("family", ONNX_FAMILIES)
def test_float16_runs_as_exactly_as_in_torch(family: str, tmp_path: Path) -> None:
    hybrid = make(family, torch.float16)
    path = hs.export_onnx(hybrid, tmp_path / "half.onnx", verbose=False).path
    ids, mask = prompt(9)
    wide = copy.deepcopy(make(family))
    wide.load_state_dict(hybrid.state_dict())
    exact, tokens = torch_decode(wide, ids, mask, 3)
    own, _ = torch_decode(hybrid, ids, mask, 3)
    found = onnx_decode(loaded(path), tokens.numpy(), mask.numpy(), 3)
    assert all(x.dtype == np.float16 for x in found)
    real = mask.bool().numpy()
    errors = [np.abs(x[0] - exact[0])[real].max() for x in (found, own)]
    assert errors[0] < 2 * errors[1] + 2e-3
    assert max(np.abs(x - y).max() for x, y in zip(found[1:], exact[1:], strict=True)) < 2 * errors[1] + 5e-3


def test_bfloat16_is_refused_where_there_are_no_kernels_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hybrid = make("gemma2", torch.bfloat16)
    draw_once(monkeypatch, hybrid)
    path = hs.export_onnx(hybrid, tmp_path / "model.onnx", verbose=False).path
    with pytest.raises(ExportError, match=r"model\.onnx: .* for a CPU it has none for bfloat16: export float16"):
        loaded(path)


def test_the_written_file_says_what_it_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hybrid = make("gemma2", torch.bfloat16)
    draw_once(monkeypatch, hybrid)
    written = hs.export_onnx(hybrid, tmp_path / "model.onnx", cache=True)
    assert capsys.readouterr().out.strip() == str(written)
    assert "decomposed: attention with a softcap: MatMul and Softmax (1 times)" in str(written)
    graph = onnx.load(written.path).graph

    def shape(value: Any) -> list[Any]:
        return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]

    inputs = {i.name: shape(i) for i in graph.input}
    assert inputs["input_ids"] == inputs["position_ids"] == ["batch", "sequence"]
    assert inputs["attention_mask"] == ["batch", "total"]
    assert inputs["past_key_values.0.key"] == ["batch", 2, "past", 16]
    assert inputs["past_key_values.0.recurrent"] == ["batch", 2, 16, 16]
    outputs = {o.name: shape(o) for o in graph.output}
    assert outputs["logits"] == ["batch", "sequence", 96]
    assert [name.replace("past_key_values", "present") for name in written.states] == list(outputs)[1:]


def test_what_cannot_be_written_leaves_no_file(tmp_path: Path) -> None:
    model = tiny("llama", num_hidden_layers=1)
    path = tmp_path / "model.onnx"

    def refuse(match: str, **options: Any) -> None:
        with pytest.raises(ExportError, match=match):
            hs.export_onnx(options.pop("model", model), path, verbose=False, **options)
        assert [f.name for f in tmp_path.iterdir() if f.name != "taken.onnx"] == []

    refuse("no target is called 'tensorrt'; known: onnxruntime, opset27", target="tensorrt")
    refuse("opset 18 is too old: target onnxruntime needs 23", opset=18)
    refuse("opset 23 is too old: target opset27 needs 27", opset=23, target="opset27")
    refuse("opset 99 is unknown", opset=99)
    refuse("float64", model=tiny("llama", num_hidden_layers=1).double())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))  # a disk with room for less than the model
    try:
        refuse(r"model\.onnx: cannot be written .* bytes are free")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with pytest.raises(UnsupportedModelError, match="PlainDecoder: only Hugging Face decoders"):
        hs.export_onnx(PlainDecoder(FusedAttention), path)
    taken = tmp_path / "taken.onnx"
    taken.write_text("mine")
    with pytest.raises(ExportError, match=r"taken\.onnx: exists"):
        hs.export_onnx(model, taken)
    assert taken.read_text() == "mine"


def test_slices_are_looked_for_where_there_are_some(monkeypatch: pytest.MonkeyPatch) -> None:
    from onnxscript.rewriter import RewriteRuleSet
    from onnxscript.rewriter.rules.common import slice_split_rule as rule

    text = """<ir_version: 10, opset_import: ["" : 23]>
    g (float[2, 8] x) => (float[2, 4] a, float[2, 4] b)
    <int64[1] zero = {0}, int64[1] half = {4}, int64[1] end = {8}, int64[1] axis = {1}> {
        d = Slice(x, half, end, axis)
        c = Slice(x, zero, half, axis)
        a = Relu(c)
        b = Relu(d)
    }"""
    looks: list[str] = []
    match = type(rule).match
    monkeypatch.setattr(type(rule), "match", lambda *a, **k: (looks.append(a[3].op_type), match(*a, **k))[1])

    def rewritten() -> list[str]:
        looks.clear()
        model = onnx_ir.from_proto(onnx.parser.parse_model(text))
        RewriteRuleSet([rule]).apply_to_model(model)
        return [node.op_type for node in model.graph]

    with onnx_file._quick():
        inside, seen = rewritten(), list(looks)
    assert inside == rewritten() == ["Split", "Relu", "Relu"]
    assert "Relu" not in seen and "Relu" in looks  # outside every node is looked at, as before


def test_an_op_that_the_target_lacks_is_named(tmp_path: Path) -> None:
    @torch.library.custom_op("hydra::of_another_kind", mutates_args=())
    def of_another_kind(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    of_another_kind.register_fake(torch.empty_like)
    model = tiny("llama", num_hidden_layers=1)
    model.model.layers[0].self_attn.register_forward_hook(lambda m, a, out: (of_another_kind(out[0]), *out[1:]))
    with pytest.raises(ExportError, match=r"cannot express hydra\.of_another_kind"):
        hs.export_onnx(model, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


class EveryOp(torch.nn.Module):
    """What no tiny family has: each rule, a decay a channel, sinks, a softcap with them, additive masks, all heads normalised."""

    def forward(self, q: Any, k: Any, v: Any, mask: Any, sinks: Any, decay: Any, beta: Any, gamma: Any) -> Any:
        tokens = (
            q.transpose(1, 2),
            k.repeat_interleave(2, 1).transpose(1, 2),
            v.repeat_interleave(2, 1).transpose(1, 2),
        )
        additive = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
        full = [
            ops.attention(q, k, v, mask, sinks),
            ops.attention(q, k, v, additive, sinks, softcap=2.0),
            ops.attention(q, k, v, additive),
            ops.attention(q, k, v, scale=0.3),
        ]
        linear = [
            ops.linear_attention(*tokens, rule="linear")[0],
            ops.linear_attention(*tokens, decay[..., 0], rule="gated", scale=0.5)[0],
            ops.linear_attention(*tokens, None, beta, rule="delta")[0],
            *ops.linear_attention(*tokens, decay, beta, rule="gated_delta"),
        ]
        fused = ops.scale_norm_fusion(full[0], linear[0], gamma, linear_heads=(1, 2, 4, 7), norm_full=True)
        only = ops.scale_norm_fusion(None, linear[3], gamma[:4], beta[..., None], linear_heads=(0, 1, 2, 3))
        return (*full, *linear, fused, only)


def test_what_no_family_has(tmp_path: Path) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8)
    mask = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()
    mask[0, :, :, :2] &= torch.eye(6, 2, dtype=torch.bool)
    decay, beta = -torch.rand(2, 6, 4, 8), torch.rand(2, 6, 4)
    arguments = (q, k / 3, v, mask, torch.randn(4), decay, beta, torch.randn(8))
    lowering = Lowering()
    table, path = lowering.table(), tmp_path / "ops.onnx"
    torch.onnx.export(
        EveryOp().eval(), arguments, path, custom_translation_table=table, opset_version=23, verbose=False
    )
    assert set(lowering.fallbacks) == {
        "attention with sinks: MatMul and Softmax",
        "attention with a softcap and sinks: MatMul and Softmax",
    }
    session = pytest.importorskip("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    got = session.run(None, {n: a.numpy() for n, a in zip(names, arguments, strict=True)})
    for number, (a, b) in enumerate(zip(got, EveryOp()(*arguments), strict=True)):
        assert np.allclose(a, b.numpy(), atol=1e-5), number


def test_another_file_is_no_decoder(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    (tmp_path / "broken.onnx").write_bytes(b"nothing")
    with pytest.raises(ExportError, match=r"broken\.onnx: ONNX Runtime cannot load it"):
        hs.OnnxDecoder(tmp_path / "broken.onnx")
    written = hs.export_onnx(tiny("llama", num_hidden_layers=1), tmp_path / "plain.onnx", cache=False, verbose=False)
    assert written.states == ()
    with pytest.raises(ExportError, match="export it with cache=True"):
        hs.OnnxDecoder(written.path)

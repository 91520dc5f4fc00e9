"""GGUF files: dequantised models are ordinary ones, and broken files are refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import hydrasurgery as hs
from hydrasurgery.cli import app
from hydrasurgery.demo import teacher as shipped
from hydrasurgery.errors import CheckpointError
from hydrasurgery.loading import load_model, load_tokenizer
from tests.families import tiny

gguf = pytest.importorskip("gguf")
FOLDER = Path(shipped.__file__).with_suffix("")
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def as_stored(name: str, weight: torch.Tensor, config) -> tuple[str, np.ndarray]:
    """A tensor under its name in GGUF; rotary channels of q and k are stored as neighbours."""
    outer = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if name in outer or name == "lm_head.weight":
        return outer.get(name, "output.weight"), weight.numpy()
    _, _, layer, *rest = name.split(".")
    own = NAMES[".".join(rest[:-1])]
    if own in ("attn_q", "attn_k"):
        heads = config.num_attention_heads if own == "attn_q" else config.num_key_value_heads
        weight = weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
    return f"blk.{layer}.{own}.weight", weight.numpy()


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, torch.nn.Module]:
    """A llama with the shipped tokenizer as a GGUF file of 8-bit matrices, and the model itself."""
    tokenizer = json.loads((FOLDER / "tokenizer.json").read_text())
    vocabulary = [*sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get), "<|endoftext|>"]
    model = tiny("llama", vocab_size=len(vocabulary), tie_word_embeddings=True)
    config, path = model.config, tmp_path_factory.mktemp("gguf") / "tiny.Q8_0.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([1] * (len(vocabulary) - 1) + [3])  # plain ones, and one that ends a text
    writer.add_bos_token_id(len(vocabulary) - 1)
    writer.add_eos_token_id(len(vocabulary) - 1)
    writer.add_token_merges(
        [" ".join(pair) if isinstance(pair, list) else pair for pair in tokenizer["model"]["merges"]]
    )
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        stored, values = as_stored(name, weight.detach().float(), config)
        if values.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(stored, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(stored, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, model


def test_it_is_the_model_within_what_was_rounded_off(made, caplog):
    path, model = made
    found = load_model(path)
    assert "dequantised to float32" in caplog.text and "of Q8_0" in caplog.text
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        wanted, logits = model.eval()(ids).logits, found(ids).logits
    assert found.dtype == torch.float32 and (wanted - logits).norm() < 0.02 * wanted.norm()
    tokenizer = load_tokenizer(path, found)
    text = "for name in names:"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_what_is_read_is_an_ordinary_model(made, tmp_path):
    teacher = load_model(made[0])
    assert load_model(made[0], dtype=torch.bfloat16).dtype == torch.bfloat16
    hybrid = hs.rewrite(teacher.float(), hs.plan_heads(teacher, ratio="1:1", strategy="fixed"))
    hybrid.save_pretrained(tmp_path)
    again = load_model(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    ids = torch.arange(3, 20)[None]
    assert torch.equal(again(ids).logits, hybrid.eval()(ids).logits)


def test_commands_take_it(made, tmp_path):
    plan, out = tmp_path / "plan.json", tmp_path / "hybrid"
    for command in (
        ["plan", "--model", str(made[0]), "--strategy", "fixed", "--ratio", "1:1", "--out", str(plan)],
        ["rewrite", str(made[0]), "--plan", str(plan), "--out", str(out)],
    ):
        found = CliRunner().invoke(app, command)
        assert found.exit_code == 0, found.output
    assert (out / "model.safetensors").is_file() and (out / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda whole: whole[: len(whole) // 2], "truncated or not a GGUF file"),
        (lambda whole: whole[:200], "truncated or not a GGUF file"),
        (lambda whole: b"", "is no GGUF file"),
        (lambda whole: b"PK" + whole[2:], "is no GGUF file"),
        (lambda whole: whole.replace(b"llama", b"lemur"), "cannot be loaded as a model"),
    ],
    ids=["half", "header", "empty", "another", "architecture"],
)
def test_broken_files_are_refused_by_name(made, tmp_path, damage, said):
    path = tmp_path / "broken.gguf"
    path.write_bytes(damage(made[0].read_bytes()))
    with pytest.raises(CheckpointError, match=said) as refused:
        load_model(path)
    assert str(path) in str(refused.value)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        load_model(tmp_path / "nowhere.gguf")


def test_without_the_package_it_says_what_to_install(made, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gguf" else find(name, *rest))
    with pytest.raises(CheckpointError, match=r"needs gguf \(pip install 'hydrasurgery\[gguf\]'\)"):
        load_model(made[0])

"""What cannot be cut out is refused by name, with the reason, and the model is left as it was."""

from __future__ import annotations

import pytest
import torch
from hydrasurgery.passes import parse, run_pipeline
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

import hydrasurgery as hs
from hydrasurgery.errors import PipelineError, PlanError, PreconditionError, UnsupportedModelError
from tests.families import FusedAttention, PlainDecoder, tiny
from tests.test_families import half_plan


def small(model_type: str, **changes: object) -> nn.Module:
    config = AutoConfig.for_model(model_type, vocab_size=64, hidden_size=32, **changes)
    return AutoModelForCausalLM.from_config(config).eval()


def test_alibi_that_bypasses_the_interface() -> None:
    model = small("bloom", n_layer=2, n_head=4)
    with pytest.raises(UnsupportedModelError, match=r"BloomForCausalLM.*ALiBi"):
        hs.capture(model)


def test_latent_attention() -> None:
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 32}
    latent = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    with pytest.raises(UnsupportedModelError, match=r"MLA, kv_lora_rank=8"):
        hs.capture(small("deepseek_v3", first_k_dense_replace=1, **sizes, **latent))


class EagerAttention(nn.Module):
    """Softmax attention in code of its own."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        scores = (q @ k.transpose(1, 2)).masked_fill(~torch.ones(x.shape[1], x.shape[1]).tril().bool(), -1e9)
        return F.softmax(scores, dim=-1) @ v


def test_eager_code_is_named() -> None:
    with pytest.raises(UnsupportedModelError, match=r"attention\.0 computes softmax in code of its own"):
        hs.capture(PlainDecoder(EagerAttention))


class BothWays(FusedAttention):
    """Attends in both directions."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_bidirectional_attention() -> None:
    with pytest.raises(UnsupportedModelError, match=r"attention\.0 attends in both directions"):
        hs.capture(PlainDecoder(BothWays))


def test_a_refused_rewrite_leaves_the_model_as_it_was() -> None:
    model, other = tiny("qwen3"), tiny("llama", num_hidden_layers=3)
    implementation, modules = model.config._attn_implementation, list(model.modules())
    with pytest.raises(PlanError, match="another architecture"):
        hs.rewrite(model, half_plan(other))
    assert model.config._attn_implementation == implementation
    assert list(model.modules()) == modules
    assert not hasattr(model.config, "quantization_config")


@pytest.mark.parametrize("pipeline", ["no-such-pass", "fuse-heads{colour=red}", "fuse-heads{", "a b"])
def test_pipelines_that_do_not_parse(pipeline: str) -> None:
    with pytest.raises(PipelineError):
        parse(pipeline)


def test_a_pass_names_itself_and_the_region() -> None:
    regions = hs.capture(tiny("qwen3"))
    with pytest.raises(PreconditionError, match=r"linearize-heads: model\.layers\.0\.self_attn: run split-heads first"):
        run_pipeline(regions, "linearize-heads")


def test_pipeline_strings_round_trip() -> None:
    text = "split-heads,linearize-heads{rule=delta,conv=0},fuse-heads{full_norm=paper}"
    assert ",".join(map(str, parse(text))) == text


def test_dumps_hold_every_step(tmp_path: object) -> None:
    model = tiny("qwen3")
    hs.rewrite(model, half_plan(model), dump=tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names[0] == "model.layers.0.self_attn.00-captured.txt"
    assert len(names) == 2 * 6
    last = (tmp_path / "model.layers.0.self_attn.05-thread-state.txt").read_text()
    assert "hydra::scale_norm_fusion" in last
    assert "%o_linear" not in last


def test_a_check_that_fails_names_the_pass() -> None:
    model = tiny("qwen3")
    regions = hs.capture(model)
    for region in regions:
        region.kinds = ("full", "linear") * 2

    def unchanged(region: hs.Region, step: object) -> None:
        assert region.find(torch.ops.hydra.linear_attention.default) == [], "a recurrence appeared"

    with pytest.raises(Exception, match=r"linearize-heads: model\.layers\.0\.self_attn: numbers changed"):
        run_pipeline(regions, "split-heads,linearize-heads", check=unchanged)

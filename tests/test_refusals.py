"""What cannot be cut out is refused by name, with the reason, and the model is left as it was."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache
from transformers.cache_utils import LinearAttentionAndFullAttentionLayer

import hydrasurgery as hs
from hydrasurgery.dialect.names import ATTENTION
from hydrasurgery.errors import (
    CheckpointError,
    PassError,
    PipelineError,
    PlanError,
    PreconditionError,
    UnsupportedModelError,
)
from hydrasurgery.ir import trials
from hydrasurgery.passes import parse, run_pipeline
from hydrasurgery.passes.base import Pass, PassResult
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


def test_of_several_layers_the_first_that_does_not_fit_is_named() -> None:
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 32}
    with pytest.raises(UnsupportedModelError, match=r"^model\.layers\.0\.self_attn calls attention 2 times"):
        hs.capture(small("diffllama", num_hidden_layers=8, **sizes))


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
    assert not hasattr(model.config, "hydrasurgery")


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
    assert names[0] == "model.layers.0.self_attn.00-given.txt"
    assert len(names) == 2 * 8
    last = (tmp_path / "model.layers.0.self_attn.06-thread-state.txt").read_text()
    assert "hydra::scale_norm_fusion" in last
    assert "%o_linear" not in last


@dataclass(frozen=True)
class Louder(Pass):
    """Claims to keep the region's numbers, and scales the attention's output."""

    name: ClassVar[str] = "louder"
    factor: float = 1.0

    def run(self, region: hs.Region) -> PassResult:
        node = region.find(ATTENTION)[0]
        with region.graph.inserting_after(node):
            scaled = region.graph.call_function(torch.ops.aten.mul.Tensor, (node, self.factor))
        node.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)
        return PassResult(region, True)


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gpt2"])
def test_numbers_are_compared_around_each_exact_pass(family: str) -> None:
    regions = hs.capture(tiny(family))
    for region in regions:
        region.kinds = ("full", "linear") * 2
    steps = parse("canonicalize-attention,split-heads,untie-projections,prune-projections,linearize-heads,fuse-heads")
    run_pipeline(regions, steps, tolerance=1e-5)
    with pytest.raises(PassError, match=r"^louder: model\.layers\.0\.self_attn: the pass changed .* by 0\.01 of"):
        run_pipeline(hs.capture(tiny("qwen3")), [Louder(1.01), *steps], tolerance=1e-5)


def test_layers_that_share_keys_and_values() -> None:
    config = AutoConfig.for_model("gemma3n_text", num_hidden_layers=4, num_kv_shared_layers=2)
    model = nn.Linear(1, 1)
    model.config = config
    with pytest.raises(UnsupportedModelError, match="num_kv_shared_layers"):
        hs.capture(model)


def test_an_interface_with_other_masks_is_refused() -> None:
    model = tiny("llama")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UnsupportedModelError, match=r"flash_attention_2.*set_attn_implementation\('sdpa'\)"):
        hs.rewrite(model, half_plan(tiny("llama")))


def test_a_cache_that_cannot_serve_a_hybrid_is_refused() -> None:
    model = tiny("llama")
    hybrid = hs.rewrite(model, half_plan(model))
    ids = torch.arange(3, 9)[None]
    for new in (DynamicCache, lambda: StaticCache(config=model.config, max_cache_len=16)):
        cache = new()
        model(ids, past_key_values=cache)
        with pytest.raises(
            UnsupportedModelError, match="layer 0: the cache holds tokens that this hybrid has not seen"
        ):
            hybrid(ids, past_key_values=cache)
        cache = new()
        hybrid(ids, past_key_values=cache)
        with pytest.raises(UnsupportedModelError, match="cannot be cropped"):
            cache.crop(-3)


def test_a_hybrid_prints_its_regions() -> None:
    model = tiny("gemma2")
    hybrid = hs.rewrite(model, half_plan(model))
    assert hs.regions(model) == []
    first, second = hs.regions(hybrid)
    assert str(first).startswith(
        "region model.layers.0.self_attn: 4 heads (2 linear), 2 KV heads of 16, window 8, softcap 50"
    )
    assert "%o_recurrent: [B, T, 2, 16]" in str(second)
    assert "%hydra_gamma: [2] = self.hydra.gamma" in str(second)


def test_a_hybrid_is_not_rewritten_again() -> None:
    model = tiny("llama")
    hybrid = hs.rewrite(model, half_plan(model))
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM is a hybrid already; pass the teacher"):
        hs.plan_heads(hybrid, strategy="all-linear")


def test_a_model_without_attention_is_not_blamed_on_a_softmax() -> None:
    with pytest.raises(UnsupportedModelError, match=r"no call of an attention op was seen\. It has no attention"):
        hs.capture(nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8)))


def test_a_dispatched_model_is_refused() -> None:
    model = tiny("llama")
    add_hook_to_module(model.model.layers[1].self_attn, ModelHook())
    with pytest.raises(UnsupportedModelError, match=r"accelerate moves the weights of model\.layers\.1\.self_attn"):
        hs.rewrite(model, half_plan(tiny("llama")))


def test_a_mask_that_is_no_tensor_is_named() -> None:
    model = tiny("llama")
    hybrid = hs.rewrite(model, half_plan(model))
    hybrid.set_attn_implementation("flex_attention")
    with pytest.raises(
        UnsupportedModelError, match=r"attention_mask is a BlockMask.*set_attn_implementation\('sdpa'\)"
    ):
        hybrid(torch.arange(3, 9)[None])


def test_a_cache_of_a_state_space_layer_is_named() -> None:
    model = tiny("llama")
    hybrid = hs.rewrite(model, half_plan(model))
    cache = DynamicCache(config=model.config)
    cache.layers[0] = LinearAttentionAndFullAttentionLayer()
    with pytest.raises(
        UnsupportedModelError, match="layer 0: the model keeps a LinearAttentionAndFullAttentionLayer there"
    ):
        hybrid(torch.arange(3, 9)[None], past_key_values=cache)


def test_a_checkpoint_without_an_addition_is_named(tmp_path: Path) -> None:
    model = tiny("llama")
    hs.rewrite(model, half_plan(model)).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.self_attn.hydra.gamma"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.1\.self_attn\.hydra\.gamma"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_layer_without_a_full_head_breaks_the_plans_promise() -> None:
    model = tiny("llama")
    plan = half_plan(model)
    empty = replace(plan, layers=(replace(plan.layers[0], kinds=("linear",) * 4), *plan.layers[1:]))
    with pytest.raises(
        PlanError, match=r"layer model\.layers\.0\.self_attn keeps 0 full units of head.*promises 1 a layer"
    ):
        hs.rewrite(model, empty)
    assert len(hs.region_modules(hs.rewrite(model, replace(empty, min_full_per_layer=0)))) == 2


def test_what_padding_gets_is_its_kernels_affair(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's kernels in half precision give tokens that may attend to nothing a mean over all, later ones too."""
    tokens, seen = trials._tokens, []

    def with_means(region: Any, run: Any, call: dict[str, Any]) -> torch.Tensor:
        results, given = tokens(region, run, call), call["hidden_states"]
        blind = ~call["attention_mask"].any(-1)[:, 0]
        seen.append(bool(blind.any()))
        return torch.where(blind[:, :, None], given.mean(1, keepdim=True).expand_as(results), results)

    monkeypatch.setattr(trials, "_tokens", with_means)
    assert len(hs.capture(tiny("qwen3"))) == 2
    assert any(seen)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gpt2", "opt"])
def test_models_on_a_gpu_are_captured(family: str, dtype: torch.dtype) -> None:
    assert hs.capture(tiny(family).to("cuda", dtype))

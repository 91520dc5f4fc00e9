"""The linear heads' own projections: same numbers, fewer rows, and nothing shared with the full heads or the teacher."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache

import hydrasurgery as hs
from hydrasurgery import ops
from hydrasurgery.errors import PreconditionError
from hydrasurgery.sharing import same_memory
from tests.families import FusedAttention, GroupedAttention, PlainDecoder, tiny
from tests.test_families import IDS, half_plan, stir

UNTIED = ("qwen3", "llama", "phi3", "gpt2", "olmo2")
KINDS = ("full", "linear", "linear", "full")
UNEVEN = ("full", "full", "linear", "full")  # the kept KV heads are read by 2 and 1 full heads


def pair(model: nn.Module, kinds: tuple[str, ...] = KINDS) -> tuple[nn.Module, nn.Module]:
    """A tied hybrid, and one with its own projections and the same gates."""
    plan = half_plan(model, kinds)
    tied = stir(hs.rewrite(model, plan))
    untied = hs.rewrite(model, plan, layer="untie=true")
    gates = {name: value for name, value in tied.state_dict().items() if ".hydra." in name}
    assert set(gates) <= set(untied.state_dict())
    untied.load_state_dict(gates, strict=False)
    return tied, untied


def attention(hybrid: nn.Module) -> hs.RegionModule:
    return next(iter(hs.region_modules(hybrid).values()))


def selections(hybrid: nn.Module) -> list[str]:
    """Names of the selections of heads that are left in the first layer."""
    return [n.name for n in hs.regions(hybrid)[0].graph.nodes if n.target is ops.select_heads]


@pytest.fixture(params=UNTIED, scope="module")
def both(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module]:
    return pair(tiny(request.param))


@torch.no_grad()
def test_numbers_are_those_of_the_tied_hybrid(both: tuple[nn.Module, nn.Module]) -> None:
    tied, untied = both
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    for call in ({"input_ids": IDS}, {"input_ids": IDS, "attention_mask": mask}):
        assert torch.allclose(untied(**call, use_cache=False).logits, tied(**call, use_cache=False).logits, atol=1e-5)


@torch.no_grad()
def test_cached_equals_full_and_the_cache_holds_the_kept_heads(both: tuple[nn.Module, nn.Module]) -> None:
    hybrid = both[1]
    full = hybrid(IDS, use_cache=False).logits
    cache, parts = DynamicCache(config=hybrid.config), []
    for piece in (IDS[:, :5], IDS[:, 5:6], IDS[:, 6:9], *IDS[:, 9:].split(1, dim=1)):
        parts.append(hybrid(piece, past_key_values=cache, use_cache=True).logits)
    assert torch.allclose(torch.cat(parts, dim=1), full, atol=1e-4)
    assert cache.layers[0].keys.shape[1] == 2


@torch.no_grad()
def test_saved_copied_and_pickled_hybrids_are_bit_equal(both: tuple[nn.Module, nn.Module], tmp_path: object) -> None:
    hybrid = both[1]
    expected = hybrid(IDS, use_cache=False).logits
    hybrid.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert list(loaded.state_dict()) == list(hybrid.state_dict())
    for other in (loaded, copy.deepcopy(hybrid), pickle.loads(pickle.dumps(hybrid))):
        assert torch.equal(other(IDS, use_cache=False).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("family", ["phi3"])
def test_untying_alone_is_bit_exact(family: str) -> None:
    model = tiny(family)
    tail = "linearize-heads,fuse-heads,thread-state"
    tied, untied = (
        hs.rewrite(model, half_plan(model), pipeline=f"canonicalize-attention,split-heads,{own}{tail}")
        for own in ("", "untie-projections,")
    )
    assert torch.equal(untied(IDS, use_cache=False).logits, tied(IDS, use_cache=False).logits)


def test_qwen3_projections_hold_their_own_heads_only() -> None:
    model = tiny("qwen3", num_attention_heads=8, num_key_value_heads=4, head_dim=16)
    old = model.model.layers[0].self_attn
    rows = old.q_proj.weight.unflatten(0, (8, 16)), old.k_proj.weight.unflatten(0, (4, 16))
    full, linear = (0, 3, 4), (1, 2, 5, 6, 7)
    _, hybrid = pair(model, tuple("full" if h in full else "linear" for h in range(8)))
    new = attention(hybrid)
    assert torch.equal(new.q_proj.weight, rows[0][list(full)].flatten(0, 1))
    assert torch.equal(new.hydra.q_proj.weight, rows[0][list(linear)].flatten(0, 1))
    assert torch.equal(new.k_proj.weight, rows[1][:3].flatten(0, 1))
    assert torch.equal(new.hydra.k_proj.weight, rows[1][[h // 2 for h in linear]].flatten(0, 1))
    assert new.q_proj.out_features == 48 and new.hydra.v_proj.out_features == 80
    assert same_memory(new.original.q_proj.weight, old.q_proj.weight)
    assert old.q_proj.weight.shape == (128, 64)
    assert torch.equal(hs.restore(hybrid)(IDS).logits, model(IDS).logits)


@torch.no_grad()
def test_bias_rows_follow_their_heads() -> None:
    tied, untied = pair(tiny("qwen2"))
    assert attention(untied).q_proj.bias.shape == attention(untied).hydra.q_proj.bias.shape == (32,)
    assert torch.allclose(untied(IDS, use_cache=False).logits, tied(IDS, use_cache=False).logits, atol=1e-5)


def test_only_what_treats_heads_alike_is_pruned(both: tuple[nn.Module, nn.Module]) -> None:
    left = selections(both[1])
    whole = {"phi3": 6, "gpt2": 6, "olmo2": 4}  # fused projections; norms over the full width of q and k
    assert len(left) == whole.get(both[1].config.model_type, 0), left


@torch.no_grad()
def test_uneven_groups_keep_each_cached_head_once() -> None:
    tied, untied = pair(tiny("llama"), UNEVEN)
    assert attention(untied).k_proj.out_features == 32
    assert selections(untied) == ["k_full_expanded", "v_full_expanded"]
    assert torch.allclose(untied(IDS, use_cache=False).logits, tied(IDS, use_cache=False).logits, atol=1e-5)
    cache, parts = DynamicCache(config=untied.config), []
    for piece in IDS.split(5, dim=1):
        parts.append(untied(piece, past_key_values=cache, use_cache=True).logits)
    assert torch.allclose(torch.cat(parts, dim=1), untied(IDS, use_cache=False).logits, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kinds", [("linear",) * 4, ("full",) * 4, ("linear", "linear", "full", "full")])
def test_one_kind_of_head_and_dropped_groups(kinds: tuple[str, ...]) -> None:
    model = tiny("qwen3")
    tied, untied = pair(model, kinds)
    names = {name for name, _ in attention(untied).hydra.named_children()}
    assert ("q_proj" in names) == (len(set(kinds)) == 2)
    assert torch.allclose(untied(IDS, use_cache=False).logits, tied(IDS, use_cache=False).logits, atol=1e-5)
    rows = attention(untied).k_proj.out_features
    assert rows == {("linear",) * 4: 64, ("full",) * 4: 32}.get(kinds, 16)


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen3"])
def test_pruning_a_tied_region_leaves_shared_projections(family: str) -> None:
    model = tiny(family)
    steps = "canonicalize-attention,split-heads,prune-projections,linearize-heads,fuse-heads,thread-state"
    pruned, tied = hs.rewrite(model, half_plan(model), pipeline=steps), hs.rewrite(model, half_plan(model))
    assert len(selections(pruned)) == 6
    assert torch.equal(pruned(IDS, use_cache=False).logits, tied(IDS, use_cache=False).logits)


@torch.no_grad()
@pytest.mark.parametrize("block", [FusedAttention, GroupedAttention])
def test_plain_modules(block: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = PlainDecoder(block)
    tied, untied = pair(model)
    assert torch.allclose(untied(IDS), tied(IDS), atol=1e-5)
    assert bool(selections(untied)) == (block is FusedAttention)


def test_untie_names_the_missing_pass() -> None:
    model = tiny("llama")
    with pytest.raises(PreconditionError, match="untie-projections.*run split-heads first"):
        hs.rewrite(model, half_plan(model), pipeline="canonicalize-attention,untie-projections")


@pytest.mark.parametrize("family", ["qwen3", "olmo2"])
def test_training_the_linear_branch_moves_neither_full_heads_nor_teacher(family: str) -> None:
    model = tiny(family)
    teacher = {name: value.clone() for name, value in model.state_dict().items()}
    hybrid = pair(model)[1]
    seen: list[torch.Tensor] = []
    attention(hybrid).o_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    own = [
        parameter
        for module in hs.region_modules(hybrid).values()
        for name, parameter in module.hydra.named_parameters()
        if name.endswith("_proj.weight") and name.count(".") == 1
    ]
    assert own
    optimizer = torch.optim.SGD(own, lr=1.0)
    hybrid(IDS, use_cache=False).logits.square().mean().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in own)
    optimizer.step()
    with torch.no_grad():
        hybrid(IDS, use_cache=False)
    before, after = (x.unflatten(-1, (4, 16)) for x in seen)
    assert torch.equal(before[:, :, [0, 3]], after[:, :, [0, 3]])
    assert not torch.allclose(before[:, :, [1, 2]], after[:, :, [1, 2]], atol=1e-4)
    for name, value in model.state_dict().items():
        assert torch.equal(value, teacher[name]), name

"""Which kernels a user's own calls would run on a GPU: every case that reaches the registry, and what it chooses there.

The calls run here, on graphs as GPUs run them; the choice is a pure function of the case and a machine.
"""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, StaticCache

import hydrasurgery as hs
from hydrasurgery.kernels import registry
from hydrasurgery.kernels.registry import Case, Machine, choose
from tests.families import FAMILIES, tiny

MACHINES = [Machine("cuda", capability, frozenset({("triton", "3.6.0")})) for capability in ((9, 0), (8, 6))]
HEADS = ("attention", "linear_attention", "causal_conv", "head_inputs", "head_gates", "decode_step")


@pytest.fixture
def asked(monkeypatch):
    """(operator, case) of every call."""
    found: dict[tuple[str, Case], None] = {}
    kernel = registry._kernel

    def ask(op, case, machine):
        found[op, case] = None
        return kernel(op, case, machine)

    monkeypatch.setattr(registry, "_kernel", ask)
    return found


def hybrid_of(family: str) -> torch.nn.Module:
    """Every layer with both kinds of heads, and with the graphs that GPUs run."""
    teacher = tiny(family)
    hybrid = hs.rewrite(teacher, hs.plan_heads(teacher, ratio="1:1", strategy="fixed"))
    for module in hs.region_modules(hybrid).values():
        vars(module).update(_run=module._run_fast, _run_decode=module._run_step)
    return hybrid


def train(hybrid, ids, mask) -> None:
    hybrid.train()
    hybrid(ids, labels=ids, use_cache=False).loss.backward()
    hybrid(ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
    packed = (torch.arange(ids.shape[1]) % 5)[None].expand_as(ids)
    hybrid(ids, position_ids=packed, labels=ids, use_cache=False).loss.backward()


@torch.no_grad()
def generate(hybrid, ids, mask) -> None:
    hybrid.eval()
    for given in (None, mask):
        cache = DynamicCache(config=hybrid.config)
        seen = torch.ones_like(mask) if given is None else given
        hybrid(ids, attention_mask=given, past_key_values=cache)
        one = torch.cat([seen, torch.ones_like(seen[:, :1])], 1)
        hybrid(ids[:, :1], attention_mask=None if given is None else one, past_key_values=cache)
        turn = torch.cat([one, torch.ones_like(seen[:, :4])], 1)
        hybrid(ids[:, :4], attention_mask=None if given is None else turn, past_key_values=cache)
    if torch.is_autocast_enabled("cpu"):
        return  # transformers' static caches do not take keys and values of two dtypes
    cache = StaticCache(config=hybrid.config, max_cache_len=24)
    hybrid(ids, past_key_values=cache)
    hybrid(ids[:, :1], past_key_values=cache)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_call_runs_plain_pytorch_on_a_gpu(family, asked):
    hybrid = hybrid_of(family)
    ids = torch.randint(3, 60, (2, 12))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    asked.clear()
    with torch.autocast("cpu", torch.bfloat16):
        train(hybrid, ids, mask)
        generate(hybrid, ids, mask)
    hybrid.to(torch.bfloat16)
    train(hybrid, ids, mask)
    generate(hybrid, ids, mask)
    assert {op for op, _ in asked} >= {"attention", "scale_norm_fusion"}
    assert not {case for op, case in asked if op in HEADS and case.dtype != torch.bfloat16}
    for machine in MACHINES:
        slow = {(op, case) for op, case in asked if choose(op, case, machine).implementation.name == "reference"}
        assert not slow, machine.capability


def test_a_call_that_falls_back_says_which_module_asked(monkeypatch):
    hybrid = hybrid_of("qwen3")
    bare = Machine("cuda", (7, 5), frozenset({("none", "of test_whole_choice")}))  # for which there is no kernel
    monkeypatch.setattr(registry, "_machine", lambda kind, index: bare)
    with pytest.warns(
        RuntimeWarning, match=r"linear_attention .* on CUDA, first for model\.layers\.0\.self_attn: "
    ) as said:
        hybrid(torch.randint(3, 60, (1, 6)))
    assert len({str(w.message) for w in said}) == len(said)  # once for all layers

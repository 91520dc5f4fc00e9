"""One token that follows others: the decode graph runs, only in inference, and gives what the region's own graph gives."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import hydrasurgery as hs
from tests.families import tiny
from tests.test_families import half_plan, stir

IDS = torch.arange(3, 27).view(2, 12)
STEP, RECURRENCE = torch.ops.hydra.decode_step.default, torch.ops.hydra.linear_attention.default
HEADS = torch.ops.hydra.step_heads.default


class Count(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func] += 1
        return func(*args, **(kwargs or {}))


def hybrid_of(kinds: tuple[str, ...], **options: Any) -> Any:
    model = tiny("qwen3")
    return stir(hs.rewrite(model, half_plan(model, kinds), layer=hs.LayerOptions(**options)))


def by_token(hybrid: Any, mask: torch.Tensor, first: int) -> torch.Tensor:
    """Logits of IDS with the first tokens at once and the others one by one."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache, parts, start = None, [], 0
    for stop in (first, *range(first + 1, IDS.shape[1] + 1)):
        piece = slice(start, stop)
        out = hybrid(
            IDS[:, piece],
            attention_mask=mask[:, :stop],
            position_ids=positions[:, piece],
            past_key_values=cache,
            use_cache=True,
        )
        cache, start = out.past_key_values, stop
        parts.append(out.logits)
    return torch.cat(parts, dim=1)


KINDS = [("full", "linear", "linear", "full"), ("linear",) * 4]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"conv": "none"},
    {"gate": False},
    {"untie": True},
    {"linear_rope": False, "full_rope": False},
    {"log_length": True, "full_gate": True},
]


@torch.no_grad()
@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("first", [1, 4, 8])
def test_decoding_in_one_step_says_the_same(kinds: tuple[str, ...], options: dict[str, Any], first: int) -> None:
    # In fp64 two right ways agree to 1e-12; in fp32 each is up to 1e-5 from the truth, more or less by processor.
    hybrid = hybrid_of(kinds, **options).double()
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0  # a sequence whose first token comes after decoding has begun, or before
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    whole = hybrid(IDS, attention_mask=mask, position_ids=positions, use_cache=False).logits
    with Count() as count:
        found = by_token(hybrid, mask, first)
    assert torch.allclose(found[mask.bool()], whole[mask.bool()], rtol=0, atol=1e-12)
    assert count.calls[STEP] == 2 * (IDS.shape[1] - first)
    assert count.calls[RECURRENCE] == 2
    plain = copy.deepcopy(hybrid)
    for module in hs.region_modules(plain).values():
        module.region.decode = None
    with Count() as count:
        assert torch.allclose(by_token(plain, mask, first)[mask.bool()], found[mask.bool()], rtol=0, atol=1e-12)
    assert count.calls[STEP] == 0


@torch.no_grad()
@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("options", OPTIONS)
def test_what_gpus_run_says_the_same(kinds: tuple[str, ...], options: dict[str, Any]) -> None:
    hybrid = hybrid_of(kinds, **options).double()
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    wanted = by_token(hybrid, mask, 4)
    for module in hs.region_modules(hybrid).values():
        vars(module)["_run_decode"] = module._run_step
    with Count() as count:
        found = by_token(hybrid, mask, 4)
    assert torch.allclose(found[mask.bool()], wanted[mask.bool()], rtol=0, atol=1e-12)
    assert (count.calls[STEP], count.calls[HEADS]) == (0, 2 * (IDS.shape[1] - 4))


def test_training_runs_the_regions_own_graph() -> None:
    hybrid = hybrid_of(("full", "linear", "linear", "full"))
    cache = hybrid(IDS, use_cache=True).past_key_values
    with Count() as count:
        hybrid(IDS[:, :1], past_key_values=cache).logits.sum().backward()
    assert count.calls[STEP] == 0


@pytest.mark.parametrize("options", [{"rule": "delta"}, {"full_norm": "paper"}, {"conv": "native"}])
def test_what_the_operator_cannot_do_keeps_one_graph(options: dict[str, Any]) -> None:
    hybrid = hybrid_of(("full", "linear", "linear", "full"), **options)
    assert [region.decode for region in hs.regions(hybrid)] == [None, None]

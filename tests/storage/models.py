"""Small hybrids to save and load, and what they compute."""

from __future__ import annotations

from typing import Any

import torch

import hydrasurgery as hs
from tests.families import tiny
from tests.test_families import half_plan, stir

IDS = torch.arange(3, 35).view(2, 16)


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model.eval()(ids, use_cache=False).logits


@torch.no_grad()
def states(model: Any) -> torch.Tensor:
    return model.eval()(IDS, use_cache=False).last_hidden_state


def small(family: str, **changes: Any) -> Any:
    """A model of one layer: what is asked here of a layer is the same of each."""
    return tiny(family, num_hidden_layers=1, **{"n_layer": 1, **changes} if family == "gpt2" else changes)


def hybrid_of(model: Any) -> Any:
    return stir(hs.rewrite(model, half_plan(model))).eval()

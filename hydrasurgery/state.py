"""What a region's graph says to its cache layer. Without a cache (`state` is None) each call is the identity."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def extend_kv(state: Any, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Append new keys and values [B, kept KV heads, T, D]; returns all of them [B, kept KV heads, S, D]."""
    return (key, value) if state is None else state.update(key, value)


def count_tokens(state: Any, hidden_states: Tensor) -> None:
    """Tell a layer that keeps no KV head how many tokens went by (hidden_states [B, T, C])."""
    if state is not None:
        state.advance(hidden_states.shape[1])


def read_state(state: Any, name: str) -> Tensor | None:
    """The state called `name` after the tokens seen so far, or None at the start."""
    return None if state is None else state.states.get(name)


def write_state(state: Any, name: str, value: Tensor) -> None:
    """Keep `value` as the state called `name`."""
    if state is not None:
        state.states[name] = value

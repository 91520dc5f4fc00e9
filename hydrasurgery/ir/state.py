"""What a region's graph says to its cache layer; without a cache (`state` is None) each call is the identity."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hydrasurgery.dialect.names import DECODE_STEP, LINEAR_HEADS, STEP_HEADS
from hydrasurgery.dialect.tokens import previous_tokens, token_flags

STATE = "state"  # the input that stands for the cache layer, once thread-state has made it


def extend_kv(state: Any, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Append new keys and values [B, kept KV heads, T, D]; returns those that the columns of `mask` stand for, S of each."""
    return (key, value) if state is None else state.extend(key, value, mask)


def first_key(state: Any) -> Tensor | int | None:
    """The mask's column that stands for the call's first token, before any is added; None: the last T are the call's."""
    return None if state is None else state.first_key()


def count_tokens(state: Any, hidden_states: Tensor) -> None:
    """Tell a layer that keeps no KV head how many tokens went by (hidden_states [B, T, C])."""
    if state is not None:
        state.advance(hidden_states.shape[1], hidden_states.device)


def step_linear(
    state: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor,
    gate: Tensor | None,
    gamma: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    v_weight: Tensor | None,
    A_log: Tensor,
    dt_bias: Tensor,
    valid: Tensor | None,
    reset: Tensor | None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    scale: float | None = None,
    eps: float = 1e-6,
    turn: str = "half",
) -> Tensor:
    """One token through a layer's linear heads by `ops.decode_step`, the states in `state` brought up to date in place.

    q, k, v [B, H, 1, K or V]; decay, beta and gate [B, 1, H] as projections left them; weights of the short convolution
    [H * K or V, W] or None; A_log, dt_bias [H]; valid, reset [B, 1] or None; cos, sin [B or 1, 1, 1, R] or None -> [B, 1, H, V].
    """
    weights = [weight for weight in (q_weight, k_weight, v_weight) if weight is not None]
    recurrent, pasts = _in_place(state, len(weights))
    o = DECODE_STEP(  # not by its checked form: the passes know what they hand over
        q[:, :, 0],
        k[:, :, 0],
        v[:, :, 0],
        decay[:, 0],
        beta[:, 0],
        None if gate is None else gate[:, 0],
        gamma,
        A_log,
        dt_bias,
        weights,
        recurrent,
        pasts,
        None if valid is None else valid[:, 0],
        None if reset is None else reset[:, 0],
        None if cos is None else cos[:, 0, 0],
        None if sin is None else sin[:, 0, 0],
        scale=scale,
        eps=eps,
        turn=turn,
    )
    return o[:, None]


def step_heads(
    state: Any,
    hidden_states: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    full: Tensor | None,
    decay_weight: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    beta_weight: Tensor,
    beta_bias: Tensor,
    gate_weight: Tensor | None,
    gamma: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    v_weight: Tensor | None,
    valid: Tensor | None,
    reset: Tensor | None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    q_heads: list[int],
    kv_heads: list[int],
    slots: list[int],
    scale: float | None = None,
    eps: float = 1e-6,
    turn: str = "half",
) -> Tensor:
    """One token through a layer's heads by `hydra::step_heads`, the states in `state` brought up to date in place.

    q [B, Hq, 1, K], k and v [B, G, 1, K or V]: of all heads; full [B, 1, Hf, V]; the rest as `run_linear` -> [B, 1, H + Hf, V].
    """
    weights = [weight for weight in (q_weight, k_weight, v_weight) if weight is not None]
    recurrent, pasts = _in_place(state, len(weights))
    own = (hidden_states[:, 0], q[:, :, 0], k[:, :, 0], v[:, :, 0], None if full is None else full[:, 0])
    gates = (decay_weight, A_log, dt_bias, beta_weight, beta_bias, gate_weight, gamma)
    known = (valid, reset) if valid is None or reset is None else (valid[:, 0], reset[:, 0])
    turned = (cos, sin) if cos is None or sin is None else (cos[:, 0, 0], sin[:, 0, 0])
    out = STEP_HEADS(
        *own, *gates, weights, recurrent, pasts, *known, *turned,
        q_heads=q_heads, kv_heads=kv_heads, slots=slots, scale=scale, eps=eps, turn=turn,
    )  # fmt: skip
    return out[:, None]


def _in_place(state: Any, convs: int) -> tuple[Tensor, list[Tensor]]:
    """The recurrent state, and those of the convolutions, as a kernel writes into them."""
    names = ("recurrent", *("q_conv", "k_conv", "v_conv")[:convs])
    for name in names:
        held = state.read(name)
        if not held.is_contiguous():
            state.write(name, held.contiguous())
    recurrent, *pasts = (state.states[name] for name in names)
    return recurrent, pasts


def run_linear(
    state: Any,
    hidden_states: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    full: Tensor | None,
    decay_weight: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    beta_weight: Tensor,
    beta_bias: Tensor,
    gate_weight: Tensor | None,
    gamma: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    v_weight: Tensor | None,
    valid: Tensor | None,
    reset: Tensor | None,
    previous: Tensor | None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    slots: list[int],
    scale: float | None = None,
    eps: float = 1e-6,
    turn: str = "half",
) -> Tensor:
    """Any number of tokens through a layer's linear heads by `hydra::linear_heads`, after the states in `state`, which move on.

    full [B, T, Hf, V]: the full heads, for the slots that are not in `slots`; the rest as there -> [B, T, H + Hf, V].
    """
    names = () if q_weight is None else ("q_conv", "k_conv", "v_conv")
    pasts = [read_state(state, name) for name in names] or [None] * 3
    gates = (decay_weight, A_log, dt_bias, beta_weight, beta_bias, gate_weight, gamma)
    known = (read_state(state, "recurrent"), valid, reset, previous, cos, sin)
    inputs = (hidden_states, q, k, v, full, *gates, q_weight, k_weight, v_weight, *pasts, *known)
    out, after, *tails = LINEAR_HEADS(*inputs, slots=slots, scale=scale, eps=eps, turn=turn)
    if state is not None:
        state.write("recurrent", after)
        for name, tail in zip(
            names, (tail for stack in tails if stack.dim() > 1 for tail in stack.unbind(0)), strict=True
        ):
            state.write(name, tail)
    return out


def flags_of(
    mask: Tensor | None, hidden_states: Tensor, first_key: Tensor | int | None = None, window: int | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """(valid, reset) of `token_flags`; None each without a mask, which says nothing."""
    return (None, None) if mask is None else token_flags(mask, hidden_states, first_key, window=window)


def previous_of(valid: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """`previous_tokens` of what `flags_of` gives."""
    return None if valid is None else previous_tokens(valid, mask)


def read_state(state: Any, name: str) -> Tensor | None:
    """The state called `name` after the tokens seen so far, or None at the start."""
    return None if state is None else state.read(name)


def write_state(state: Any, name: str, value: Tensor) -> None:
    """Keep `value` as the state called `name`."""
    if state is not None:
        state.write(name, value)


TELLS = (
    extend_kv,
    count_tokens,
    run_linear,
    step_heads,
    step_linear,
    write_state,
)  # they change the cache layer: a graph keeps them, read or not


def exporting() -> bool:
    """Whether a graph is made that must serve every call, of any length."""
    compiler = torch.compiler
    if compiler.is_dynamo_compiling():
        return compiler._is_exporting_flag  # dynamo of PyTorch 2.11 takes `is_exporting()` to be True, whatever it is
    return compiler.is_compiling()

"""`hydra::decode_step` and `hydra::step_heads`: one token through a layer's linear heads; inference only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hydrasurgery.dialect.checks import (
    DERIVATIVES,
    exact,
    expect,
    expect_state,
    fake,
    full_precision,
    lower_under_autocast,
    refuse_tangents,
    refuse_transforms,
)
from hydrasurgery.dialect.operators import operator
from hydrasurgery.kernels import registry
from hydrasurgery.kernels.rotary import TURNS


def decode_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor,
    gate: Tensor | None,
    gamma: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    conv_weights: Sequence[Tensor] = (),
    *,
    state: Tensor,
    conv_states: Sequence[Tensor] = (),
    valid: Tensor | None = None,
    reset: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    scale: float | None = None,
    eps: float = 1e-6,
    turn: str = "half",
) -> Tensor:
    """One token through a layer's linear heads (rule gated_delta), from short convolution to output gate; inference only.

    q, k, v <- x + causal_conv(x); q, k <- rotated, L2-normalised; o, S <- the recurrence of `linear_attention`;
    out = gamma RMSNorm(o) 2 sigmoid(gate). With `A_log` the gates are computed here:
    decay <- -exp(A_log) softplus(decay + dt_bias) and beta <- sigmoid(beta).

    Args:
        q: [B, H, K].
        k: [B, H, K].
        v: [B, H, V].
        decay: [B, H], the log decay, or with `A_log` its pre-activation.
        beta: [B, H], the write strength, or with `A_log` its pre-activation.
        gate: [B, H], the output gate's pre-activation; no gate if None.
        gamma: [H], the scale of the normalised outputs.
        A_log: [H], together with `dt_bias` or not at all.
        dt_bias: [H].
        conv_weights: of q [H * K, W], k [H * K, W] and v [H * V, W]; empty: no convolution.
        state: [B, H, K, V] fp32, contiguous, **updated in place**.
        conv_states: of q, k and v, [B, H * K or H * V, W - 1] each, contiguous, **updated in place**.
        valid: [B] bool, of `token_flags`: a token that is padding leaves all states as they were.
        reset: [B] bool, likewise: a document's first token finds all states 0. Together with `valid` or not at all.
        cos: [B or 1, R], the rotary embedding of the first R channels of q and k, after the convolution; none if None.
        sin: [B or 1, R], together with `cos` or not at all.
        scale: of the outputs before their norm; K ** -0.5 if None.
        eps: added to the mean square of the outputs.
        turn: how the embedding pairs channels: "half", "half-back" or "pairs" (`hydrasurgery.kernels.rotary.TURNS`).

    Returns:
        [B, H, V] in v's dtype.

    Raises:
        ValueError: a shape, dtype or stride does not fit; the message names the argument.

    Example:
        >>> (q, k, v), (decay, beta) = torch.randn(3, 1, 2, 8), torch.rand(2, 1, 2)
        >>> state = torch.zeros(1, 2, 8, 8)
        >>> decode_step(q, k, v, -decay, beta, None, torch.ones(2), state=state).shape, bool(state.any())
        (torch.Size([1, 2, 8]), True)
    """
    expect("q", q, (None, None, None))
    batch, heads, channels = q.shape
    expect("k", k, (batch, heads, channels))
    expect("v", v, (batch, heads, None))
    for name, x in (("decay", decay), ("beta", beta), ("gate", gate)):
        if x is not None:
            expect(name, x, (batch, heads))
    for name, x in (("gamma", gamma), ("A_log", A_log), ("dt_bias", dt_bias)):
        if x is not None:
            expect(name, x, (heads,))
    for name, x in (("valid", valid), ("reset", reset)):
        if x is not None:
            expect(name, x, (batch,))
            if x.dtype != torch.bool:
                raise ValueError(f"{name} must be bool, found {x.dtype}")
    if (A_log is None) != (dt_bias is None):
        raise ValueError("A_log and dt_bias belong together: give both or neither")
    if (valid is None) != (reset is None):
        raise ValueError("valid and reset belong together: give both or neither")
    if (cos is None) != (sin is None):
        raise ValueError("cos and sin belong together: give both or neither")
    for name, x in (("cos", cos), ("sin", sin)):
        if x is not None:
            expect(name, x, (1 if x.shape[0] == 1 else batch, cos.shape[-1]))  # type: ignore[union-attr]
            if x.shape[-1] > channels or x.shape[-1] % 2:
                raise ValueError(f"{name} must turn an even number of the {channels} channels, found {x.shape[-1]}")
    if turn not in TURNS:
        raise ValueError(f"turn must be one of {', '.join(TURNS)}, found {turn!r}")
    expect("state", state, (batch, heads, channels, v.shape[-1]))
    expect_state("state", state)
    if len(conv_weights) not in (0, 3) or len(conv_states) != len(conv_weights):
        raise ValueError(
            "conv_weights and conv_states must be those of q, k and v, or empty, "
            f"found {len(conv_weights)} and {len(conv_states)}"
        )
    for weight, past, x in zip(conv_weights, conv_states, (q, k, v), strict=False):
        expect("conv_weights", weight, (heads * x.shape[-1], conv_weights[0].shape[1]))
        expect("conv_states", past, (batch, heads * x.shape[-1], conv_weights[0].shape[1] - 1))
    if not all(x.is_contiguous() for x in (state, *conv_states)):
        raise ValueError("state and conv_states must be contiguous: they are updated in place")
    refuse_transforms("hydra::decode_step", *DERIVATIVES)
    return torch.ops.hydra.decode_step.default(
        q,
        k,
        v,
        decay,
        beta,
        gate,
        gamma,
        A_log,
        dt_bias,
        list(conv_weights),
        state,
        list(conv_states),
        valid,
        reset,
        cos,
        sin,
        scale=scale,
        eps=eps,
        turn=turn,
    )


@operator(
    "decode_step",
    "(Tensor q, Tensor k, Tensor v, Tensor decay, Tensor beta, Tensor? gate, Tensor gamma, Tensor? A_log, Tensor? dt_bias, "
    "Tensor[] conv_weights, Tensor(a!) state, Tensor(b!)[] conv_states, Tensor? valid=None, Tensor? reset=None, "
    'Tensor? cos=None, Tensor? sin=None, *, float? scale=None, float eps=1e-6, str turn="half") -> Tensor',
)
def _decode_step(
    q, k, v, decay, beta, gate, gamma, A_log, dt_bias, conv_weights, state, conv_states, valid=None, reset=None,
    cos=None, sin=None, *, scale=None, eps=1e-6, turn="half",
):  # fmt: skip
    refuse_tangents(q, k, v, decay, beta, gate, gamma, A_log, dt_bias, *conv_weights, state, *conv_states)
    case = registry.decode_step_case(q, v, conv_weights[0].shape[1] if conv_weights else 0)
    forward = registry.kernel("decode_step", case, q.device).forward
    inputs = (
        q,
        k,
        v,
        decay,
        beta,
        gate,
        gamma,
        A_log,
        dt_bias,
        conv_weights,
        state,
        conv_states,
        valid,
        reset,
        cos,
        sin,
    )
    with full_precision(q):
        return exact(forward(*inputs, scale=scale, eps=eps, turn=turn))


@_decode_step.register_fake
def _(
    q, k, v, decay, beta, gate, gamma, A_log, dt_bias, conv_weights, state, conv_states, valid=None, reset=None,
    cos=None, sin=None, *, scale=None, eps=1e-6, turn="half",
):  # fmt: skip
    return fake(v)


lower_under_autocast("decode_step", 0, 1, 2)


@operator(
    "step_heads",
    "(Tensor hidden, Tensor q, Tensor k, Tensor v, Tensor? o_full, Tensor decay_weight, Tensor A_log, Tensor dt_bias, "
    "Tensor beta_weight, Tensor beta_bias, Tensor? gate_weight, Tensor gamma, Tensor[] conv_weights, Tensor(a!) state, "
    "Tensor(b!)[] conv_states, Tensor? valid=None, Tensor? reset=None, Tensor? cos=None, Tensor? sin=None, *, int[] q_heads, "
    "int[] kv_heads, int[] slots, float? scale=None, float eps=1e-6, str turn='half') -> Tensor",
)
def _step_heads(
    hidden, q, k, v, o_full, decay_weight, A_log, dt_bias, beta_weight, beta_bias, gate_weight, gamma, conv_weights, state,
    conv_states, valid=None, reset=None, cos=None, sin=None, *, q_heads, kv_heads, slots, scale=None, eps=1e-6, turn="half",
):  # fmt: skip
    """`decode_step` of what a layer projects: hidden [B, C]; q [B, Hq, K], k and v [B, G, K or V] of all its heads, of which the
    linear ones read those in `q_heads` and `kv_heads`; o_full [B, Hf, V]; weights of the gates [H, C].

    Returns all heads [B, H + Hf, V], the linear ones in `slots`, the full ones in the others.
    """
    gates = (decay_weight, A_log, dt_bias, beta_weight, beta_bias, gate_weight, gamma)
    inputs = (hidden, q, k, v, o_full, *gates)
    refuse_tangents(*inputs, *conv_weights, state, *conv_states)
    case = registry.decode_step_case(q, v, conv_weights[0].shape[1] if conv_weights else 0)
    forward = registry.kernel("decode_step", case, q.device).forward_heads
    places = {"q_heads": q_heads, "kv_heads": kv_heads, "slots": slots}
    tensors = (*inputs, conv_weights, state, conv_states, valid, reset, cos, sin)
    with full_precision(q):
        return exact(forward(*tensors, **places, scale=scale, eps=eps, turn=turn))


@_step_heads.register_fake
def _(
    hidden, q, k, v, o_full, decay_weight, A_log, dt_bias, beta_weight, beta_bias, gate_weight, gamma, conv_weights, state,
    conv_states, valid=None, reset=None, cos=None, sin=None, *, q_heads, kv_heads, slots, scale=None, eps=1e-6, turn="half",
):  # fmt: skip
    others = 0 if o_full is None else o_full.shape[1]
    dtype = v.dtype if o_full is None else torch.promote_types(v.dtype, o_full.dtype)
    return v.new_empty(v.shape[0], len(slots) + others, v.shape[2], dtype=dtype)


lower_under_autocast("step_heads", *range(5))

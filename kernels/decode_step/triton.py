"""One token through a layer's linear heads in Triton: one launch, the state read and written once.

A program owns one head of one sequence: its conv inputs, its state and its output, so nothing is shared and nothing is atomic.
In a layer's step (`forward_heads`) it projects its gates too, and further programs copy the full heads to their slots.
With a = exp(decay) and u = beta (v - a S^T k), the new state is S' = a S + k u^T and what it answers is
S'^T q = a S^T q + (k.q) u: both products of S are taken of the values as they were read.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from hydrasurgery.kernels.decode_step.reference import L2_EPS
from hydrasurgery.kernels.launching import cdiv, launch, power_of_2
from hydrasurgery.kernels.rotary import TURNS

STATE_ELEMENTS = 8192  # of a state, in registers at once
CHANNELS = 1024  # of what gates are projected from, at once
WARPS = 4


@triton.jit
def _log1p(x):
    """log(1 + x) to full relative precision for small x >= 0 (Kahan)."""
    u = 1.0 + x
    exact = u == 1.0
    return tl.where(exact, x, tl.log(u) * (x / tl.where(exact, 1.0, u - 1.0)))


@triton.jit
def _load_head(
    x, stride_batch, stride_head, weight, past, batch, source, head, channel, token, follows,
    HEADS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """Channels of a head's vector after the residual convolution, and what that saw [BLOCK, TAPS]: W - 1 past inputs, then its own.

    `source`: where the head is in x. `token`: the vector counts (else it is 0). `follows`: the past counts.
    """
    live = channel < SIZE
    own = tl.load(x + batch * stride_batch + source * stride_head + channel, mask=live & token, other=0).to(tl.float32)
    past += (batch * HEADS + head) * SIZE * (WIDTH - 1)
    weight += head * SIZE * WIDTH
    seen = tl.zeros((BLOCK, TAPS), tl.float32)
    slot = tl.arange(0, TAPS)
    if WIDTH > 0:
        kept = (live & follows)[:, None] & (slot < WIDTH - 1)[None, :]
        seen = tl.load(past + channel[:, None] * (WIDTH - 1) + slot[None, :], mask=kept, other=0).to(tl.float32)
        seen = tl.where((slot == WIDTH - 1)[None, :], own[:, None], seen)
        taps = live[:, None] & (slot < WIDTH)[None, :]
        tap = tl.load(weight + channel[:, None] * WIDTH + slot[None, :], mask=taps, other=0).to(tl.float32)
        own += tl.sum(seen * tap, axis=1)
    return own, seen


@triton.jit
def _load_rotated(
    x, stride_batch, stride_head, weight, past, cos, sin, batch, source, head, token, follows,
    HEADS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TAPS: tl.constexpr,
    TURN: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """`_load_head` of all channels, the first TURNED of them rotated: each meets its partner, which is loaded once more."""
    channel = tl.arange(0, BLOCK)
    own, seen = _load_head(
        x, stride_batch, stride_head, weight, past, batch, source, head, channel, token, follows,
        HEADS, SIZE, WIDTH, BLOCK, TAPS,
    )  # fmt: skip
    if TURNED > 0:
        turns = channel < TURNED
        if TURN == 2:  # pairs of neighbours
            partner = channel ^ 1
            sign = tl.where(channel % 2 == 0, -1.0, 1.0)
        else:
            lower = channel < TURNED // 2
            partner = tl.where(lower, channel + TURNED // 2, channel - TURNED // 2)
            sign = tl.where(lower, -1.0, 1.0) if TURN == 0 else tl.where(lower, 1.0, -1.0)
        other, _ = _load_head(
            x, stride_batch, stride_head, weight, past, batch, source, head, tl.where(turns, partner, SIZE), token,
            follows, HEADS, SIZE, WIDTH, BLOCK, TAPS,
        )  # fmt: skip
        factor = tl.load(cos + channel, mask=turns, other=1).to(tl.float32)
        own = own * factor + sign * other * tl.load(sin + channel, mask=turns, other=0).to(tl.float32)
    return own, seen


@triton.jit
def _store_history(
    seen, past, batch, head, token,
    HEADS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """The history without its oldest input; padding leaves it as it was."""
    channel, slot = tl.arange(0, BLOCK), tl.arange(0, TAPS)
    kept = ((channel < SIZE) & token)[:, None] & ((slot > 0) & (slot < WIDTH))[None, :]
    past += (batch * HEADS + head) * SIZE * (WIDTH - 1)
    tl.store(past + channel[:, None] * (WIDTH - 1) + (slot - 1)[None, :], seen.to(past.dtype.element_ty), mask=kept)


@triton.jit
def _projected(hidden, weight, batch, head, C: tl.constexpr, CHANNELS: tl.constexpr):
    """Row `head` of weight [H, C] times hidden [B, C]."""
    total = tl.zeros((CHANNELS,), tl.float32)
    for first in range(0, C, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)
        x = tl.load(hidden + batch * C + channel, mask=channel < C, other=0).to(tl.float32)
        total += x * tl.load(weight + head * C + channel, mask=channel < C, other=0).to(tl.float32)
    return tl.sum(total)


@triton.jit
def _kernel(
    q, k, v, decay, beta, gate, gamma, a_log, dt_bias, q_weight, k_weight, v_weight, state, q_past, k_past, v_past,
    valid, reset, cos, sin, out, hidden, beta_bias, full, places,
    q_batch, q_head, k_batch, k_head, v_batch, v_head, turn_batch, scale, eps, l2_eps,
    HEADS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, WIDTH: tl.constexpr, RAW: tl.constexpr, GATE: tl.constexpr,
    FLAGS: tl.constexpr, TURN: tl.constexpr, TURNED: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    TILES: tl.constexpr, TAPS: tl.constexpr, FULL: tl.constexpr, C: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """C > 0: decay, beta and gate are weights [H, C] of what is projected from hidden, and `places` holds, of the linear heads,
    those of q, those of k and v, and their slots; then the slots of the FULL others."""
    batch, head = (tl.program_id(0) // (HEADS + FULL)).to(tl.int64), tl.program_id(0) % (HEADS + FULL)
    row, column = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    VALUES: tl.constexpr = BLOCK_V * TILES
    channel = tl.arange(0, VALUES)
    if FULL > 0 and head >= HEADS:
        slot = batch * (HEADS + FULL) + tl.load(places + 2 * HEADS + head)
        value = tl.load(full + (batch * FULL + head - HEADS) * V + channel, mask=channel < V)
        tl.store(out + slot * V + channel, value.to(out.dtype.element_ty), mask=channel < V)
        return
    one = batch * HEADS + head
    q_from, k_from, slot = head, head, one
    if C > 0:
        q_from, k_from = tl.load(places + head), tl.load(places + HEADS + head)
        slot = batch * (HEADS + FULL) + tl.load(places + 2 * HEADS + head)
    state += one * K * V
    at = row[:, None] * V + column[None, :]
    inside = (row < K)[:, None] & (column < V)[None, :]
    # A new document finds all states 0.
    token, follows = batch >= 0, batch >= 0  # true
    if FLAGS:
        token, follows = tl.load(valid + batch) != 0, tl.load(reset + batch) == 0
        follows = follows | (token == 0)
    # The state is under way while the vectors are made ready.
    following = tl.load(state + at, mask=inside & follows, other=0)
    cos, sin = cos + batch * turn_batch, sin + batch * turn_batch
    queries, q_seen = _load_rotated(
        q, q_batch, q_head, q_weight, q_past, cos, sin, batch, q_from, head, token, follows,
        HEADS, K, WIDTH, BLOCK_K, TAPS, TURN, TURNED,
    )  # fmt: skip
    keys, k_seen = _load_rotated(
        k, k_batch, k_head, k_weight, k_past, cos, sin, batch, k_from, head, token, follows,
        HEADS, K, WIDTH, BLOCK_K, TAPS, TURN, TURNED,
    )  # fmt: skip
    values, v_seen = _load_head(
        v, v_batch, v_head, v_weight, v_past, batch, k_from, head, channel, token, follows,
        HEADS, V, WIDTH, VALUES, TAPS,
    )  # fmt: skip
    queries *= tl.rsqrt(tl.sum(queries * queries) + l2_eps) * scale
    keys *= tl.rsqrt(tl.sum(keys * keys) + l2_eps)
    opened = 0.0
    if C > 0:
        forget = _projected(hidden, decay, batch, head, C, CHANNELS)
        strength = _projected(hidden, beta, batch, head, C, CHANNELS) + tl.load(beta_bias + head).to(tl.float32)
        if GATE:
            opened = _projected(hidden, gate, batch, head, C, CHANNELS)
    else:
        forget, strength = tl.load(decay + one).to(tl.float32), tl.load(beta + one).to(tl.float32)
        if GATE:
            opened = tl.load(gate + one).to(tl.float32)
    if RAW:
        step = forget + tl.load(dt_bias + head).to(tl.float32)
        softplus = tl.maximum(step, 0.0) + _log1p(tl.exp(-tl.abs(step)))
        forget = -tl.exp(tl.load(a_log + head).to(tl.float32)) * softplus
        strength = 1.0 / (1.0 + tl.exp(-strength))
    # Padding leaves the state.
    forget = tl.where(token, tl.exp(forget), 1.0)
    strength = tl.where(token, strength, 0.0)
    overlap = tl.sum(queries * keys)
    # Some threads may hold copies of what another one stores: all loads come first.
    tl.debug_barrier()
    if WIDTH > 0:
        _store_history(q_seen, q_past, batch, head, token, HEADS, K, WIDTH, BLOCK_K, TAPS)
        _store_history(k_seen, k_past, batch, head, token, HEADS, K, WIDTH, BLOCK_K, TAPS)
        _store_history(v_seen, v_past, batch, head, token, HEADS, V, WIDTH, VALUES, TAPS)
    tile_of = tl.arange(0, TILES)[:, None]
    values = tl.reshape(values, (TILES, BLOCK_V))
    answers = tl.zeros((TILES, BLOCK_V), tl.float32)
    for tile in tl.static_range(TILES):
        old = following
        if tile + 1 < TILES:
            further = (row < K)[:, None] & ((tile + 1) * BLOCK_V + column < V)[None, :]
            following = tl.load(state + at + (tile + 1) * BLOCK_V, mask=further & follows, other=0)
        value = tl.sum(tl.where(tile_of == tile, values, 0.0), axis=0)
        write = strength * (value - forget * tl.sum(old * keys[:, None], axis=0))
        answer = forget * tl.sum(old * queries[:, None], axis=0) + overlap * write
        answers = tl.where(tile_of == tile, answer[None, :], answers)
        tl.debug_barrier()
        inside = (row < K)[:, None] & (tile * BLOCK_V + column < V)[None, :]
        tl.store(state + at + tile * BLOCK_V, forget * old + keys[:, None] * write[None, :], mask=inside)
    norm = tl.load(gamma + head).to(tl.float32)
    if GATE:
        norm *= 2.0 / (1.0 + tl.exp(-opened))
    answers *= tl.rsqrt(tl.sum(answers * answers) / V + eps) * norm
    place = tile_of * BLOCK_V + column[None, :]
    tl.store(out + slot * V + place, answers.to(out.dtype.element_ty), mask=place < V)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor,
    gate: Tensor | None,
    gamma: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    conv_weights: Sequence[Tensor],
    state: Tensor,
    conv_states: Sequence[Tensor],
    valid: Tensor | None = None,
    reset: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    scale: float | None,
    eps: float,
    turn: str = "half",
) -> Tensor:
    """As `reference.forward`. `state` and `conv_states` must be contiguous, for they are written in place."""
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    gates = (decay.contiguous(), beta.contiguous(), None if gate is None else gate.contiguous())
    tensors = (gamma, A_log, dt_bias, conv_weights, state, conv_states, valid, reset, cos, sin)
    _run(out, q, k, v, gates, *tensors, scale=scale, eps=eps, turn=turn)
    return out


def forward_heads(
    hidden: Tensor,
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
    conv_weights: Sequence[Tensor],
    state: Tensor,
    conv_states: Sequence[Tensor],
    valid: Tensor | None = None,
    reset: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    q_heads: Sequence[int],
    kv_heads: Sequence[int],
    slots: Sequence[int],
    scale: float | None,
    eps: float,
    turn: str = "half",
) -> Tensor:
    """As `reference.forward_heads`. `state` and `conv_states` must be contiguous, for they are written in place."""
    others = 0 if full is None else full.shape[1]
    dtype = v.dtype if full is None else torch.promote_types(v.dtype, full.dtype)
    out = torch.empty(v.shape[0], len(slots) + others, v.shape[2], dtype=dtype, device=v.device)
    weights = (decay_weight, beta_weight, gate_weight)
    gates = tuple(None if weight is None else weight.contiguous() for weight in weights)
    tensors = (gamma, A_log, dt_bias, conv_weights, state, conv_states, valid, reset, cos, sin)
    places = _places(tuple(q_heads), tuple(kv_heads), tuple(slots), others, out.device)
    layer = (hidden.contiguous(), beta_bias, out if full is None else full.contiguous(), places)
    _run(out, q, k, v, gates, *tensors, scale=scale, eps=eps, turn=turn, layer=layer)
    return out


@functools.cache
def _places(
    q_heads: tuple[int, ...], kv_heads: tuple[int, ...], slots: tuple[int, ...], others: int, device: torch.device
) -> Tensor:
    """What `_kernel` calls places, int32: made by the first call, which comes before any that a graph records."""
    full = [slot for slot in range(len(slots) + others) if slot not in slots]
    return torch.tensor([*q_heads, *kv_heads, *slots, *full], dtype=torch.int32, device=device)


def _run(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Sequence[Tensor | None],
    gamma: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    conv_weights: Sequence[Tensor],
    state: Tensor,
    conv_states: Sequence[Tensor],
    valid: Tensor | None,
    reset: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    scale: float | None,
    eps: float,
    turn: str,
    layer: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
) -> None:
    """Fill `out`; `layer`: hidden, the bias of beta, the full heads (any tensor without) and places."""
    (batch, heads), width_k, width_v = state.shape[:2], q.shape[2], v.shape[2]
    if not batch or not heads:
        return
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    flags = [q if x is None else x.contiguous().view(torch.uint8) for x in (valid, reset)]
    tables = [q if x is None else x.contiguous() for x in (cos, sin)]
    taps = conv_weights[0].shape[1] if conv_weights else 0
    weights = [w.contiguous() for w in conv_weights] if taps else [q, q, q]
    pasts = list(conv_states) if taps else [q, q, q]
    block_k = power_of_2(width_k)
    block_v = min(power_of_2(width_v), max(1, STATE_ELEMENTS // block_k))
    columns = 0 if layer is None else layer[0].shape[1]
    launch(
        _kernel, (batch * out.shape[1], 1, 1),
        q, k, v, *(q if gate is None else gate for gate in gates), gamma, q if A_log is None else A_log,
        q if dt_bias is None else dt_bias, *weights, state, *pasts, *flags, *tables, out, *(layer or (q, q, q, q)),
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        0 if cos is None or cos.shape[0] == 1 else cos.shape[1],
        width_k**-0.5 if scale is None else scale, eps, L2_EPS,
        HEADS=heads, K=width_k, V=width_v, WIDTH=taps, RAW=A_log is not None, GATE=gates[2] is not None,
        FLAGS=valid is not None, TURN=list(TURNS).index(turn), TURNED=0 if cos is None else cos.shape[1],
        BLOCK_K=block_k, BLOCK_V=block_v,
        TILES=cdiv(power_of_2(width_v), block_v), TAPS=power_of_2(max(1, taps)),
        FULL=out.shape[1] - heads, C=columns, CHANNELS=min(CHANNELS, power_of_2(max(1, columns))),
        num_warps=WARPS,
    )  # fmt: skip

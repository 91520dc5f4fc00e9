"""One token through a layer's linear heads in Triton: one launch, the state read and written once.

A program owns one head of one sequence: its conv inputs, its state and its output, so nothing is shared and nothing is atomic.
With a = exp(decay) and u = beta (v - a S^T k), the new state is S' = a S + k u^T and what it answers is
S'^T q = a S^T q + (k.q) u: both products of S are taken of the values as they were read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from hydrasurgery.kernels.decode_step.reference import L2_EPS
from hydrasurgery.kernels.rotary import TURNS

STATE_ELEMENTS = 8192  # of a state, in registers at once
WARPS = 4


@triton.jit
def _log1p(x):
    """log(1 + x) to full relative precision for small x >= 0 (Kahan)."""
    u = 1.0 + x
    exact = u == 1.0
    return tl.where(exact, x, tl.log(u) * (x / tl.where(exact, 1.0, u - 1.0)))


@triton.jit
def _load_head(
    x, stride_batch, stride_head, weight, past, batch, head, channel, token, follows,
    HEADS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """Channels of a head's vector after the residual convolution, and what that saw [BLOCK, TAPS]: W - 1 past inputs, then its own.

    `token`: the vector counts (else it is 0). `follows`: the past counts.
    """
    live = channel < SIZE
    own = tl.load(x + batch * stride_batch + head * stride_head + channel, mask=live & token, other=0).to(tl.float32)
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
    x, stride_batch, stride_head, weight, past, cos, sin, batch, head, token, follows,
    HEADS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TAPS: tl.constexpr,
    TURN: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """`_load_head` of all channels, the first TURNED of them rotated: each meets its partner, which is loaded once more."""
    channel = tl.arange(0, BLOCK)
    own, seen = _load_head(
        x,
        stride_batch,
        stride_head,
        weight,
        past,
        batch,
        head,
        channel,
        token,
        follows,
        HEADS,
        SIZE,
        WIDTH,
        BLOCK,
        TAPS,
    )
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
            x, stride_batch, stride_head, weight, past, batch, head, tl.where(turns, partner, SIZE), token, follows,
            HEADS, SIZE, WIDTH, BLOCK, TAPS,
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
def _kernel(
    q, k, v, decay, beta, gate, gamma, a_log, dt_bias, q_weight, k_weight, v_weight, state, q_past, k_past, v_past,
    valid, reset, cos, sin, out, q_batch, q_head, k_batch, k_head, v_batch, v_head, turn_batch, scale, eps, l2_eps,
    HEADS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, WIDTH: tl.constexpr, RAW: tl.constexpr, GATE: tl.constexpr,
    FLAGS: tl.constexpr, TURN: tl.constexpr, TURNED: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    TILES: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    batch, head = (tl.program_id(0) // HEADS).to(tl.int64), tl.program_id(0) % HEADS
    row, column = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    VALUES: tl.constexpr = BLOCK_V * TILES
    one = batch * HEADS + head
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
        q, q_batch, q_head, q_weight, q_past, cos, sin, batch, head, token, follows,
        HEADS, K, WIDTH, BLOCK_K, TAPS, TURN, TURNED,
    )  # fmt: skip
    keys, k_seen = _load_rotated(
        k, k_batch, k_head, k_weight, k_past, cos, sin, batch, head, token, follows,
        HEADS, K, WIDTH, BLOCK_K, TAPS, TURN, TURNED,
    )  # fmt: skip
    channel = tl.arange(0, VALUES)
    values, v_seen = _load_head(
        v, v_batch, v_head, v_weight, v_past, batch, head, channel, token, follows, HEADS, V, WIDTH, VALUES, TAPS
    )
    queries *= tl.rsqrt(tl.sum(queries * queries) + l2_eps) * scale
    keys *= tl.rsqrt(tl.sum(keys * keys) + l2_eps)
    forget, strength = tl.load(decay + one).to(tl.float32), tl.load(beta + one).to(tl.float32)
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
        norm *= 2.0 / (1.0 + tl.exp(-tl.load(gate + one).to(tl.float32)))
    answers *= tl.rsqrt(tl.sum(answers * answers) / V + eps) * norm
    place = tile_of * BLOCK_V + column[None, :]
    tl.store(out + one * V + place, answers.to(out.dtype.element_ty), mask=place < V)


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
    (batch, heads, width_k), width_v = q.shape, v.shape[-1]
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    if not batch or not heads:
        return out
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    decay, beta = decay.contiguous(), beta.contiguous()
    flags = [q if x is None else x.contiguous().view(torch.uint8) for x in (valid, reset)]
    tables = [q if x is None else x.contiguous() for x in (cos, sin)]
    taps = conv_weights[0].shape[1] if conv_weights else 0
    weights = [w.contiguous() for w in conv_weights] if taps else [q, q, q]
    pasts = list(conv_states) if taps else [q, q, q]
    block_k = triton.next_power_of_2(width_k)
    block_v = min(triton.next_power_of_2(width_v), max(1, STATE_ELEMENTS // block_k))
    _kernel[(batch * heads,)](
        q, k, v, decay, beta, q if gate is None else gate.contiguous(), gamma, q if A_log is None else A_log,
        q if dt_bias is None else dt_bias, *weights, state, *pasts, *flags, *tables, out,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        0 if cos is None or cos.shape[0] == 1 else cos.shape[1],
        width_k**-0.5 if scale is None else scale, eps, L2_EPS,
        HEADS=heads, K=width_k, V=width_v, WIDTH=taps, RAW=A_log is not None, GATE=gate is not None,
        FLAGS=valid is not None, TURN=list(TURNS).index(turn), TURNED=0 if cos is None else cos.shape[1],
        BLOCK_K=block_k, BLOCK_V=block_v,
        TILES=triton.cdiv(triton.next_power_of_2(width_v), block_v), TAPS=triton.next_power_of_2(max(1, taps)), num_warps=WARPS,
    )  # fmt: skip
    return out

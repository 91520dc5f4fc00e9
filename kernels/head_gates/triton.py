"""The gates of linear heads in Triton: one launch each way.

A program owns some tokens, with all their heads.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hydrasurgery.kernels.decode_step.triton import _log1p
from hydrasurgery.kernels.head_gates.reference import FORGET
from hydrasurgery.kernels.launching import cdiv, launch, power_of_2

TILE = 512  # numbers of a gate, of one program
SUMS = 3  # A_log, dt_bias and beta_bias
_FORGET = tl.constexpr(FORGET)


@triton.jit
def _softplus(x):
    return tl.maximum(x, 0.0) + _log1p(tl.exp(-tl.abs(x)))


@triton.jit
def _place(tokens, HEADS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """(tokens, heads, which of [token, head] there are) of this program."""
    row, head = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    return row, head, (row < tokens)[:, None] & (head < HEADS)[None, :]


@triton.jit
def _biased(raw, A_log, dt_bias, beta_bias, at, head, live, HEADS: tl.constexpr):
    """Of a and b what softplus and sigmoid are taken of [token, head], and -exp(A_log) [1, head]."""
    own = head < HEADS
    a = tl.load(raw + at, mask=live, other=0).to(tl.float32)
    b = tl.load(raw + at + HEADS, mask=live, other=0).to(tl.float32)
    a += tl.load(dt_bias + head, mask=own, other=0).to(tl.float32)[None, :]
    b += tl.load(beta_bias + head, mask=own, other=0).to(tl.float32)[None, :]
    return a, b, -tl.exp(tl.load(A_log + head, mask=own, other=0).to(tl.float32))[None, :]


@triton.jit(do_not_specialize=["tokens"])
def _forward_kernel(
    raw, A_log, dt_bias, beta_bias, valid, reset, decay, beta, gate, tokens,
    N: tl.constexpr, HEADS: tl.constexpr, FLAGS: tl.constexpr, GATED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, head, live = _place(tokens, HEADS, ROWS, BLOCK)
    at, to = row[:, None] * N + head[None, :], row[:, None] * HEADS + head[None, :]
    a, b, rate = _biased(raw, A_log, dt_bias, beta_bias, at, head, live, HEADS)
    left, written = rate * _softplus(a), tl.sigmoid(b)
    if FLAGS:
        token = (tl.load(valid + row, mask=row < tokens, other=0) != 0)[:, None]
        first = (tl.load(reset + row, mask=row < tokens, other=0) != 0)[:, None]
        left, written = tl.where(first, _FORGET, tl.where(token, left, 0.0)), tl.where(token, written, 0.0)
    tl.store(decay + to, left, mask=live)
    tl.store(beta + to, written, mask=live)
    if GATED:
        g = tl.load(raw + at + 2 * HEADS, mask=live, other=0).to(tl.float32)
        tl.store(gate + to, (2 * tl.sigmoid(g)).to(gate.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["tokens"])
def _backward_kernel(
    grad_decay, grad_beta, grad_gate, raw, A_log, dt_bias, beta_bias, valid, reset, draw, sums, tokens,
    N: tl.constexpr, HEADS: tl.constexpr, FLAGS: tl.constexpr, GATED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, head, live = _place(tokens, HEADS, ROWS, BLOCK)
    at, of = row[:, None] * N + head[None, :], row[:, None] * HEADS + head[None, :]
    a, b, rate = _biased(raw, A_log, dt_bias, beta_bias, at, head, live, HEADS)
    d_decay = tl.load(grad_decay + of, mask=live, other=0).to(tl.float32)
    d_beta = tl.load(grad_beta + of, mask=live, other=0).to(tl.float32)
    if FLAGS:
        token = (tl.load(valid + row, mask=row < tokens, other=0) != 0)[:, None]
        first = (tl.load(reset + row, mask=row < tokens, other=0) != 0)[:, None]
        d_decay, d_beta = tl.where(token & ~first, d_decay, 0.0), tl.where(token, d_beta, 0.0)
    da = d_decay * rate * tl.sigmoid(a)
    written = tl.sigmoid(b)
    db = d_beta * written * (1.0 - written)
    tl.store(draw + at, da.to(draw.dtype.element_ty), mask=live)
    tl.store(draw + at + HEADS, db.to(draw.dtype.element_ty), mask=live)
    if GATED:
        open_ = tl.sigmoid(tl.load(raw + at + 2 * HEADS, mask=live, other=0).to(tl.float32))
        dg = 2 * tl.load(grad_gate + of, mask=live, other=0).to(tl.float32) * open_ * (1.0 - open_)
        tl.store(draw + at + 2 * HEADS, dg.to(draw.dtype.element_ty), mask=live)
    used: tl.constexpr = HEADS * (3 if GATED else 2)
    if used < N:
        spare = tl.arange(0, 8)
        rest = (row < tokens)[:, None] & (spare < N - used)[None, :]
        nothing = tl.zeros((ROWS, 8), tl.float32).to(draw.dtype.element_ty)
        tl.store(draw + row[:, None] * N + used + spare[None, :], nothing, mask=rest)
    share, own = sums + tl.program_id(0) * 3 * HEADS + head, head < HEADS
    tl.store(share, tl.sum(tl.where(live, d_decay * rate * _softplus(a), 0.0), 0), mask=own)
    tl.store(share + HEADS, tl.sum(tl.where(live, da, 0.0), 0), mask=own)
    tl.store(share + 2 * HEADS, tl.sum(tl.where(live, db, 0.0), 0), mask=own)


def forward(
    raw: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    beta_bias: Tensor,
    valid: Tensor | None,
    reset: Tensor | None,
    *,
    gated: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As `reference.forward`."""
    batch, length, _ = raw.shape
    decay, beta = (raw.new_empty(batch, length, len(A_log), dtype=torch.float32) for _ in range(2))
    gate = raw.new_empty(batch, length, len(A_log), 1) if gated else None
    if decay.numel():
        grid, options = _launch(raw, A_log, valid, gated)
        launch(
            _forward_kernel, grid,
            raw, A_log, dt_bias, beta_bias, *_flags(raw, valid, reset), decay, beta, raw if gate is None else gate,
            batch * length, **options,
        )  # fmt: skip
    return decay, beta, gate


def backward(
    grad_decay: Tensor,
    grad_beta: Tensor,
    grad_gate: Tensor | None,
    raw: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    beta_bias: Tensor,
    valid: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As `reference.backward`. Programs leave their shares of the sums, added in a fixed order."""
    grad_decay, grad_beta = grad_decay.contiguous(), grad_beta.contiguous()
    draw = torch.empty_like(raw)
    grid, options = _launch(raw, A_log, valid, grad_gate is not None)
    sums = raw.new_empty(grid[0], SUMS, len(A_log), dtype=torch.float32)
    if sums.numel():
        launch(
            _backward_kernel, grid,
            grad_decay, grad_beta, raw if grad_gate is None else grad_gate.contiguous(), raw, A_log, dt_bias, beta_bias,
            *_flags(raw, valid, reset), draw, sums, raw.shape[0] * raw.shape[1], **options,
        )  # fmt: skip
    return draw, sums.sum(0)


def _flags(raw: Tensor, valid: Tensor | None, reset: Tensor | None) -> list[Tensor]:
    """An absent tensor is never read; raw stands in for it."""
    return [raw if x is None else x.contiguous().view(torch.uint8) for x in (valid, reset)]


def _launch(
    raw: Tensor, A_log: Tensor, valid: Tensor | None, gated: bool
) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """Grid, and constants."""
    block = power_of_2(len(A_log))
    rows = max(1, TILE // block)
    options = {
        "N": raw.shape[2], "HEADS": len(A_log), "FLAGS": valid is not None, "GATED": gated, "ROWS": rows, "BLOCK": block,
        "num_warps": 4,
    }  # fmt: skip
    return (cdiv(raw.shape[0] * raw.shape[1], rows), 1, 1), options

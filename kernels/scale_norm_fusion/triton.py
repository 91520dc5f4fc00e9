"""Scale-normalised fusion in Triton: one launch and one pass over memory each way.

A program takes one slot of the output [B*T, H, D] for ROWS tokens. Which head stands there follows from the bits of two 64-bit
words, one per slot (1 = linear): the number of set bits below a slot is its place among the linear heads. So no table of indices
travels to the device, and a plan needs no kernel of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from hydrasurgery.kernels.launching import cdiv, launch, power_of_2

ELEMENTS = 4096  # a program's share of the output
WORDS = ("low", "high")  # a word that is 1 must not become a constant of the kernel, as Triton would make it


@triton.jit
def _ones(bits):
    """The number of set bits of a uint64."""
    bits = bits - ((bits >> 1) & 0x5555555555555555)
    bits = (bits & 0x3333333333333333) + ((bits >> 2) & 0x3333333333333333)
    bits = (bits + (bits >> 4)) & 0x0F0F0F0F0F0F0F0F
    bits = bits + (bits >> 8)
    bits = bits + (bits >> 16)
    return ((bits + (bits >> 32)) & 0x7F).to(tl.int32)


@triton.jit
def _block(low, high, HEADS: tl.constexpr, ROWS: tl.constexpr):
    """(tokens [ROWS], slot, whether its head is linear, that head's place among the heads of its kind) of this program."""
    slot = tl.program_id(0) % HEADS
    token = (tl.program_id(0) // HEADS).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    low, high = low.to(tl.uint64), high.to(tl.uint64)
    word, bit = tl.where(slot < 64, low, high), slot % 64
    rank = _ones((word << 1) << (63 - bit).to(tl.uint64))  # the bits below; a shift by 64 at once is undefined
    if HEADS > 64:
        rank += tl.where(slot < 64, 0, _ones(low))
    linear = ((word >> bit.to(tl.uint64)) & 1) == 1
    return token, slot, linear, tl.where(linear, rank, slot - rank)


@triton.jit
def _load_gates(gate, row, column, live, DIM: tl.constexpr, GATE: tl.constexpr):
    """The gates of rows: none, one per row, or one per element."""
    if GATE == 2:
        gates = tl.load(gate + row[:, None] * DIM + column, mask=live[:, None] & (column < DIM), other=0)
    elif GATE == 1:
        gates = tl.load(gate + row, mask=live, other=0)[:, None]
    else:
        gates = tl.full((1, 1), 1.0, tl.float32)
    return gates.to(tl.float32)


@triton.jit(do_not_specialize=WORDS)
def _forward_kernel(
    full, linear, gamma, gate, out, tokens, low, high, eps,
    HEADS: tl.constexpr, LINEAR: tl.constexpr, DIM: tl.constexpr, NORM_FULL: tl.constexpr, GATE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token, slot, is_linear, place = _block(low, high, HEADS, ROWS)
    live, column = token < tokens, tl.arange(0, BLOCK)[None, :]
    inside = live[:, None] & (column < DIM)
    to = out + (token * HEADS + slot)[:, None] * DIM + column
    if is_linear:
        row = token * LINEAR + place
        x = tl.load(linear + row[:, None] * DIM + column, mask=inside, other=0).to(tl.float32)
        scale = tl.load(gamma + (slot if NORM_FULL else place)).to(tl.float32)
        r = tl.rsqrt(tl.sum(x * x, axis=1) / DIM + eps)[:, None] * scale
        y = x * r * _load_gates(gate, row, column, live, DIM, GATE)
        tl.store(to, y.to(out.dtype.element_ty), mask=inside)
    else:
        row = token * (HEADS - LINEAR) + place
        x = tl.load(full + row[:, None] * DIM + column, mask=inside, other=0).to(tl.float32)
        if NORM_FULL:
            scale = tl.load(gamma + slot).to(tl.float32)
            x *= tl.rsqrt(tl.sum(x * x, axis=1) / DIM + eps)[:, None] * scale
        tl.store(to, x.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _norm_backward(dy, x, scale, gates, eps, DIM: tl.constexpr):
    """(dx, dy n) of y = scale n gates, n = x r."""
    dy = dy.to(tl.float32)
    r = tl.rsqrt(tl.sum(x * x, axis=1) / DIM + eps)[:, None]
    n = x * r
    dn = dy * scale * gates
    return r * (dn - n * (tl.sum(dn * n, axis=1) / DIM)[:, None]), dy * n


@triton.jit(do_not_specialize=WORDS)
def _backward_kernel(
    grad, full, linear, gamma, gate, dfull, dlinear, dgamma, dgate, tokens, low, high, eps,
    HEADS: tl.constexpr, LINEAR: tl.constexpr, DIM: tl.constexpr, NORM_FULL: tl.constexpr, GATE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token, slot, is_linear, place = _block(low, high, HEADS, ROWS)
    live, column = token < tokens, tl.arange(0, BLOCK)[None, :]
    inside = live[:, None] & (column < DIM)
    share = dgamma + (slot if NORM_FULL else place) * (tl.num_programs(0) // HEADS) + tl.program_id(0) // HEADS
    dy = tl.load(grad + (token * HEADS + slot)[:, None] * DIM + column, mask=inside, other=0)
    if is_linear:
        row = token * LINEAR + place
        at = row[:, None] * DIM + column
        x = tl.load(linear + at, mask=inside, other=0).to(tl.float32)
        scale = tl.load(gamma + (slot if NORM_FULL else place)).to(tl.float32)
        gates = _load_gates(gate, row, column, live, DIM, GATE)
        dx, product = _norm_backward(dy, x, scale, gates, eps, DIM)
        tl.store(dlinear + at, dx.to(dlinear.dtype.element_ty), mask=inside)
        if GATE == 1:
            tl.store(dgate + row, (tl.sum(product, axis=1) * scale).to(dgate.dtype.element_ty), mask=live)
        if GATE == 2:
            tl.store(dgate + at, (product * scale).to(dgate.dtype.element_ty), mask=inside)
        tl.store(share, tl.sum(tl.where(live, tl.sum(product * gates, axis=1), 0.0), axis=0))
    else:
        at = (token * (HEADS - LINEAR) + place)[:, None] * DIM + column
        if NORM_FULL:
            x = tl.load(full + at, mask=inside, other=0).to(tl.float32)
            scale = tl.load(gamma + slot).to(tl.float32)
            dx, product = _norm_backward(dy, x, scale, 1.0, eps, DIM)
            tl.store(dfull + at, dx.to(dfull.dtype.element_ty), mask=inside)
            tl.store(share, tl.sum(tl.where(live, tl.sum(product, axis=1), 0.0), axis=0))
        else:
            tl.store(dfull + at, dy.to(dfull.dtype.element_ty), mask=inside)


def forward(
    o_full: Tensor | None,
    o_linear: Tensor | None,
    gamma: Tensor,
    gate: Tensor | None,
    *,
    linear_heads: Sequence[int],
    norm_full: bool,
    eps: float,
) -> Tensor:
    """As `reference.forward`: contiguous [B, T, H, D], every head in its own slot."""
    inputs, (grid, options) = _contiguous(o_full, o_linear, gamma, gate), _launch(o_full, o_linear, gate, norm_full)
    given = [o for o in (o_full, o_linear) if o is not None]
    batch, length, _, dim = given[0].shape
    dtype = torch.promote_types(given[0].dtype, given[-1].dtype)
    out = gamma.new_empty(batch, length, options["HEADS"], dim, dtype=dtype)
    if out.numel():
        words = _words(linear_heads)
        launch(_forward_kernel, (grid, 1, 1), *_pointers(inputs), out, batch * length, *words, eps, **options)
    return out


def backward(
    grad: Tensor,
    o_full: Tensor | None,
    o_linear: Tensor | None,
    gamma: Tensor,
    gate: Tensor | None,
    *,
    linear_heads: Sequence[int],
    norm_full: bool,
    eps: float,
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor | None]:
    """As `reference.backward`. Every program leaves its share of d gamma; they are summed in a fixed order."""
    inputs, (grid, options) = _contiguous(o_full, o_linear, gamma, gate), _launch(o_full, o_linear, gate, norm_full)
    grad = grad.contiguous()
    dfull, dlinear, _, dgate = (None if x is None else torch.empty_like(x) for x in inputs)
    dgamma = torch.empty(len(gamma), grid // grad.shape[2], dtype=torch.float32, device=grad.device)
    if grad.numel():
        results = _pointers((dfull, dlinear, dgamma, dgate))
        tokens, words = grad.shape[0] * grad.shape[1], _words(linear_heads)
        launch(_backward_kernel, (grid, 1, 1), grad, *_pointers(inputs), *results, tokens, *words, eps, **options)
    return dfull, dlinear, dgamma.sum(1).to(gamma.dtype), dgate


def _contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if x is None else x.contiguous() for x in tensors)


def _pointers(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    """An absent tensor is never read or written; any other stands in for it."""
    present = next(x for x in tensors if x is not None)
    return [present if x is None else x for x in tensors]


def _words(linear_heads: Sequence[int]) -> tuple[int, int]:
    """The linear slots as bits of two words, each as the signed integer that a kernel is passed."""
    bits = sum(1 << slot for slot in linear_heads)
    return _signed(bits & (1 << 64) - 1), _signed(bits >> 64)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >= 1 << 63 else word


def _launch(o_full: Tensor | None, o_linear: Tensor | None, gate: Tensor | None, norm_full: bool) -> tuple[int, dict]:
    """(the number of programs, the constants of the kernels)."""
    full, linear = (0 if o is None else o.shape[2] for o in (o_full, o_linear))
    batch, length, _, dim = (o_full if o_full is not None else o_linear).shape  # type: ignore[union-attr]
    block = power_of_2(dim)
    rows = max(1, ELEMENTS // block)
    options = {
        "HEADS": full + linear,
        "LINEAR": linear,
        "DIM": dim,
        "NORM_FULL": norm_full,
        "GATE": 0 if gate is None else 1 if gate.shape[-1] == 1 < dim else 2,
        "ROWS": rows,
        "BLOCK": block,
        "num_warps": 4,
    }
    return cdiv(batch * length, rows) * (full + linear), options

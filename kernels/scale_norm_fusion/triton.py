"""Scale-normalised fusion in Triton: one launch and one pass over memory each way.

A program takes ROWS rows of the output [B*T*H, D], consecutive in memory. Which head a row belongs to follows from the bits of
two 64-bit words, one a slot (1 = linear): the number of set bits below a slot is its place among the linear heads. So no table
of indices travels to the device, and a plan needs no kernel of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 4096  # a program's share of the output
WORDS = ("low", "high")  # a word that is 1 must not become a constant of the kernel, as Triton would make it


@triton.jit
def _ones(bits):
    """The number of set bits of each uint64."""
    bits = bits - ((bits >> 1) & 0x5555555555555555)
    bits = (bits & 0x3333333333333333) + ((bits >> 2) & 0x3333333333333333)
    bits = (bits + (bits >> 4)) & 0x0F0F0F0F0F0F0F0F
    bits = bits + (bits >> 8)
    bits = bits + (bits >> 16)
    return (bits + (bits >> 32)) & 0x7F


@triton.jit
def _below(slot):
    """A uint64 with the bits below `slot` set, all of them from 64 on."""
    one = tl.full((1,), 1, tl.uint64)
    slot = tl.minimum(tl.maximum(slot, 0), 64)
    half = slot // 2  # a shift by 64 at once is undefined
    return ((one << half.to(tl.uint64)) << (slot - half).to(tl.uint64)) - one


@triton.jit
def _place(row, low, high, HEADS: tl.constexpr):
    """(token, slot, whether it is linear, its place among the heads of its kind) of rows of the output."""
    token, slot = row // HEADS, (row % HEADS).to(tl.int32)
    low, high = low.to(tl.uint64), high.to(tl.uint64)
    word = tl.where(slot < 64, low, high)
    linear = ((word >> (slot % 64).to(tl.uint64)) & 1) == 1
    rank = _ones(low & _below(slot)).to(tl.int32)
    if HEADS > 64:
        rank += tl.where(slot < 64, 0, _ones(high & _below(slot - 64)).to(tl.int32))
    return token, slot, linear, tl.where(linear, rank, slot - rank)


@triton.jit
def _load_row_block(
    full, linear, gamma, gate, rows, low, high,
    HEADS: tl.constexpr, LINEAR: tl.constexpr, DIM: tl.constexpr, NORM_FULL: tl.constexpr, GATE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What both ways need of a block: where it lies, the values, and the factors of its rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    live = row < rows
    token, slot, is_linear, place = _place(row, low, high, HEADS)
    is_full = live & ~is_linear
    is_linear = live & is_linear
    inside = column[None, :] < DIM
    at_linear = token * LINEAR + place
    at_full = token * (HEADS - LINEAR) + place
    x = tl.zeros((ROWS, BLOCK), tl.float32)
    if LINEAR > 0:
        where = at_linear[:, None] * DIM + column[None, :]
        x += tl.load(linear + where, mask=is_linear[:, None] & inside, other=0).to(tl.float32)
    if LINEAR < HEADS:
        where = at_full[:, None] * DIM + column[None, :]
        x += tl.load(full + where, mask=is_full[:, None] & inside, other=0).to(tl.float32)
    if NORM_FULL:
        scaled = live
        scale = tl.load(gamma + slot, mask=live, other=0).to(tl.float32)
    else:
        scaled = is_linear
        scale = tl.load(gamma + place, mask=is_linear, other=0).to(tl.float32)
    gates = tl.full((ROWS, 1), 1.0, tl.float32)
    if GATE == 1:
        gates = tl.load(gate + at_linear, mask=is_linear, other=1).to(tl.float32)[:, None]
    if GATE == 2:
        where = at_linear[:, None] * DIM + column[None, :]
        gates = tl.load(gate + where, mask=is_linear[:, None] & inside, other=1).to(tl.float32)
    return row, column, live, is_linear, is_full, at_linear, at_full, x, scaled, scale[:, None], gates


@triton.jit(do_not_specialize=WORDS)
def _forward_kernel(
    full, linear, gamma, gate, out, rows, low, high, eps,
    HEADS: tl.constexpr, LINEAR: tl.constexpr, DIM: tl.constexpr, NORM_FULL: tl.constexpr, GATE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, column, live, _, _, _, _, x, scaled, scale, gates = _load_row_block(
        full, linear, gamma, gate, rows, low, high, HEADS, LINEAR, DIM, NORM_FULL, GATE, ROWS, BLOCK
    )
    r = tl.rsqrt(tl.sum(x * x, axis=1) / DIM + eps)
    y = tl.where(scaled[:, None], x * r[:, None] * scale * gates, x)
    inside = live[:, None] & (column[None, :] < DIM)
    tl.store(out + row[:, None] * DIM + column[None, :], y.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=WORDS)
def _backward_kernel(
    grad, full, linear, gamma, gate, dfull, dlinear, dgamma, dgate, rows, low, high, eps,
    HEADS: tl.constexpr, LINEAR: tl.constexpr, DIM: tl.constexpr, NORM_FULL: tl.constexpr, GATE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, column, live, is_linear, is_full, at_linear, at_full, x, scaled, scale, gates = _load_row_block(
        full, linear, gamma, gate, rows, low, high, HEADS, LINEAR, DIM, NORM_FULL, GATE, ROWS, BLOCK
    )
    inside = column[None, :] < DIM
    dy = tl.load(grad + row[:, None] * DIM + column[None, :], mask=live[:, None] & inside, other=0).to(tl.float32)
    r = tl.rsqrt(tl.sum(x * x, axis=1) / DIM + eps)[:, None]
    n = x * r
    product = dy * n
    tl.store(dgamma + row, tl.sum(product * gates, axis=1), mask=live)
    at = at_linear[:, None] * DIM + column[None, :]
    if GATE == 1:
        found = tl.sum(product, axis=1)[:, None] * scale
        tl.store(dgate + at_linear[:, None], found.to(dgate.dtype.element_ty), mask=is_linear[:, None])
    if GATE == 2:
        tl.store(dgate + at, (product * scale).to(dgate.dtype.element_ty), mask=is_linear[:, None] & inside)
    dn = dy * scale * gates
    dx = r * (dn - n * (tl.sum(dn * n, axis=1) / DIM)[:, None])
    dx = tl.where(scaled[:, None], dx, dy)
    if LINEAR > 0:
        tl.store(dlinear + at, dx.to(dlinear.dtype.element_ty), mask=is_linear[:, None] & inside)
    if LINEAR < HEADS:
        where = at_full[:, None] * DIM + column[None, :]
        tl.store(dfull + where, dx.to(dfull.dtype.element_ty), mask=is_full[:, None] & inside)


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
    rows = out.numel() // dim
    if rows:
        _forward_kernel[grid(rows)](*_pointers(inputs), out, rows, *_words(linear_heads), eps, **options)
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
    """As `reference.backward`. Every row leaves its share of d gamma, summed over the tokens in a fixed order."""
    inputs, (grid, options) = _contiguous(o_full, o_linear, gamma, gate), _launch(o_full, o_linear, gate, norm_full)
    grad = grad.contiguous()
    batch, length, heads, dim = grad.shape
    rows = batch * length * heads
    dfull, dlinear, _, dgate = (None if x is None else torch.empty_like(x) for x in inputs)
    partial = torch.empty(batch * length, heads, dtype=torch.float32, device=grad.device)
    if rows:
        results = _pointers((dfull, dlinear, partial, dgate))
        words = _words(linear_heads)
        _backward_kernel[grid(rows)](grad, *_pointers(inputs), *results, rows, *words, eps, **options)
    dgamma = partial.sum(0)
    if not norm_full:
        dgamma = torch.cat([dgamma.new_empty(0), *(dgamma[slot : slot + 1] for slot in linear_heads)])
    return dfull, dlinear, dgamma.to(gamma.dtype), dgate


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


def _launch(o_full: Tensor | None, o_linear: Tensor | None, gate: Tensor | None, norm_full: bool):
    """(rows -> grid, the constants of the kernels)."""
    full, linear = (0 if o is None else o.shape[2] for o in (o_full, o_linear))
    dim = (o_full if o_full is not None else o_linear).shape[3]  # type: ignore[union-attr]
    block = triton.next_power_of_2(dim)
    size = max(1, ELEMENTS // block)
    options = {
        "HEADS": full + linear,
        "LINEAR": linear,
        "DIM": dim,
        "NORM_FULL": norm_full,
        "GATE": 0 if gate is None else 1 if gate.shape[-1] == 1 < dim else 2,
        "ROWS": size,
        "BLOCK": block,
        "num_warps": 4,
    }
    return lambda rows: (triton.cdiv(rows, size),), options

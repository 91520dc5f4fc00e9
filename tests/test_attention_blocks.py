"""Attention of many queries in Triton, in the interpreter, against fp64: masks, widths, gradients, the same bits twice."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from hydrasurgery.kernels.attention import reference
from hydrasurgery.kernels.attention.reach import OPEN

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")

PLAIN = {"scale": None, "causal": True, "window": None, "softcap": None}
KEYS = 150


def reach(kind: str, queries: int, keys: int = KEYS) -> Tensor:
    """A reach mask [2, 1, 1, S + 1]."""
    key = torch.arange(keys)
    rows = torch.full((2, keys), OPEN)
    first = keys - queries
    if kind == "left":
        rows[0, : keys // 2 + 7] = 0
    if kind == "holes":
        rows[0, ::3] = 0
        rows[1, 40:90] = 0
    if kind == "documents":
        ends = torch.tensor([10, 11, 75, keys])
        rows[0] = ends[torch.searchsorted(ends, key, right=True)]
        rows[1] = (key // 60 + 1) * 60
    if kind == "documents, window":
        rows = torch.minimum((key // 60 + 1) * 60, key + 9).expand(2, -1).clone()
    if kind == "window":
        rows = (key + 33).expand(2, -1).clone()
    if kind == "unwritten":
        first = keys - queries - 41
    if kind == "nothing":
        rows[1] = 0
    return torch.cat([rows, torch.full((2, 1), first)], 1).to(torch.int32)[:, None, None]


def inputs(
    queries: int, keys: int = KEYS, heads: tuple[int, int] = (2, 1), dims: tuple[int, int] = (16, 16)
) -> list[Tensor]:
    torch.manual_seed(0)
    q = torch.randn(2, queries, heads[0], dims[0], dtype=torch.float64).transpose(1, 2)
    k, v = (torch.randn(2, keys, heads[1], dim, dtype=torch.float64).transpose(1, 2) for dim in dims)
    return [q, k, v]


def check(tensors: list[Tensor], mask: Tensor | None, sinks: Tensor | None = None, **options) -> None:
    from hydrasurgery.kernels.attention import triton_blocks

    options = PLAIN | options
    wanted = [reference.forward(*tensors, mask, sinks, **options)]
    single = [x.float() for x in tensors]
    flat = None if sinks is None else sinks.float()
    found = [triton_blocks.forward(*single, mask, flat, **options)]
    grad = torch.randn(wanted[0].shape, dtype=torch.float64)
    wanted += reference.backward(grad, *tensors, mask, sinks, **options)
    found += triton_blocks.backward(grad.float(), *single, mask, flat, **options)
    again = triton_blocks.backward(grad.float(), *single, mask, flat, **options)
    for have, want in zip(found, wanted, strict=True):
        assert (have is None) == (want is None)
        assert have is None or (have.shape == want.shape and torch.allclose(have.double(), want, rtol=1e-4, atol=2e-5))
    assert all(one is None or torch.equal(one, other) for one, other in zip(found[1:], again, strict=True))


@pytest.mark.parametrize(
    ("kind", "queries"),
    [
        (kind, queries)
        for kind in ("left", "holes", "documents", "documents, window", "window", "nothing")
        for queries in (KEYS, 70)
    ]
    + [("unwritten", 70)],
)
def test_reach_masks(kind, queries):
    check(inputs(queries), reach(kind, queries))


@pytest.mark.parametrize("queries", [KEYS, 1])
@pytest.mark.parametrize(
    "options", [{}, {"window": 40}, {"softcap": 2.0}, {"causal": False}, {"scale": 0.7, "window": 1}], ids=str
)
def test_without_a_mask(queries, options):
    check(inputs(queries), None, **options)


@pytest.mark.parametrize("mask", [None, "left", "nothing"])
def test_sinks(mask):
    sinks = torch.randn(2, dtype=torch.float64)
    check(inputs(70), None if mask is None else reach(mask, 70), sinks, softcap=3.0)


@pytest.mark.parametrize(
    ("heads", "dims"), [((3, 3), (8, 8)), ((6, 1), (16, 40)), ((2, 2), (80, 80)), ((2, 1), (130, 24))]
)
def test_heads_and_widths(heads, dims):
    check(inputs(37, 45, heads, dims), None)


def test_half_precision():
    from hydrasurgery.kernels.attention import triton_blocks

    tensors, mask = inputs(70), reach("documents", 70)
    half = [x.half() for x in tensors]  # the interpreter multiplies no bfloat16
    found = triton_blocks.forward(*half, mask, None, **PLAIN)
    wanted = reference.forward(*(x.double() for x in half), mask, None, **PLAIN)
    assert found.dtype == torch.float16
    assert torch.allclose(found.double(), wanted, rtol=2e-3, atol=2e-3)


def test_nothing_to_do():
    from hydrasurgery.kernels.attention import triton_blocks

    q, k, v = (x.float() for x in inputs(0, 0))
    assert triton_blocks.forward(q, k, v, None, None, **PLAIN).shape == (2, 0, 2, 16)
    assert triton_blocks.backward(torch.empty(2, 0, 2, 16), q, k, v, None, None, **PLAIN)[1].shape == k.shape

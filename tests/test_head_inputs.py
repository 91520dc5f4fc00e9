"""`hydra::head_inputs`: what it stands for, its gradients, its Triton kernels in the interpreter, and graphs with it."""

from __future__ import annotations

import os
from itertools import product

import pytest
import torch
from torch import Tensor

import hydrasurgery as hs
from hydrasurgery import ops
from hydrasurgery.ir.launches import fewer_launches
from hydrasurgery.kernels.head_inputs import reference
from hydrasurgery.layers import l2_norm, rotate_tokens, to_heads, to_tokens
from tests.families import FAMILIES, stir, tiny

MASKS = {
    "none": None,
    "left": [[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]],
    "holes": [[1, 0, 1, 1, 0, 0, 1], [0, 1, 0, 1, 1, 1, 0]],
    "documents": None,
}


def case(mask: str, *, turned: bool, past: bool, dtype=torch.float64, dim: int = 6) -> tuple[Tensor | None, ...]:
    """x [2, 3, 7, dim] and the rest of the operator's inputs."""
    torch.manual_seed(0)
    x = torch.randn(2, 7, 3, dim, dtype=dtype).transpose(1, 2).requires_grad_()  # as projections leave it
    weight = torch.randn(3 * dim, 4, dtype=dtype, requires_grad=True)
    state = torch.randn(2, 3 * dim, 3, dtype=dtype, requires_grad=True) if past else None
    valid, reset = torch.ones(2, 7, dtype=torch.bool), torch.zeros(2, 7, dtype=torch.bool)
    previous = None
    if MASKS[mask] is not None:
        valid = torch.tensor(MASKS[mask]).bool()
        previous = ops.previous_tokens(valid, torch.ones(1, 1, 7, 7))
    if mask == "documents":
        reset[0, 2] = reset[1, 4] = True
    angles = torch.randn(1, 1, 7, dim)
    tables = (angles.cos().to(dtype), angles.sin().to(dtype)) if turned else (None, None)
    return x, weight, state, reset, previous, *tables


def apart(x, weight, state, reset, previous, cos, sin, *, norm: bool) -> tuple[Tensor, Tensor]:
    """The same by the operators that graphs are written in."""
    valid = torch.ones_like(reset) if previous is None else previous[:, 1:] == torch.arange(reset.shape[1])
    tokens = to_tokens(x, valid)
    mixed, tail = ops.causal_conv(tokens, weight, state, reset, previous)
    y = to_heads(tokens + mixed, x.shape[1])
    y = y if cos is None else rotate_tokens(y, cos, sin, "half")
    return l2_norm(y) if norm else y, tail


CASES = list(product(MASKS, (True, False), (True, False), (True, False)))


@pytest.mark.parametrize(("mask", "turned", "past", "norm"), CASES)
def test_it_is_what_it_stands_for(mask, turned, past, norm):
    inputs = case(mask, turned=turned, past=past)
    wanted = [x for x in inputs[:3] if x is not None]
    results = []
    for function in (ops.head_inputs, apart):
        y, tail = function(*inputs, norm=norm)
        results.append((y, tail, *torch.autograd.grad((y * y.cos()).sum() + tail.square().sum(), wanted)))
    assert all(torch.allclose(*pair, rtol=1e-9, atol=1e-10) for pair in zip(*results, strict=True))


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")
@pytest.mark.parametrize(("mask", "turned", "past", "norm"), CASES)
def test_the_kernels_compute_it(mask, turned, past, norm):
    from hydrasurgery.kernels.head_inputs import triton as kernel

    inputs = [
        x.detach() if x is not None and x.is_floating_point() else x for x in case(mask, turned=turned, past=past)
    ]
    single = [x.float() if x is not None and x.is_floating_point() else x for x in inputs]
    wanted, found = reference.forward(*inputs, norm=norm), kernel.forward(*single, norm=norm)
    grads = torch.randn(wanted[0].shape, dtype=torch.float64), torch.randn(wanted[1].shape, dtype=torch.float64)
    wanted += reference.backward(*grads, *inputs, norm=norm)
    found += kernel.backward(*(x.float() for x in grads), *single, norm=norm)
    for have, want in zip(found, wanted, strict=True):
        assert (have is None) == (want is None)
        assert have is None or torch.allclose(have.double(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")
@pytest.mark.parametrize(("length", "dim"), [(1, 16), (2, 32), (300, 10)])
def test_the_kernels_take_any_length_and_width(length, dim):
    from hydrasurgery.kernels.head_inputs import triton as kernel

    torch.manual_seed(0)
    x, weight, state = torch.randn(1, 2, length, dim), torch.randn(2 * dim, 4), torch.randn(1, 2 * dim, 3)
    given = (x, weight, state, None, None, None, None)
    for have, want in zip(kernel.forward(*given, norm=True), reference.forward(*given, norm=True), strict=True):
        assert torch.allclose(have, want, rtol=1e-5, atol=1e-6)


# --- graphs -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_graphs_with_it_say_the_same(family):
    teacher = tiny(family)
    hybrid = stir(hs.rewrite(teacher, hs.plan_heads(teacher, ratio="1:1", strategy="fixed")))
    modules = hs.region_modules(hybrid).values()
    ids = torch.randint(3, 60, (2, 12))
    mask = torch.ones_like(ids)
    mask[0, :3] = mask[1, 5] = 0

    def run() -> tuple[Tensor, list[Tensor]]:
        out = hybrid(ids, attention_mask=mask, labels=ids)
        trained = [p for m in modules for p in m.parameters()]
        return out.logits[mask.bool()], list(torch.autograd.grad(out.loss, trained, allow_unused=True))

    logits, grads = run()
    for module in modules:
        assert not [n for n in fewer_launches(module.region.graph).nodes if n.target is to_tokens]
        vars(module)["_run"] = module._run_fast
    fast, fast_grads = run()
    assert torch.allclose(fast, logits, rtol=1e-5, atol=1e-5)
    for one, other in zip(grads, fast_grads, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.allclose(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("layer", ["hydrahead", "conv=native", "conv=none", "rule=delta", "conv=residual"])
def test_layers_of_other_options_say_the_same(layer):
    teacher = tiny("qwen3")
    hybrid = stir(hs.rewrite(teacher, hs.plan_heads(teacher, ratio="1:1", strategy="fixed"), layer=layer)).eval()
    ids = torch.randint(3, 60, (2, 12))
    with torch.no_grad():
        wanted = hybrid(ids).logits
        for module in hs.region_modules(hybrid).values():
            vars(module)["_run"] = module._run_fast
        assert torch.allclose(hybrid(ids).logits, wanted, rtol=1e-5, atol=1e-5)

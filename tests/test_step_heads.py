"""`hydra::step_heads`: what it stands for, its Triton kernel in the interpreter, and what it promises."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from hydrasurgery.kernels.decode_step import reference
from hydrasurgery.kernels.rotary import TURNS

interpreter = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")
B, H, C, K = 2, 4, 21, 6

CASES: list[dict[str, Any]] = [
    {}, {"flags": True}, {"taps": 0}, {"gated": False}, {"full": 0}, {"full": 2}, {"values": 5}, {"turned": 0},
    *({"turn": turn, "turned": turned} for turn in TURNS for turned in (4, 6)), {"tables": B}, {"channels": 1500},
]  # fmt: skip


def case(
    *, flags: bool = False, taps: int = 4, gated: bool = True, full: int = 1, values: int = K, turned: int = 6,
    turn: str = "half", tables: int = 1, channels: int = C,
) -> tuple[list[Any], dict[str, Any]]:  # fmt: skip
    """The operator's inputs in fp64, for 5 query heads on 3 KV heads; and its options."""
    torch.manual_seed(0)
    new = lambda *shape: torch.randn(*shape, dtype=torch.float64)  # noqa: E731
    widths = (K, K, values)
    heads = [new(B, count, 1, width).transpose(1, 2)[:, 0] for count, width in zip((5, 3, 3), widths, strict=True)]
    convs = [new(H * width, taps) for width in widths] if taps else []
    pasts = [new(B, H * width, taps - 1) for width in widths] if taps else []
    known = [torch.tensor([True, False]), torch.tensor([True, False])] if flags else [None, None]
    angles = new(tables, turned)
    inputs = [
        new(B, channels) / channels**0.5, *heads, new(B, full, values) if full else None, new(H, channels), new(H), new(H),
        new(H, channels), new(H), new(H, channels) if gated else None, new(H), convs, new(B, H, K, values), pasts, *known,
        *([angles.cos(), angles.sin()] if turned else [None, None]),
    ]  # fmt: skip
    slots = [slot for slot in range(H + full) if slot not in (1, 3)[:full]]
    options = {"q_heads": [4, 0, 1, 2], "kv_heads": [2, 0, 0, 1], "slots": slots}
    return inputs, {**options, "scale": 0.7, "eps": 1e-6, "turn": turn}


def copied(x: Any, dtype: torch.dtype) -> Any:
    if isinstance(x, list):
        return [copied(each, dtype) for each in x]
    return x.to(dtype, copy=True) if isinstance(x, Tensor) and x.is_floating_point() else x


@pytest.mark.parametrize("given", CASES, ids=str)
def test_it_is_a_step_of_selected_heads_with_projected_gates(given):
    inputs, options = case(**given)
    (hidden, q, k, v, full, decay, A_log, dt_bias, beta, bias, gate, gamma, convs, state, pasts, *rest) = copied(
        inputs, torch.float64
    )
    slots, q_heads, kv_heads = (options[name] for name in ("slots", "q_heads", "kv_heads"))
    own = (q[:, q_heads], k[:, kv_heads], v[:, kv_heads])
    raw = (hidden @ decay.mT, hidden @ beta.mT + bias, None if gate is None else hidden @ gate.mT)
    more = {name: options[name] for name in ("scale", "eps", "turn")}
    o = torch.ops.hydra.decode_step(*own, *raw, gamma, A_log, dt_bias, convs, state, pasts, *rest, **more)
    found = torch.ops.hydra.step_heads(*inputs, **options)
    assert torch.allclose(found[:, slots], o, rtol=1e-12, atol=1e-12)
    others = [slot for slot in range(found.shape[1]) if slot not in slots]
    assert full is None or torch.equal(found[:, others], full)
    for one, other in zip([inputs[13], *inputs[14]], [state, *pasts], strict=True):  # moved on in place
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-12)


@interpreter
@pytest.mark.parametrize("given", CASES, ids=str)
def test_the_kernel_computes_it(given):
    from hydrasurgery.kernels.decode_step import triton as kernel

    inputs, options = case(**given)
    single = copied(inputs, torch.float32)
    wanted, found = reference.forward_heads(*inputs, **options), kernel.forward_heads(*single, **options)
    for one, other in zip([found, single[13], *single[14]], [wanted, inputs[13], *inputs[14]], strict=True):
        assert torch.allclose(one.double(), other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("given", [{}, {"full": 0, "taps": 0, "gated": False}, {"flags": True, "values": 5}], ids=str)
def test_its_promises_hold(given):
    inputs, options = case(**given)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.hydra.step_heads.default, tuple(inputs), options, test_utils=tests)


def test_a_full_head_of_another_dtype_is_not_rounded():
    inputs, options = case(full=2)
    inputs = copied(inputs, torch.bfloat16)
    inputs[4], inputs[13] = inputs[4].float() + 1e-4, inputs[13].float()
    found = torch.ops.hydra.step_heads(*inputs, **options)
    assert found.dtype == torch.float32 and torch.equal(found[:, [1, 3]], inputs[4])

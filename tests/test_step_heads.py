"""`hydra::step_heads` and `hydra::rotate`: what they stand for, their Triton kernels in the interpreter, and what they promise."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

import hydrasurgery as hs
from hydrasurgery.dialect.names import DECODE_STEP, ROTATE, STEP_HEADS
from hydrasurgery.ir.launches import fewer_launches
from hydrasurgery.kernels.decode_step import reference
from hydrasurgery.kernels.rotary import TURNS, rotate
from tests.families import tiny

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
    o = DECODE_STEP(*own, *raw, gamma, A_log, dt_bias, convs, state, pasts, *rest, **more)
    found = STEP_HEADS(*inputs, **options)
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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=str)
@pytest.mark.parametrize("given", CASES, ids=str)
def test_a_gpu_computes_it(given, dtype, bound):
    inputs, options = case(**given)
    low = copied(inputs, dtype)
    for place in (6, 7, 13):  # rates and the recurrent state
        low[place] = low[place].float()
    wide, card = copied(low, torch.float64), moved(low)
    wanted, found = reference.forward_heads(*wide, **options), STEP_HEADS(*card, **options)
    for one, other in zip([found, card[13], *card[14]], [wanted, wide[13], *wide[14]], strict=True):
        assert (one.cpu().double() - other).norm() < bound * other.norm()


def moved(x: Any) -> Any:
    return [moved(each) for each in x] if isinstance(x, list) else x.cuda() if isinstance(x, Tensor) else x


@pytest.mark.parametrize("given", [{}, {"full": 0, "taps": 0, "gated": False}, {"flags": True, "values": 5}], ids=str)
def test_its_promises_hold(given):
    inputs, options = case(**given)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(STEP_HEADS, tuple(inputs), options, test_utils=tests)


def test_a_full_head_of_another_dtype_is_not_rounded():
    inputs, options = case(full=2)
    inputs = copied(inputs, torch.bfloat16)
    inputs[4], inputs[13] = inputs[4].float() + 1e-4, inputs[13].float()
    found = STEP_HEADS(*inputs, **options)
    assert found.dtype == torch.float32 and torch.equal(found[:, [1, 3]], inputs[4])


@pytest.mark.parametrize("rows", [1, B])
@pytest.mark.parametrize("turned", [4, 6])
@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("kernel", ["operator", pytest.param("triton", marks=interpreter)])
def test_heads_are_rotated(kernel, turn, turned, rows):
    torch.manual_seed(0)
    angles = torch.randn(rows, 1, 3, turned, dtype=torch.float64)
    cos, sin = angles.cos(), angles.sin()
    for counts in [(H,), (H, 1), (2, 3)]:
        xs = [torch.randn(B, 3, count, K, dtype=torch.float64).transpose(1, 2) for count in counts]
        wanted = [rotate(x, cos, sin, turn) for x in xs]
        if kernel == "triton":
            from hydrasurgery.kernels.rotate import triton

            found = triton.forward([x.float() for x in xs], cos.float(), sin.float(), turn=turn)
            assert all(torch.allclose(y.double(), want, atol=1e-5) for y, want in zip(found, wanted, strict=True))
        else:
            assert all(map(torch.equal, ROTATE(xs, cos, sin, turn), wanted))
            if torch.cuda.is_available():
                found = ROTATE([x.cuda().float() for x in xs], cos.cuda().float(), sin.cuda().float(), turn)
                assert all(
                    torch.allclose(y.cpu().double(), want, atol=1e-5) for y, want in zip(found, wanted, strict=True)
                )
            torch.library.opcheck(ROTATE, (xs, cos, sin, turn), test_utils=("test_schema", "test_faketensor"))


def test_a_step_rotates_queries_and_keys_at_once():
    teacher = tiny("qwen3")
    hybrid = hs.rewrite(teacher, hs.plan_heads(teacher, ratio="1:1", strategy="fixed"))
    for module in hs.region_modules(hybrid).values():
        step = fewer_launches(module, module.region.graph, step=True)
        assert len(step.find_nodes(op="call_function", target=ROTATE)) == 1
        assert not step.find_nodes(op="call_function", target=rotate)

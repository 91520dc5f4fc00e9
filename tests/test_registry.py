"""The choice of a kernel, as a table of machines and calls: a pure function, so machines are data."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import warnings

import pytest
import torch

from hydrasurgery import ops
from hydrasurgery.kernels import registry
from hydrasurgery.kernels.registry import BACKWARD, DECODE, FORWARD, IMPLEMENTATIONS, Case, Machine, choose

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
TRITON = ("triton", "3.6.0")
CPU = Machine("cpu", (0, 0), frozenset({TRITON, ("fla", "0.6.0"), ("flash_attn", "2.8.3")}))
BARE = Machine("cuda", (9, 0))
HOPPER = Machine("cuda", (9, 0), frozenset({TRITON, ("fa3_fwd_interface", "0.0.3"), ("flash_qla", "0.1.3")}))
AMPERE = Machine("cuda", (8, 0), HOPPER.packages | {("flash_attn", "2.8.3"), ("fla", "0.6.0")})
NO_TRITON = Machine("cuda", (9, 0), HOPPER.packages - {TRITON})
OLD = Machine("cuda", (7, 5), AMPERE.packages)
WIDE = (("D", 128),)
GDN = (("K", 128), ("V", 128))


def case(mode: str, dtype: torch.dtype, sizes=(), *features: str) -> Case:
    return Case(mode, dtype, tuple(sizes), frozenset(features))


TABLE = [
    ("attention", case(FORWARD, BF16, WIDE), CPU, "reference"),
    ("attention", case(FORWARD, BF16, WIDE), BARE, "sdpa"),
    ("attention", case(FORWARD, BF16, WIDE), HOPPER, "fa3"),
    ("attention", case(DECODE, BF16, WIDE), HOPPER, "fa3"),
    ("attention", case(FORWARD, torch.float16, WIDE), HOPPER, "sdpa"),
    ("attention", case(FORWARD, BF16, WIDE), AMPERE, "sdpa"),
    ("attention", case(BACKWARD, BF16, WIDE), HOPPER, "sdpa"),
    ("attention", case(FORWARD, BF16, WIDE, "window"), AMPERE, "flash_attn"),
    ("attention", case(FORWARD, BF16, WIDE, "window"), HOPPER, "triton, blocks"),
    ("attention", case(FORWARD, BF16, WIDE, "softcap"), HOPPER, "fa3"),
    ("attention", case(FORWARD, BF16, WIDE, "more keys than queries"), HOPPER, "fa3"),
    ("attention", case(FORWARD, BF16, WIDE, "mask"), HOPPER, "sdpa, masked"),
    ("attention", case(BACKWARD, BF16, WIDE, "mask"), HOPPER, "efficient"),
    ("attention", case(BACKWARD, FP32, WIDE), HOPPER, "triton, blocks"),
    ("attention", case(BACKWARD, BF16, WIDE, "mask", "sinks"), HOPPER, "reference"),
    ("attention", case(FORWARD, BF16, WIDE, "sinks"), AMPERE, "triton, blocks"),
    ("attention", case(FORWARD, FP32, WIDE), HOPPER, "triton, blocks"),
    ("attention", case(FORWARD, FP64, WIDE), HOPPER, "reference"),
    ("attention", case(FORWARD, BF16, (("D", 84),)), AMPERE, "triton, blocks"),
    ("attention", case(FORWARD, BF16, WIDE, "reach"), HOPPER, "triton, blocks"),
    ("attention", case(BACKWARD, BF16, WIDE, "reach", "softcap"), AMPERE, "triton, blocks"),
    ("attention", case(DECODE, BF16, WIDE, "reach", "sinks"), HOPPER, "triton"),
    ("attention", case(FORWARD, BF16, WIDE, "reach"), BARE, "sdpa, masked"),
    ("head_inputs", case(BACKWARD, BF16, (("K", 128), ("V", 128), ("W", 4))), AMPERE, "triton"),
    ("head_gates", case(BACKWARD, BF16, (("H", 14),)), AMPERE, "triton"),
    ("attention", case(FORWARD, BF16, WIDE), OLD, "reference"),
    ("linear_attention", case(FORWARD, BF16, GDN, "gated_delta"), CPU, "reference"),
    ("linear_attention", case(FORWARD, BF16, GDN, "gated"), AMPERE, "reference"),
    ("linear_attention", case(FORWARD, BF16, GDN, "gated_delta", "decay by channel"), AMPERE, "reference"),
    ("linear_attention", case(FORWARD, BF16, GDN, "gated_delta", "state"), AMPERE, "triton"),
    ("linear_attention", case(BACKWARD, BF16, GDN, "gated_delta"), HOPPER, "flash_qla"),
    ("linear_attention", case(FORWARD, BF16, GDN, "gated_delta"), HOPPER, "flash_qla"),
    ("linear_attention", case(FORWARD, BF16, GDN, "gated_delta", "few tokens"), HOPPER, "triton"),
    ("linear_attention", case(FORWARD, BF16, GDN, "gated_delta", "few tokens"), NO_TRITON, "flash_qla, few tokens"),
    ("linear_attention", case(BACKWARD, BF16, GDN, "gated_delta"), AMPERE, "triton"),
    ("linear_attention", case(FORWARD, FP32, (("K", 64), ("V", 256)), "gated_delta"), AMPERE, "triton, fp32"),
    ("linear_attention", case(BACKWARD, FP32, GDN, "gated_delta"), HOPPER, "triton, fp32, wide"),
    ("linear_attention", case(BACKWARD, FP32, GDN, "gated_delta"), AMPERE, "reference"),
    ("linear_attention", case(FORWARD, BF16, (("K", 256), ("V", 256)), "gated_delta"), AMPERE, "triton"),
    ("linear_attention", case(BACKWARD, FP32, (("K", 256), ("V", 256)), "gated_delta"), HOPPER, "reference"),
    ("linear_attention", case(FORWARD, BF16, (("K", 96), ("V", 96)), "gated_delta"), AMPERE, "triton"),
    ("causal_conv", case(FORWARD, BF16, (("W", 4),), "state", "reset"), HOPPER, "triton"),
    ("causal_conv", case(BACKWARD, FP64, (("W", 4),)), HOPPER, "reference"),
    ("causal_conv", case(FORWARD, BF16, (("W", 4),)), BARE, "reference"),
    ("scale_norm_fusion", case(BACKWARD, BF16, (("D", 128), ("H", 16))), AMPERE, "triton"),
    ("scale_norm_fusion", case(FORWARD, BF16, (("D", 128), ("H", 129))), AMPERE, "reference"),
    ("decode_step", case(DECODE, BF16, (*GDN, ("W", 4))), HOPPER, "triton"),
    ("decode_step", case(DECODE, BF16, (("K", 512), ("V", 128), ("W", 4))), HOPPER, "reference"),
]


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("machine", [CPU, BARE, HOPPER, AMPERE, OLD], ids="cpu bare hopper ampere old".split())
@pytest.mark.parametrize("dtype", [BF16, torch.float16, FP32, FP64])
@pytest.mark.parametrize("sizes", [*itertools.product((32, 128, 256), repeat=2)])
def test_what_a_forward_keeps_is_read_by_the_backward_of_the_same_kernel(machine, dtype, sizes, length):
    pytest.importorskip("triton")
    q, v = (torch.empty(1, length, 2, size, dtype=dtype, device="meta") for size in sizes)
    gate = torch.empty(1, length, 2, device="meta")
    forward, backward = (
        choose(
            "linear_attention",
            registry.linear_attention_case(mode, q, q, v, gate, gate, rule="gated_delta", trains=True),
            machine,
        ).implementation.module
        for mode in (FORWARD, BACKWARD)
    )
    module = importlib.import_module(forward)
    assert hasattr(module, "kept_like") == hasattr(module, "forward_keeping")
    if hasattr(module, "forward_keeping"):
        assert backward == forward


@pytest.mark.parametrize("dtype", [BF16, FP32, FP64])
@pytest.mark.parametrize("sizes", [*itertools.product((16, 32, 64, 128, 256, 512), repeat=2)])
def test_the_table_promises_what_the_triton_kernel_takes(dtype, sizes):
    kernel = pytest.importorskip("hydrasurgery.kernels.linear_attention.triton")
    q, v = (torch.empty(1, 3, 2, size, dtype=dtype, device="meta") for size in sizes)
    gate = torch.empty(1, 3, 2, device="meta")
    call = registry.linear_attention_case(BACKWARD, q, q, v, gate, gate, rule="gated_delta")
    machine = Machine("cuda", (9, 0), frozenset({("triton", "3.6.0")}))
    promised = choose("linear_attention", call, machine).implementation.name.startswith("triton")
    assert promised == (kernel.refusal(q, q, v, gate, gate, rule="gated_delta") is None)


@pytest.mark.parametrize(("op", "call", "machine", "wanted"), TABLE)
def test_the_choice(op, call, machine, wanted):
    choice = choose(op, call, machine)
    assert choice.implementation.name == wanted
    assert len(choice.others) == len(IMPLEMENTATIONS[op]) - 1
    assert all(reason for _, reason in choice.others)
    assert choose(op, call, machine) == choice


@pytest.mark.parametrize(
    ("op", "call", "machine", "name", "reason"),
    [
        ("attention", case(FORWARD, BF16, WIDE), CPU, "fa3", "needs a CUDA device"),
        ("attention", case(FORWARD, BF16, WIDE), AMPERE, "fa3", "needs compute capability 9.0 to 9.9, found 8.0"),
        ("attention", case(BACKWARD, BF16, WIDE), HOPPER, "fa3", "has no backward"),
        ("attention", case(FORWARD, BF16, WIDE, "sinks", "softcap"), HOPPER, "sdpa", "does not do sinks, softcap"),
        ("attention", case(FORWARD, FP32, WIDE), HOPPER, "sdpa", "does not take float32"),
        (
            "attention",
            case(FORWARD, BF16, (("D", 84),)),
            BARE,
            "sdpa",
            "does not take D = 84 (only 8 to 256 in steps of 8)",
        ),
        ("attention", case(FORWARD, BF16, WIDE), HOPPER, "sdpa", "fa3 comes first"),
        ("causal_conv", case(FORWARD, BF16), BARE, "triton", "needs triton (pip install 'hydrasurgery[kernels]')"),
        (
            "causal_conv",
            case(FORWARD, BF16),
            Machine("cuda", (9, 0), frozenset({("triton", "3.4.0")})),
            "triton",
            "needs triton 3.6 or newer, found 3.4.0 (pip install 'hydrasurgery[kernels]')",
        ),
    ],
)
def test_every_refusal_says_why(op, call, machine, name, reason):
    assert reason in {other.name: why for other, why in choose(op, call, machine).others}[name]


def test_a_mode_that_nothing_has_is_an_error():
    with pytest.raises(ValueError, match="decode_step has no backward"):
        choose("decode_step", case(BACKWARD, BF16), HOPPER)


def test_the_reference_comes_last_and_takes_any_call():
    for op, implementations in IMPLEMENTATIONS.items():
        assert [i.name for i in implementations].index("reference") == len(implementations) - 1, op
        assert implementations[-1].why_not(case(implementations[-1].modes[0], FP64, GDN, "anything"), CPU) is None


def test_every_module_is_there():
    for implementations in IMPLEMENTATIONS.values():
        for implementation in implementations:
            assert importlib.util.find_spec(implementation.module) is not None, implementation.module


def test_a_missing_fast_path_is_said_once(monkeypatch):
    """On CUDA only; the reference itself would run on any device."""
    registry._kernel.cache_clear()
    registry._say.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"causal_conv.*triton needs triton.*hydrasurgery\[kernels\]"):
        registry._kernel("causal_conv", case(FORWARD, BF16, (("W", 4),)), BARE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        registry._kernel("causal_conv", case(FORWARD, BF16, (("W", 3),)), BARE)
        registry._kernel("causal_conv", case(FORWARD, BF16, (("W", 4),)), CPU)


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (lambda q: call_attention(q, q), case(FORWARD, FP32, (("D", 8), ("V", 8)))),
        (lambda q: call_attention(q[:, :, :1], q), case(DECODE, FP32, (("D", 8), ("V", 8)))),
        (lambda q: call_attention(q[:, :, :2], q), case(FORWARD, FP32, (("D", 8), ("V", 8)), "more keys than queries")),
        (lambda q: call_attention(q[:, :, :2], q, causal=False), case(FORWARD, FP32, (("D", 8), ("V", 8)))),
        (lambda q: call_attention(q, q, window=3), case(FORWARD, FP32, (("D", 8), ("V", 8)))),
        (lambda q: call_attention(q, q, window=2), case(FORWARD, FP32, (("D", 8), ("V", 8)), "window")),
        (
            lambda q: registry.attention_case(
                BACKWARD, q, q.half(), q[..., :4], q, q, causal=True, window=2, softcap=1.0
            ),
            case(
                BACKWARD,
                FP32,
                (("D", 8), ("V", 4)),
                "mask",
                "sinks",
                "softcap",
                "mixed dtypes",
                "a value width of its own",
            ),
        ),
        (
            lambda q: registry.linear_attention_case(FORWARD, q, q, q, q, q, rule="gated"),
            case(FORWARD, FP32, (("K", 8), ("V", 8)), "gated", "state", "decay by channel", "few tokens"),
        ),
        (
            lambda q: registry.linear_attention_case(FORWARD, q[:, :1], q[:, :1], q, None, None, rule="delta"),
            case(DECODE, FP32, (("K", 8), ("V", 8)), "delta"),
        ),
        (lambda q: registry.causal_conv_case(FORWARD, q, q[0, 0], q, None), case(FORWARD, FP32, (("W", 8),), "state")),
        (lambda q: registry.scale_norm_fusion_case(FORWARD, None, q), case(FORWARD, FP32, (("D", 8), ("H", 3)))),
    ],
)
def test_the_case_of_a_call(make, wanted):
    assert make(torch.zeros(2, 4, 3, 8)) == wanted


def call_attention(q, k, causal=True, window=None):
    return registry.attention_case(FORWARD, q, k, k, None, None, causal=causal, window=window, softcap=None)


def test_operators_on_a_cpu_take_the_reference(monkeypatch):
    taken = []
    pick = registry.kernel
    monkeypatch.setattr(registry, "kernel", lambda *args: taken.append(pick(*args)) or taken[-1])
    x = torch.randn(1, 4, 2, 8, requires_grad=True)
    gates = -torch.rand(1, 4, 2), torch.rand(1, 4, 2)
    y, _ = ops.causal_conv(x.flatten(2), torch.randn(16, 4))
    full = ops.attention(*[y.unflatten(-1, (2, 8)).transpose(1, 2)] * 3)
    linear, _ = ops.linear_attention(x, x, x, *gates)
    ops.scale_norm_fusion(full, linear, torch.ones(2), linear_heads=[1, 2]).sum().backward()
    assert len(taken) == 9  # both ways of four, and the kernel of attention's backward when its forward is asked for
    assert {module.__name__.rpartition(".")[2] for module in taken} == {"reference"}

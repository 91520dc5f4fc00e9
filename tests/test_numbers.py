"""Numbers at the edges: fp64 to its last digits, mixed dtypes, empty batches, sums beyond fp16, masks of every kind."""

from __future__ import annotations

import copy
import functools
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import hydrasurgery as hs
from hydrasurgery import ops
from hydrasurgery.layers import FORGET, to_tokens
from tests.families import GroupedAttention, PlainDecoder, tiny
from tests.test_families import half_plan, stir

IDS = torch.arange(3, 27).view(2, 12)
RULES = ("linear", "gated", "delta", "gated_delta")
LAYERS = (
    "default",
    "hydrahead",
    "log_length=true,rule=gated",
    "rule=delta,full_norm=paper",
    "conv=residual,rule=linear",
)


@functools.cache
def hybrid_of(layer: str, kinds: tuple[str, ...] = ("full", "linear", "linear", "full"), family: str = "qwen3") -> Any:
    model = tiny(family)
    return stir(hs.rewrite(model, half_plan(model, kinds), layer=layer))


# --- fp64 -------------------------------------------------------------------------------------------------------------


class Narrow(TorchDispatchMode):
    """Notes operators that give numbers narrower than fp64 that fp32 could have rounded."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            exact = not isinstance(x, Tensor) or not x.is_floating_point() or x.dtype == torch.float64
            if not exact and not set(x.flatten().tolist()) <= {0.0, 1.0, FORGET}:
                self.found.append(str(func))
        return out


@pytest.mark.parametrize("layer", LAYERS)
def test_a_hybrid_of_fp64_computes_nothing_in_fp32(layer: str) -> None:
    hybrid = hybrid_of(layer, family="llama").double()  # whose own attention has no norm, which would be of fp32
    narrow, calls = Narrow(), 0

    def leave(*_: Any) -> None:
        nonlocal calls
        calls += 1
        narrow.__exit__(None, None, None)

    for module in hs.region_modules(hybrid).values():
        module.register_forward_pre_hook(lambda *_: narrow.__enter__() and None)
        module.register_forward_hook(leave)
    with torch.no_grad():
        for mask in (torch.ones_like(IDS), (IDS > 5).long()):
            cache = hybrid(IDS[:, :7], attention_mask=mask[:, :7], use_cache=True).past_key_values
            for first, last in ((7, 8), (8, 12)):
                hybrid(IDS[:, first:last], attention_mask=mask[:, :last], past_key_values=cache)
    assert calls == 2 * 2 * 3
    assert not narrow.found


# --- mixed dtypes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", ["default", "full_gate=true", "hydrahead,untie=false", "rule=linear"])
@pytest.mark.parametrize(("body", "added"), [("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "float64")])
def test_additions_may_have_a_dtype_of_their_own(layer: str, body: str, added: str) -> None:
    model = tiny("qwen3")
    hybrid = stir(hs.rewrite(model, half_plan(model), layer=layer))
    wanted = hybrid(IDS, use_cache=False).logits.detach()
    plain = copy.deepcopy(hybrid).to(getattr(torch, body))(IDS, use_cache=False).logits.detach()
    limit = 1.5 * float((plain.float() - wanted).norm()) + 1e-3
    hybrid.to(getattr(torch, body))
    for module in hs.region_modules(hybrid).values():
        module.hydra.to(getattr(torch, added))
    found = hybrid(IDS, use_cache=False).logits
    assert found.dtype == getattr(torch, body)
    limit = (
        max(limit, 0.02 * float(wanted.norm())) if body == "float32" else limit
    )  # its additions are the less exact part
    assert (found.float() - wanted).norm() < limit
    found.float().sum().backward()
    with torch.no_grad():
        cache, parts = None, []
        for place in range(5):
            out = hybrid(IDS[:, place : place + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
    assert (torch.cat(parts, 1).float() - wanted[:, :5]).norm() < limit


@pytest.mark.parametrize("layer", ["default", "hydrahead"])
def test_autocast_runs_a_hybrid_of_fp32(layer: str) -> None:
    hybrid = hybrid_of(layer).float()
    wanted = hybrid(IDS, use_cache=False).logits.detach()
    with torch.autocast("cpu", torch.bfloat16):
        found = hybrid(IDS, use_cache=False).logits
        found.float().sum().backward()
    assert (found.float() - wanted).norm() < 0.05 * wanted.norm()
    hybrid.zero_grad()


# --- nothing ----------------------------------------------------------------------------------------------------------

EMPTY = [(0, 5), (2, 0), (0, 0), (0, 1)]


def empty(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


@pytest.mark.parametrize(("batch", "length"), EMPTY)
@pytest.mark.parametrize("state", [False, True])
def test_operators_of_no_tokens_give_none_and_keep_states(batch: int, length: int, state: bool) -> None:
    q, k, v = (empty(batch, length, 3, size) for size in (8, 8, 4))
    first = empty(batch, 3, 8, 4) if state else None
    for rule in RULES:
        decay = -torch.rand(batch, length, 3) if "gated" in rule else None
        beta = torch.rand(batch, length, 3) if "delta" in rule else None
        o, final = ops.linear_attention(q, k, v, decay, beta, first, rule=rule)
        assert o.shape == v.shape
        assert torch.equal(final, torch.zeros(batch, 3, 8, 4) if first is None or not batch else first)
        (o.sum() + (final * 2).sum()).backward()
        if first is not None:
            assert torch.equal(first.grad, torch.full_like(first, 2.0))
            first.grad = None
    x, past = empty(batch, length, 6), empty(batch, 6, 3) if state else None
    valid = torch.ones(batch, length, dtype=torch.bool)
    for previous in (None, ops.previous_tokens(valid, x)):
        y, tail = ops.causal_conv(x, torch.randn(6, 4), past, None if previous is None else ~valid, previous)
        assert y.shape == x.shape
        assert torch.equal(tail, torch.zeros(batch, 6, 3) if past is None or not batch else past)
        (y.sum() + tail.sum()).backward()
    heads = [x.transpose(1, 2) for x in (q, k[:, :, :1], v[:, :, :1])]
    mask = torch.ones(batch, 1, length, length, dtype=torch.bool).tril()
    for given in ({}, {"mask": mask}, {"window": 2}, {"softcap": 3.0}, {"sinks": torch.zeros(3)}):
        out = ops.attention(*heads, **given)
        assert out.shape == (batch, length, 3, 4)
        out.sum().backward()
    fused = ops.scale_norm_fusion(out.detach(), v[:, :, :2], torch.ones(5), linear_heads=[1, 2], norm_full=True)
    assert fused.shape == (batch, length, 5, 4)
    fused.sum().backward()
    assert ops.token_positions(valid, ~valid)[0].shape == (batch, length)
    assert all(flags.shape == (batch, length) for flags in ops.token_flags(mask, x))


def test_one_token_of_no_sequence() -> None:
    q, gate, state = torch.randn(0, 2, 8), torch.rand(0, 2), torch.zeros(0, 2, 8, 8)
    assert ops.decode_step(q, q, q, -gate, gate, None, torch.ones(2), state=state).shape == (0, 2, 8)


@pytest.mark.parametrize("family", ["gpt2", "phi3", "gpt_neox", "qwen3", "opt"])
@pytest.mark.parametrize("layer", ["default", "rule=linear", "full_norm=paper,full_gate=true"])
def test_a_hybrid_of_no_sequence_is_what_its_teacher_is(family: str, layer: str) -> None:
    hybrid, teacher = hybrid_of(layer, family=family).float(), tiny(family)
    for length in (5, 1):
        ids = torch.ones(0, length, dtype=torch.long)
        try:
            wanted = teacher(ids, use_cache=False).logits
        except RuntimeError as error:  # many reshape with a size that is not named
            with pytest.raises(RuntimeError, match=re.escape(str(error).splitlines()[0])):
                hybrid(ids, use_cache=False)
            continue
        logits = hybrid(ids, use_cache=False).logits
        assert logits.shape == wanted.shape
        logits.sum().backward()
        with torch.no_grad():
            cache = hybrid(ids, attention_mask=torch.ones_like(ids), use_cache=True).past_key_values
            assert hybrid(ids[:, :1], past_key_values=cache).logits.shape[:2] == (0, 1)
        hybrid.zero_grad()


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)])
@pytest.mark.parametrize("layer", ["default", "rule=delta", "full_norm=paper,full_gate=true"])
def test_plain_decoders_of_nothing(shape: tuple[int, int], layer: str) -> None:
    model, ids = PlainDecoder(GroupedAttention), torch.ones(shape, dtype=torch.long)
    hybrid = hs.rewrite(model, half_plan(model), layer=layer)
    assert hybrid(ids).shape == model(ids).shape == (*shape, 96)
    hybrid(ids).sum().backward()


# --- beyond fp16 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_long_sums_of_large_values_are_no_overflow(rule: str) -> None:
    length, size = 4096, 100.0
    ones = torch.ones(1, length, 1, 4).half()
    q, v = ones / 2, (ones * size).requires_grad_()
    decay = torch.full((1, length, 1), -1e-6) if "gated" in rule else None
    beta = torch.ones(1, length, 1) if "delta" in rule else None
    o, _ = ops.linear_attention(q, q, v, decay, beta, rule=rule)
    fused = ops.scale_norm_fusion(None, o, torch.ones(1), linear_heads=[0])
    assert torch.allclose(fused.float(), torch.ones(1, length, 1, 4), atol=2e-3)
    fused.sum().backward()
    assert v.grad.isfinite().all()


@pytest.mark.parametrize("rule", ["linear", "gated"])
@torch.no_grad()
def test_a_half_precision_hybrid_of_large_values_is_finite(rule: str) -> None:
    model = tiny("qwen3")
    hybrid = stir(hs.rewrite(model, half_plan(model, ("linear",) * 4), layer=f"rule={rule}"))
    for layer in hybrid.model.layers:
        layer.self_attn.v_proj.weight.mul_(2e4)
    wanted = hybrid(IDS.view(1, -1), use_cache=False).logits
    found = hybrid.half()(IDS.view(1, -1), use_cache=False).logits
    assert found.dtype == torch.float16
    assert (found.float() - wanted).norm() < 0.02 * wanted.norm()


# --- values that have no meaning --------------------------------------------------------------------------------------


def test_a_decay_that_grows_is_refused() -> None:
    q, gate = torch.randn(1, 5, 2, 4), torch.rand(1, 5, 2)
    for decay in (gate, gate[..., None].expand(-1, -1, -1, 4), torch.full_like(gate, math.inf)):
        with pytest.raises(ValueError, match="decay must be at most 0, found"):
            ops.linear_attention(q, q, q, decay, gate)
        with pytest.raises(ValueError, match="decay must be at most 0, found"):
            ops.linear_attention(q.clone().requires_grad_(), q, q, decay, gate)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64])
def test_states_of_few_digits_are_refused(dtype: torch.dtype) -> None:
    q, gate, state = torch.randn(1, 5, 2, 4), torch.rand(1, 5, 2), torch.zeros(1, 2, 4, 4, dtype=dtype)
    with pytest.raises(ValueError, match="state must be float32 or float64, found"):
        ops.linear_attention(q, q, q, -gate, gate, state)
    with pytest.raises(ValueError, match="state must be float32 or float64, found"):
        ops.decode_step(q[:, 0], q[:, 0], q[:, 0], -gate[:, 0], gate[:, 0], None, torch.ones(2), state=state)


@pytest.mark.parametrize("beta", [-0.5, 1.9, 3.0])
def test_any_write_strength_is_the_recurrence(beta: float) -> None:
    from hydrasurgery.kernels.linear_attention.reference import naive

    q, k, v = (torch.nn.functional.normalize(torch.randn(1, 70, 2, 4).double(), dim=-1) for _ in range(3))
    decay, betas = -2 * torch.rand(1, 70, 2).double(), torch.full((1, 70, 2), beta).double()
    wanted = naive(q, k, v, decay, betas)
    for have, want in zip(ops.linear_attention(q, k, v, decay, betas), wanted, strict=True):
        assert torch.allclose(have, want, rtol=1e-9, atol=1e-12)


def test_padding_of_no_number_reaches_no_token() -> None:
    heads, valid = torch.full((1, 2, 3, 4), math.nan), torch.tensor([[True, False, False]])
    heads[:, :, 0] = 1
    assert to_tokens(heads, valid).isfinite().all()
    q, gate, state = torch.full((1, 2, 4), math.nan), torch.rand(1, 2), torch.ones(1, 2, 4, 4)
    flag = torch.tensor([False])
    ops.decode_step(q, q, q, -gate, gate * math.nan, None, torch.ones(2), state=state, valid=flag, reset=flag)
    assert torch.equal(state, torch.ones(1, 2, 4, 4))


# --- masks ------------------------------------------------------------------------------------------------------------


def masks() -> dict[str, Tensor]:
    """Complete masks [B, 1, T, S] that let the same keys be seen: causal, with holes."""
    seen = torch.ones(2, 1, 12, 12, dtype=torch.bool).tril()
    seen[0, :, :, 3:5] &= torch.eye(12, dtype=torch.bool)[:, 3:5]
    seen[0, :, 3:5] = torch.eye(12, dtype=torch.bool)[3:5]
    return {
        "bool": seen,
        **{
            str(dtype): torch.where(seen, 0.0, torch.finfo(dtype).min).to(dtype)
            for dtype in (torch.float32, torch.float16, torch.bfloat16)
        },
    }


@pytest.mark.parametrize("kinds", [("full",) * 4, ("full", "linear", "linear", "full")])
@torch.no_grad()
def test_complete_masks_mean_the_same_in_every_form(kinds: tuple[str, ...]) -> None:
    hybrid = hybrid_of("default", kinds).float()
    given = masks()
    wanted = hybrid(IDS, attention_mask=given["bool"], use_cache=False).logits
    if "linear" not in kinds:
        teacher = tiny("qwen3")(IDS, attention_mask=given["bool"], use_cache=False).logits
        assert torch.allclose(wanted, teacher, atol=1e-6)
    for mask in given.values():
        assert torch.allclose(hybrid(IDS, attention_mask=mask, use_cache=False).logits, wanted, atol=1e-5)


@pytest.mark.parametrize("kinds", [("full",) * 4, ("linear",) * 4, ("full", "linear", "linear", "full")])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_masks_of_integers_are_refused_by_name(kinds: tuple[str, ...], dtype: torch.dtype) -> None:
    mask = masks()["bool"].to(dtype)
    with pytest.raises(ValueError, match=rf"mask must be bool .* found {dtype}: give mask\.bool\(\)"):
        hybrid_of("default", kinds).float()(IDS, attention_mask=mask, use_cache=False)


def test_masks_that_are_not_complete_are_refused_where_they_say_too_little() -> None:
    short = torch.ones(2, 1, 1, 12, dtype=torch.bool)
    full = hybrid_of("default", ("full",) * 4).float()
    teacher = tiny("qwen3")(IDS, attention_mask=short, use_cache=False).logits
    assert torch.allclose(full(IDS, attention_mask=short, use_cache=False).logits, teacher, atol=1e-6)
    for kinds in (("linear",) * 4, ("full", "linear", "linear", "full")):
        with pytest.raises(
            ValueError, match=r"must be complete, \[batch or 1, heads or 1, 12, keys\], found \[2, 1, 1, 12\]"
        ):
            hybrid_of("default", kinds).float()(IDS, attention_mask=short, use_cache=False)

"""`hydra::attention`: softmax attention, with its backward and its rule under autocast."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hydrasurgery.dialect.checks import (
    DERIVATIVES,
    check_mask_dtype,
    exact,
    expect,
    fake,
    fake_or_empty,
    full_precision,
    lower_under_autocast,
    or_empty,
    refuse_tangents,
    refuse_transforms,
)
from hydrasurgery.dialect.operators import operator
from hydrasurgery.kernels import registry
from hydrasurgery.kernels.attention.reach import is_reach


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Softmax attention, `o_i = sum_j softmax_j(s_ij) v_j` with `s = cap tanh(scale q k^T / cap) + mask`.

    Args:
        q: [B, H, T, D].
        k: [B, Hk, S, D]; H is a multiple of Hk, and query head h reads KV head `h * Hk // H`.
        v: [B, Hk, S, Dv].
        mask: [B or 1, H or 1, T, S], bool (True = may attend) or float (added to the scores), or [B, 1, 1, S + 1] int32: for each
            key the place of the first query that no longer sees it, and last the place of the first query here; a query at
            place p sees key s if s <= p < mask[s]. It is complete: with a mask, `causal` and `window` have no effect. No
            gradient flows into it.
        sinks: [H], one more logit a head in the softmax's denominator.
        scale: of the scores; D ** -0.5 if None.
        causal: without a mask, query i sees the keys up to its own, the last query at the last key (S >= T).
        window: without a mask, the number of keys seen, counted back from the query's own and including it.
        softcap: cap of the scores, applied before the mask.

    Returns:
        [B, T, H, Dv], contiguous, in q's dtype. A query that may attend to nothing gives 0 (under an additive mask of finite
        numbers: the mean of v, as in PyTorch) and passes no gradient.

    Raises:
        ValueError: a shape or dtype does not fit; the message names the argument.

    Example:
        >>> q, k, v = (torch.randn(1, heads, 5, 8) for heads in (4, 2, 2))
        >>> attention(q, k, v, window=3).shape
        torch.Size([1, 5, 4, 8])
    """
    expect("q", q, (None, None, None, None))
    batch, heads, queries, dim = q.shape
    expect("k", k, (batch, None, None, dim))
    expect("v", v, (batch, k.shape[1], k.shape[2], None))
    if heads % k.shape[1]:
        raise ValueError(f"q has {heads} heads and k {k.shape[1]}: the first must be a multiple of the second")
    if not q.dtype == k.dtype == v.dtype and not torch.is_autocast_enabled(q.device.type):
        raise ValueError(f"q, k and v must have one dtype, found {q.dtype}, {k.dtype} and {v.dtype}")
    if mask is not None:
        _expect_mask(mask, (batch, heads, queries, k.shape[2]))
    if sinks is not None:
        expect("sinks", sinks, (heads,))
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, found {window}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, found {softcap}")
    refuse_transforms("hydra::attention", *DERIVATIVES)
    return torch.ops.hydra.attention.default(
        q, k, v, mask, sinks, scale=scale, causal=causal, window=window, softcap=softcap
    )


def _expect_mask(mask: Tensor, shape: tuple[int, int, int, int]) -> None:
    batch, heads, queries, keys = shape
    if is_reach(mask) and tuple(mask.shape) == (batch, 1, 1, keys + 1):
        return
    fits = mask.dim() == 4 and mask.shape[0] in (1, batch) and mask.shape[1] in (1, heads)
    if not fits or tuple(mask.shape[2:]) != (queries, keys):
        raise ValueError(
            f"mask must have shape [{batch} or 1, {heads} or 1, {queries}, {keys}], found {list(mask.shape)}"
        )
    check_mask_dtype(mask)
    if mask.requires_grad:
        raise ValueError("mask requires a gradient, and attention gives it none: detach it")


_ATTENTION_OPTIONS = "float? scale=None, bool causal=True, int? window=None, float? softcap=None"


@operator(
    "attention",
    f"(Tensor q, Tensor k, Tensor v, Tensor? mask=None, Tensor? sinks=None, *, {_ATTENTION_OPTIONS}) -> Tensor",
)
def _attention(q, k, v, mask=None, sinks=None, *, scale=None, causal=True, window=None, softcap=None):
    if mask is not None and not (is_reach(mask) and mask.shape[3] == k.shape[2] + 1):
        check_mask_dtype(mask)
    refuse_tangents(q, k, v, sinks)
    options = {"causal": causal, "window": window, "softcap": softcap}
    case = registry.attention_case("forward", q, k, v, mask, sinks, **options)
    with full_precision(q):
        out = registry.kernel("attention", case, q.device).forward(q, k, v, mask, sinks, scale=scale, **options)
    return exact(out)


@_attention.register_fake
def _(q, k, v, mask=None, sinks=None, *, scale=None, causal=True, window=None, softcap=None):
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


def _training_module(q: Any, k: Any, v: Any, mask: Any, sinks: Any, options: dict[str, Any]) -> Any:
    """The kernel of the backward: what its forward keeps is its own."""
    return registry.kernel("attention", registry.attention_case("backward", q, k, v, mask, sinks, **options), q.device)


@operator(
    "attention_forward",
    "(Tensor q, Tensor k, Tensor v, Tensor? mask=None, Tensor? sinks=None, *, "
    f"{_ATTENTION_OPTIONS}) -> (Tensor o, Tensor[] kept)",
)
def _forward(q, k, v, mask=None, sinks=None, *, scale=None, causal=True, window=None, softcap=None):
    """As `attention`, and what the backward needs again, for kernels that have it: nothing of the rest."""
    options = {"causal": causal, "window": window, "softcap": softcap}
    module = _training_module(q, k, v, mask, sinks, options)
    if not hasattr(module, "forward_keeping"):
        return _attention.run(q, k, v, mask, sinks, scale=scale, **options), []
    refuse_tangents(q, k, v, sinks)
    with full_precision(q):
        out, kept = module.forward_keeping(q, k, v, mask, sinks, scale=scale, **options)
    return exact(out), [exact(x) for x in kept]


@_forward.register_fake
def _(q, k, v, mask=None, sinks=None, *, scale=None, causal=True, window=None, softcap=None):
    options = {"causal": causal, "window": window, "softcap": softcap}
    module = _training_module(q, k, v, mask, sinks, options)
    out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])
    return out, list(module.kept_like(q)) if hasattr(module, "forward_keeping") else []


@operator(
    "attention_backward",
    "(Tensor grad, Tensor? o, Tensor[] kept, Tensor q, Tensor k, Tensor v, Tensor? mask=None, Tensor? sinks=None, *, "
    f"{_ATTENTION_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _attention_backward(
    grad, o, kept, q, k, v, mask=None, sinks=None, *, scale=None, causal=True, window=None, softcap=None
):
    """`o` and `kept` of `attention_forward`; without them the forward runs once more."""
    options = {"causal": causal, "window": window, "softcap": softcap}
    backward = _training_module(q, k, v, mask, sinks, options).backward
    known = {"kept": (o, *kept)} if kept else {}
    with full_precision(q):
        dq, dk, dv, dsinks = backward(grad, q, k, v, mask, sinks, scale=scale, **options, **known)
    return exact(dq), exact(dk), exact(dv), or_empty(dsinks, q)


@_attention_backward.register_fake
def _(grad, o, kept, q, k, v, mask=None, sinks=None, *, scale=None, causal=True, window=None, softcap=None):
    return fake(q), fake(k), fake(v), fake_or_empty(sinks, q)


def _attention_grads(ctx, grad):
    q, k, v, mask, sinks, o, *kept = ctx.saved_tensors
    inputs = (q, k, v, mask, sinks)
    if grad is None:
        return (None,) * len(inputs)
    dq, dk, dv, dsinks = torch.ops.hydra.attention_backward.default(grad, o, kept, *inputs, **ctx.options)
    return dq, dk, dv, None, None if sinks is None else dsinks


_attention.register_autograd(_attention_grads, _forward)


lower_under_autocast("attention", 0, 1, 2)

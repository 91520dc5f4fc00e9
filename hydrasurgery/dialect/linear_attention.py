"""`hydra::linear_attention`: attention by a recurrence, with its forward for training and its backward."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from hydrasurgery.dialect.checks import (
    DERIVATIVES,
    exact,
    expect,
    expect_state,
    fake_or_empty,
    full_precision,
    given,
    lower_under_autocast,
    or_empty,
    refuse_tangents,
    refuse_transforms,
)
from hydrasurgery.dialect.operators import operator
from hydrasurgery.kernels import registry
from hydrasurgery.kernels.linear_attention.reference import DECAY_RULES, DELTA_RULES, RULES, output_dtype


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    state: Tensor | None = None,
    *,
    rule: str = "gated_delta",
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention by a recurrence over a state S [K, V] a head: `S_t = a_t S_{t-1} + w_t`, `o_t = scale S_t^T q_t`.

    =============  ==================  =================================================
    rule           a_t                 w_t
    =============  ==================  =================================================
    linear         1                   k_t v_t^T
    gated          exp(decay_t)        k_t v_t^T
    delta          1                   beta_t k_t (v_t - S_{t-1}^T k_t)^T
    gated_delta    exp(decay_t)        beta_t k_t (v_t - (exp(decay_t) S_{t-1})^T k_t)^T
    =============  ==================  =================================================

    A token with k, v, beta and decay 0 leaves the state as it was. q and k are taken as given: normalise them first.

    Where a gradient is wanted, `hydra::linear_attention_forward` runs below autograd: its third output is what the backward needs
    again. Compiled training graphs and policies of selective activation checkpoints see that operator, exported graphs
    `hydra::linear_attention`.

    Args:
        q: [B, T, H, K].
        k: [B, T, H, K].
        v: [B, T, H, V].
        decay: natural logarithm of the decay, at most 0: [B, T, H], or [B, T, H, K] for one a key channel. For the gated rules.
            A positive one is refused on a CPU; elsewhere to look would be to wait, and what it gives is not specified.
        beta: [B, T, H], the strength of a write, any number. For the delta rules.
        state: [B, H, K, V] fp32 or fp64, the state before the first token; zero if None.
        rule: "linear", "gated", "delta" or "gated_delta".
        scale: of the outputs; K ** -0.5 if None.

    Returns:
        o [B, T, H, V] in v's dtype (fp32 for v of fp16 and a rule without delta, whose sums may exceed fp16) and the state after
        the last token [B, H, K, V] in fp32 (fp64 if q, k or v is fp64).

    Raises:
        ValueError: an unknown rule, an argument that the rule lacks or does not use, a shape or dtype that does not fit, or a
            positive decay on a CPU.

    Example:
        >>> q, k, v = (torch.nn.functional.normalize(torch.randn(1, 6, 2, 8), dim=-1) for _ in range(3))
        >>> decay, beta = -torch.rand(1, 6, 2), torch.rand(1, 6, 2)
        >>> o, _ = linear_attention(q, k, v, decay, beta)
        >>> _, state = linear_attention(*(x[:, :4] for x in (q, k, v, decay, beta)))
        >>> last, _ = linear_attention(*(x[:, 4:] for x in (q, k, v, decay, beta)), state)
        >>> torch.allclose(last, o[:, 4:], atol=1e-5)
        True
    """
    expect("q", q, (None, None, None, None))
    batch, length, heads, channels = q.shape
    expect("k", k, (batch, length, heads, channels))
    expect("v", v, (batch, length, heads, None))
    _check_rule(rule, decay, beta)
    if rule not in DECAY_RULES and decay is not None:
        raise ValueError(f"decay is given, but rule {rule!r} does not use it: leave it out or choose a gated rule")
    if rule not in DELTA_RULES and beta is not None:
        raise ValueError(f"beta is given, but rule {rule!r} does not use it: leave it out or choose a delta rule")
    if decay is not None:
        expect("decay", decay, (batch, length, heads) if decay.dim() == 3 else (batch, length, heads, channels))
    if beta is not None:
        expect("beta", beta, (batch, length, heads))
    if state is not None:
        expect("state", state, (batch, heads, channels, v.shape[-1]))
        expect_state("state", state)
    refuse_transforms("hydra::linear_attention", *DERIVATIVES)
    return torch.ops.hydra.linear_attention.default(q, k, v, decay, beta, state, rule=rule, scale=scale)


def _check_rule(rule: str, decay: Tensor | None, beta: Tensor | None) -> None:
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, found {rule!r}")
    if rule in DECAY_RULES and decay is None:
        raise ValueError(f"decay is missing: rule {rule!r} needs it, [B, T, H] or [B, T, H, K]")
    if rule in DELTA_RULES and beta is None:
        raise ValueError(f"beta is missing: rule {rule!r} needs it, [B, T, H]")


def _check_decay(decay: Tensor | None) -> None:
    """Chunked kernels take decays for factors of at most 1."""
    if decay is not None and decay.device.type == "cpu" and bool((decay > 0).any()):
        raise ValueError(
            f"decay must be at most 0, found {float(decay.max()):.3g}: it is the logarithm of what is kept of the state"
        )


_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? decay=None, Tensor? beta=None, Tensor? state=None"
_OPTIONS = 'str rule="gated_delta", float? scale=None'


# --- without gradients -------------------------------------------------------------------------------------------------------


@operator("linear_attention", f"({_INPUTS}, *, {_OPTIONS}) -> (Tensor o, Tensor state)")
def _linear_attention(q, k, v, decay=None, beta=None, state=None, *, rule="gated_delta", scale=None):
    _check_rule(rule, decay, beta)
    _check_decay(decay)
    refuse_tangents(q, k, v, decay, beta, state)
    case = registry.linear_attention_case("forward", q, k, v, decay, state, rule=rule)
    forward = registry.kernel("linear_attention", case, q.device).forward
    with full_precision(q):
        o, final = forward(q, k, v, decay, beta, state, rule=rule, scale=scale)
    return exact(o), exact(final)


@_linear_attention.register_fake
def _fake(q, k, v, decay=None, beta=None, state=None, *, rule="gated_delta", scale=None):
    _check_rule(rule, decay, beta)
    wide = torch.float64 if torch.float64 in (q.dtype, k.dtype, v.dtype) else torch.float32
    o = v.new_empty(v.shape, dtype=output_dtype(rule, v))
    return o, q.new_empty(q.shape[0], q.shape[2], q.shape[3], v.shape[3], dtype=wide)


# --- for training ------------------------------------------------------------------------------------------------------------


def _training_module(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, state: Tensor | None, rule: str
) -> ModuleType:
    case = registry.linear_attention_case("forward", q, k, v, decay, state, rule=rule, trains=True)
    return registry.kernel("linear_attention", case, q.device)


@operator(
    "linear_attention_forward",
    f"({_INPUTS}, *, {_OPTIONS}) -> (Tensor o, Tensor state, Tensor[] kept)",
)
def _forward(q, k, v, decay=None, beta=None, state=None, *, rule="gated_delta", scale=None):
    _check_rule(rule, decay, beta)
    _check_decay(decay)
    module = _training_module(q, k, v, decay, state, rule)
    inputs, kept = (q, k, v, decay, beta, state), ()
    with full_precision(q):
        if hasattr(module, "forward_keeping"):
            o, final, kept = module.forward_keeping(*inputs, rule=rule, scale=scale)
        else:
            o, final = module.forward(*inputs, rule=rule, scale=scale)
    return exact(o), exact(final), [exact(x) for x in kept]


@_forward.register_fake
def _(q, k, v, decay=None, beta=None, state=None, *, rule="gated_delta", scale=None):
    o, final = _fake(q, k, v, decay, beta, state, rule=rule, scale=scale)
    module = _training_module(q, k, v, decay, state, rule)
    if not hasattr(module, "forward_keeping"):
        return o, final, []
    return o, final, list(module.kept_like(q, k, v, decay, beta, state, rule=rule, scale=scale))


@operator(
    "linear_attention_backward",
    f"(Tensor grad_o, Tensor? grad_state, Tensor[] kept, {_INPUTS}, *, {_OPTIONS}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward(grad_o, grad_state, kept, q, k, v, decay=None, beta=None, state=None, *, rule="gated_delta", scale=None):
    case = registry.linear_attention_case("backward", q, k, v, decay, state, rule=rule)
    backward = registry.kernel("linear_attention", case, q.device).backward
    with full_precision(q):
        options = {"kept": kept} if kept else {}
        grads = backward(grad_o, grad_state, q, k, v, decay, beta, state, rule=rule, scale=scale, **options)
    return tuple(or_empty(grad, q) for grad in grads)


@_backward.register_fake
def _(grad_o, grad_state, kept, q, k, v, decay=None, beta=None, state=None, *, rule="gated_delta", scale=None):
    return tuple(fake_or_empty(x, q) for x in (q, k, v, decay, beta, state))


# --- autograd ----------------------------------------------------------------------------------------------------------------


def _grads(ctx, grad_o, grad_state):
    q, k, v, decay, beta, state, _, *kept = ctx.saved_tensors
    inputs = (q, k, v, decay, beta, state)
    if grad_o is None:
        grad_o = torch.zeros_like(v)
    grads = torch.ops.hydra.linear_attention_backward.default(grad_o, grad_state, kept, *inputs, **ctx.options)
    return given(grads, inputs)


_linear_attention.register_autograd(_grads, _forward)
lower_under_autocast("linear_attention", 0, 1, 2)

"""The dialect: four pure operators that every region graph is written in, a fifth that decodes one token through several of
them at once, one that counts, and two helpers on heads and tokens.

An operator is `torch.ops.hydra.<name>`: a schema, a fake kernel, an analytic backward that is an operator too
(`hydra::<name>_backward`; decoding and counting have none), and kernels in `hydrasurgery.kernels.<name>`, of which
`kernels.registry` chooses one for each call (counting is plain PyTorch everywhere). Layouts and meanings follow ONNX where ONNX
has the operator. The function of the same name here checks shapes and says what is wrong; graphs call the operator itself.
Inside, arithmetic is fp32 (fp64 for fp64 inputs); autocast has no say in it, except that it lowers the q, k, v of `attention`,
as it does for PyTorch's own attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from hydrasurgery.kernels import registry
from hydrasurgery.kernels.linear_attention.reference import DECAY_RULES, DELTA_RULES

__all__ = [
    "RULES",
    "attention",
    "causal_conv",
    "decode_step",
    "linear_attention",
    "scale_norm_fusion",
    "select_heads",
    "token_flags",
    "token_positions",
]

MASKED = -1.0e4  # what additive masks hold where a token may not attend is this or less, in every dtype
RULES = ("linear", "gated", "delta", "gated_delta")


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
        mask: [B or 1, H or 1, T, S], bool (True = may attend) or float (added to the scores). It is complete: with a mask,
            `causal` and `window` have no effect. No gradient flows into it.
        sinks: [H], one more logit a head in the softmax's denominator.
        scale: of the scores; D ** -0.5 if None.
        causal: without a mask, query i sees the keys up to its own, the last query standing on the last key (S >= T).
        window: without a mask, the number of keys seen, counted back from the query's own and including it.
        softcap: cap of the scores, applied before the mask.

    Returns:
        [B, T, H, Dv], contiguous, in q's dtype. A query that may attend to nothing gives 0 (under an additive mask of finite
        numbers: the mean of v, as in PyTorch) and passes no gradient.

    Raises:
        ValueError: a shape or dtype does not fit; the message names the argument.
    """
    _expect("q", q, (None, None, None, None))
    batch, heads, queries, dim = q.shape
    _expect("k", k, (batch, None, None, dim))
    _expect("v", v, (batch, k.shape[1], k.shape[2], None))
    if heads % k.shape[1]:
        raise ValueError(f"q has {heads} heads and k {k.shape[1]}: the first must be a multiple of the second")
    if not q.dtype == k.dtype == v.dtype and not torch.is_autocast_enabled(q.device.type):
        raise ValueError(f"q, k and v must have one dtype, found {q.dtype}, {k.dtype} and {v.dtype}")
    if mask is not None:
        _expect_mask(mask, (batch, heads, queries, k.shape[2]))
    if sinks is not None:
        _expect("sinks", sinks, (heads,))
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, found {window}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, found {softcap}")
    return torch.ops.hydra.attention.default(
        q, k, v, mask, sinks, scale=scale, causal=causal, window=window, softcap=softcap
    )


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

    Args:
        q: [B, T, H, K].
        k: [B, T, H, K].
        v: [B, T, H, V].
        decay: natural logarithm of the decay, at most 0: [B, T, H], or [B, T, H, K] for one a key channel. For the gated rules.
        beta: [B, T, H], the strength of a write. For the delta rules.
        state: [B, H, K, V] fp32, the state before the first token; zero if None.
        rule: "linear", "gated", "delta" or "gated_delta".
        scale: of the outputs; K ** -0.5 if None.

    Returns:
        o [B, T, H, V] in v's dtype and the state after the last token [B, H, K, V] in fp32 (fp64 if q, k or v is fp64).

    Raises:
        ValueError: an unknown rule, an argument that the rule lacks or does not use, or a shape that does not fit.
    """
    _expect("q", q, (None, None, None, None))
    batch, length, heads, channels = q.shape
    _expect("k", k, (batch, length, heads, channels))
    _expect("v", v, (batch, length, heads, None))
    _check_rule(rule, decay, beta)
    if rule not in DECAY_RULES and decay is not None:
        raise ValueError(f"decay is given, but rule {rule!r} does not use it: leave it out or choose a gated rule")
    if rule not in DELTA_RULES and beta is not None:
        raise ValueError(f"beta is given, but rule {rule!r} does not use it: leave it out or choose a delta rule")
    if decay is not None:
        _expect("decay", decay, (batch, length, heads) if decay.dim() == 3 else (batch, length, heads, channels))
    if beta is not None:
        _expect("beta", beta, (batch, length, heads))
    if state is not None:
        _expect("state", state, (batch, heads, channels, v.shape[-1]))
    return torch.ops.hydra.linear_attention.default(q, k, v, decay, beta, state, rule=rule, scale=scale)


def causal_conv(
    x: Tensor, weight: Tensor, state: Tensor | None = None, reset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution, `y_t = sum_j weight[:, W-1-j] * x_{t-j}`: no bias, no activation.

    Args:
        x: [B, T, C].
        weight: [C, W]; the last column multiplies the current token.
        state: [B, C, W-1], the inputs before x, oldest first; zero if None.
        reset: [B, T] bool, True where a document starts. No tap reaches across a start, into `state` neither.

    Returns:
        y [B, T, C] and the state after x [B, C, W-1], both in x's dtype. The state holds 0 for inputs of a document that has ended.

    Raises:
        ValueError: a shape or dtype does not fit; the message names the argument.
    """
    _expect("x", x, (None, None, None))
    batch, length, channels = x.shape
    _expect("weight", weight, (channels, None))
    if state is not None:
        _expect("state", state, (batch, channels, weight.shape[1] - 1))
    if reset is not None:
        _expect("reset", reset, (batch, length))
        if reset.dtype != torch.bool:
            raise ValueError(f"reset must be bool, found {reset.dtype}")
    return torch.ops.hydra.causal_conv.default(x, weight, state, reset)


def scale_norm_fusion(
    o_full: Tensor | None,
    o_linear: Tensor | None,
    gamma: Tensor,
    gate: Tensor | None = None,
    *,
    linear_heads: Sequence[int],
    norm_full: bool = False,
    eps: float = 1e-6,
) -> Tensor:
    """Put full and linear heads in their own slots, linear ones brought to scale: `gamma_h * RMSNorm(o_h) * gate_h`.

    RMSNorm(o) = o / sqrt(mean(o^2) + eps), over the head's own D numbers.

    Args:
        o_full: [B, T, Hf, D], the full heads in slot order; None if there are none.
        o_linear: [B, T, Hl, D], the linear heads in slot order; None if there are none.
        gamma: [Hl], one scale a linear head; with `norm_full` [Hf + Hl], one a slot.
        gate: [B, T, Hl, D] or [B, T, Hl, 1], multiplied onto the linear heads; 1 if None.
        linear_heads: the slots of the linear heads, ascending. The full heads fill the others.
        norm_full: treat full heads alike (without a gate), instead of passing them through.
        eps: added to the mean square.

    Returns:
        [B, T, Hf + Hl, D], contiguous, in the wider dtype of o_full and o_linear.

    Raises:
        ValueError: a shape or slot does not fit; the message names the argument.
    """
    first = o_full if o_full is not None else o_linear
    if first is None:
        raise ValueError("o_full and o_linear are both None: at least one kind of head is needed")
    _expect("o_full" if o_full is not None else "o_linear", first, (None, None, None, None))
    batch, length, _, dim = first.shape
    full = 0 if o_full is None else o_full.shape[2]
    linear = 0 if o_linear is None else o_linear.shape[2]
    if o_linear is not None:
        _expect("o_linear", o_linear, (batch, length, None, dim))
    slots = list(linear_heads)
    if len(slots) != linear or slots != sorted(set(slots)) or any(not 0 <= s < full + linear for s in slots):
        raise ValueError(
            f"linear_heads must be {linear} ascending slots below {full + linear} (o_linear has {linear} heads), found {slots}"
        )
    _expect("gamma", gamma, (full + linear if norm_full else linear,))
    if gate is not None:
        _expect("gate", gate, (batch, length, linear, 1 if gate.shape[-1:] == (1,) else dim))
    return torch.ops.hydra.scale_norm_fusion.default(
        o_full, o_linear, gamma, gate, linear_heads=slots, norm_full=norm_full, eps=eps
    )


def decode_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor,
    gate: Tensor | None,
    gamma: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    conv_weights: Sequence[Tensor] = (),
    *,
    state: Tensor,
    conv_states: Sequence[Tensor] = (),
    valid: Tensor | None = None,
    reset: Tensor | None = None,
    scale: float | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """One token through a layer's linear heads (rule gated_delta), from short convolution to output gate; inference only.

    q, k, v <- x + causal_conv(x); q, k <- L2-normalised; o, S <- the recurrence of `linear_attention`;
    out = gamma RMSNorm(o) 2 sigmoid(gate). With `A_log` the gates are computed here:
    decay <- -exp(A_log) softplus(decay + dt_bias) and beta <- sigmoid(beta).

    Args:
        q: [B, H, K].
        k: [B, H, K].
        v: [B, H, V].
        decay: [B, H], the log decay, or with `A_log` its pre-activation.
        beta: [B, H], the write strength, or with `A_log` its pre-activation.
        gate: [B, H], the output gate's pre-activation; no gate if None.
        gamma: [H], the scale of the normalised outputs.
        A_log: [H], together with `dt_bias` or not at all.
        dt_bias: [H].
        conv_weights: of q [H * K, W], k [H * K, W] and v [H * V, W]; empty: no convolution.
        state: [B, H, K, V] fp32, contiguous, **updated in place**.
        conv_states: of q, k and v, [B, H * K or H * V, W - 1] each, contiguous, **updated in place**.
        valid: [B] bool, of `token_flags`: a token that is padding enters the convolutions as 0 and leaves `state` as it was.
        reset: [B] bool, likewise: a document's first token finds all states 0. Together with `valid` or not at all.
        scale: of the outputs before their norm; K ** -0.5 if None.
        eps: added to the mean square of the outputs.

    Returns:
        [B, H, V] in v's dtype.

    Raises:
        ValueError: a shape, dtype or stride does not fit; the message names the argument.
    """
    _expect("q", q, (None, None, None))
    batch, heads, channels = q.shape
    _expect("k", k, (batch, heads, channels))
    _expect("v", v, (batch, heads, None))
    for name, x in (("decay", decay), ("beta", beta), ("gate", gate)):
        if x is not None:
            _expect(name, x, (batch, heads))
    for name, x in (("gamma", gamma), ("A_log", A_log), ("dt_bias", dt_bias)):
        if x is not None:
            _expect(name, x, (heads,))
    for name, x in (("valid", valid), ("reset", reset)):
        if x is not None:
            _expect(name, x, (batch,))
            if x.dtype != torch.bool:
                raise ValueError(f"{name} must be bool, found {x.dtype}")
    if (A_log is None) != (dt_bias is None):
        raise ValueError("A_log and dt_bias belong together: give both or neither")
    if (valid is None) != (reset is None):
        raise ValueError("valid and reset belong together: give both or neither")
    _expect("state", state, (batch, heads, channels, v.shape[-1]))
    if len(conv_weights) not in (0, 3) or len(conv_states) != len(conv_weights):
        raise ValueError(
            "conv_weights and conv_states must be those of q, k and v, or empty, "
            f"found {len(conv_weights)} and {len(conv_states)}"
        )
    for weight, past, x in zip(conv_weights, conv_states, (q, k, v), strict=False):
        _expect("conv_weights", weight, (heads * x.shape[-1], conv_weights[0].shape[1]))
        _expect("conv_states", past, (batch, heads * x.shape[-1], conv_weights[0].shape[1] - 1))
    if not all(x.is_contiguous() for x in (state, *conv_states)):
        raise ValueError("state and conv_states must be contiguous: they are updated in place")
    return torch.ops.hydra.decode_step.default(
        q,
        k,
        v,
        decay,
        beta,
        gate,
        gamma,
        A_log,
        dt_bias,
        list(conv_weights),
        state,
        list(conv_states),
        valid,
        reset,
        scale=scale,
        eps=eps,
    )


def select_heads(x: Tensor, heads: tuple[int, ...], dim: int) -> Tensor:
    """The slices `heads` of x along `dim`, in that order, a head any number of times: (0, 0, 1, 1) repeats each of two.

    Built of slices and not by an index tensor, so that a graph holds no constant and exports as it is. All heads in order are x
    itself, and consecutive heads a view of it.

    Raises:
        ValueError: no head is named, or one that x does not have.
    """
    dim %= x.dim()
    size = x.shape[dim]
    if not heads or min(heads) < 0 or max(heads) >= size:
        raise ValueError(f"heads must name at least one of the {size} along dimension {dim}, found {tuple(heads)}")
    if tuple(heads) == tuple(range(size)):
        return x
    times = heads.count(heads[0])
    once = tuple(heads[::times])
    if times > 1 and tuple(heads) == tuple(h for h in once for _ in range(times)):  # each KV head for its query heads
        own = select_heads(x, once, dim).unsqueeze(dim + 1)
        repeated = own.expand(*own.shape[: dim + 1], times, *own.shape[dim + 2 :])
        # Cloned, not left to flatten: an exported graph would exclude a length of 1.
        return repeated.clone(memory_format=torch.contiguous_format).flatten(dim, dim + 1)
    parts, first = [], 0
    for last in range(1, len(heads) + 1):
        if last == len(heads) or heads[last] != heads[last - 1] + 1:
            parts.append(x.narrow(dim, heads[first], last - first))
            first = last
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)


def token_flags(
    mask: Tensor | None, hidden_states: Tensor, first_key: Tensor | int | None = None
) -> tuple[Tensor, Tensor]:
    """What a complete attention mask says of each token: is it one (not padding), and does a document start with it?

    Token t is key `first_key + t`. `valid[t]`: t may attend to itself.
    `reset[t]`: t is valid and may not attend to the key before it (False if there is none). The mask's first head is read.

    Args:
        mask: [B or 1, H or 1, T, S], bool (True = may attend) or float (-1e4 or less = may not), or None.
        hidden_states: [B, T, ...]; only its shape and device are used.
        first_key: which of the S keys the first token is, a number or a tensor [1] or []; S - T if None.

    Returns:
        (valid [B, T], reset [B, T]), bool; all True and all False without a mask.
    """
    batch, length = hidden_states.shape[:2]
    if mask is None:
        flags = hidden_states.new_ones((batch, length), dtype=torch.bool)
        return flags, ~flags
    first = mask[:, 0]
    start = first.shape[2] - first.shape[1] if first_key is None else first_key
    own = torch.arange(first.shape[1], device=mask.device) + start
    # Gathered and not sliced along a diagonal: that would need slices of T - 1, and an exported graph would exclude T = 2.
    columns = (own, (own - 1).clamp(min=0))
    valid, follows = (_may_attend(first.gather(2, c[:, None].expand(first.shape[0], -1, 1)))[..., 0] for c in columns)
    reset = valid & ~follows & (own > 0)
    return valid.expand(batch, length), reset.expand(batch, length)


def token_positions(valid: Tensor, reset: Tensor, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Each token's place in its document, padding not counted: `p_t = n_t - 1`, n_t its tokens up to and with t.

    Not the model's position ids: those of a batch that is padded on the left may count the padding.

    Args:
        valid, reset: [B, T], of `token_flags`.
        seen: [B] int64, tokens of the last document before the first token here; 0 if None.

    Returns:
        positions [B, T] int64 (of padding, its predecessor's, at least 0) and `seen` after the last token [B] int64.

    Raises:
        ValueError: a shape does not fit; the message names the argument.
    """
    _expect("valid", valid, (None, None))
    _expect("reset", reset, tuple(valid.shape))
    if seen is not None:
        _expect("seen", seen, (valid.shape[0],))
    return torch.ops.hydra.token_positions.default(valid, reset, seen)


def _may_attend(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask > MASKED


def _expect(name: str, x: Tensor, shape: tuple[int | None, ...]) -> None:
    """Raise unless x has this shape; None is any size."""
    if x.dim() != len(shape) or any(
        want is not None and have != want for have, want in zip(x.shape, shape, strict=True)
    ):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have shape [{wanted}], found {list(x.shape)}")


def _expect_mask(mask: Tensor, shape: tuple[int, int, int, int]) -> None:
    batch, heads, queries, keys = shape
    fits = mask.dim() == 4 and mask.shape[0] in (1, batch) and mask.shape[1] in (1, heads)
    if not fits or tuple(mask.shape[2:]) != (queries, keys):
        raise ValueError(
            f"mask must have shape [{batch} or 1, {heads} or 1, {queries}, {keys}], found {list(mask.shape)}"
        )
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(f"mask must be bool (True = may attend) or float (added to the scores), found {mask.dtype}")
    if mask.requires_grad:
        raise ValueError("mask requires a gradient, and attention gives it none: detach it")


def _check_rule(rule: str, decay: Tensor | None, beta: Tensor | None) -> None:
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, found {rule!r}")
    if rule in DECAY_RULES and decay is None:
        raise ValueError(f"decay is missing: rule {rule!r} needs it, [B, T, H] or [B, T, H, K]")
    if rule in DELTA_RULES and beta is None:
        raise ValueError(f"beta is missing: rule {rule!r} needs it, [B, T, H]")


def _exact(x: Tensor) -> Tensor:
    """x as its fake kernel promised it: dense, dimensions of size 1 included, and no slice that keeps a larger tensor alive."""
    flat = x.contiguous().reshape(-1)
    return (flat if flat.untyped_storage().nbytes() == flat.nbytes else flat.clone()).view(x.shape)


def _or_empty(x: Tensor | None, like: Tensor) -> Tensor:
    """Operators cannot return None: the gradient of an absent input is an empty tensor, dropped by the caller."""
    return like.new_empty(0) if x is None else _exact(x)


def _fake_or_empty(x: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if x is None else _fake(x)


def _fake(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@contextmanager
def _full_precision(x: Tensor) -> Iterator[None]:
    """For kernels: on x's device, and dtypes are those of the arguments."""
    lowered = torch.is_autocast_enabled(x.device.type)  # Leaving what was not entered takes longer than looking.
    with torch.autocast(x.device.type, enabled=False) if lowered else nullcontext(), torch.cuda.device_of(x):
        yield


def _save(ctx: Any, inputs: tuple[Tensor | None, ...], options: dict[str, Any]) -> None:
    ctx.save_for_backward(*inputs)
    ctx.options = options


def _given(grads: Sequence[Tensor], inputs: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    return tuple(None if x is None else grad for grad, x in zip(grads, inputs, strict=True))


# --- attention ---------------------------------------------------------------------------------------------------------------

_ATTENTION_OPTIONS = "float? scale=None, bool causal=True, int? window=None, float? softcap=None"


@torch.library.custom_op(
    "hydra::attention",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, Tensor? mask=None, Tensor? sinks=None, *, {_ATTENTION_OPTIONS}) -> Tensor",
)
def _attention(q, k, v, mask=None, sinks=None, *, scale=None, causal=True, window=None, softcap=None):
    options = {"causal": causal, "window": window, "softcap": softcap}
    case = registry.attention_case("forward", q, k, v, mask, sinks, **options)
    with _full_precision(q):
        out = registry.kernel("attention", case, q.device).forward(q, k, v, mask, sinks, scale=scale, **options)
    return _exact(out)


@_attention.register_fake
def _(q, k, v, mask=None, sinks=None, *, scale=None, causal=True, window=None, softcap=None):
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


@torch.library.custom_op(
    "hydra::attention_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? mask=None, Tensor? sinks=None, *, "
    f"{_ATTENTION_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _attention_backward(grad, q, k, v, mask=None, sinks=None, *, scale=None, causal=True, window=None, softcap=None):
    options = {"causal": causal, "window": window, "softcap": softcap}
    case = registry.attention_case("backward", q, k, v, mask, sinks, **options)
    backward = registry.kernel("attention", case, q.device).backward
    with _full_precision(q):
        dq, dk, dv, dsinks = backward(grad, q, k, v, mask, sinks, scale=scale, **options)
    return _exact(dq), _exact(dk), _exact(dv), _or_empty(dsinks, q)


@_attention_backward.register_fake
def _(grad, q, k, v, mask=None, sinks=None, *, scale=None, causal=True, window=None, softcap=None):
    return _fake(q), _fake(k), _fake(v), _fake_or_empty(sinks, q)


def _attention_setup(ctx, inputs, keyword_only_inputs, output):
    _save(ctx, inputs, keyword_only_inputs)


def _attention_grads(ctx, grad):
    q, k, v, mask, sinks = ctx.saved_tensors
    dq, dk, dv, dsinks = torch.ops.hydra.attention_backward.default(grad, q, k, v, mask, sinks, **ctx.options)
    return dq, dk, dv, None, None if sinks is None else dsinks


_attention.register_autograd(_attention_grads, setup_context=_attention_setup)


# --- linear attention --------------------------------------------------------------------------------------------------------

_LINEAR_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? decay=None, Tensor? beta=None, Tensor? state=None"
_LINEAR_OPTIONS = 'str rule="gated_delta", float? scale=None'


@torch.library.custom_op(
    "hydra::linear_attention",
    mutates_args=(),
    schema=f"({_LINEAR_INPUTS}, *, {_LINEAR_OPTIONS}) -> (Tensor o, Tensor state)",
)
def _linear_attention(q, k, v, decay=None, beta=None, state=None, *, rule="gated_delta", scale=None):
    _check_rule(rule, decay, beta)
    inputs = (q, k, v, decay, beta, state)
    trains = any(x is not None and x.requires_grad for x in inputs)
    case = registry.linear_attention_case("forward", q, k, v, decay, state, rule=rule, trains=trains)
    module = registry.kernel("linear_attention", case, q.device)
    forward = getattr(module, "forward_keeping", module.forward) if trains else module.forward
    with _full_precision(q):
        o, final, *kept = forward(*inputs, rule=rule, scale=scale)
    o = _exact(o)
    if kept:
        o.kept = kept[0]  # for `_linear_attention_setup`
    return o, _exact(final)


@_linear_attention.register_fake
def _(q, k, v, decay=None, beta=None, state=None, *, rule="gated_delta", scale=None):
    _check_rule(rule, decay, beta)
    wide = torch.float64 if torch.float64 in (q.dtype, k.dtype, v.dtype) else torch.float32
    return _fake(v), q.new_empty(q.shape[0], q.shape[2], q.shape[3], v.shape[3], dtype=wide)


@torch.library.custom_op(
    "hydra::linear_attention_backward",
    mutates_args=(),
    schema=f"(Tensor grad_o, Tensor? grad_state, Tensor[] kept, {_LINEAR_INPUTS}, *, {_LINEAR_OPTIONS}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _linear_attention_backward(
    grad_o, grad_state, kept, q, k, v, decay=None, beta=None, state=None, *, rule="gated_delta", scale=None
):
    case = registry.linear_attention_case("backward", q, k, v, decay, state, rule=rule)
    backward = registry.kernel("linear_attention", case, q.device).backward
    with _full_precision(q):
        options = {"kept": kept} if kept else {}
        grads = backward(grad_o, grad_state, q, k, v, decay, beta, state, rule=rule, scale=scale, **options)
    return tuple(_or_empty(grad, q) for grad in grads)


@_linear_attention_backward.register_fake
def _(grad_o, grad_state, kept, q, k, v, decay=None, beta=None, state=None, *, rule="gated_delta", scale=None):
    return tuple(_fake_or_empty(x, q) for x in (q, k, v, decay, beta, state))


def _linear_attention_setup(ctx, inputs, keyword_only_inputs, output):
    # An operator returns what is known beforehand. What a forward finds out on the way, and its backward can use, comes with its
    # output object; no graph has it, and under a dispatch mode (selective checkpoints) an output may be another call's.
    kept = vars(output[0]).pop("kept", ())
    _save(ctx, (*inputs, *(() if torch._C._len_torch_dispatch_stack() else kept)), keyword_only_inputs)
    ctx.set_materialize_grads(False)  # Nobody needs the last state's gradient in training: kernels do without it.


def _linear_attention_grads(ctx, grad_o, grad_state):
    q, k, v, decay, beta, state, *kept = ctx.saved_tensors
    inputs = (q, k, v, decay, beta, state)
    if grad_o is None:
        grad_o = torch.zeros_like(v)
    grads = torch.ops.hydra.linear_attention_backward.default(grad_o, grad_state, kept, *inputs, **ctx.options)
    return _given(grads, inputs)


_linear_attention.register_autograd(_linear_attention_grads, setup_context=_linear_attention_setup)


# --- causal convolution ------------------------------------------------------------------------------------------------------

_CONV_INPUTS = "Tensor x, Tensor weight, Tensor? state=None, Tensor? reset=None"


@torch.library.custom_op("hydra::causal_conv", mutates_args=(), schema=f"({_CONV_INPUTS}) -> (Tensor y, Tensor state)")
def _causal_conv(x, weight, state=None, reset=None):
    case = registry.causal_conv_case("forward", x, weight, state, reset)
    with _full_precision(x):
        y, tail = registry.kernel("causal_conv", case, x.device).forward(x, weight, state, reset)
    return _exact(y), _exact(tail)


@_causal_conv.register_fake
def _(x, weight, state=None, reset=None):
    return _fake(x), x.new_empty(x.shape[0], x.shape[2], weight.shape[1] - 1)


@torch.library.custom_op(
    "hydra::causal_conv_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor grad_state, {_CONV_INPUTS}) -> (Tensor, Tensor, Tensor)",
)
def _causal_conv_backward(grad, grad_state, x, weight, state=None, reset=None):
    case = registry.causal_conv_case("backward", x, weight, state, reset)
    with _full_precision(x):
        grads = registry.kernel("causal_conv", case, x.device).backward(grad, grad_state, x, weight, state, reset)
    return tuple(_or_empty(part, x) for part in grads)


@_causal_conv_backward.register_fake
def _(grad, grad_state, x, weight, state=None, reset=None):
    return _fake(x), _fake(weight), _fake_or_empty(state, x)


def _causal_conv_setup(ctx, inputs, output):
    _save(ctx, inputs, {})


def _causal_conv_grads(ctx, grad, grad_state):
    inputs = ctx.saved_tensors
    grads = torch.ops.hydra.causal_conv_backward.default(grad, grad_state, *inputs)
    return (*_given(grads, inputs[:3]), None)


_causal_conv.register_autograd(_causal_conv_grads, setup_context=_causal_conv_setup)


# --- scale-normalised fusion -------------------------------------------------------------------------------------------------

_FUSION_INPUTS = "Tensor? o_full, Tensor? o_linear, Tensor gamma, Tensor? gate=None"
_FUSION_OPTIONS = "int[] linear_heads, bool norm_full=False, float eps=1e-6"


@torch.library.custom_op(
    "hydra::scale_norm_fusion", mutates_args=(), schema=f"({_FUSION_INPUTS}, *, {_FUSION_OPTIONS}) -> Tensor"
)
def _scale_norm_fusion(o_full, o_linear, gamma, gate=None, *, linear_heads, norm_full=False, eps=1e-6):
    case = registry.scale_norm_fusion_case("forward", o_full, o_linear)
    forward = registry.kernel("scale_norm_fusion", case, gamma.device).forward
    with _full_precision(gamma):
        return forward(o_full, o_linear, gamma, gate, linear_heads=linear_heads, norm_full=norm_full, eps=eps)


@_scale_norm_fusion.register_fake
def _(o_full, o_linear, gamma, gate=None, *, linear_heads, norm_full=False, eps=1e-6):
    given = [o for o in (o_full, o_linear) if o is not None]
    batch, length, _, dim = given[0].shape
    dtype = torch.promote_types(given[0].dtype, given[-1].dtype)
    return given[0].new_empty(batch, length, sum(o.shape[2] for o in given), dim, dtype=dtype)


@torch.library.custom_op(
    "hydra::scale_norm_fusion_backward",
    mutates_args=(),
    schema=f"(Tensor grad, {_FUSION_INPUTS}, *, {_FUSION_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _scale_norm_fusion_backward(grad, o_full, o_linear, gamma, gate=None, *, linear_heads, norm_full=False, eps=1e-6):
    case = registry.scale_norm_fusion_case("backward", o_full, o_linear)
    backward = registry.kernel("scale_norm_fusion", case, gamma.device).backward
    with _full_precision(gamma):
        grads = backward(grad, o_full, o_linear, gamma, gate, linear_heads=linear_heads, norm_full=norm_full, eps=eps)
    return tuple(_or_empty(part, grad) for part in grads)


@_scale_norm_fusion_backward.register_fake
def _(grad, o_full, o_linear, gamma, gate=None, *, linear_heads, norm_full=False, eps=1e-6):
    return tuple(_fake_or_empty(x, grad) for x in (o_full, o_linear, gamma, gate))


def _scale_norm_fusion_setup(ctx, inputs, keyword_only_inputs, output):
    _save(ctx, inputs, keyword_only_inputs)


def _scale_norm_fusion_grads(ctx, grad):
    inputs = ctx.saved_tensors
    grads = torch.ops.hydra.scale_norm_fusion_backward.default(grad, *inputs, **ctx.options)
    return _given(grads, inputs)


_scale_norm_fusion.register_autograd(_scale_norm_fusion_grads, setup_context=_scale_norm_fusion_setup)


# --- decoding ----------------------------------------------------------------------------------------------------------------


@torch.library.custom_op(
    "hydra::decode_step",
    mutates_args=("state", "conv_states"),
    schema="(Tensor q, Tensor k, Tensor v, Tensor decay, Tensor beta, Tensor? gate, Tensor gamma, Tensor? A_log, Tensor? dt_bias, "
    "Tensor[] conv_weights, Tensor(a!) state, Tensor(b!)[] conv_states, Tensor? valid=None, Tensor? reset=None, *, "
    "float? scale=None, float eps=1e-6) -> Tensor",
)
def _decode_step(
    q, k, v, decay, beta, gate, gamma, A_log, dt_bias, conv_weights, state, conv_states, valid=None, reset=None,
    *, scale=None, eps=1e-6,
):  # fmt: skip
    case = registry.decode_step_case(q, v, conv_weights[0].shape[1] if conv_weights else 0)
    forward = registry.kernel("decode_step", case, q.device).forward
    inputs = (q, k, v, decay, beta, gate, gamma, A_log, dt_bias, conv_weights, state, conv_states, valid, reset)
    with _full_precision(q):
        return _exact(forward(*inputs, scale=scale, eps=eps))


@_decode_step.register_fake
def _(
    q, k, v, decay, beta, gate, gamma, A_log, dt_bias, conv_weights, state, conv_states, valid=None, reset=None,
    *, scale=None, eps=1e-6,
):  # fmt: skip
    return _fake(v)


# --- counting ----------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("hydra::token_positions", mutates_args=())
def _token_positions(valid: Tensor, reset: Tensor, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
    count = valid.long().cumsum(1)
    if seen is not None:
        count = count + seen[:, None]
    if count.shape[1] == 0:
        return count, count.new_zeros(count.shape[0]) if seen is None else seen.clone()
    # What was counted before a document's first token is taken off again, until another one begins.
    before = torch.where(reset, count - 1, 0).cummax(1).values
    inside = count - before
    return (inside - 1).clamp_(min=0), inside[:, -1].clone()


@_token_positions.register_fake
def _(valid, reset, seen=None):
    return valid.new_empty(valid.shape, dtype=torch.int64), valid.new_empty(valid.shape[:1], dtype=torch.int64)


# --- autocast ----------------------------------------------------------------------------------------------------------------


def _lowered_attention(device_type: str) -> Any:
    def call(q, k, v, mask=None, sinks=None, **options):
        dtype = torch.get_autocast_dtype(device_type)
        if torch.float64 not in (q.dtype, k.dtype, v.dtype):
            q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        with torch.autocast(device_type, enabled=False):
            return torch.ops.hydra.attention.default(q, k, v, mask, sinks, **options)

    return call


# A dispatch rule and not a cast in the kernel: tracing then records the casts, and the fake kernel sees the dtypes of the real one.
_AUTOCAST = torch.library.Library("hydra", "FRAGMENT")
for _device, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
    _AUTOCAST.impl("attention", _lowered_attention(_device), _key)

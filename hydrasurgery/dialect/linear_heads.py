"""`hydra::linear_heads`: all that follows the projections of a layer's linear heads, in one operator, as GPUs run it.

It has no kernel of its own: it runs those of its parts one after the other and keeps what their backward needs, so that a layer has
one node in autograd's graph where its region has thirty.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hydrasurgery.dialect.checks import exact, fake, full_precision, given, lower_under_autocast, refuse_tangents
from hydrasurgery.dialect.operators import operator
from hydrasurgery.kernels import registry
from hydrasurgery.kernels.head_inputs.reference import unstacked

GROUP = 8  # rows of a weight, which matrix units want a multiple of
RULE = "gated_delta"


class Inputs(NamedTuple):
    """What the operator reads, in the order of its schema; the fields up to `state` have gradients."""

    hidden: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    o_full: Tensor | None
    decay_weight: Tensor
    A_log: Tensor
    dt_bias: Tensor
    beta_weight: Tensor
    beta_bias: Tensor
    gate_weight: Tensor | None
    gamma: Tensor
    q_conv: Tensor | None = None
    k_conv: Tensor | None = None
    v_conv: Tensor | None = None
    q_past: Tensor | None = None
    k_past: Tensor | None = None
    v_past: Tensor | None = None
    state: Tensor | None = None
    valid: Tensor | None = None
    reset: Tensor | None = None
    previous: Tensor | None = None
    cos: Tensor | None = None
    sin: Tensor | None = None

    @property
    def convs(self) -> list[Tensor]:
        return [weight for weight in (self.q_conv, self.k_conv, self.v_conv) if weight is not None]

    @property
    def inputs(self) -> tuple[Any, ...]:
        """As `head_inputs` kernels take them."""
        pasts = (self.q_past, self.k_past, self.v_past)
        return (self.q, self.k, self.v), self.convs, pasts, self.reset, self.previous, self.cos, self.sin

    @property
    def gates(self) -> tuple[Any, ...]:
        """As `head_gates` kernels take them."""
        return self.A_log, self.dt_bias, self.beta_bias, self.valid, self.reset

    def weight(self, low: bool) -> Tensor:
        """The gates' weights in one [N, C], filled up with rows that nobody reads; in the dtype of hidden if `low`."""
        weights = [weight for weight in (self.decay_weight, self.beta_weight, self.gate_weight) if weight is not None]
        spare = -sum(map(len, weights)) % GROUP
        weight = torch.cat([*weights, *[weights[0][:1]] * spare])
        return weight.to(self.hidden.dtype) if low else weight

    def kernel(self, part: str, mode: str, like: Tensor) -> Any:
        """The kernels of a part, chosen by `like`: what the gates' projection gave, q, or what the recurrence gave."""
        if part == "head_gates":
            case = registry.head_gates_case(mode, like, len(self.A_log))
        elif part == "head_inputs":
            width = 0 if self.q_conv is None else self.q_conv.shape[1]
            case = registry.head_inputs_case(mode, like, self.v, width)
        else:
            case = registry.scale_norm_fusion_case(mode, self.o_full, like)
        return registry.kernel(part, case, self.hidden.device)


GRADIENTS = Inputs._fields.index("state") + 1


class Kept(NamedTuple):
    """What the forward leaves for the backward."""

    raw: Tensor
    decay: Tensor
    beta: Tensor
    gate: Tensor | None
    stacks: list[Tensor]
    o: Tensor
    recurrence: list[Tensor]

    def listed(self) -> list[Tensor]:
        gate = [] if self.gate is None else [self.gate]
        return [self.raw, self.decay, self.beta, *gate, *self.stacks, self.o, *self.recurrence]

    @classmethod
    def of(cls, found: Sequence[Tensor], x: Inputs) -> Kept:
        raw, decay, beta, *rest = found
        gate = None if x.gate_weight is None else rest.pop(0)
        count = len(_widths(x))
        return cls(raw, decay, beta, gate, rest[:count], rest[count], rest[count + 1 :])


def _widths(x: Inputs) -> list[tuple[int, Tensor]]:
    """How many of q, k and v a stack holds, and one of them."""
    return [(3, x.q)] if x.q.shape[-1] == x.v.shape[-1] else [(2, x.q), (1, x.v)]


_NAMES = ", ".join(
    f"Tensor{'?' if 'None' in str(Inputs.__annotations__[name]) else ''} {name}{'=None' if name in Inputs._field_defaults else ''}"
    for name in Inputs._fields
)
_OPTIONS = "int[] slots, float? scale=None, float eps=1e-6, str turn='half', bool low=False"
_RESULTS = "Tensor out, Tensor state_after, Tensor tails, Tensor value_tails"


@operator("linear_heads", f"({_NAMES}, *, {_OPTIONS}) -> ({_RESULTS})")
def _linear_heads(*inputs, slots, scale=None, eps=1e-6, turn="half", low=False):
    """Gates, short convolution, rotary embedding, norm, recurrence of rule gated_delta and fusion with the full heads.

    hidden [B, T, C]; q, k, v [B, H, T, K or V] as projected; o_full [B, T, Hf, V]; weights of the gates [H, C], of the convolutions
    [H * K or V, W]; pasts and states as in `causal_conv` and `linear_attention`; the rest as in `decode_step`, over T tokens.

    Returns the heads in their slots [B, T, H + Hf, V], the state, and the convolutions' states as `head_inputs` kernels stack them
    (empty where there are none).
    """
    refuse_tangents(*inputs)
    return tuple(exact(part) for part in _forward(Inputs(*inputs), slots, scale, eps, turn, low, keep=False)[0])


@operator("linear_heads_forward", f"({_NAMES}, *, {_OPTIONS}) -> ({_RESULTS}, Tensor[] kept)")
def _training(*inputs, slots, scale=None, eps=1e-6, turn="half", low=False):
    refuse_tangents(*inputs)
    results, kept = _forward(Inputs(*inputs), slots, scale, eps, turn, low, keep=True)
    return *(exact(part) for part in results), [exact(part) for part in kept.listed()]


def _forward(
    x: Inputs, slots: Sequence[int], scale: float | None, eps: float, turn: str, low: bool, *, keep: bool
) -> tuple[tuple[Tensor, ...], Kept]:
    with full_precision(x.hidden):
        weight = x.weight(low)
        raw = F.linear(x.hidden.to(weight.dtype), weight)
        gated = x.gate_weight is not None
        decay, beta, gate = x.kernel("head_gates", "forward", raw).forward(raw, *x.gates, gated=gated)
        stacks, tails = x.kernel("head_inputs", "forward", x.q).forward(*x.inputs, turn=turn)
        q, k, v = unstacked(stacks)
        module = _recurrence("forward", q, k, v, decay, x.state, trains=keep)
        options = {"rule": RULE, "scale": scale}
        kept: Sequence[Tensor] = ()
        if keep and hasattr(module, "forward_keeping"):
            o, after, kept = module.forward_keeping(q, k, v, decay, beta, x.state, **options)
        else:
            o, after = module.forward(q, k, v, decay, beta, x.state, **options)
        fusion = x.kernel("scale_norm_fusion", "forward", o)
        out = fusion.forward(x.o_full, o, x.gamma, gate, linear_heads=slots, norm_full=False, eps=eps)
    ends = [*tails, *[x.hidden.new_empty(0)] * (2 - len(tails))]
    return (out, after, *ends), Kept(raw, decay, beta, gate, stacks, o, list(kept))


def _recurrence(
    mode: str, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor | None, **options: bool
) -> Any:
    case = registry.linear_attention_case(mode, q, k, v, decay, state, rule=RULE, **options)
    return registry.kernel("linear_attention", case, q.device)


@_linear_heads.register_fake
def _(*inputs, slots, scale=None, eps=1e-6, turn="half", low=False):
    return _fake(Inputs(*inputs))


@_training.register_fake
def _(*inputs, slots, scale=None, eps=1e-6, turn="half", low=False):
    x = Inputs(*inputs)
    (batch, length, _), heads = x.hidden.shape, len(x.A_log)
    gated = x.gate_weight is not None
    rows = heads * (3 if gated else 2)
    raw = x.hidden.new_empty(batch, length, rows + -rows % GROUP, dtype=x.hidden.dtype if low else x.decay_weight.dtype)
    wide = torch.promote_types(raw.dtype, torch.float32)
    decay, beta = (raw.new_empty(batch, length, heads, dtype=wide) for _ in range(2))
    gate = raw.new_empty(batch, length, heads, 1) if gated else None
    stacks = [like.new_empty(count, batch, length, heads, like.shape[-1]) for count, like in _widths(x)]
    q, k, v = unstacked(stacks)
    module = _recurrence("forward", q, k, v, decay, x.state, trains=True)
    kept = []
    if hasattr(module, "forward_keeping"):
        kept = list(module.kept_like(q, k, v, decay, beta, x.state, rule=RULE, scale=scale))
    return *_fake(x), Kept(raw, decay, beta, gate, stacks, v.new_empty(v.shape), kept).listed()


def _fake(x: Inputs) -> tuple[Tensor, ...]:
    batch, heads, length, keys = x.q.shape
    values = x.v.shape[-1]
    full = 0 if x.o_full is None else x.o_full.shape[2]
    dtype = x.v.dtype if x.o_full is None else torch.promote_types(x.v.dtype, x.o_full.dtype)
    out = x.v.new_empty(batch, length, heads + full, values, dtype=dtype)
    wide = torch.float64 if torch.float64 in (x.q.dtype, x.k.dtype, x.v.dtype) else torch.float32
    state = x.q.new_empty(batch, heads, keys, values, dtype=wide)
    ends = []
    if x.q_conv is not None:
        past = x.q_conv.shape[1] - 1
        ends = [like.new_empty(count, batch, heads * like.shape[-1], past) for count, like in _widths(x)]
    return out, state, *ends, *(x.hidden.new_empty(0) for _ in range(2 - len(ends)))


# What the backward gives: gradients of hidden, of q, k, v and o_full as [B, T, H, D], of the gates' weights in one, of A_log,
# dt_bias and beta_bias in one, of gamma, of the convolutions' weights as they are stacked (two), their pasts (three), the state.
_GRADIENTS = ", ".join(["Tensor"] * 14)


@operator(
    "linear_heads_backward",
    f"(Tensor? grad, Tensor? grad_state, Tensor? grad_tails, Tensor? grad_value_tails, Tensor[] kept, {_NAMES}, *, {_OPTIONS}, "
    f"bool[] wanted) -> ({_GRADIENTS})",
)
def _backward(
    grad, grad_state, grad_tails, grad_value_tails, kept, *inputs,
    slots, scale=None, eps=1e-6, turn="half", low=False, wanted,
):  # fmt: skip
    x = Inputs(*inputs)
    found = Kept.of(kept, x)
    with full_precision(x.hidden):
        if grad is None:
            grad = _fake(x)[0].zero_()
        fusion = x.kernel("scale_norm_fusion", "backward", found.o)
        fused = (x.o_full, found.o, x.gamma, found.gate)
        do_full, do, dgamma, dgate = fusion.backward(grad, *fused, linear_heads=slots, norm_full=False, eps=eps)
        q, k, v = unstacked(found.stacks)
        module = _recurrence("backward", q, k, v, found.decay, x.state)
        options: dict[str, Any] = {"rule": RULE, "scale": scale}
        options |= {"kept": found.recurrence} if found.recurrence else {}
        recurrence = (q, k, v, found.decay, found.beta, x.state)
        dq, dk, dv, ddecay, dbeta, dstate = module.backward(do, grad_state, *recurrence, **options)
        inputs_of = x.kernel("head_inputs", "backward", x.q)
        tails = _tails(x, (grad_tails, grad_value_tails))
        dheads, dconvs, dpasts = inputs_of.backward([dq, dk, dv], tails, *x.inputs, turn=turn)
        gates = x.kernel("head_gates", "backward", found.raw)
        draw, sums = gates.backward(ddecay, dbeta, dgate, found.raw, *x.gates)
        dhidden, dweight = _project_back(x, draw, low, wanted[0])
    ordered = [
        dhidden,
        *(head if want else None for head, want in zip(dheads, wanted[1:4], strict=True)),
        *(do_full, dweight, sums, dgamma),
        *(dconvs + [None] * (2 - len(dconvs))),
        *(dpasts or [None] * 3),
        dstate,
    ]
    return tuple(x.hidden.new_empty(0) if part is None else exact(part) for part in ordered)


@_backward.register_fake
def _(
    grad, grad_state, grad_tails, grad_value_tails, kept, *inputs,
    slots, scale=None, eps=1e-6, turn="half", low=False, wanted,
):  # fmt: skip
    x = Inputs(*inputs)
    raw = kept[0]
    (batch, length, channels), heads = x.hidden.shape, len(x.A_log)
    convs: list[Tensor | None] = [None, None]
    if x.q_conv is not None:
        shapes = [(count, heads * like.shape[-1], x.q_conv.shape[1]) for count, like in _widths(x)]
        convs = [x.q_conv.new_empty(shape, dtype=_wide(x.hidden)) for shape in shapes]
        convs += [None] * (2 - len(convs))
    pasts = [None if past is None or x.q_conv is None else fake(past) for past in (x.q_past, x.k_past, x.v_past)]
    ordered = [
        fake(x.hidden) if wanted[0] else None,
        *(
            head.new_empty(batch, length, heads, head.shape[-1]) if want else None
            for head, want in zip((x.q, x.k, x.v), wanted[1:4], strict=True)
        ),
        None if x.o_full is None else fake(x.o_full),
        x.hidden.new_empty(raw.shape[-1], channels, dtype=x.decay_weight.dtype),
        raw.new_empty(3, heads, dtype=_wide(raw)),
        fake(x.gamma),
        *convs,
        *pasts,
        None if x.state is None else fake(x.state),
    ]
    return tuple(x.hidden.new_empty(0) if part is None else part for part in ordered)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _tails(x: Inputs, grads: Sequence[Tensor | None]) -> list[Tensor] | None:
    """Gradients of the convolutions' last states; None if nobody asks for them."""
    if not x.convs or all(grad is None for grad in grads):
        return None
    likes = _fake(x)[2:][: len(_widths(x))]
    return [like.zero_() if grad is None else grad for grad, like in zip(grads, likes, strict=False)]


def _project_back(x: Inputs, draw: Tensor, low: bool, wanted: bool) -> tuple[Tensor | None, Tensor]:
    """Gradients of hidden and of the gates' weights in one."""
    weight = x.weight(low)
    dhidden = (draw @ weight).to(x.hidden.dtype) if wanted else None
    total = draw.flatten(0, 1).mT @ x.hidden.to(weight.dtype).flatten(0, 1)
    return dhidden, total.to(x.decay_weight.dtype)


def _grads(ctx, *grads):
    count = len(Inputs._fields)
    inputs, kept = ctx.saved_tensors[:count], ctx.saved_tensors[count + 1 :]
    x, wanted = Inputs(*inputs), list(ctx.needs_input_grad[3:7])  # after what `_Differentiable` itself takes
    found = torch.ops.hydra.linear_heads_backward.default(*grads, kept, *inputs, **ctx.options, wanted=wanted)
    dhidden, *dheads, do_full, dweight, sums, dgamma, dconvs, dvalue_conv, dq_past, dk_past, dv_past, dstate = found
    dweights = dweight.split(len(x.A_log))
    convs: list[Tensor | None] = [None] * 3
    if x.convs:
        parts = unstacked([dconvs, dvalue_conv][: len(_widths(x))])
        convs = [part.to(weight.dtype) for part, weight in zip(parts, x.convs, strict=True)]
    dA_log, ddt_bias, dbeta_bias = (s.to(p.dtype) for s, p in zip(sums, (x.A_log, x.dt_bias, x.beta_bias), strict=True))
    return (
        dhidden if wanted[0] else None,
        *(head.transpose(1, 2) if want else None for head, want in zip(dheads, wanted[1:], strict=True)),
        None if x.o_full is None else do_full,
        *(dweights[0], dA_log, ddt_bias, dweights[1], dbeta_bias),
        None if x.gate_weight is None else dweights[2],
        dgamma,
        *convs,
        *given((dq_past, dk_past, dv_past, dstate), (x.q_past, x.k_past, x.v_past, x.state)),
        *[None] * (count - GRADIENTS),
    )


_linear_heads.register_autograd(_grads, _training)
lower_under_autocast("linear_heads", *range(5), told="low")

"""legalize-onnx: each op of the dialect as ONNX operators of a target.

What the target has no operator for is decomposed and noted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import onnx
import torch
from onnxscript import ir, opset23, values

from hydrasurgery.dialect.names import DELTA_RULES
from hydrasurgery.errors import ExportError

op: Any = opset23
MASKED = -1e30  # a score that softmax takes for nothing, in fp32; finite, so that a row of nothing else is no NaN


@dataclass(frozen=True)
class Target:
    """Where a model is to run.

    Attributes:
        name: what the user calls it.
        opset: the ONNX opset that it needs at least.
        domain: of LinearAttention and CausalConvWithState.
    """

    name: str
    opset: int
    domain: str


TARGETS = {
    "onnxruntime": Target("onnxruntime", 23, "com.microsoft"),
    "opset27": Target("opset27", 27, ""),
}
CONTRIB = TARGETS["onnxruntime"].domain


@dataclass
class Lowering:
    """Translations, the same for every target; `fallbacks` counts the decompositions, by what they were for.

    LinearAttention and CausalConvWithState stand in ONNX Runtime's domain `CONTRIB` until a graph is addressed to a target.
    """

    fallbacks: Counter[str] = field(default_factory=Counter)

    def table(self) -> dict[Any, Callable[..., Any]]:
        """op -> translation, as torch.onnx wants it: plain functions, for it leaves a mark on each."""

        def attention(q, k, v, mask=None, sinks=None, scale=None, causal=True, window=None, softcap=None):
            return self.attention(q, k, v, mask, sinks, scale, causal, window, softcap)

        def linear_attention(q, k, v, decay=None, beta=None, state=None, rule="gated_delta", scale=None):
            return self.linear_attention(q, k, v, decay, beta, state, rule, scale)

        def causal_conv(x, weight, state=None, reset=None, previous=None):
            return self.causal_conv(x, weight, state, reset, previous)

        def scale_norm_fusion(o_full, o_linear, gamma, gate=None, linear_heads=(), norm_full=False, eps=1e-6):
            return self.scale_norm_fusion(o_full, o_linear, gamma, gate, linear_heads, norm_full, eps)

        def token_positions(valid, reset, seen=None):
            return self.token_positions(valid, reset, seen)

        def previous_tokens(valid):
            return self.previous_tokens(valid)

        functions = (attention, linear_attention, causal_conv, scale_norm_fusion, token_positions, previous_tokens)
        return {getattr(torch.ops.hydra, f.__name__).default: f for f in functions}

    # --- attention ------------------------------------------------------------------------------------------------

    def attention(
        self,
        q: Any,
        k: Any,
        v: Any,
        mask: Any,
        sinks: Any,
        scale: float | None,
        causal: bool,
        window: int | None,
        softcap: float | None,
    ) -> Any:
        """[B, H, T, D] -> [B, T, H, Dv]; rows of padding, which may attend to nothing, are finite and not specified."""
        scale = int(q.shape[3]) ** -0.5 if scale is None else scale
        square = mask is None and window is None
        if sinks is None and softcap is None and (mask is not None or square):
            out = op.Attention(q, k, v, self._additive(mask, q), is_causal=int(causal and mask is None), scale=scale)
            return op.Transpose(out[0], perm=[0, 2, 1, 3])
        if mask is None:
            raise ExportError("attention with a window, a softcap or sinks needs a mask; export with an attention_mask")
        why = " and ".join(word for word, given in (("a softcap", softcap), ("sinks", sinks)) if given is not None)
        self.fallbacks[f"attention with {why}: MatMul and Softmax"] += 1
        return self._decomposed(q, k, v, mask, sinks, scale, softcap)

    @staticmethod
    def _additive(mask: Any, like: Any) -> Any:
        """A bool mask as the scores' summand, finite: in a row of padding softmax then gives a mean, and no NaN."""
        if mask is None or mask.dtype != ir.DataType.BOOL:
            return mask
        low = {ir.DataType.FLOAT16: -6e4}.get(like.dtype, MASKED)
        zero, never = (op.CastLike(op.Constant(value_float=x), like) for x in (0.0, low))
        return op.Where(mask, zero, never)

    @staticmethod
    def _decomposed(q: Any, k: Any, v: Any, mask: Any, sinks: Any, scale: float, softcap: float | None) -> Any:
        """Query heads of a group are a dimension of their own, so that no key is copied: [B, Hk, G, T, D]. Softmax in fp32."""
        heads, dim, groups, width = int(q.shape[1]), int(q.shape[3]), int(k.shape[1]), int(v.shape[3])
        each = heads // groups
        keys = op.Transpose(op.Unsqueeze(k, op.Constant(value_ints=[2])), perm=[0, 1, 2, 4, 3])
        queries = op.Reshape(q, op.Constant(value_ints=[0, groups, each, -1, dim]))
        scores = op.Cast(op.MatMul(queries, keys), to=ir.DataType.FLOAT)
        scores = op.Mul(scores, op.Constant(value_float=scale))
        if softcap is not None:
            cap = op.Constant(value_float=softcap)
            scores = op.Mul(op.Tanh(op.Div(scores, cap)), cap)
        seen = op.Unsqueeze(mask, op.Constant(value_ints=[2]))  # its one head [B, 1, T, S] -> [B, 1, 1, T, S]
        if mask.dtype == ir.DataType.BOOL:
            scores = op.Where(seen, scores, op.Constant(value_float=MASKED))
        else:
            scores = op.Add(scores, op.Cast(seen, to=ir.DataType.FLOAT))
        if sinks is None:
            weights = op.Softmax(scores, axis=-1)
        else:
            sink = op.Reshape(op.Cast(sinks, to=ir.DataType.FLOAT), op.Constant(value_ints=[1, groups, each, 1, 1]))
            column = op.Add(op.Mul(op.Slice(scores, *_span(0, 1, 4)), op.Constant(value_float=0.0)), sink)
            weights = op.Softmax(op.Concat(column, scores, axis=-1), axis=-1)
            weights = op.Slice(weights, *_span(1, 2**62, 4))
        out = op.MatMul(op.CastLike(weights, v), op.Unsqueeze(v, op.Constant(value_ints=[2])))
        out = op.Reshape(out, op.Constant(value_ints=[0, heads, -1, width]))
        return op.Transpose(out, perm=[0, 2, 1, 3])

    # --- linear attention -----------------------------------------------------------------------------------------

    def linear_attention(
        self, q: Any, k: Any, v: Any, decay: Any, beta: Any, state: Any, rule: str, scale: float | None
    ) -> tuple[Any, Any]:
        """Heads packed into the last dimension. All in fp32, as the reference computes it: the decay needs its digits."""
        heads, dim, width = int(q.shape[2]), int(q.shape[3]), int(v.shape[3])

        def pack(x: Any, size: int) -> Any:
            return op.Reshape(op.Cast(x, to=ir.DataType.FLOAT), op.Constant(value_ints=[0, 0, heads * size]))

        channels = 1 if decay is None or len(decay.shape) == 3 else dim
        out, present = self._operator("LinearAttention")(
            pack(q, dim),
            pack(k, dim),
            pack(v, width),
            state,
            None if decay is None else pack(decay, channels),
            None if beta is None else pack(beta, 1),
            q_num_heads=heads,
            kv_num_heads=heads,
            update_rule=rule,
            scale=dim**-0.5 if scale is None else scale,
        )
        narrow = v.dtype != ir.DataType.FLOAT16 or rule in DELTA_RULES  # the dtype of `ops.linear_attention`
        out = op.CastLike(out, v) if narrow else out
        return op.Reshape(out, op.Constant(value_ints=[0, 0, heads, width])), present

    def causal_conv(self, x: Any, weight: Any, state: Any, reset: Any, previous: Any) -> tuple[Any, Any]:
        """x [B, T, C] turned to [B, C, T]; with `previous`, padding is brought to the front, the state and the tokens behind it.

        An attention_mask [B, S] tells of no packed documents: a `reset` can only say that the past is masked.
        """
        before, channels = int(weight.shape[1]) - 1, int(x.shape[2])
        taps = op.CastLike(op.Unsqueeze(weight, op.Constant(value_ints=[1])), x)
        state = _unless_reset(state, reset, 2)
        if previous is None or not before:
            y, present = self._convolve(x, taps, state)
            return y, present
        batch = _size(x, 0)
        if state is None:
            zero = op.CastLike(op.Constant(value_float=0.0), x)
            past = op.Expand(zero, op.Concat(batch, op.Constant(value_ints=[before, channels]), axis=0))
        else:
            past = op.Transpose(state, perm=[0, 2, 1])
        valid = op.Equal(op.Slice(previous, *_span(1, 2**62, 1)), _places(x))
        real = op.Expand(op.Constant(value_ints=[1]), op.Concat(batch, op.Constant(value_ints=[before]), axis=0))
        real = op.Concat(real, op.Cast(valid, to=ir.DataType.INT64), axis=1)
        count, place = op.CumSum(real, op.Constant(value_int=1)), _places(real)
        padding = op.Sub(_size(real, 1), op.Slice(count, *_span(-1, 2**62, 1)))
        goes_to = op.Where(
            op.Cast(real, to=ir.DataType.BOOL),
            op.Sub(op.Add(padding, count), op.Constant(value_int=1)),
            op.Sub(place, count),
        )
        comes_from = op.ScatterElements(place, goes_to, place, axis=1)
        line = _take(op.Concat(past, x, axis=1), comes_from)
        first = op.Transpose(op.Slice(line, *_span(0, before, 1)), perm=[0, 2, 1])
        y, present = self._convolve(op.Slice(line, *_span(before, 2**62, 1)), taps, first)
        y = op.Slice(_take(op.Concat(past, y, axis=1), goes_to), *_span(before, 2**62, 1))
        return op.Mul(y, op.CastLike(op.Unsqueeze(valid, op.Constant(value_ints=[2])), y)), present

    def _convolve(self, x: Any, taps: Any, state: Any) -> tuple[Any, Any]:
        channels_first = op.Transpose(x, perm=[0, 2, 1])
        y, present = self._operator("CausalConvWithState")(channels_first, taps, None, state, activation="none")
        return op.Transpose(y, perm=[0, 2, 1]), present

    def _operator(self, name: str) -> Any:
        """The operator `name` of `CONTRIB`, with the signature that ONNX gave it in opset 27."""
        known = onnx.defs.get_schema(name, 27, "")
        schema = onnx.defs.OpSchema(
            name,
            CONTRIB,
            1,
            inputs=list(known.inputs),
            outputs=list(known.outputs),
            type_constraints=[(t.type_param_str, t.allowed_type_strs, t.description) for t in known.type_constraints],
            attributes=list(known.attributes.values()),
        )
        return values.Op(values.Opset(CONTRIB, 1), name, schema)

    @staticmethod
    def token_positions(valid: Any, reset: Any, seen: Any) -> tuple[Any, Any]:
        """Counts of an attention_mask [B, S], which tells of no packed documents: a `reset` says that the past is masked."""
        seen = _unless_reset(seen, reset, 0)
        count = op.CumSum(op.Cast(valid, to=ir.DataType.INT64), op.Constant(value_int=1))
        if seen is not None:
            count = op.Add(count, op.Unsqueeze(seen, op.Constant(value_ints=[1])))
        positions = op.Max(op.Sub(count, op.Constant(value_int=1)), op.Constant(value_int=0))
        return positions, op.Squeeze(op.Slice(count, *_span(-1, 2**62, 1)), op.Constant(value_ints=[1]))

    @staticmethod
    def previous_tokens(valid: Any) -> Any:
        """Tokens are listed by how many there are up to them; before token t stands the one with the number of those before t."""
        count, place = op.CumSum(op.Cast(valid, to=ir.DataType.INT64), op.Constant(value_int=1)), _places(valid)
        length = _size(valid, 1)
        none = op.Concat(_size(valid, 0), op.Add(length, op.Constant(value_ints=[2])), axis=0)
        number = op.Where(valid, count, op.Add(length, op.Constant(value_ints=[1])))  # padding goes where nobody looks
        listed = op.ScatterElements(op.Expand(op.Constant(value_ints=[-1]), none), number, place, axis=1)
        start = op.Expand(op.Constant(value_ints=[0]), op.Concat(_size(valid, 0), op.Constant(value_ints=[1]), axis=0))
        return op.GatherElements(listed, op.Concat(start, count, axis=1), axis=1)

    # --- fusion ---------------------------------------------------------------------------------------------------

    def scale_norm_fusion(
        self, o_full: Any, o_linear: Any, gamma: Any, gate: Any, linear_heads: Any, norm_full: bool, eps: float
    ) -> Any:
        """RMSNormalization and products in fp32, then the heads gathered into their slots."""
        slots = [int(slot) for slot in linear_heads]
        total = sum(int(o.shape[2]) for o in (o_full, o_linear) if o is not None)
        others = [slot for slot in range(total) if slot not in slots]
        kind = (o_full if o_full is not None else o_linear).dtype
        gamma = op.Unsqueeze(op.Cast(gamma, to=ir.DataType.FLOAT), op.Constant(value_ints=[1]))

        def normalised(o: Any, heads: list[int]) -> Any:
            ones = op.Constant(value_floats=[1.0] * int(o.shape[3]))
            o = op.RMSNormalization(op.Cast(o, to=ir.DataType.FLOAT), ones, axis=-1, epsilon=eps)
            own = op.Gather(gamma, op.Constant(value_ints=heads), axis=0) if norm_full else gamma
            return op.Mul(o, own)

        parts = []
        if o_full is not None:
            parts.append(op.Cast(normalised(o_full, others), to=kind) if norm_full else o_full)
        if o_linear is not None:
            scaled = normalised(o_linear, slots)
            if gate is not None:
                scaled = op.Mul(scaled, op.Cast(gate, to=ir.DataType.FLOAT))
            parts.append(op.Cast(scaled, to=kind))
        if len(parts) == 1:
            return parts[0]
        order = [*others, *slots]
        return op.Gather(
            op.Concat(*parts, axis=2), op.Constant(value_ints=[order.index(slot) for slot in range(total)]), axis=2
        )


def _size(x: Any, dim: int) -> Any:
    """A dimension's size, [1] int64."""
    return op.Shape(x, start=dim, end=dim + 1)


def _places(x: Any) -> Any:
    """0, 1, 2, ... along the second of x's first two dimensions, [B, T] int64."""
    ones = op.Expand(op.Constant(value_ints=[1]), op.Shape(x, start=0, end=2))
    return op.CumSum(ones, op.Constant(value_int=1), exclusive=1)


def _take(x: Any, order: Any) -> Any:
    """The rows `order` [B, L] of each of x [B, L, C]."""
    return op.GatherND(x, op.Unsqueeze(order, op.Constant(value_ints=[2])), batch_dims=1)


def _unless_reset(state: Any, reset: Any, dims: int) -> Any:
    """A state [B, ...] of `dims` more dimensions, 0 in rows that have a reset (which is at their first token: see above)."""
    if state is None or reset is None:
        return state
    kept = op.Cast(op.Not(reset), to=ir.DataType.INT64)
    kept = op.ReduceMin(kept, op.Constant(value_ints=[1]), keepdims=0)
    if dims:
        kept = op.Unsqueeze(kept, op.Constant(value_ints=list(range(1, dims + 1))))
    return op.Mul(state, op.CastLike(kept, state))


def _span(start: int, stop: int, axis: int) -> list[Any]:
    """The last three inputs of a Slice."""
    return [op.Constant(value_ints=[value]) for value in (start, stop, axis)]

"""What a plan costs: bytes of cache and arithmetic at a length, teacher against hybrid: counted, not measured."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from hydrasurgery.dialect.names import FULL
from hydrasurgery.options import TAPS
from hydrasurgery.plan import LayerPlan, Plan, layer_shape

CHUNK = 64  # tokens that the chunked linear kernels take at once


@dataclass(frozen=True)
class Forecast:
    """Cache and arithmetic of the attention at `length` tokens, for `batch` sequences.

    Attributes:
        length: Tokens in the cache, and of the prefill.
        batch: Sequences.
        teacher_kv, hybrid_kv: Bytes of keys and values.
        state: Bytes of the recurrent states (fp32).
        conv: Bytes of the short convolutions' last inputs.
        teacher_flops, hybrid_flops: FLOPs of the attention itself over a prefill of `length` tokens, without projections.
    """

    length: int
    batch: int
    teacher_kv: int
    hybrid_kv: int
    state: int
    conv: int
    teacher_flops: int
    hybrid_flops: int

    @property
    def hybrid_bytes(self) -> int:
        """Everything the hybrid keeps between two tokens."""
        return self.hybrid_kv + self.state + self.conv

    @property
    def cache_ratio(self) -> float:
        """Hybrid's cache over the teacher's."""
        return self.hybrid_bytes / self.teacher_kv

    @property
    def flops_ratio(self) -> float:
        """Hybrid's prefill arithmetic over the teacher's."""
        return self.hybrid_flops / self.teacher_flops

    def __str__(self) -> str:
        parts = f"{format_bytes(self.hybrid_kv)} KV, {format_bytes(self.state)} state, {format_bytes(self.conv)} convolutions"
        return "\n".join(
            [
                f"At {self.length:,} tokens, batch {self.batch}:",
                f"  cache    {format_bytes(self.teacher_kv):>10} -> {format_bytes(self.hybrid_bytes):>10}  "
                f"({self.cache_ratio:.1%} of the teacher's: {parts})",
                f"  prefill  {self.teacher_flops:>10.3g} -> {self.hybrid_flops:>10.3g} FLOPs of attention "
                f"({self.flops_ratio:.1%})",
            ]
        )


def forecast(
    plan: Any, *, length: int, batch: int = 1, bytes_per_element: int = 2, conv_width: int | None = None
) -> Forecast:
    """Count the cache bytes and prefill FLOPs of a plan (or of regions with `kinds`) and of its teacher.

    Per layer, with T = `length`, w its window, K and V the widths of a head:

    - keys and values: kept KV heads * min(w, T) * (K + V) * `bytes_per_element`; a KV head is kept if a full head
      reads it, the teacher keeps all;
    - recurrent state: linear heads * K * V * 4;
    - short convolution: linear heads * (2 K + V) * (`conv_width` - 1) * `bytes_per_element`;
    - a full head: 2 (K + V) for each pair of a query and a key it may see: T (T + 1) / 2, or w T - w (w - 1) / 2;
    - a linear head, chunks of C = 64: T (6 K V + C (6 K + 4 V) + C^2 / 3). Three products with the state (S^T k, the
      write, S^T q), five inside the chunk (k k^T, q k^T, two of the triangular inverse, the read), the inverse itself.

    Left out: the number that a layer with `log_length` keeps, 8 bytes per sequence.

    Args:
        plan: A Plan, or an iterable of regions.
        length: Tokens in the cache, and of the prefill.
        batch: Sequences.
        bytes_per_element: Of keys, values and convolution inputs: 2 for half precision.
        conv_width: Taps of the short convolution on q, k and v, 0 where there is none; None takes those of the plan's layer.

    Returns:
        The counts; printing them gives a table.

    Example:
        >>> import hydrasurgery as hs
        >>> from hydrasurgery.demo.teacher import load_teacher
        >>> plan = hs.plan_heads(load_teacher()[0], ratio="7:1", strategy="layerwise")
        >>> print(hs.forecast(plan, length=524288))
        At 524,288 tokens, batch 1:
          cache         2 GiB ->  256.1 MiB  (12.5% of the teacher's: 256 MiB KV, 112 KiB state, 31.5 KiB convolutions)
          prefill    1.13e+15 ->   1.42e+14 FLOPs of attention (12.6%)
    """
    layers = [
        layer if isinstance(layer, LayerPlan) else replace(layer_shape(layer), kinds=tuple(layer.kinds))
        for layer in getattr(plan, "layers", plan)
    ]
    if conv_width is None:
        conv_width = 0 if isinstance(plan, Plan) and plan.layer.conv == "none" else TAPS
    costs = [_layer(layer, length, bytes_per_element, conv_width) for layer in layers]
    totals = [batch * sum(column) for column in zip(*costs, strict=True)]
    return Forecast(length, batch, *totals)


def _layer(layer: LayerPlan, length: int, element: int, conv_width: int) -> tuple[int, int, int, int, int, int]:
    """Teacher's KV, hybrid's KV, state, convolution (bytes); teacher's and hybrid's FLOPs."""
    k, v = layer.head_dim, layer.value_dim
    kv = kept_tokens(layer, length) * (k + v) * element
    full, linear = sum(kind == FULL for kind in layer.kinds), sum(kind != FULL for kind in layer.kinds)
    softmax = attention_flops(layer, length)
    recurrence = length * (6 * k * v + CHUNK * (6 * k + 4 * v) + CHUNK**2 // 3)
    return (
        layer.num_key_value_heads * kv,
        len(layer.kept_key_value_heads) * kv,
        linear * k * v * 4,
        linear * (2 * k + v) * max(0, conv_width - 1) * element,
        layer.num_heads * softmax,
        full * softmax + linear * recurrence,
    )


def kept_tokens(layer: LayerPlan, length: int) -> int:
    """Tokens of `length` whose keys and values a full head of the layer still reads."""
    return length if layer.window is None else min(layer.window, length)


def attention_flops(layer: LayerPlan, length: int) -> int:
    """FLOPs of one full head over a prefill of `length` tokens, projections left out."""
    seen = kept_tokens(layer, length)
    return 2 * (layer.head_dim + layer.value_dim) * (seen * length - seen * (seen - 1) // 2)


def format_bytes(count: int) -> str:
    """A count of bytes in the unit that fits it, to four digits: `1.5 MiB`."""
    value = float(count)
    for suffix in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.4g} {suffix}"
        value /= 1024
    return f"{value:.4g} TiB"

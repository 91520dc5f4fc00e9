"""What is measured, as data: suites of inputs, the contenders that take them, what they must compute, and the floor."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hydrasurgery import ops
from hydrasurgery.kernels import registry
from hydrasurgery.kernels.attention import reference as attention_reference
from hydrasurgery.kernels.decode_step import reference as decode_reference
from hydrasurgery.kernels.linear_attention import reference as linear_reference
from hydrasurgery.kernels.scale_norm_fusion import reference as fusion_reference

CHUNK = 64  # tokens per chunk, in the count of a linear head's arithmetic
Inputs = dict[str, Any]
Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Layer:
    """One hybrid attention layer. `kv_heads` are those of the full attention of all heads that it is compared with."""

    full: int = 2
    linear: int = 14
    kv_heads: int = 8
    dim: int = 128
    conv: int = 4

    @property
    def heads(self) -> int:
        return self.full + self.linear


@dataclass(frozen=True)
class Contender:
    """Something that runs on a suite's inputs. `exact` says what it must compute, on fp64 inputs; the suite's if None."""

    name: str
    run: Callable[[Inputs], Outputs]
    package: registry.Package | None = None
    exact: Callable[[Inputs], Outputs] | None = None
    cuda_only: bool = True


@dataclass(frozen=True)
class Suite:
    """Contenders on inputs of several sizes (tokens or sequences). `floor` counts the fewest (bytes, operations)."""

    name: str
    unit: str
    sizes: tuple[int, ...]
    inputs: Callable[[Layer, int, torch.device, torch.dtype], Inputs]
    contenders: tuple[Contender, ...]
    exact: Callable[[Inputs], Outputs]
    floor: Callable[[Layer, int], tuple[float, float]]
    gate_size: int = 1000
    graph: bool = False


_PLAIN: dict[str, Any] = {"scale": None, "causal": True, "window": None, "softcap": None}


def _normal(*shape: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, device=device, dtype=dtype)


def _unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x.float(), dim=-1).to(x.dtype)


# --- linear attention -----------------------------------------------------------------------------------------------------------


def _linear_inputs(layer: Layer, length: int, device: torch.device, dtype: torch.dtype) -> Inputs:
    shape = (1, length, layer.linear, layer.dim)
    q, k, v = (_normal(*shape, device=device, dtype=dtype) for _ in range(3))
    decay = -0.1 * torch.rand(shape[:3], device=device)
    return {"q": _unit(q), "k": _unit(k), "v": v, "decay": decay, "beta": torch.rand(shape[:3], device=device)}


def _training_inputs(layer: Layer, length: int, device: torch.device, dtype: torch.dtype) -> Inputs:
    inputs = {name: x.requires_grad_() for name, x in _linear_inputs(layer, length, device, dtype).items()}
    return {**inputs, "grad": torch.randn_like(inputs["v"])}


def _fla(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor) -> Outputs:
    """fla's own kernels: the function that it exports hands the call to FlashQLA where that is installed."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    return inspect.unwrap(chunk_gated_delta_rule)(q, k, v, g=decay, beta=beta, output_final_state=True)


def _flash_qla(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor) -> Outputs:
    from flash_qla import chunk_gated_delta_rule

    return chunk_gated_delta_rule(q, k, v, g=decay, beta=beta, output_final_state=True)


def _triton(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor) -> Outputs:
    """Our own kernels, which the operator takes where no faster ones are installed."""
    from hydrasurgery.kernels.linear_attention import triton

    return triton.forward(q, k, v, decay, beta, None)


def _triton_training(inputs: Inputs) -> Outputs:
    from hydrasurgery.kernels.linear_attention import triton

    q, k, v, decay, beta, grad = (x.detach() for x in inputs.values())
    o, _, kept = triton.forward_keeping(q, k, v, decay, beta, None)
    return o, *triton.backward(grad, None, q, k, v, decay, beta, None, kept=kept)[:5]  # type: ignore[return-value]


def _exact_linear(inputs: Inputs) -> Outputs:
    return linear_reference.forward(**inputs, state=None, rule="gated_delta", scale=None)


def _exact_training(inputs: Inputs) -> Outputs:
    inputs = {name: x.detach() for name, x in inputs.items()}
    grad, state = inputs.pop("grad"), inputs["q"].new_zeros(1, *inputs["q"].shape[2:], inputs["v"].shape[-1])
    options: dict[str, Any] = {"state": None, "rule": "gated_delta", "scale": None}
    out, _ = linear_reference.forward(**inputs, **options)
    return out, *(g for g in linear_reference.backward(grad, state, **inputs, **options) if g is not None)


def _trained(forward: Callable[..., Outputs]) -> Callable[[Inputs], Outputs]:
    """Forward and backward by autograd: (o, gradients of q, k, v, decay and beta)."""

    def run(inputs: Inputs) -> Outputs:
        tensors = {name: x for name, x in inputs.items() if name != "grad"}
        out = forward(**tensors)[0]
        return out, *torch.autograd.grad(out, list(tensors.values()), inputs["grad"])

    return run


def _linear_floor(passes: int, tensors: int) -> Callable[[Layer, int], tuple[float, float]]:
    def floor(layer: Layer, length: int) -> tuple[float, float]:
        """bf16 tensors once; a chunk's products (two of keys, one of U, two of outputs) and three of the state."""
        tokens, dim = length * layer.linear, layer.dim
        return 2 * tensors * tokens * dim, passes * tokens * (2 * CHUNK * 5 * dim + 6 * dim * dim)

    return floor


LINEAR_FORWARD = Suite(
    "linear-forward", "tokens", (4096, 16384, 65536, 262144, 524288), _linear_inputs,
    (
        Contender("hydra", lambda x: ops.linear_attention(**x), cuda_only=False),
        Contender("hydra, triton", lambda x: _triton(**x), registry.TRITON),
        Contender("fla", lambda x: _fla(**x), registry.FLA),
        Contender("flash_qla", lambda x: _flash_qla(**x), registry.FLASH_QLA),
    ),
    _exact_linear, _linear_floor(1, 4), graph=True,
)  # fmt: skip

LINEAR_TRAINING = Suite(
    "linear-training", "tokens", (4096, 16384, 65536), _training_inputs,
    (
        Contender("hydra", _trained(ops.linear_attention), cuda_only=False),
        Contender("hydra, triton", _triton_training, registry.TRITON),
        Contender("fla", _trained(_fla), registry.FLA),
        Contender("flash_qla", _trained(_flash_qla), registry.FLASH_QLA),
    ),
    _exact_training, _linear_floor(3, 11), graph=True,
)  # fmt: skip


# --- decoding -----------------------------------------------------------------------------------------------------------------


def _decode_inputs(layer: Layer, batch: int, device: torch.device, dtype: torch.dtype) -> Inputs:
    heads, dim = layer.linear, layer.dim
    make: dict[str, Any] = {"device": device, "dtype": dtype}
    q, k, v = (_normal(batch, heads, dim, **make) for _ in range(3))
    gates = {name: _normal(batch, heads, **make) for name in ("decay", "beta", "gate")}
    rates = {"A_log": torch.zeros(heads, device=device), "dt_bias": torch.full((heads,), -3.0, device=device)}
    return {
        "q": q, "k": k, "v": v, **gates, **rates, "gamma": torch.rand(heads, device=device),
        "conv_weights": [0.1 * _normal(heads * dim, layer.conv, **make) for _ in range(3)],
        "state": 0.1 * torch.randn(batch, heads, dim, dim, device=device),
        "conv_states": [_normal(batch, heads * dim, layer.conv - 1, **make) for _ in range(3)],
    }  # fmt: skip


def _decode(inputs: Inputs) -> Outputs:
    return (ops.decode_step(**inputs),)


def _decode_one_by_one(inputs: Inputs) -> Outputs:
    """The operators that `decode_step` is one launch of."""
    x, heads = inputs, inputs["q"].shape[1]
    tokens = [x[name].flatten(1)[:, None] for name in "qkv"]
    mixed = [ops.causal_conv(*each)[0] for each in zip(tokens, x["conv_weights"], x["conv_states"], strict=True)]
    q, k, v = ((t + y).unflatten(-1, (heads, -1)) for t, y in zip(tokens, mixed, strict=True))
    decay = -x["A_log"].exp() * torch.nn.functional.softplus(x["decay"].float() + x["dt_bias"])
    beta = x["beta"].float().sigmoid()[:, None]
    o, _ = ops.linear_attention(_l2(q), _l2(k), v, decay[:, None], beta, x["state"])
    gate = 2 * x["gate"].sigmoid()[:, None, :, None]
    return (ops.scale_norm_fusion(None, o, x["gamma"], gate, linear_heads=range(heads))[:, 0],)


def _l2(x: Tensor) -> Tensor:
    y = x.float()
    return (y * torch.rsqrt(y.square().sum(-1, keepdim=True) + decode_reference.L2_EPS)).to(x.dtype)


def _exact_decode(inputs: Inputs) -> Outputs:
    return (decode_reference.forward(**inputs, scale=None, eps=1e-6),)


def _fla_recurrence(inputs: Inputs) -> Outputs:
    """The recurrence, the gates and the L2 norms only: no convolution, no norm and gate of the output."""
    from fla.ops.gated_delta_rule import fused_recurrent_gated_delta_rule

    q, k, v, g, beta = (inputs[name][:, None] for name in ("q", "k", "v", "decay", "beta"))
    return fused_recurrent_gated_delta_rule(
        q, k, v, g=g, beta=beta, initial_state=inputs["state"], output_final_state=True, use_qk_l2norm_in_kernel=True,
        use_gate_in_kernel=True, A_log=inputs["A_log"], dt_bias=inputs["dt_bias"], use_beta_sigmoid_in_kernel=True,
    )  # fmt: skip


def _exact_recurrence(inputs: Inputs) -> Outputs:
    q, k, v = (inputs[name][:, None] for name in "qkv")
    norm = torch.nn.functional.normalize
    decay = -inputs["A_log"].exp() * torch.nn.functional.softplus(inputs["decay"] + inputs["dt_bias"])
    gates = decay[:, None], inputs["beta"].sigmoid()[:, None]
    return linear_reference.forward(
        norm(q, dim=-1), norm(k, dim=-1), v, *gates, inputs["state"], rule="gated_delta", scale=None
    )


DECODE = Suite(
    "decode", "sequences", (1, 16, 256), _decode_inputs,
    (
        Contender("hydra", _decode, cuda_only=False),
        Contender("one by one", _decode_one_by_one, cuda_only=False),
        Contender("fla, recurrence only", _fla_recurrence, registry.FLA, _exact_recurrence),
    ),
    _exact_decode, lambda layer, batch: (8 * batch * layer.linear * layer.dim**2, 0.0), gate_size=3, graph=True,
)  # fmt: skip


def _cache_inputs(layer: Layer, keys: int, device: torch.device, dtype: torch.dtype) -> Inputs:
    make: dict[str, Any] = {"device": device, "dtype": dtype}
    kept = max(1, layer.full * layer.kv_heads // layer.heads)
    mask = torch.arange(keys, device=device)[None, None, None] < keys - 8
    q = 4 * _normal(1, layer.full, 1, layer.dim, **make)  # a head that looks at few keys
    return {"q": q, **{name: _normal(1, kept, keys, layer.dim, **make) for name in "kv"}, "mask": mask}


def _masked(module: str) -> Callable[[Inputs], Outputs]:
    def run(inputs: Inputs) -> Outputs:
        kernel = importlib.import_module(f"hydrasurgery.kernels.attention.{module}")
        return (kernel.forward(*inputs.values(), None, **_PLAIN),)

    return run


MASKED_DECODE = Suite(
    "masked-decode", "keys", (4096, 65536), _cache_inputs,
    (
        Contender("hydra", lambda x: (ops.attention(**x),), cuda_only=False),
        Contender("sdpa", _masked("sdpa")),
    ),
    _masked("reference"),
    lambda layer, keys: (4 * keys * layer.dim * max(1, layer.full * layer.kv_heads // layer.heads), 0.0), graph=True,
)  # fmt: skip


# --- fusion -------------------------------------------------------------------------------------------------------------------


def _slots(layer: Layer) -> list[int]:
    """Full heads spread evenly among the slots."""
    full = {round(i * layer.heads / layer.full) for i in range(layer.full)}
    return [slot for slot in range(layer.heads) if slot not in full]


def _fusion_inputs(layer: Layer, length: int, device: torch.device, dtype: torch.dtype) -> Inputs:
    make: dict[str, Any] = {"device": device, "dtype": dtype}
    return {
        "o_full": _normal(1, length, layer.full, layer.dim, **make),
        "o_linear": _normal(1, length, layer.linear, layer.dim, **make),
        "gamma": torch.rand(layer.linear, device=device),
        "gate": torch.rand(1, length, layer.linear, 1, device=device, dtype=dtype),
        "linear_heads": _slots(layer),
    }


def _fusion_backward_inputs(layer: Layer, length: int, device: torch.device, dtype: torch.dtype) -> Inputs:
    return {
        "grad": _normal(1, length, layer.heads, layer.dim, device=device, dtype=dtype),
        **_fusion_inputs(layer, length, device, dtype),
    }


def _fusion_floor(all_heads: int, linear_heads: int, gates: int) -> Callable[[Layer, int], tuple[float, float]]:
    """How many bf16 tensors of all heads, of only linear heads, and of gates are read or written."""

    def floor(layer: Layer, length: int) -> tuple[float, float]:
        channels = layer.dim * (all_heads * layer.heads + linear_heads * layer.linear) + gates * layer.linear
        return 2 * length * channels, 0.0

    return floor


def _reference_fusion(inputs: Inputs) -> Outputs:
    return (fusion_reference.forward(**inputs, norm_full=False, eps=1e-6),)


def _reference_fusion_backward(inputs: Inputs) -> Outputs:
    return fusion_reference.backward(**inputs, norm_full=False, eps=1e-6)  # type: ignore[return-value]


FUSION_FORWARD = Suite(
    "fusion-forward", "tokens", (65536,), _fusion_inputs,
    (
        Contender("hydra", lambda x: (ops.scale_norm_fusion(**x),), cuda_only=False),
        Contender("plain PyTorch", _reference_fusion, cuda_only=False),
    ),
    _reference_fusion, _fusion_floor(2, 0, 1), graph=True,
)  # fmt: skip

FUSION_BACKWARD = Suite(
    "fusion-backward", "tokens", (65536,), _fusion_backward_inputs,
    (
        Contender("hydra", lambda x: torch.ops.hydra.scale_norm_fusion_backward(**x), cuda_only=False),
        Contender("plain PyTorch", _reference_fusion_backward, cuda_only=False),
    ),
    _reference_fusion_backward, _fusion_floor(2, 1, 2), graph=True,
)  # fmt: skip


# --- a whole layer ------------------------------------------------------------------------------------------------------------


def _layer_inputs(layer: Layer, length: int, device: torch.device, dtype: torch.dtype) -> Inputs:
    make: dict[str, Any] = {"device": device, "dtype": dtype}
    linear = {f"linear_{name}": x for name, x in _linear_inputs(layer, length, device, dtype).items()}
    kept = max(1, layer.full * layer.kv_heads // layer.heads)
    all_heads = _normal(1, length, layer.heads + 2 * layer.kv_heads, layer.dim, **make)
    return {
        **linear,
        # Views of a projection's output: heads after tokens in memory.
        "all_q": all_heads[:, :, : layer.heads].transpose(1, 2),
        "all_k": all_heads[:, :, layer.heads : layer.heads + layer.kv_heads].transpose(1, 2),
        "all_v": all_heads[:, :, layer.heads + layer.kv_heads :].transpose(1, 2),
        "q": _normal(1, length, layer.full, layer.dim, **make).transpose(1, 2),
        "k": _normal(1, length, kept, layer.dim, **make).transpose(1, 2),
        "v": _normal(1, length, kept, layer.dim, **make).transpose(1, 2),
        "gamma": torch.rand(layer.linear, device=device),
        "gate": torch.rand(1, length, layer.linear, 1, device=device, dtype=dtype),
        "linear_heads": _slots(layer),
    }


def _linear_part(inputs: Inputs) -> Inputs:
    return {name.removeprefix("linear_"): x for name, x in inputs.items() if name in _LINEAR_NAMES}


_LINEAR_NAMES = {f"linear_{name}" for name in ("q", "k", "v", "decay", "beta")}


def _hybrid(inputs: Inputs) -> Outputs:
    full = ops.attention(inputs["q"], inputs["k"], inputs["v"])
    linear, _ = ops.linear_attention(**_linear_part(inputs))
    return (ops.scale_norm_fusion(full, linear, **{n: inputs[n] for n in ("gamma", "gate", "linear_heads")}),)


def _exact_hybrid(inputs: Inputs) -> Outputs:
    full = attention_reference.forward(inputs["q"], inputs["k"], inputs["v"], None, None, **_PLAIN)
    linear = _exact_linear(_linear_part(inputs))[0]
    rest = {name: inputs[name] for name in ("gamma", "gate", "linear_heads")}
    return (fusion_reference.forward(full, linear, **rest, norm_full=False, eps=1e-6),)


def _all_full(module: str) -> Callable[[Inputs], Outputs]:
    def run(inputs: Inputs) -> Outputs:
        kernel = importlib.import_module(f"hydrasurgery.kernels.attention.{module}")
        return (kernel.forward(inputs["all_q"], inputs["all_k"], inputs["all_v"], None, None, **_PLAIN),)

    return run


def _exact_full(inputs: Inputs) -> Outputs:
    return (attention_reference.forward(inputs["all_q"], inputs["all_k"], inputs["all_v"], None, None, **_PLAIN),)


def _layer_floor(layer: Layer, length: int) -> tuple[float, float]:
    """The hybrid's: causal scores of the full heads, the linear heads' floor, and the fusion's two tensors."""
    moved, work = _linear_floor(1, 4)(layer, length)
    fused, _ = _fusion_floor(2, 0, 1)(layer, length)
    return moved + fused + 8 * length * layer.full * layer.dim, work + 2 * length**2 * layer.dim * layer.full


LAYER = Suite(
    "layer", "tokens", (4096, 16384, 65536, 262144, 524288), _layer_inputs,
    (
        Contender("hydra hybrid", _hybrid, cuda_only=False),
        Contender("all full, sdpa", _all_full("sdpa"), exact=_exact_full),
        Contender("all full, fa3", _all_full("fa3"), registry.FA3, _exact_full),
    ),
    _exact_hybrid, _layer_floor, graph=True,
)  # fmt: skip

SUITES = {
    s.name: s for s in (LINEAR_FORWARD, LINEAR_TRAINING, DECODE, MASKED_DECODE, FUSION_FORWARD, FUSION_BACKWARD, LAYER)
}

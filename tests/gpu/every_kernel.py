"""Every Triton kernel once, on small shapes: `compute-sanitizer --tool memcheck python -m tests.gpu.every_kernel` (or racecheck).

Give it `PYTORCH_NO_CUDA_MEMORY_CACHING=1`, so that each tensor is an allocation of its own and reads past its end show.
"""

from __future__ import annotations

from itertools import product

import torch

from hydrasurgery import ops
from hydrasurgery.bench.cases import DECODE, FUSION_BACKWARD, Layer
from hydrasurgery.kernels.attention import triton as attention
from hydrasurgery.kernels.causal_conv import triton as conv
from hydrasurgery.kernels.decode_step import triton as decode
from hydrasurgery.kernels.linear_attention import triton as linear
from hydrasurgery.kernels.scale_norm_fusion import triton as fusion
from tests.gpu.check_linear_attention import inputs

SIZES = [(128, 128), (64, 64), (64, 128), (128, 64), (256, 128), (64, 256), (256, 256), (32, 24)]
SMALL = Layer(full=1, linear=2, kv_heads=1)


def linear_attention(dtype: torch.dtype, keys: int, values: int, **options: object) -> None:
    given = inputs(dtype, (1, 300, 2, keys, values), 0.02)
    if options.get("cu_seqlens") is not None:
        given["state"] = torch.randn(4, 2, keys, values, device="cuda")
    o, state = linear.forward(**given, **options)
    linear.backward(torch.randn_like(o), torch.randn_like(state), **given, **options)


def linear_attention_in_training() -> None:
    """As the operator calls the kernels: long enough for segments on any card."""
    given = inputs(torch.bfloat16, (1, 1000, 1, 64, 64), 0.02)
    o, state, kept = linear.forward_keeping(**given)
    linear.backward(torch.randn_like(o), torch.randn_like(state), **given, kept=kept)


def causal_conv(dtype: torch.dtype, reset: bool, padding: bool) -> None:
    x, weight = (torch.randn(*shape, device="cuda", dtype=dtype) for shape in ((2, 70, 48), (48, 4)))
    state = None if reset else torch.randn(2, 48, 3, device="cuda", dtype=dtype)
    starts = torch.rand(2, 70, device="cuda") < 0.1 if reset else None
    previous = ops.previous_tokens(torch.rand(2, 70, device="cuda") < 0.7, x) if padding else None
    y, tail = conv.forward(x, weight, state, starts, previous)
    conv.backward(torch.randn_like(y), torch.randn_like(tail), x, weight, state, starts, previous)


def attention_of_one_query(dtype: torch.dtype) -> None:
    q, k, v = (
        torch.randn(2, heads, length, 80, device="cuda", dtype=dtype) for heads, length in ((6, 1), (2, 130), (2, 130))
    )
    mask = torch.rand(2, 1, 1, 130, device="cuda") < 0.5
    options = {"scale": None, "causal": True}
    attention.forward(q, k, v, mask, None, window=None, softcap=None, **options)
    attention.forward(q, k, v, None, torch.randn(6, device="cuda"), window=70, softcap=5.0, **options)


def main() -> None:
    torch.manual_seed(0)
    device = torch.device("cuda")
    documents = torch.tensor([0, 0, 1, 130, 300], device="cuda", dtype=torch.int32)
    for keys, values in SIZES:
        linear_attention(torch.bfloat16, keys, values, segment=128)
    linear_attention_in_training()
    linear_attention(torch.bfloat16, 128, 128, cu_seqlens=documents, l2_norm=True)
    linear_attention(torch.float32, 64, 64, segment=128)
    for dtype in (torch.bfloat16, torch.float32):
        for reset, padding in product((False, True), (False, True)):
            causal_conv(dtype, reset, padding)
        attention_of_one_query(dtype)
        given = FUSION_BACKWARD.inputs(SMALL, 37, device, dtype)
        grad = given.pop("grad")
        for norm_full, scales in ((False, SMALL.linear), (True, SMALL.heads)):
            given["gamma"] = torch.rand(scales, device=device)
            fusion.forward(**given, norm_full=norm_full, eps=1e-6)
            fusion.backward(grad, **given, norm_full=norm_full, eps=1e-6)
        decode.forward(**DECODE.inputs(SMALL, 3, device, dtype), scale=None, eps=1e-6)
    torch.cuda.synchronize()
    print("every kernel ran")


if __name__ == "__main__":
    main()

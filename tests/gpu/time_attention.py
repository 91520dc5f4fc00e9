"""Softmax attention in Triton beside PyTorch's kernels: `python -m tests.gpu.time_attention` on CUDA; milliseconds, bf16.

Many queries: 16 heads of 128 on 8 KV heads, 16,384 tokens, without a mask and with an eighth of padding on the left. One query:
2 heads on one KV head, in graph replay.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hydrasurgery.bench.timing import median_ms
from hydrasurgery.kernels.attention import sdpa, triton, triton_blocks
from hydrasurgery.kernels.attention.reach import OPEN

PLAIN = {"scale": None, "causal": True, "window": None, "softcap": None}
DEVICE = torch.device("cuda")


def heads(count: int, length: int) -> Tensor:
    return torch.randn(1, length, count, 128, device=DEVICE, dtype=torch.bfloat16).transpose(1, 2)


def main() -> None:
    length = 16384
    q, k, v, grad = heads(16, length), heads(8, length), heads(8, length), heads(16, length).transpose(1, 2)
    reach = torch.full((1, 1, 1, length + 1), OPEN, device=DEVICE, dtype=torch.int32)
    reach[..., : length // 8] = reach[..., -1] = 0
    for name, module, mask in (("ours", triton_blocks, None), ("left", triton_blocks, reach), ("SDPA", sdpa, None)):
        forward = median_ms(lambda: module.forward(q, k, v, mask, None, **PLAIN), DEVICE)  # noqa: B023
        both = median_ms(lambda: module.backward(grad, q, k, v, mask, None, **PLAIN), DEVICE)  # noqa: B023
        print(f"{name}: forward {forward:.3f}, backward with its forward {both:.3f}")
    for keys in (4096, 65536, 524288):
        q, k, v = heads(2, 1), heads(1, keys), heads(1, keys)
        for name, module in (("ours", triton), ("SDPA", sdpa)):
            ms = median_ms(lambda: module.forward(q, k, v, None, None, **PLAIN), DEVICE, graph=True)  # noqa: B023
            print(f"{name}: one query over {keys} keys {ms:.4f}")


if __name__ == "__main__":
    main()

"""Gradients of softmax attention on the GPU at hand: each kernel's errors against the reference in fp64, and its time beside the
reference's: `python -m tests.gpu.check_attention`."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from hydrasurgery.bench.timing import median_ms
from hydrasurgery.kernels import registry
from hydrasurgery.kernels.attention import reference

LIMITS = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 2e-5}
PLAIN: dict[str, Any] = {"scale": None, "causal": True, "window": None, "softcap": None}
# name, queries, keys, mask, options
CALLS = [
    ("causal", 1000, 1000, "", {}),
    ("documents", 1000, 1000, "bool", {}),
    ("added", 1000, 1003, "added", {}),
    ("window", 1000, 1000, "", {"window": 100}),
    ("more keys", 300, 1000, "", {}),
    ("all keys", 300, 301, "", {"causal": False}),
]


def mask_of(kind: str, queries: int, keys: int) -> Tensor | None:
    """Causal within documents of 150 tokens; the first sequence's first ten queries see nothing."""
    if not kind:
        return None
    place = torch.arange(queries, device="cuda")[:, None], torch.arange(keys, device="cuda")[None]
    seen = (place[0] >= place[1]) & (place[0] // 150 == place[1] // 150)
    seen = seen.expand(2, 1, -1, -1).clone()
    seen[0, :, :10] = False
    if kind == "bool":
        return seen
    return torch.where(seen, torch.randn(seen.shape, device="cuda"), -torch.inf)


def check(name: str, queries: int, keys: int, kind: str, options: dict[str, Any], dtype: torch.dtype) -> bool:
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(2, length, heads, 64, device="cuda", dtype=dtype).transpose(1, 2)
        for length, heads in ((queries, 6), (keys, 2), (keys, 2))
    )
    mask, grad = mask_of(kind, queries, keys), torch.randn(2, queries, 6, 64, device="cuda", dtype=dtype)
    options = PLAIN | options
    inputs = (grad, q, k, v, mask, None)
    names = {n: options[n] for n in ("causal", "window", "softcap")}
    case = registry.attention_case(registry.BACKWARD, *inputs[1:], **names)
    chosen = registry.choose("attention", case, registry.machine_of("cuda")).implementation
    module = importlib.import_module(chosen.module)
    found = module.backward(*inputs, **options)
    wide = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
    wanted = reference.backward(*wide, **options)
    errors = [float((x.double() - y).norm() / y.norm()) for x, y in zip(found[:3], wanted, strict=False)]
    device = torch.device("cuda")
    own, plain = (median_ms(lambda m=m: m.backward(*inputs, **options), device) for m in (module, reference))
    good = all(error < LIMITS[dtype] for error in errors)
    text = " ".join(f"d{n} {error:.1e}" for n, error in zip("qkv", errors, strict=True))
    print(
        f"{'ok  ' if good else 'BAD '} {name:10} {str(dtype)[6:]:9} {chosen.name:10} {text}  {own:.3f} ms, reference {plain:.3f}",
        flush=True,
    )
    return good


def main() -> None:
    print(torch.cuda.get_device_name(), "torch", torch.__version__, flush=True)
    good = [check(*call, dtype) for dtype in LIMITS for call in CALLS]
    if not all(good):
        raise SystemExit(f"{good.count(False)} cases are wrong")


if __name__ == "__main__":
    main()

"""Check and time the Triton kernels of `hydra::linear_attention` on the GPU at hand: `python -m tests.gpu.check_linear_attention`.

Errors are ||x - reference|| / ||reference|| against the reference in float64. Times are medians in milliseconds, of one of many
calls replayed as a CUDA graph and of calls that are waited for. `--peers` times the operator, with what the registry chooses, and
fla's own kernels and FlashQLA beside them, where they are installed; `--unchecked` only times; `--cold` measures the first call in
a fresh process with an empty Triton cache. `--profile` makes one pass for a profiler:
`ncu --profile-from-start off --set full python -m tests.gpu.check_linear_attention --profile`.
"""

from __future__ import annotations

import argparse
import inspect
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

import torch
import triton
from torch import Tensor

from hydrasurgery import ops
from hydrasurgery.bench.timing import median_ms
from hydrasurgery.kernels.linear_attention import reference
from hydrasurgery.kernels.linear_attention import triton as kernel

NAMES = ("o", "state", "dq", "dk", "dv", "ddecay", "dbeta", "dstate")
LIMITS = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 2e-5}
# dtype, batch, length, heads, keys, values, decay (mean of a token), options
CASES = [
    (torch.bfloat16, 1, 4096, 14, 128, 128, 0.7, {}),
    (torch.bfloat16, 1, 4096, 14, 128, 128, 0.002, {}),
    (torch.bfloat16, 2, 1000, 3, 128, 128, 0.05, {"segment": 128}),
    (torch.bfloat16, 1, 3000, 4, 128, 128, 0.01, {"documents": (0, 1, 1, 700, 1900, 1964, 3000)}),
    (torch.bfloat16, 1, 777, 4, 128, 128, 0.01, {"l2_norm": True, "segment": 192}),
    (torch.bfloat16, 1, 520, 2, 64, 64, 0.02, {"segment": 64}),
    (torch.bfloat16, 1, 520, 2, 32, 32, 0.02, {"segment": 64}),
    (torch.bfloat16, 1, 520, 2, 64, 128, 0.02, {"segment": 128}),
    (torch.bfloat16, 1, 520, 2, 128, 32, 0.02, {"segment": 128}),
    (torch.bfloat16, 1, 520, 2, 80, 96, 0.02, {"segment": 128}),
    (torch.bfloat16, 1, 520, 2, 256, 32, 0.02, {"segment": 128}),
    (torch.bfloat16, 1, 520, 2, 256, 256, 0.02, {"segment": 128}),
    (torch.bfloat16, 1, 520, 2, 128, 256, 0.02, {"segment": 128}),
    (torch.bfloat16, 1, 520, 2, 32, 128, 0.02, {"segment": 128}),
    (torch.bfloat16, 1, 520, 2, 64, 32, 0.02, {"segment": 128}),
    (torch.float16, 1, 2000, 4, 128, 128, 0.02, {"segment": 256}),
    (torch.float16, 1, 520, 2, 256, 64, 0.02, {"segment": 128, "l2_norm": True}),
    (torch.float32, 1, 2000, 4, 128, 128, 0.02, {"segment": 256}),
    (torch.float32, 1, 520, 2, 64, 64, 0.02, {"segment": 128, "l2_norm": True}),
    (torch.float32, 1, 520, 2, 128, 256, 0.02, {"segment": 128}),
    (torch.float32, 1, 500, 2, 32, 32, 0.02, {"documents": (0, 200, 500)}),
]


def inputs(
    dtype: torch.dtype,
    shape: Sequence[int],
    decay: float,
    documents: tuple[int, ...] | None = None,
    l2_norm: bool = False,
) -> dict[str, Tensor]:
    """Inputs of `shape` (batch, length, heads, keys, values): random, k of length 1 unless the kernel normalises, decays with the
    mean -decay, beta in 0..1, and a first state."""
    batch, length, heads, keys, values = shape

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda")

    k = draw(batch, length, heads, keys)
    k = k if l2_norm else torch.nn.functional.normalize(k, dim=-1)
    tokens = (batch, length, heads)
    states = batch if documents is None else len(documents) - 1
    return {
        "q": draw(*tokens, keys).to(dtype),
        "k": k.to(dtype),
        "v": draw(*tokens, values).to(dtype),
        "decay": -2 * decay * torch.rand(tokens, device="cuda"),
        "beta": torch.rand(tokens, device="cuda").to(dtype),
        "state": draw(states, heads, keys, values),
    }


def wanted(given: dict[str, Tensor], grad: Tensor, grad_state: Tensor, documents, l2_norm: bool) -> list[Tensor]:
    """The reference's outputs and gradients in float64, document by document."""
    x = {name: value.double() for name, value in given.items()}
    raw = x["q"], x["k"]
    scales = [
        torch.rsqrt(y.square().sum(-1, keepdim=True) + 1e-6) if l2_norm else torch.ones_like(y[..., :1]) for y in raw
    ]
    x["q"], x["k"] = (y * r for y, r in zip(raw, scales, strict=True))
    pieces = []
    cuts = documents or (0, grad.shape[1])
    for n, (start, stop) in enumerate(zip(cuts[:-1], cuts[1:], strict=True)):
        row = slice(None) if documents is None else slice(n, n + 1)
        state = x["state"][row]
        if start == stop:
            pieces.append(
                (*(y[:, :0] for y in (grad.double(), *list(x.values())[:5])), state, grad_state.double()[row])
            )
            continue
        part = [y[:, start:stop] for y in list(x.values())[:5]]
        o, final = reference.forward(*part, state, rule="gated_delta", scale=None)
        do = grad[:, start:stop].double()
        *grads, first = reference.backward(do, grad_state.double()[row], *part, state, rule="gated_delta", scale=None)
        pieces.append((o, *grads, final, first))
    o, dq, dk, dv, dg, db = (torch.cat(y, 1) for y in list(zip(*pieces, strict=True))[:6])
    final, first = (torch.cat(y) for y in list(zip(*pieces, strict=True))[6:])
    if l2_norm:
        dq, dk = (
            r * (d - y * (y * d).sum(-1, keepdim=True))
            for r, d, y in zip(scales, (dq, dk), (x["q"], x["k"]), strict=True)
        )
    return [o, final, dq, dk, dv, dg, db, first]


def run(given: dict[str, Tensor], grad: Tensor, grad_state: Tensor, options: dict) -> list[Tensor]:
    found = kernel.forward(**given, **options)
    return [*found, *kernel.backward(grad, grad_state, **given, **options)]


def keeping(module, given: dict[str, Tensor | None], grad: Tensor, grad_state: Tensor | None) -> list[Tensor]:
    """As a training operator: what the forward finds out is kept for the backward."""
    call = given | {"rule": "gated_delta", "scale": None}
    o, final, kept = module.forward_keeping(**call)
    return [o, final, *module.backward(grad, grad_state, **call, kept=kept)]


def check(case) -> bool:
    dtype, *shape, decay, options = case
    torch.manual_seed(1)
    documents, l2_norm = options.get("documents"), options.get("l2_norm", False)
    given = inputs(dtype, shape, decay, documents, l2_norm)
    grad, grad_state = torch.randn_like(given["v"]), torch.randn_like(given["state"])
    call = {name: value for name, value in options.items() if name != "documents"}
    if documents is not None:
        call["cu_seqlens"] = torch.tensor(documents, device="cuda", dtype=torch.int32)
    found = run(given, grad, grad_state, call)
    # Memory that the kernels may forget to write is dirty by now.
    again = run(given, grad, grad_state, call) if call else keeping(kernel, given, grad, grad_state)
    same = all(torch.equal(x, y) for x, y in zip(found, again, strict=True))
    truth = wanted(given, grad, grad_state, documents, l2_norm)
    errors = [float((x.double() - y).norm() / y.norm()) for x, y in zip(found, truth, strict=True)]
    good = same and all(e < LIMITS[dtype] for e in errors)
    text = " ".join(f"{name} {e:.1e}" for name, e in zip(NAMES, errors, strict=True))
    print(
        f"{'ok  ' if good else 'BAD '} {str(dtype)[6:]:8} {shape} {decay} {options}: {text} same bits {same}",
        flush=True,
    )
    return good


def beside_flash_qla() -> None:
    """Our errors and those of the FlashQLA adapter, gradients too, on the same inputs."""
    from hydrasurgery.kernels.linear_attention import flash_qla

    for decay in (0.05, 0.7, 0.002):
        torch.manual_seed(2000)
        given = inputs(torch.bfloat16, (1, 2000, 14, 128, 128), decay)
        grad, state = torch.randn_like(given["v"]), torch.zeros_like(given["state"])
        o, final, *grads, _ = wanted(given | {"state": state}, grad, state, None, False)
        for name, module in (("ours", kernel), ("FlashQLA", flash_qla)):
            found = keeping(module, given | {"state": None}, grad, None)
            pairs = zip(NAMES, found, [o, final, *grads], strict=False)
            text = " ".join(
                f"{part} {float((x.double() - y).norm() / y.norm()):.1e}" for part, x, y in pairs if x is not None
            )
            print(f"errors, decay {decay}, {name}: {text}", flush=True)


def replayed_ms(call: Callable[[], object]) -> float:
    return median_ms(call, torch.device("cuda"), graph=True)


def waited_ms(call: Callable[[], object], repeats: int = 15) -> float:
    """Median of calls that are waited for one by one: the host's time counts."""
    call()
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


def ours(given: dict[str, Tensor], grad: Tensor, back: bool) -> Callable[[], object]:
    call = given | {"state": None}
    return lambda: keeping(kernel, call, grad, None) if back else kernel.forward(**call)


def peer(function, given: dict[str, Tensor], grad: Tensor, back: bool) -> Callable[[], object]:
    """fla's calling convention, which FlashQLA shares."""
    order = ("q", "k", "v", "decay", "beta")
    leaves = [given[name].detach().requires_grad_(back) for name in order]

    def call() -> object:
        o = function(*leaves, scale=None, initial_state=None, output_final_state=True)[0]
        return torch.autograd.grad(o, leaves, grad) if back else o

    return call


def operator(q, k, v, decay, beta, *, scale, initial_state, output_final_state):
    """The operator, with whatever kernels the registry chooses here."""
    return ops.linear_attention(q, k, v, decay, beta, initial_state, scale=scale)


def peers() -> dict[str, Callable]:
    found = {"the operator": operator}
    try:
        from flash_qla import chunk_gated_delta_rule as flash

        found["FlashQLA"] = flash
    except ImportError as error:
        print("no FlashQLA:", error)
    try:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        found["fla"] = inspect.unwrap(chunk_gated_delta_rule)  # else it hands the call to FlashQLA
    except ImportError as error:
        print("no fla:", error)
    return found


def time_all(lengths: list[int], decays: list[float], directions: list[str], others: dict[str, Callable]) -> None:
    print("length direction decay | replayed, waited for: " + " | ".join(["ours", *others]))
    for direction in directions:
        back = direction == "both"
        for length in lengths:
            if back and length > 65536:
                continue
            for decay in decays:
                given = inputs(torch.bfloat16, (1, length, 14, 128, 128), decay)
                grad = torch.randn_like(given["v"])
                calls = {"ours": ours(given, grad, back)}
                calls |= {name: peer(function, given, grad, back) for name, function in others.items()}
                row = []
                for name, call in calls.items():
                    for clock in (replayed_ms, waited_ms):
                        try:
                            row.append(f"{clock(call):.4f}")
                        except Exception as error:
                            print(f"{name} failed: {str(error)[:200]}")
                            row.append("-")
                pairs = " | ".join(map(", ".join, zip(row[::2], row[1::2], strict=True)))
                print(length, direction, decay, "|", pairs, flush=True)


def first_call(back: bool) -> None:
    given = inputs(torch.bfloat16, (1, 4096, 14, 128, 128), 0.1)
    torch.cuda.synchronize()
    start = time.perf_counter()
    ours(given, torch.randn_like(given["v"]), back)()
    torch.cuda.synchronize()
    print(f"first call {'with backward' if back else 'forward'}: {time.perf_counter() - start:.2f} s", flush=True)


def profile() -> None:
    given = inputs(torch.bfloat16, (1, 65536, 14, 128, 128), 0.0001)
    call = ours(given, torch.randn_like(given["v"]), True)
    call()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStart()
    call()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="*", default=[4096, 16384, 65536, 262144, 524288])
    parser.add_argument("--decays", type=float, nargs="*", default=[0.7, 0.02, 0.0001])
    parser.add_argument("--directions", nargs="*", default=["forward", "both"], choices=["forward", "both"])
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--unchecked", action="store_true", help="times only")
    parser.add_argument(
        "--profile", action="store_true", help="one pass at 65,536 tokens and weak decays, nothing else"
    )
    parser.add_argument("--first-call", choices=["forward", "both"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.first_call:
        return first_call(options.first_call == "both")
    if options.profile:
        return profile()
    print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__, flush=True)
    if options.cold:
        for kind in ("forward", "both"):
            with tempfile.TemporaryDirectory() as cache:
                command = [sys.executable, "-m", "tests.gpu.check_linear_attention", "--first-call", kind]
                subprocess.run(command, env=os.environ | {"TRITON_CACHE_DIR": cache}, check=True)
    bad = 0
    for case in [] if options.unchecked else CASES:
        try:
            bad += not check(case)
        except Exception as error:
            bad += 1
            print("BAD ", case, type(error).__name__, str(error)[-300:], flush=True)
    others = peers() if options.peers else {}
    if "FlashQLA" in others:
        beside_flash_qla()
    time_all(options.lengths, options.decays, options.directions, others)
    if bad:
        raise SystemExit(f"{bad} cases are wrong")


if __name__ == "__main__":
    main()

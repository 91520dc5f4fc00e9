"""Launching a call's kernels: compiled together once for each kind of call, with a fixed choice of warps, stages and registers."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
import triton

from hydrasurgery.kernels.linear_attention.triton_call import Call, tokens


class _Launch(NamedTuple):
    """A kernel, its grid of three, its arguments in order, and its constants and compiler's options by name."""

    kernel: triton.JITFunction
    grid: tuple[int, int, int]
    args: tuple
    options: dict


_compiled: dict[tuple, list] = {}
_thread = threading.local()


class Run:
    """A call's kernels, launched in order.

    Triton's own launch looks at every argument to find the compiled kernel, which takes longer than the kernels of a short
    sequence. Here nothing of an argument but its type is compiled in, so the kind of a call finds all its kernels at once; for
    a kind that is new to this process they are compiled first, when all are known.
    """

    def __init__(self, call: Call, *, back: bool, kept: bool) -> None:
        self.call = call
        self.turns = back or kept  # whether M^T is wanted
        self.q, self.k = tokens(call.q, call.keys), tokens(call.k, call.keys)
        self.v = tokens(call.v, call.block)
        types = (call.q.device, call.q.dtype, call.decay.dtype, call.beta.dtype)
        wide = max(*call.decay.stride(), *call.beta.stride()) >= 1 << 31  # such a number has another type
        self.kind = (
            back,
            kept,
            *types,
            call.keys,
            call.values,
            call.l2_norm,
            call.cut.split,
            call.chunk_table is None,
            wide,
        )
        self.compiled = iter(_compiled[self.kind]) if self.kind in _compiled else None
        self.plan: list[_Launch] = []
        self.device = torch.cuda.device_of(call.q)

    def __call__(self, name: str, kernel: triton.JITFunction, grid: tuple, args: tuple, **constants: object) -> None:
        """`name` as `_launch` knows it."""
        if self.compiled is not None:
            ready, values = next(self.compiled)
            ready[grid](*args, *values)
        else:
            self.plan.append(_Launch(kernel, grid, args, self._options(name) | constants))

    def __enter__(self) -> Run:
        self.device.__enter__()
        if self.call.q.is_cuda and not hasattr(_thread, "bound"):
            # Tensor descriptors need the card's context, which a new thread (autograd's) has from its first launch on.
            torch.zeros(1, device=self.call.q.device)
            _thread.bound = True
        return self

    def __exit__(self, error: object, *rest: object) -> None:
        try:
            if error is None and self.plan:
                self._launch_new()
        finally:
            self.device.__exit__(error, *rest)

    def _launch_new(self) -> None:
        if not self.call.q.is_cuda:  # Triton's interpreter
            for kernel, grid, args, options in self.plan:
                kernel[grid](*args, **options)
            return
        _compiled[self.kind] = _compile(self.plan)
        for (ready, values), (_, grid, args, _) in zip(_compiled[self.kind], self.plan, strict=True):
            ready[grid](*args, *values)

    def _options(self, name: str) -> dict:
        """What every kernel takes: sizes, and the fixed choice of warps and stages."""
        call = self.call
        sizes = {
            "K": call.keys,
            "V": call.values,
            "VARLEN": call.chunk_table is not None,
            "PRECISION": "tf32x3" if call.q.dtype == torch.float32 else "tf32",
        }
        return sizes | _launch(name, call.keys, call.q.dtype)


def _compile(plan: list[_Launch]) -> list[tuple]:
    """The compiled kernel and the constants of each launch. Side by side: a cold call waits for the slowest, not for the sum."""
    new = {(x.kernel, *x.options.items()): x for x in plan}.values()
    with ThreadPoolExecutor(len(new)) as pool, triton.AsyncCompileMode(pool):
        for kernel, grid, args, options in new:
            kernel.warmup(*args, grid=grid, **options)
    found = []
    for kernel, grid, args, options in plan:
        values = tuple(options[name] for name in kernel.arg_names[len(args) :])
        found.append((kernel.warmup(*args, grid=grid, **options), values))
    return found


def _launch(name: str, keys: int, dtype: torch.dtype) -> dict[str, int]:
    """The fixed choice of a kernel's stages and registers.

    Always four warps, one group of Hopper's matrix units: with two groups results were seen to change from run to run (a group's
    wait covers its own products only, and tiles that the other still reads are overwritten).
    """
    narrow = keys <= 128 and dtype != torch.float32
    if not narrow:  # Their tiles leave no room to fetch ahead.
        return {"num_warps": 4, "num_stages": 1}
    if name == "prepare":  # One long chain and no loop: with 168 registers three programs share a processor.
        return {"num_warps": 4, "num_stages": 1, "maxnreg": 168}
    # With two stages Triton orders the next tiles after these ones' products, with three in time; but three of the tiles of the
    # walks to outputs and back leave room for one program a processor.
    return {"num_warps": 4, "num_stages": 2 if name in ("outputs", "back") else 3}

"""Launching a Triton kernel in less of the host's time."""

from __future__ import annotations

from typing import Any

import triton
from torch import Tensor

_READY: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


def launch(kernel: triton.JITFunction, grid: tuple[int, int, int], *args: Any, **constants: Any) -> None:
    """`kernel[grid](*args, **constants)`, whose second call of a kind finds what the first one compiled at once.

    Triton's own launch binds and looks at each argument anew, which takes longer than most of these kernels run. A kind is all that
    Triton may compile in: of tensors dtype and alignment, of integers whether they are 1, or multiples of 16, or need 64 bits, and
    the constants.

    Args:
        grid: of three.
        args: the kernel's arguments in order, before its constants: tensors, integers and floats.
        constants: its constants, and the compiler's options.
    """
    first = args[0]
    if not first.is_cuda:  # Triton's interpreter
        kernel[grid](*args, **constants)
        return
    kind = (id(kernel), first.device, *constants.values(), *map(_kind, args))
    found = _READY.get(kind)
    if found is None:
        compiled = kernel[grid](*args, **constants)
        _READY[kind] = compiled, tuple(constants[name] for name in kernel.arg_names[len(args) :])
    else:
        compiled, values = found
        compiled[grid](*args, *values)


def _kind(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.dtype, x.data_ptr() % 16 == 0
    if isinstance(x, int):
        return 1 if x == 1 else (x % 16 == 0, -(1 << 31) <= x < 1 << 31, x >> 63)
    return type(x)

"""Launching a Triton kernel in less of the host's time."""

from __future__ import annotations

from typing import Any

import triton
from torch import Tensor

_INT32 = 1 << 31
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
    kind = (
        id(kernel), first.device, *constants.items(),
        *[(x.dtype, x.data_ptr() % 16 == 0) if isinstance(x, Tensor) else _number(x) for x in args],
    )  # fmt: skip
    found = _READY.get(kind)
    if found is None:
        compiled = kernel[grid](*args, **constants)
        _READY[kind] = compiled, tuple(constants[name] for name in kernel.arg_names[len(args) :])
    else:
        compiled, values = found
        compiled[grid](*args, *values)


def _number(x: int | float) -> Any:
    return float if isinstance(x, float) else 1 if x == 1 else (x % 16 == 0, -_INT32 <= x < _INT32, x < 0)


def cdiv(a: int, b: int) -> int:
    """a / b rounded up. Triton's own takes ten times as long, for it may run inside a kernel."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The first power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()

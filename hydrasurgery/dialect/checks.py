"""What the files of operators share: checks of arguments, and the promises of kernels, fakes and backwards."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def expect(name: str, x: Tensor, shape: tuple[int | None, ...]) -> None:
    """Raise unless x has this shape; None is any size."""
    if x.dim() != len(shape) or any(
        want is not None and have != want for have, want in zip(x.shape, shape, strict=True)
    ):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have shape [{wanted}], found {list(x.shape)}")


def expect_state(name: str, x: Tensor) -> None:
    """Raise unless x can hold a recurrent state: what half precision rounds off at every token adds up."""
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{name} must be float32 or float64, found {x.dtype}")


def check_mask_dtype(mask: Tensor) -> None:
    """Raise for a mask of integers, of which nobody knows whether they are flags or summands."""
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(
            f"mask must be bool (True = may attend) or float (added to the scores), found {mask.dtype}: give mask.bool() if 1 "
            "means that a key may be attended to"
        )


def exact(x: Tensor) -> Tensor:
    """x as its fake kernel promised it: dense, dimensions of size 1 included, and no slice that keeps a larger tensor alive.

    Empty ones too: two slices of one empty tensor would alias each other.
    """
    if x.is_contiguous() and x.storage_offset() == 0 and x.untyped_storage().nbytes() == x.nbytes > 0:
        stride = 1  # as most are; the rest is for slices, and for dimensions of size 1 with another stride
        for size, step in zip(reversed(x.shape), reversed(x.stride()), strict=True):
            if step != stride:
                break
            stride *= size
        else:
            return x
    flat = x.contiguous().reshape(-1)
    whole = flat.nbytes > 0 and flat.untyped_storage().nbytes() == flat.nbytes
    return (flat if whole else flat.clone()).view(x.shape)


def or_empty(x: Tensor | None, like: Tensor) -> Tensor:
    """Operators cannot return None: the gradient of an absent input is an empty tensor, dropped by the caller."""
    return like.new_empty(0) if x is None else exact(x)


def fake_or_empty(x: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if x is None else fake(x)


def fake(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def full_precision(x: Tensor) -> AbstractContextManager[Any]:
    """For kernels: on x's device, and dtypes are those of the arguments."""
    device = x.device
    # Asking takes less time than blocks that change nothing.
    there = device.type != "cuda" or device.index == torch.cuda.current_device()
    if not torch.is_autocast_enabled(device.type):
        return _NOTHING if there else torch.cuda.device(device)
    block = ExitStack()
    block.enter_context(torch.autocast(device.type, enabled=False))
    if not there:
        block.enter_context(torch.cuda.device(device))
    return block


_NOTHING = nullcontext()


def refuse_tangents(*inputs: Tensor | None) -> None:
    """Kernels compute values and nothing else: PyTorch would drop the tangents of forward-mode differentiation without a word.

    Raises:
        NotImplementedError: an input has a tangent.
    """
    if forward_ad._current_level < 0:
        return
    # Inside an operator, some versions of PyTorch can be asked for tangents only with this key let in again.
    left_out = torch._C._dispatch_tls_local_exclude_set().remove(torch._C.DispatchKey.ADInplaceOrView)
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), left_out):
        found = any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in inputs)
    if found:
        raise NotImplementedError(
            "hydra's operators have no forward-mode derivative (torch.func.jvp, jacfwd, hessian, "
            "torch.autograd.forward_ad); use reverse mode: torch.autograd.grad or .backward()"
        )


DERIVATIVES = ("grad", "jvp")  # transforms of torch.func


def refuse_transforms(name: str, *transforms: str) -> None:
    """The operators have no rules for these, and below torch.func's wrappers kernels do not see that there is a tangent.

    Raises:
        NotImplementedError: one of `transforms` (vmap, grad, jvp) is active.
    """
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is None:
        return
    active = {level.key().name.lower() for level in torch._C._functorch.get_interpreter_stack() or ()}
    if found := sorted(active.intersection(transforms)):
        raise NotImplementedError(
            f"{name} does not run under torch.func's {' and '.join(found)}; torch.func.functional_call with "
            "torch.autograd.grad does, sample by sample in a loop where vmap was meant"
        )


def save(ctx: Any, inputs: tuple[Tensor | None, ...], options: dict[str, Any]) -> None:
    ctx.save_for_backward(*inputs)
    ctx.options = options


def given(grads: Sequence[Tensor], inputs: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    return tuple(None if x is None else grad for grad, x in zip(grads, inputs, strict=True))


def lower_under_autocast(name: str, *places: int, told: str | None = None) -> None:
    """Let `hydra::<name>` take these of its arguments in autocast's dtype, together, as PyTorch lowers those of its own attention.

    `told`: an option of the operator that says so. Doubles stay as they are. A dispatch rule and not a cast in the kernel: tracing
    then records the casts, and the fake kernel sees the dtypes of the real one.
    """

    def rule(device_type: str) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            lowered = [x for place, x in enumerate(args) if place in places and x is not None]
            operator = getattr(torch.ops.hydra, name).default
            if all(x.dtype != torch.float64 for x in lowered):
                dtype = torch.get_autocast_dtype(device_type)
                args = tuple(x.to(dtype) if place in places and x is not None else x for place, x in enumerate(args))
                options |= {} if told is None else {told: True}
            with torch.autocast(device_type, enabled=False):
                return operator(*args, **options)

        return call

    for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        _AUTOCAST.impl(name, rule(device_type), key)


_AUTOCAST = torch.library.Library("hydra", "FRAGMENT")

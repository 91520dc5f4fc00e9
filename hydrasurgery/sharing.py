"""Models that share memory until one of them is written to, and which parameters two models have in common."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

# Where all of torch's kernels keep to copy on write. Those of CUDA's foreach and fused optimizers write into the shared memory.
LAZY_DEVICES = ("cpu", "meta")
_SAME_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def share_copy(model: nn.Module) -> nn.Module:
    """A copy of `model` (and of its config) whose parameters and buffers use the model's memory until one of the two is written to.

    The tensors are objects of the copy's own: an optimizer step, a cast, `resize_token_embeddings` or an edit in place of
    either model never reaches the other, which keeps its values. Tensors that alias each other do so in the copy. A tensor
    that is written to moves to memory of its own first, and so does one whose address is asked for (`data_ptr()`, NumPy,
    safetensors, kernels outside of torch).

    Copied at once are tensors of CUDA and other devices (torch's foreach and fused optimizers do not heed copy on write
    there), those whose memory torch has not allocated (weights that safetensors mapped from a file, which is what
    `from_pretrained` gives on the CPU if it casts nothing; NumPy arrays; memory shared between processes), quantised and
    sparse tensors, and subclasses of Tensor.
    """
    return copy.deepcopy(model, _lazy_clones(itertools.chain(model.parameters(), model.buffers())))


def share_parameters(hybrid: nn.Module, teacher: nn.Module) -> set[str]:
    """Let a hybrid that was loaded from disk use its teacher's memory for what it has unchanged from it, in place.

    A parameter with the teacher's name, shape, dtype and bits becomes a lazy copy, as `rewrite` leaves it; ties stay. What
    cannot be copied lazily (see `share_copy`) stays as it is.

    Returns:
        The names of the parameters that share memory now.
    """
    originals = dict(teacher.named_parameters(remove_duplicate=False))
    equal = unchanged_names(hybrid, teacher)
    lazy = _lazy_clones(originals[name] for name in equal)
    clones: dict[int, Tensor] = {}
    for name, parameter in hybrid.named_parameters():
        clone = lazy.get(id(originals[name])) if name in equal else None
        if clone is not None and parameter.device == clone.device:
            clones[id(parameter)] = clone.requires_grad_(parameter.requires_grad)
    shared = set()
    for name, parameter in list(hybrid.named_parameters(remove_duplicate=False)):
        if id(parameter) in clones:
            path, _, key = name.rpartition(".")
            hybrid.get_submodule(path)._parameters[key] = clones[id(parameter)]  # type: ignore[assignment]
            shared.add(name)
    return shared


def unchanged_names(hybrid: nn.Module, teacher: nn.Module | None) -> set[str]:
    """Names of the hybrid's parameters that hold what the teacher's of the same name do: dtype, shape and bits.

    Args:
        hybrid: any model; of parameters tied to each other the first one's name counts.
        teacher: the model it is compared with, on any device; None has nothing in common with it.

    Example:
        >>> import hydrasurgery as hs
        >>> from hydrasurgery.demo.teacher import load_teacher
        >>> teacher, _ = load_teacher()
        >>> hybrid = hs.rewrite(teacher, hs.plan_heads(teacher, strategy="all-linear"))
        >>> added = {name for name, _ in hybrid.named_parameters()} - unchanged_names(hybrid, teacher)
        >>> all(".hydra." in name for name in added)
        True
    """
    originals = {} if teacher is None else dict(teacher.named_parameters(remove_duplicate=False))
    own = hybrid.named_parameters()
    return {name for name, parameter in own if name in originals and same_bits(parameter, originals[name])}


def same_memory(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors read the same numbers from the same place, as one object or as lazy copies."""
    if one.layout != torch.strided or other.layout != torch.strided:
        return one is other
    address: Any = torch._C._data_address  # type: ignore[attr-defined]  # of a lazy copy too, which stays one
    layouts = [(t.device, t.dtype, t.shape, t.stride(), address(t)) for t in (one, other)]
    return layouts[0] == layouts[1]


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors, of whatever devices, have the same dtype, shape and bits. Nothing is written or materialised."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if same_memory(one, other):
        return True
    bits = _SAME_SIZE[one.element_size()]  # of integers: NaN equals itself, and 0.0 differs from -0.0
    return torch.equal(one.detach().view(bits), other.detach().to(one.device).view(bits))


def _lazy_clones(tensors: Iterable[Tensor]) -> dict[int, Any]:
    """A lazy clone of each tensor that can have one, by the tensor's id: a memo for `copy.deepcopy`."""
    storages: dict[int, torch.UntypedStorage] = {}
    found = {}
    for tensor in tensors:
        clone = _lazy_clone(tensor, storages)
        if clone is not None:
            found[id(tensor)] = clone
    return found


@torch.no_grad()
def _lazy_clone(tensor: Tensor, storages: dict[int, torch.UntypedStorage]) -> Tensor | None:
    """A lazy clone, over the lazy copy of its storage in `storages` if there is one; None if the tensor can have none."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided and not tensor.is_quantized
    if not plain or tensor.device.type not in LAZY_DEVICES:
        return None
    key = tensor.untyped_storage()._cdata
    if key not in storages:
        try:
            storages[key] = torch._lazy_clone(tensor.detach()).untyped_storage()
        except RuntimeError:  # memory that torch has not allocated
            return None
    view = tensor.new_empty(0).set_(storages[key], tensor.storage_offset(), tensor.shape, tensor.stride())
    if isinstance(tensor, nn.Parameter):
        view = nn.Parameter(view, tensor.requires_grad)
    vars(view).update(vars(tensor))  # what other libraries note on a tensor
    return view

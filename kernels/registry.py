"""Which kernel runs: one table of what every implementation can do, and a pure choice among them.

`choose` sees only data: the operator, the case at hand and the machine. Nothing is tried out, timed or imported to decide, so
the same case gives the same kernel everywhere, and `hydrasurgery kernels` can print why. A CPU always takes the reference.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch
from packaging.version import Version
from torch import Tensor

from hydrasurgery.kernels.attention.reach import is_reach

FORWARD, BACKWARD, DECODE = "forward", "backward", "decode"
HALF = frozenset({torch.float16, torch.bfloat16})
FLOAT = HALF | {torch.float32}
# Tokens times heads, below which our kernels are faster than FlashQLA's, parts of which take 0.1 ms however few they are. Forward,
# it lies between the 4,096 and the 8,192 tokens of 14 heads that were timed on an H200; with gradients, between 4,096 and 16,384.
FEW_TOKENS = 6144 * 14


@dataclass(frozen=True)
class Package:
    """An optional dependency: its import name, its name on PyPI, the least version, and our extra that installs it."""

    module: str
    distribution: str
    version: str
    extra: str


TRITON = Package("triton", "triton", "3.6", "kernels")
FLA = Package("fla", "flash-linear-attention", "0.6", "kernels")
FLASH_QLA = Package("flash_qla", "flash-qla", "0.1.3", "hopper")
FA3 = Package("fa3_fwd_interface", "fa3-fwd", "0.0.3", "hopper")
FLASH_ATTN = Package("flash_attn", "flash-attn", "2.8", "flash")
PACKAGES = (TRITON, FLA, FLASH_QLA, FA3, FLASH_ATTN)


@dataclass(frozen=True)
class Machine:
    """What a choice needs to know of a machine: device type, CUDA compute capability, and versions by import name."""

    device: str = "cpu"
    capability: tuple[int, int] = (0, 0)
    packages: frozenset[tuple[str, str]] = frozenset()


@dataclass(frozen=True)
class Case:
    """One call, reduced to what a kernel may care about.

    `mode` is forward, backward or decode (a forward of one token); `dtype` that of the heads; `sizes` pairs such as ("K", 128);
    `features` names what the plainest call of the operator lacks: a mask, a state, the rule, ...
    """

    mode: str
    dtype: torch.dtype
    sizes: tuple[tuple[str, int], ...] = ()
    features: frozenset[str] = frozenset()


@dataclass(frozen=True, eq=False)
class Implementation:
    """What one kernel can do. `module` has `forward` and, if that is a mode of it, `backward`, called as the reference's are.

    It may have `forward_keeping` too, a forward for training: what that returns third, a tuple of tensors, its `backward` takes as
    `kept` and does not compute again. Then it has `kept_like` as well, called as the forward is: unfilled tensors of the same
    number, shapes and dtypes, from the shapes and dtypes of the inputs.
    """

    name: str
    module: str
    modes: Collection[str] = (FORWARD, BACKWARD, DECODE)
    dtypes: Collection[torch.dtype] | None = None
    sizes: Mapping[str, Collection[int]] = field(default_factory=dict)
    features: Collection[str] | None = None
    capability: tuple[tuple[int, int], tuple[int, int]] | None = None  # the lowest and highest; None: any device
    package: Package | None = None

    def why_not(self, case: Case, machine: Machine) -> str | None:
        """Why this cannot run `case` on `machine`; None if it can."""
        if self.capability is not None:
            low, high = self.capability
            if machine.device != "cuda":
                return "needs a CUDA device"
            if not low <= machine.capability <= high:
                return (
                    f"needs compute capability {_dotted(low)} to {_dotted(high)}, found {_dotted(machine.capability)}"
                )
        if case.mode not in self.modes:
            return f"has no {case.mode}"
        if self.dtypes is not None and case.dtype not in self.dtypes:
            return f"does not take {_word(case.dtype)}"
        lacking = sorted(case.features - set(self.features)) if self.features is not None else []
        if lacking:
            return f"does not do {', '.join(lacking)}"
        for name, size in case.sizes:
            if name in self.sizes and size not in self.sizes[name]:
                return f"does not take {name} = {size} (only {_listed(self.sizes[name])})"
        return None if self.package is None else missing(self.package, machine)


class Choice(NamedTuple):
    """The implementation that runs, and each other one with the reason why it does not."""

    implementation: Implementation
    others: tuple[tuple[Implementation, str], ...]


def _here(op: str, name: str) -> str:
    return f"{__package__}.{op}.{name}"


def _table() -> dict[str, tuple[Implementation, ...]]:
    ampere, hopper = ((8, 0), (12, 9)), ((9, 0), (9, 9))
    eights = range(8, 257, 8)
    forward, every = (FORWARD, DECODE), (FORWARD, BACKWARD, DECODE)
    chunked = {"gated_delta", "state", "varlen", "few tokens"}
    return {
        "attention": (
            Implementation(
                "fa3", _here("attention", "fa3"), forward, (torch.bfloat16,), {"D": (64, 96, 128, 192, 256)},
                {"softcap", "more keys than queries"}, hopper, FA3,
            ),
            Implementation(
                "triton", _here("attention", "triton"), (DECODE,), FLOAT, {"D": range(1, 257)},
                {"mask", "reach", "sinks", "softcap", "window", "more keys than queries", "a value width of its own"},
                ampere, TRITON,
            ),
            Implementation("sdpa", _here("attention", "sdpa"), every, HALF, {"D": eights}, (), ampere),
            Implementation(
                "flash_attn", _here("attention", "flash_attn"), forward, HALF, {"D": eights},
                {"window", "softcap", "more keys than queries"}, ampere, FLASH_ATTN,
            ),
            Implementation(
                "triton, blocks", _here("attention", "triton_blocks"), (FORWARD, BACKWARD), FLOAT,
                {"D": range(1, 257), "V": range(1, 257)},
                {"reach", "sinks", "softcap", "window", "more keys than queries", "a value width of its own"}, ampere, TRITON,
            ),
            Implementation(
                "sdpa, masked", _here("attention", "sdpa"), forward, FLOAT, {},
                {"mask", "reach", "window", "more keys than queries", "a value width of its own"}, ampere,
            ),
            Implementation(
                "efficient", _here("attention", "efficient"), (BACKWARD,), FLOAT, {"D": eights},
                {"mask", "reach", "window", "more keys than queries"}, ampere,
            ),
            Implementation("reference", _here("attention", "reference")),
        ),
        "linear_attention": (
            Implementation(
                "flash_qla", _here("linear_attention", "flash_qla"), (FORWARD, BACKWARD), HALF,
                {"K": (128,), "V": (128,)}, {"gated_delta", "state", "varlen"}, hopper, FLASH_QLA,
            ),
            Implementation(
                "triton", _here("linear_attention", "triton"), every, HALF,
                {"K": range(1, 257), "V": range(1, 257)}, chunked, ampere, TRITON,
            ),
            Implementation(
                "triton, fp32", _here("linear_attention", "triton"), every, (torch.float32,),
                {"K": range(1, 65), "V": range(1, 257)}, chunked, ampere, TRITON,
            ),
            Implementation(  # Triton 3.8 gives its backward 192 KB of shared memory before 9.0, more than there is.
                "triton, fp32, wide", _here("linear_attention", "triton"), every, (torch.float32,),
                {"K": range(65, 129), "V": range(1, 257)}, chunked, ((9, 0), (12, 9)), TRITON,
            ),
            Implementation(
                "flash_qla, few tokens", _here("linear_attention", "flash_qla"), (FORWARD,), HALF,
                {"K": (128,), "V": (128,)}, {"gated_delta", "state", "varlen", "few tokens"}, hopper, FLASH_QLA,
            ),
            Implementation(
                "fla", _here("linear_attention", "fla"), forward, FLOAT,
                {"K": range(1, 257)}, {"gated_delta", "state", "varlen", "few tokens"}, ampere, FLA,
            ),
            Implementation("reference", _here("linear_attention", "reference")),
        ),
        "causal_conv": (
            Implementation(
                "triton", _here("causal_conv", "triton"), dtypes=FLOAT, sizes={"W": range(1, 17)},
                features={"state", "reset", "padding"}, capability=ampere, package=TRITON,
            ),
            Implementation("reference", _here("causal_conv", "reference")),
        ),
        "head_inputs": (
            Implementation(
                "triton", _here("head_inputs", "triton"), (FORWARD, BACKWARD), FLOAT,
                {"K": range(2, 257, 2), "V": range(2, 257, 2), "W": range(17)}, capability=ampere, package=TRITON,
            ),
            Implementation("reference", _here("head_inputs", "reference"), (FORWARD, BACKWARD)),
        ),
        "head_gates": (
            Implementation(
                "triton", _here("head_gates", "triton"), (FORWARD, BACKWARD), FLOAT, {"H": range(1, 257)},
                capability=ampere, package=TRITON,
            ),
            Implementation("reference", _here("head_gates", "reference"), (FORWARD, BACKWARD)),
        ),
        "scale_norm_fusion": (
            Implementation(
                "triton", _here("scale_norm_fusion", "triton"), dtypes=FLOAT,
                sizes={"D": range(1, 1025), "H": range(1, 129)}, capability=ampere, package=TRITON,
            ),
            Implementation("reference", _here("scale_norm_fusion", "reference")),
        ),
        "decode_step": (
            Implementation(
                "triton", _here("decode_step", "triton"), (DECODE,), FLOAT,
                {"K": range(1, 257), "V": range(1, 257), "W": range(0, 17)}, None, ampere, TRITON,
            ),
            Implementation("reference", _here("decode_step", "reference"), (DECODE,)),
        ),
        "rotate": (
            Implementation(
                "triton", _here("rotate", "triton"), (DECODE,), FLOAT, {"D": range(1, 513), "H": range(1, 129)},
                capability=ampere, package=TRITON,
            ),
            Implementation("reference", _here("rotate", "reference"), (DECODE,)),
        ),
    }  # fmt: skip


IMPLEMENTATIONS = _table()  # by operator, in order of preference; the last is the reference, which takes anything


def choose(op: str, case: Case, machine: Machine) -> Choice:
    """The first implementation of `op` that can run `case` on `machine`, and why each other one does not. Pure.

    Raises:
        ValueError: the operator has no such mode.
    """
    found: Implementation | None = None
    others = []
    for implementation in IMPLEMENTATIONS[op]:
        reason = implementation.why_not(case, machine)
        if reason is None and found is None:
            found = implementation
        else:
            others.append((implementation, reason or f"{found.name} comes first"))  # type: ignore[union-attr]
    if found is None:
        raise ValueError(f"{op} has no {case.mode}: its modes are {', '.join(IMPLEMENTATIONS[op][-1].modes)}")
    return Choice(found, tuple(others))


def machine_of(device: torch.device | str) -> Machine:
    """The machine that `device` is part of, with the versions of the optional packages installed here."""
    device = torch.device(device)
    return _machine(device.type, device.index)


def kernel(op: str, case: Case, device: torch.device) -> ModuleType:
    """The module whose `forward` or `backward` runs `case` on `device`.

    A CUDA call that falls back to the reference is reported once, with the reasons and the extra to install.
    """
    return _kernel(op, case, _machine(device.type, device.index))


@cache
def _kernel(op: str, case: Case, machine: Machine) -> ModuleType:
    choice = choose(op, case, machine)
    if machine.device == "cuda" and choice.implementation.name == "reference" and choice.others:
        reasons = "; ".join(f"{other.name} {reason}" for other, reason in choice.others)
        asks = _running_module()
        first = f", first for {asks}" if asks else ""
        _say(f"hydra::{op} ({case.mode}, {_word(case.dtype)}) runs its plain PyTorch kernel on CUDA{first}: {reasons}")
    return importlib.import_module(choice.implementation.module)


def _running_module() -> str | None:
    """The name of the hybrid's module that is running, found on the stack: so that calls that fall back to nothing pay nothing."""
    frame = sys._getframe()
    while frame is not None:
        region = getattr(frame.f_locals.get("self"), "region", None)
        if isinstance(name := getattr(region, "name", None), str):
            return name
        frame = frame.f_back  # type: ignore[assignment]
    return None


@cache
def _say(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)


@cache
def _machine(kind: str, index: int | None) -> Machine:
    if kind == "cuda" and torch.version.hip is not None:
        kind = "hip"  # PyTorch calls AMD's devices cuda too
    capability = torch.cuda.get_device_capability(index) if kind == "cuda" else (0, 0)
    versions = {package.module: _version(package) for package in PACKAGES}
    return Machine(kind, capability, frozenset((name, found) for name, found in versions.items() if found))


def _version(package: Package) -> str | None:
    """The installed version, without importing it; "0" if the module is there and its version cannot be told."""
    if importlib.util.find_spec(package.module) is None:
        return None
    try:
        return importlib.metadata.version(package.distribution)
    except importlib.metadata.PackageNotFoundError:
        return "0"


def missing(package: Package, machine: Machine) -> str | None:
    found = dict(machine.packages).get(package.module)
    install = f"pip install 'hydrasurgery[{package.extra}]'"
    if found is None:
        return f"needs {package.distribution} ({install})"
    if Version(found) < Version(package.version):
        return f"needs {package.distribution} {package.version} or newer, found {found} ({install})"
    return None


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def _listed(sizes: Collection[int]) -> str:
    if isinstance(sizes, range):
        step = "" if sizes.step == 1 else f" in steps of {sizes.step}"
        return f"{sizes[0]} to {sizes[-1]}{step}"
    return ", ".join(map(str, sizes))


# --- the case of a call -------------------------------------------------------------------------------------------------------


def _case(mode: str, heads: tuple[Tensor, ...], sizes: dict[str, int], features: dict[str, bool]) -> Case:
    dtypes = {x.dtype for x in heads}
    dtype = heads[0].dtype if len(dtypes) == 1 else torch.float64 if torch.float64 in dtypes else torch.float32
    named = frozenset(name for name, used in features.items() if used)
    return Case(mode, dtype, tuple(sizes.items()), named | {"mixed dtypes"} if len(dtypes) > 1 else named)


def attention_case(
    mode: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    *,
    causal: bool,
    window: int | None,
    softcap: float | None,
) -> Case:
    """The case of a `hydra::attention`; one query makes a forward a decode."""
    queries, keys, dim = q.shape[2], k.shape[2], q.shape[3]
    features = {
        "mask": mask is not None and not is_reach(mask),
        "reach": is_reach(mask),
        "sinks": sinks is not None,
        "softcap": softcap is not None,
        "window": mask is None and window is not None and window < keys,
        "more keys than queries": mask is None and causal and 1 < queries != keys,
        "a value width of its own": v.shape[3] != dim,
    }
    mode = DECODE if mode == FORWARD and queries == 1 else mode
    return _case(mode, (q, k, v), {"D": int(dim), "V": int(v.shape[3])}, features)  # symbols in a trace


def linear_attention_case(
    mode: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    state: Tensor | None,
    *,
    rule: str,
    trains: bool = False,
) -> Case:
    """The case of a `hydra::linear_attention`; one token makes a forward a decode.

    `trains`: a `hydra::linear_attention_forward`, which a backward follows. Head sizes that are symbols in a trace become numbers
    here, for a kernel is chosen by them.
    """
    batch, length, heads, keys = q.shape
    mode = DECODE if mode == FORWARD and length == 1 and not trains else mode
    features = {
        rule: True,
        "decay by channel": decay is not None and decay.dim() == 4,
        "state": state is not None,
        "few tokens": mode != DECODE and batch * length * heads < FEW_TOKENS,
    }
    return _case(mode, (q, k, v), {"K": int(keys), "V": int(v.shape[3])}, features)


def causal_conv_case(
    mode: str, x: Tensor, weight: Tensor, state: Tensor | None, reset: Tensor | None, previous: Tensor | None = None
) -> Case:
    """The case of a `hydra::causal_conv`."""
    features = {"state": state is not None, "reset": reset is not None, "padding": previous is not None}
    return _case(mode, (x,), {"W": weight.shape[1]}, features)


def head_inputs_case(mode: str, q: Tensor, v: Tensor, width: int) -> Case:
    """The case of what linear heads read, in a `hydra::linear_heads`; `width` is the convolutions', 0 without."""
    return _case(mode, (q, v), {"K": int(q.shape[3]), "V": int(v.shape[3]), "W": width}, {})


def head_gates_case(mode: str, raw: Tensor, heads: int) -> Case:
    """The case of the gates of a `hydra::linear_heads`."""
    return _case(mode, (raw,), {"H": heads}, {})


def scale_norm_fusion_case(mode: str, o_full: Tensor | None, o_linear: Tensor | None) -> Case:
    """The case of a `hydra::scale_norm_fusion`."""
    given = tuple(o for o in (o_full, o_linear) if o is not None)
    sizes = {"D": given[0].shape[3], "H": sum(o.shape[2] for o in given)}
    return _case(mode, given, sizes, {})


def decode_step_case(q: Tensor, v: Tensor, width: int) -> Case:
    """The case of a `hydra::decode_step`; `width` is the convolutions', 0 without."""
    return _case(DECODE, (q, v), {"K": q.shape[-1], "V": v.shape[-1], "W": width}, {})


def rotate_case(xs: Sequence[Tensor]) -> Case:
    """The case of a `hydra::rotate`."""
    return _case(DECODE, tuple(xs), {"D": xs[0].shape[3], "H": max(x.shape[1] for x in xs)}, {})

"""Compiles every Triton kernel for GPUs, without one: `env -u TRITON_INTERPRET python -m tests.compile_kernels [MODULE...]`.

Triton's interpreter, which the other tests use, sees no types: a variable that is bf16 in one branch and fp32 in the other is an
error only to the compiler. Here the modules' own `forward` and `backward` are called on meta tensors. Triton asks a hook before it
compiles what they launch; the hook notes each request and lets nothing run. Then what was noted is compiled, each request once.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver

from hydrasurgery import kernels
from hydrasurgery.bench.cases import DECODE, Layer
from hydrasurgery.kernels.attention import triton as one_query
from hydrasurgery.kernels.attention import triton_blocks as many
from hydrasurgery.kernels.causal_conv import triton as conv
from hydrasurgery.kernels.decode_step import triton as decode
from hydrasurgery.kernels.head_gates import triton as gates
from hydrasurgery.kernels.head_inputs import triton as inputs
from hydrasurgery.kernels.linear_attention import triton as linear
from hydrasurgery.kernels.linear_attention import triton_walks
from hydrasurgery.kernels.registry import BACKWARD, Case, Machine, choose
from hydrasurgery.kernels.rotary import TURNS
from hydrasurgery.kernels.rotate import triton as turning
from hydrasurgery.kernels.scale_norm_fusion import triton as fusion

LAST = "llir"  # the compiler's stage that finds the shared memory; those after it are left out
# By compute capability, the bytes of shared memory that a program may have. No card that is offered the kernels has less than 8.6.
SHARED = {90: 227 << 10, 86: 99 << 10}
DTYPES = torch.bfloat16, torch.float32


# --- what is compiled: calls in the place of a user's, on meta tensors -------------------------------------------------------


def linear_attention() -> None:
    half, single = DTYPES
    sizes = [(half, 64, 64), (half, 128, 128), (half, 256, 256), (half, 64, 128), (single, 64, 64), (single, 128, 128)]
    card = driver.active.get_current_device()
    for (dtype, keys, values), packed in product(sizes, (True, False)):
        case = Case(BACKWARD, dtype, (("K", keys), ("V", values)), frozenset({"gated_delta"}))
        machine = Machine("cuda", divmod(card, 10), frozenset({("triton", triton.__version__)}))
        if not choose("linear_attention", case, machine).implementation.name.startswith("triton"):
            continue
        q, k, v = (torch.empty(1, 512, 2, size, dtype=dtype) for size in (keys, keys, values))
        decay, beta = torch.empty(1, 512, 2), torch.empty(1, 512, 2, dtype=dtype)
        given = q, k, v, decay, beta, torch.empty(1, 2, keys, values)
        documents = torch.empty(2, dtype=torch.int32) if packed else None
        options = {"cu_seqlens": documents, "l2_norm": packed, "segment": 128}
        linear.backward(*linear.forward(*given, **options), *given, **options)


def scale_norm_fusion() -> None:
    for dtype, norm_full, width, (full, of_linear) in product(
        DTYPES, (False, True), (None, 1, 64), ((2, 0), (0, 2), (2, 2), (40, 60))
    ):
        o_full, o_linear = (torch.empty(1, 100, n, 64, dtype=dtype) if n else None for n in (full, of_linear))
        gate = torch.empty(1, 100, of_linear, width, dtype=dtype) if width and of_linear else None
        given = o_full, o_linear, torch.empty(full + of_linear if norm_full else of_linear), gate
        options = {"linear_heads": range(of_linear), "norm_full": norm_full, "eps": 1e-6}
        fusion.backward(fusion.forward(*given, **options), *given, **options)


def decode_step() -> None:
    flags: dict[str, Any] = dict.fromkeys(("valid", "reset"), torch.empty(1, dtype=torch.bool))
    tables: dict[str, Any] = dict.fromkeys(("cos", "sin"), torch.empty(1, 32))
    plain: dict[str, Any] = {"gate": None, "A_log": None, "dt_bias": None, "conv_weights": (), "conv_states": ()}
    for dtype, dim in product(DTYPES, (64, 128)):
        given = DECODE.inputs(Layer(linear=2, dim=dim), 1, torch.device("meta"), dtype)
        for change in ({}, flags, plain, *({**flags, **tables, "turn": turn} for turn in TURNS)):
            decode.forward(**given | change, scale=None, eps=1e-6)


def attention_of_one_query() -> None:
    for dtype, mask in product(DTYPES, (None, torch.bool, torch.float32, torch.int32)):
        q, k, v = (torch.empty(1, *shape, 128, dtype=dtype) for shape in ((4, 1), (2, 1000), (2, 1000)))
        if mask is None:
            one_query.forward(q, k, v, None, torch.empty(4), scale=None, causal=True, window=70, softcap=5.0)
        else:
            seen = torch.empty(1, 1, 1, 1001 if mask == torch.int32 else 1000, dtype=mask)
            one_query.forward(q, k, v, seen, None, scale=None, causal=True, window=None, softcap=None)


def attention_of_many_queries() -> None:
    many._tiles = lambda q, width, backward=False: many._fit(
        divmod(driver.active.get_current_device(), 10), q.dtype == torch.float32, width, backward
    )
    for dtype, dim in [(DTYPES[0], 64), (DTYPES[0], 128), (DTYPES[0], 256), (DTYPES[1], 64), (DTYPES[1], 128)]:
        q, k, v, grad = (torch.empty(1, *shape, dim, dtype=dtype) for shape in ((4, 200), (2, 200), (2, 200), (200, 4)))
        plain: dict[str, Any] = {"scale": None, "causal": True, "window": None, "softcap": None}
        many.backward(grad, q, k, v, torch.empty(1, 1, 1, 201, dtype=torch.int32), torch.empty(4), **plain)
        if dim == 128:
            many.backward(grad, q, k, v, None, None, **plain | {"window": 70, "softcap": 5.0})


def causal_conv() -> None:
    for dtype, with_state, with_reset, padding in product(DTYPES, *[(False, True)] * 3):
        x, weight = torch.empty(2, 70, 48, dtype=dtype), torch.empty(48, 4, dtype=dtype)
        state = torch.empty(2, 48, 3, dtype=dtype) if with_state else None
        reset = torch.empty(2, 70, dtype=torch.bool) if with_reset else None
        previous = torch.empty(2, 71, dtype=torch.int64) if padding else None
        conv.backward(*conv.forward(x, weight, state, reset, previous), x, weight, state, reset, previous)


def head_inputs() -> None:
    for dtype, masked, turn, values in [
        (DTYPES[0], False, "half", 64),
        (DTYPES[0], True, "pairs", 32),
        (DTYPES[1], True, "half-back", 64),
        (DTYPES[1], False, None, 64),
    ]:
        heads = [torch.empty(2, 3, 70, dim, dtype=dtype) for dim in (64, 64, values)]
        if turn is None:  # a stride of 1 is a constant to Triton
            heads = [x[:1].as_strided((1, *x.shape[1:]), (1, *x.stride()[1:])) for x in heads]
        weights = [torch.empty(3 * x.shape[3], 4, dtype=dtype) for x in heads]
        states = [torch.empty(2, 3 * x.shape[3], 3, dtype=dtype) if masked else None for x in heads]
        reset = torch.empty(2, 70, dtype=torch.bool) if masked else None
        previous = torch.empty(2, 71, dtype=torch.int64) if masked else None
        tables = [torch.empty(1, 1, 70, 32 if masked else 64, dtype=dtype) if turn else None for _ in range(2)]
        given, options = (heads, weights, states, reset, previous, *tables), {"turn": turn or "half"}
        results, tails = inputs.forward(*given, **options)
        grads = [part.squeeze(0) for stack in results for part in stack.split(1)]
        inputs.backward(grads, tails if masked else None, *given, **options)


def step_heads() -> None:
    for dtype, gated in product(DTYPES, (False, True)):
        q, k = torch.empty(2, 6, 64, dtype=dtype), torch.empty(2, 3, 64, dtype=dtype)
        hidden, weights = torch.empty(2, 200, dtype=dtype), [torch.empty(4, 200, dtype=dtype) for _ in range(3)]
        heads, flags = torch.empty(4), torch.empty(2, dtype=torch.bool)
        gates_of = (weights[0], heads, heads, weights[1], heads, weights[2] if gated else None, heads)
        convs = [torch.empty(256, 4, dtype=dtype)] * 3 if gated else []
        pasts = [torch.empty(2, 256, 3, dtype=dtype) for _ in convs]
        full = torch.empty(2, 2, 64, dtype=dtype) if gated else None
        known = (flags, flags) if gated else (None, None)
        decode.forward_heads(
            hidden, q, k, k, full, *gates_of, convs, torch.empty(2, 4, 64, 64), pasts, *known, None, None,
            q_heads=range(4), kv_heads=[0, 0, 1, 1], slots=range(4), scale=None, eps=1e-6,
        )  # fmt: skip


def rotate() -> None:
    for dtype, (name, heads) in product(DTYPES, zip(TURNS, (2, 1, 3), strict=True)):
        table = torch.empty(1, 1, 1, 32, dtype=dtype)
        xs = [torch.empty(1, count, 1, 64, dtype=dtype) for count in (heads, 1)]
        turning.forward(xs, table, table, turn=name)


def head_gates() -> None:
    for dtype, masked, gated in product(DTYPES, (False, True), (False, True)):
        raw, parameters = torch.empty(2, 70, 24, dtype=dtype), [torch.empty(6 if gated else 9) for _ in range(3)]
        flags = [torch.empty(2, 70, dtype=torch.bool) if masked else None for _ in range(2)]
        gates.backward(*gates.forward(raw, *parameters, *flags, gated=gated), raw, *parameters, *flags)


def attention() -> None:
    attention_of_one_query()
    attention_of_many_queries()


def one_token() -> None:
    decode_step()
    step_heads()


CALLS: dict[str, Callable[[], None]] = {
    "linear_attention": linear_attention,
    "scale_norm_fusion": scale_norm_fusion,
    "decode_step": one_token,
    "rotate": rotate,
    "attention": attention,
    "causal_conv": causal_conv,
    "head_inputs": head_inputs,
    "head_gates": head_gates,
}


# --- how -----------------------------------------------------------------------------------------------------------------------


class Card(DriverBase):
    """All that Triton asks of a machine until a kernel is loaded. The device's number is its compute capability."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    @classmethod
    def is_active(cls) -> bool:
        return True

    def _no_machine(self, *_: object) -> Any:
        raise RuntimeError("there is no GPU here: kernels are compiled, not run")

    get_active_torch_device = get_benchmarker = map_python_to_cpp_type = _no_machine


class Request(NamedTuple):
    """A kernel to compile for a card: its module and name, and Triton's own account of types and constants, in JSON."""

    capability: int
    module: str
    name: str
    specialization: str

    @property
    def kernel(self) -> triton.JITFunction:
        return getattr(sys.modules[self.module], self.name)

    def __str__(self) -> str:
        found = json.loads(self.specialization)
        names = (self.kernel.arg_names[place] for (place,) in found["constant_keys"])
        constants = ", ".join(f"{name}={value}" for name, value in zip(names, found["constant_vals"], strict=True))
        return f"{self.module}:{self.name}[{constants}] for {self.capability / 10}"


def requests(capability: int, modules: list[str]) -> list[Request]:
    """What `CALLS` would have compiled on such a card, of the kernels in these modules."""
    noted: dict[Request, None] = {}

    def note(*, fn: Any, compile: dict[str, Any], **_: object) -> bool:
        if fn.module in modules:
            noted[Request(capability, fn.module, fn.name, compile["specialization_data"])] = None
        return True  # True: neither compile nor launch

    driver.set_active(Card(capability))
    triton_walks._holds_maps = lambda device: capability == 90
    triton.knobs.runtime.jit_cache_hook = note
    with torch.device("meta"):
        for op, call in CALLS.items():
            if any(module.split(".")[-2] == op for module in modules):
                call()
    triton.knobs.runtime.jit_cache_hook = None
    return list(noted)


def failure(request: Request) -> str | None:
    """The compiler's message, if it has one."""

    def nothing(module: object, metadata: dict[str, Any]) -> bytes:
        metadata.update({"name": request.name, "shared": 0} | metadata)
        return b""

    def end(backend: object = None, stages: dict[str, Callable] | None = None, *_: object) -> tuple[str, str]:
        """Triton's hook, called twice: with the stages, to change them; bare, for what the cache's key has to add."""
        if stages is not None:
            names = list(stages)
            stages.update(dict.fromkeys(names[names.index(LAST) + 1 :], nothing))
        return LAST, LAST

    driver.set_active(Card(request.capability))
    triton.knobs.runtime.add_stages_inspection_hook = end
    try:
        shared = request.kernel.preload(request.specialization).metadata.shared
    except Exception as error:  # whatever it is, it is the kernel's
        return f"{type(error).__name__}: {error}"
    given = SHARED[request.capability]
    return f"{shared} bytes of shared memory, of {given}" if shared > given else None


def forgotten(noted: list[Request], wanted: list[str]) -> list[str]:
    """Kernels of the wanted modules that no call launched. A function that another one calls is a part of that."""
    launched = {(request.module, request.name) for request in noted}
    found = []
    for folder in sorted({name.split(".")[-2] for name in wanted}):
        modules = [importlib.import_module(name) for name in kernel_modules() if name.split(".")[-2] == folder]
        functions = {x for module in modules for x in vars(module).values() if isinstance(x, triton.JITFunction)}
        for module, name in sorted((function.module, function.__name__) for function in functions):
            inner = any(x.__name__ != name and re.search(rf"\b{name}\(", x.src) for x in functions)
            if module in wanted and not inner and (module, name) not in launched:
                found.append(f"{module}:{name}: no call here launches it")
    return found


def kernel_modules() -> list[str]:
    """The modules that define functions of Triton's."""
    folder = Path(kernels.__path__[0])
    paths = sorted(path for path in folder.glob("*/*.py") if "@triton.jit" in path.read_text(encoding="utf-8"))
    return [f"{kernels.__name__}.{path.parent.name}.{path.stem}" for path in paths]


def main(modules: list[str]) -> None:
    os.environ["DISABLE_LLVM_OPT"] = "1"  # LLVM's optimiser takes whatever is LLVM
    triton.knobs.compilation.disable_line_info = True  # messages name the line without it
    noted = [request for capability in SHARED for request in requests(capability, modules)]
    failures: dict[tuple[str, str, str], list[Request]] = {}
    for request in noted:
        message = failure(request)
        if message is not None:
            failures.setdefault((request.module, request.name, message), []).append(request)
    missing = forgotten(noted, modules)
    for (_, _, message), alike in failures.items():
        print(f"{alike[0]}, and {len(alike) - 1} more:\n{message}\n")
    print(*missing, f"{len(noted)} compilations, {sum(map(len, failures.values()))} failures", sep="\n")
    sys.exit(bool(failures or missing))  # what is only called by other kernels is compiled as a part of them


if __name__ == "__main__":
    main(sys.argv[1:] or kernel_modules())

"""What one layer of a compiled decoding step launches: `python -m tests.decode_launches [backend ...]`.

The static cache's step of one token is compiled for the CPU, and what Inductor's scheduler is left with is counted: the difference
of models of three layers and of two. On a GPU each entry is a launch or more.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch._inductor import config
from transformers import StaticCache

import hydrasurgery as hs
from tests.families import tiny
from tests.test_families import stir

KINDS = {"teacher": ("full",) * 4, "half of the heads linear": ("linear",) * 2 + ("full",) * 2, "all": ("linear",) * 4}


class Counted(BaseException):
    """Ends a compilation, once it is known what it would write; no `except Exception` on the way out takes it for a failure."""


MINE = ("MultiOutput", "MutationOutput", "NoneLayout")  # nodes that only name what another one made


@functools.cache
def decoder(kinds: tuple[str, ...], layers: int) -> Any:
    """A tiny qwen3 whose heads are of these kinds in each layer; the teacher itself if all are full."""
    model = tiny("qwen3", num_hidden_layers=layers)
    if "linear" not in kinds:
        return model
    plan = hs.plan_heads(model, strategy="all-linear")
    plan = replace(plan, layers=tuple(replace(layer, kinds=kinds) for layer in plan.layers))
    return stir(hs.rewrite(model, plan))


@torch.no_grad()
def launches(model: Any, backend: str) -> Counter[str]:
    """What a step of one token is made of: products and operators by name, and "Inductor" for its own kernels."""
    found: Counter[str] = Counter()

    def look(nodes: list[Any]) -> list[Any]:
        for node in nodes:
            kind = type(node).__name__
            inner: Any = getattr(node, "node", None)
            if kind == "ExternKernelSchedulerNode" and type(inner).__name__ not in MINE:
                found[
                    str(inner.op_overload or inner.python_kernel_name).removesuffix(".out").removesuffix(".default")
                ] += 1
            elif kind not in ("ExternKernelSchedulerNode", "NopKernelSchedulerNode"):
                found["Inductor"] += 1
        raise Counted

    torch._dynamo.reset()
    cache = StaticCache(config=model.config, max_cache_len=16)
    ids = torch.arange(3, 10)[None]
    model(ids, past_key_values=cache)
    with config.patch(_post_fusion_custom_pass=look, fx_graph_cache=False), contextlib.suppress(Counted):
        torch.compile(model, backend=backend, fullgraph=True)(ids[:, :1], past_key_values=cache)
    torch._dynamo.reset()
    return found


def a_layer(kinds: tuple[str, ...], backend: str, number: int = 3) -> Counter[str]:
    """The launches of the layer of this number: of that many layers, less those of one fewer."""
    with_it, without = (launches(decoder(kinds, layers), backend) for layers in (number, number - 1))
    return with_it - without


if __name__ == "__main__":
    for backend in sys.argv[1:] or ("inductor", "hydra"):
        for name, kinds in KINDS.items():
            layer = a_layer(kinds, backend)
            parts = ", ".join(f"{count} {what}" for what, count in sorted(layer.items()))
            print(f"| {backend} | {name} | {layer.total()} | {parts} |", flush=True)

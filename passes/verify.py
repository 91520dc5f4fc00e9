"""What holds of every region at all times, and the shapes of its nodes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode

from hydrasurgery.errors import PassError
from hydrasurgery.regions import Region

SIZES = ({"B": 5, "T": 13}, {"B": 7, "T": 17})


def verify(region: Region, after: str, original_parameters: set[str]) -> None:
    """Raise PassError, naming the pass, unless the region's invariants hold.

    Head kinds cover every head; the graph is well formed and each child it calls exists; every parameter that the
    region had is present under its name; additions live under `hydra`.
    """

    def fail(message: str) -> None:
        raise PassError(f"{after}: {region.name}: {message}")

    region.graph.lint()
    if len(region.kinds) != region.num_heads or set(region.kinds) - {"full", "linear"}:
        fail(f"kinds {region.kinds} do not name one kind for each of {region.num_heads} heads")
    present = {n for n, _ in region.module.named_parameters()}
    lost = original_parameters - present
    if lost:
        fail(f"parameters vanished: {', '.join(sorted(lost))}")
    stray = {n for n in present - original_parameters if not n.startswith("hydra.")}
    if stray:
        fail(f"new parameters outside hydra: {', '.join(sorted(stray))}")
    for node in region.graph.nodes:
        if node.op == "call_module":
            try:
                region.module.get_submodule(node.target)
            except AttributeError:
                fail(f"the graph calls {node.target}, which the region does not have")


def infer_shapes(region: Region, known: dict[str, list[Any]] | None = None) -> None:
    """Write each node's shape to `node.meta["shape"]`, batch and length by name (B, T), by two runs on fake tensors.

    `known` remembers the shapes of a graph over parameters of certain shapes, so that equal layers are run once.
    """
    known = {} if known is None else known
    key = f"{region.graph}{[(n, tuple(p.shape)) for n, p in region.module.named_parameters()]}"
    if key not in known:
        _infer(region)
        known[key] = [node.meta["shape"] for node in region.graph.nodes]
    for node, shape in zip(region.graph.nodes, known[key], strict=True):
        node.meta["shape"] = shape


def _infer(region: Region) -> None:
    first, second = (_run_fake(region, sizes) for sizes in SIZES)
    for node in region.graph.nodes:
        a, b = first.get(node), second.get(node)
        node.meta["shape"] = (
            tuple(_name(x, y) for x, y in zip(a.shape, b.shape, strict=True))
            if isinstance(a, Tensor) and isinstance(b, Tensor)
            else None
        )


def _name(a: int, b: int) -> str | int:
    if a == b:
        return a
    for name in ("B", "T"):
        if (a, b) == (SIZES[0][name], SIZES[1][name]):
            return name
    return f"{a}..{b}"


def run_random(region: Region, seed: int = 0) -> Tensor:
    """What the region's graph gives for random inputs of 2 sequences of 7 tokens, the same for equal seeds: [2, 7, C]."""
    generator = torch.Generator().manual_seed(seed)

    def make(shape: list[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        if dtype == torch.bool:
            return torch.ones(shape, dtype=dtype, device=device).tril()
        return torch.randn(shape, generator=generator).to(device, dtype)

    with torch.no_grad():
        arguments = _arguments(region, {"B": 2, "T": 7}, make)
        output = fx.Interpreter(region.module, graph=region.graph).run(*arguments, enable_io_processing=False)
    return output if isinstance(output, Tensor) else output[0]


def _run_fake(region: Region, sizes: dict[str, int]) -> dict[fx.Node, Any]:
    values: dict[fx.Node, Any] = {}

    class Record(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            values[n] = super().run_node(n)
            return values[n]

    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        arguments = _arguments(
            region, sizes, lambda shape, dtype, device: torch.empty(shape, dtype=dtype, device=device)
        )
        fake = Record(region.module, garbage_collect_values=False, graph=region.graph)
        try:
            fake.run(*arguments, enable_io_processing=False)
        except Exception as error:
            raise PassError(f"{region.name}: the graph does not run on shapes {sizes}: {error}") from error
    return values


def _arguments(
    region: Region, sizes: dict[str, int], make: Callable[[list[int], torch.dtype, torch.device], Tensor]
) -> list[Tensor | None]:
    """A tensor for each of the graph's inputs, with `sizes` for its named dimensions; None for a cache layer."""
    like = next(region.module.parameters())
    arguments: list[Tensor | None] = []
    for node in region.graph.nodes:
        if node.op == "placeholder":
            shape = node.meta.get("shape")
            if shape is None:
                arguments.append(None)
                continue
            shape = [sizes.get(s, s) if isinstance(s, str) else s for s in shape]
            dtype = torch.bool if len(shape) == 4 and "mask" in node.name else like.dtype
            arguments.append(make(shape, dtype, like.device))
    return arguments

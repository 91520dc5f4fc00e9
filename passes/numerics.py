"""What a region gives for random inputs, before and after a pass."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from hydrasurgery.ir.region import Region

SIZES = {"B": 2, "T": 7}


def run_random(region: Region, seed: int = 0) -> Tensor:
    """What the graph gives for random inputs of 2 sequences of 7 tokens, the same for equal seeds: [2, 7, C]."""
    generator = torch.Generator().manual_seed(seed)
    inputs: list[Tensor | None] = []
    for node in region.graph.nodes:
        if node.op == "placeholder":
            shape = node.meta.get("shape")
            inputs.append(None if shape is None else _random(region, [SIZES.get(s, s) for s in shape], node, generator))
    with torch.no_grad():
        output = fx.Interpreter(region.module, graph=region.graph).run(*inputs, enable_io_processing=False)
    return output if isinstance(output, Tensor) else output[0]


def _random(region: Region, shape: list[int], node: fx.Node, generator: torch.Generator) -> Tensor:
    dtype = input_dtype(region, node)
    if dtype == torch.bool:
        return torch.ones(shape, dtype=torch.bool, device=region.device).tril()
    if not dtype.is_floating_point:
        return torch.zeros(shape, dtype=dtype, device=region.device)
    return torch.randn(shape, generator=generator).to(region.device, dtype)


def input_dtype(region: Region, node: fx.Node) -> torch.dtype:
    """An input's dtype: what capture noted of it if that is no float's, and the region's for all others."""
    noted: torch.dtype = getattr(torch, node.meta.get("dtype", ""), region.dtype)
    return noted


def compare(before: Tensor, after: Tensor, tolerance: float) -> None:
    """Raise ValueError if `after` differs from `before` by more than `tolerance` of the largest number."""
    error = ((after - before).abs().max() / before.abs().max().clamp_min(torch.finfo(before.dtype).tiny)).item()
    if not error <= tolerance:
        raise ValueError(
            f"the pass changed the region's outputs by {error:.2g} of the largest; {tolerance:.2g} is allowed"
        )

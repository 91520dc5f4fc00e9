"""Taps: for the time of a block each attention runs in a module of its own, where hooks read and change heads."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from hydrasurgery.dialect.names import ATTENTION
from hydrasurgery.errors import UnsupportedModelError
from hydrasurgery.ir.capture import capture
from hydrasurgery.ir.interface import using_hydra_attention
from hydrasurgery.ir.stitch import region_modules, replace_module, stitch


class HeadTap(nn.Module):
    """A region's attention node as a module, for hooks on q, k, v, mask and sinks and on what the heads give."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, sinks: Tensor | None = None, **options: Any
    ) -> Tensor:
        """`hydra::attention`."""
        return ATTENTION(q, k, v, mask, sinks, **options)


@contextlib.contextmanager
def head_taps(model: nn.Module, example_inputs: Any = None) -> Iterator[dict[str, HeadTap]]:
    """For the time of the block the attention of every attention module runs in a `HeadTap` of its own.

    Forward hooks on a tap read the heads' outputs [B, T, H, D] or, by returning a tensor, replace them; pre-hooks do the same
    with q, k, v and the mask. A hook may return more rows than it got: the new ones go on with the hidden states of row 0.

    Args:
        model: a decoder with all heads full, not a hybrid.
        example_inputs: see `hydrasurgery.capture`.

    Yields:
        The taps, by the attention module's name.

    Raises:
        UnsupportedModelError: the model is a hybrid, or one that cannot be captured.

    Example:
        >>> import hydrasurgery as hs
        >>> from hydrasurgery.demo.teacher import load_teacher
        >>> teacher, tokenizer = load_teacher()
        >>> shapes = []
        >>> with hs.head_taps(teacher) as taps:
        ...     tap = taps["model.layers.0.self_attn"]
        ...     _ = tap.register_forward_hook(lambda tap, inputs, heads: shapes.append(tuple(heads.shape)))
        ...     _ = teacher(torch.ones(2, 5, dtype=torch.long))
        >>> shapes
        [(2, 5, 16, 16)]
    """
    originals: dict[str, nn.Module] = {}
    stitched = region_modules(model)
    if stitched:
        raise UnsupportedModelError("head_taps reads the model before the rewrite; pass the teacher")
    regions = capture(model, example_inputs)
    taps = {}
    for region in regions:
        taps[region.name] = region.module.hydra.tap = HeadTap()
        _put_tap(region.graph, region.find(ATTENTION)[0])
        region.recompile()
        originals[region.name] = model.get_submodule(region.name)
    try:
        with using_hydra_attention(model):
            stitch(model, regions)
        yield taps
    finally:
        for name, original in originals.items():
            replace_module(model, name, original)


def _put_tap(graph: fx.Graph, attention: fx.Node) -> None:
    """Call the tap instead of the attention, and let all that is used after it have as many rows as its output."""
    with graph.inserting_after(attention):
        tap = graph.call_module("hydra.tap", attention.args, attention.kwargs)
    attention.replace_all_uses_with(tap)
    graph.erase_node(attention)
    nodes = list(graph.nodes)
    place = nodes.index(tap)
    for node in nodes[:place]:
        size = node.target == torch.ops.aten.sym_size.int and node.args[1] == 0
        used = [user for user in nodes[place + 1 :] if node in user.all_input_nodes]
        if used and (size or (node.meta.get("shape") or ())[:1] == ("B",)):
            with graph.inserting_after(tap):
                follower = (
                    graph.call_function(node.target, (tap, 0)) if size else graph.call_function(_grow, (node, tap))
                )
            for user in used:
                user.replace_input_with(node, follower)


def _grow(x: Tensor, like: Tensor) -> Tensor:
    """x with row 0 repeated until it has as many rows as `like`."""
    return x if len(x) == len(like) else torch.cat([x, x[:1].expand(len(like) - len(x), *x.shape[1:])])

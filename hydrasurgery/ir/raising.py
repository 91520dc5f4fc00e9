"""Raising: what a model's code calls attention becomes one `hydra::attention` node."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from hydrasurgery.dialect.names import ATTENTION, SDPA
from hydrasurgery.errors import UnsupportedModelError
from hydrasurgery.ir.graphs import remove_unused
from hydrasurgery.ir.region import HIDDEN


def raise_attention(name: str, graph: fx.Graph) -> bool:
    """Rewrite the region's attention to one `hydra::attention` node; says whether anything changed."""
    modified = False
    for node in graph.find_nodes(op="call_function", target=SDPA):
        _raise_sdpa(name, graph, node)
        modified = True
    for node in graph.find_nodes(op="call_function", target=ATTENTION):
        modified |= _plain_mask(node)
        _check(name, graph, node)
    remove_unused(graph)
    return modified


BOTH_WAYS = "{name} attends in both directions ({why}); only decoders are supported"


def _check(name: str, graph: fx.Graph, node: fx.Node) -> None:
    """Refuse attention that is not causal, or whose mask is not one for all heads that the call gives."""
    if node.kwargs.get("causal") is False:
        raise UnsupportedModelError(BOTH_WAYS.format(name=name, why="it is told is_causal=False"))
    mask = node.args[3] if len(node.args) > 3 else None
    if not isinstance(mask, fx.Node):
        return
    if any(n.meta.get("role") == HIDDEN for n in _tensors_above(mask)):
        raise UnsupportedModelError(
            f"{name} computes its mask from the hidden states: which token sees which is not fixed"
        )
    if (mask.meta.get("shape") or (1, 1))[1] != 1:
        raise UnsupportedModelError(f"{name} has a mask {list(mask.meta['shape'])} of its own for each head")


def _tensors_above(node: fx.Node) -> list[fx.Node]:
    """The node and the tensors that its values, and not only its sizes, are computed from."""
    found = [node]
    for tensor in found:
        found += (n for n in tensor.all_input_nodes if n.meta.get("shape") is not None and n not in found)
    return found


def _raise_sdpa(name: str, graph: fx.Graph, node: fx.Node) -> None:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    mask = given.get("attn_mask")
    if not given.get("is_causal", False) and mask is None:
        raise UnsupportedModelError(BOTH_WAYS.format(name=name, why="is_causal=False and no mask"))
    q, k, v = given["query"], given["key"], given["value"]
    b, heads, length, _ = q.meta["shape"]
    with graph.inserting_before(node):
        if mask is not None:
            for _ in range(4 - len(mask.meta["shape"])):
                shape = mask.meta["shape"]
                mask = graph.call_function(torch.ops.aten.unsqueeze.default, (mask, 0))
                mask.meta["shape"] = (1, *shape)
        op = graph.call_function(ATTENTION, (q, k, v, mask), {"scale": given.get("scale")})
        op.meta["shape"] = (b, length, heads, v.meta["shape"][3])
        back = graph.call_function(torch.ops.aten.transpose.int, (op, 1, 2))
        back.meta["shape"] = node.meta["shape"]
    node.replace_all_uses_with(back)
    graph.erase_node(node)


def _plain_mask(node: fx.Node) -> bool:
    """Undo slicing of the mask between the call and the op: the mask that the call gets already is the op's."""
    mask = node.args[3] if len(node.args) > 3 else None
    start = mask
    while isinstance(mask, fx.Node) and mask.op == "call_function" and mask.target == torch.ops.aten.slice.Tensor:
        mask = mask.args[0]
    if mask is start:
        return False
    node.update_arg(3, mask)
    return True

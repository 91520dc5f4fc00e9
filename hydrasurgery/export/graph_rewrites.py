"""Rewrites of the graph that `torch.compile` captured; each says how many nodes it changed.

They see sizes where they are known, and weights as inputs. All but `sum_linears`, which sums in another order, are exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hydrasurgery.dialect.names import ATTENTION
from hydrasurgery.ir.graphs import ancestors, arguments
from hydrasurgery.kernels.attention.reach import OPEN, is_reach, parts
from hydrasurgery.kernels.attention.reference import visible_keys

# Tokens: a mask whose formula holds a larger number is left as it is, for trying it would need too much memory.
LARGEST = 8192
# A projection of few tokens to THIN times fewer channels than it reads: its launch costs more than its sums.
FEW_TOKENS, THIN = 8, 16
TALL = 65536  # rows of a weight whose product fills a card even for one token: a vocabulary's


def drop_causal_masks(graph: fx.GraphModule) -> int:
    """An attention whose mask is the causal one, whatever the sizes, gets `causal=True` in its place; returns how many did.

    A mask that depends only on sizes is computed for short sequences and for some longer than every number in its formula,
    and compared. Kernels skip what a causal flag hides, and the mask [B, 1, T, S] is never made.
    """
    changed = 0
    known: dict[fx.Node, bool] = {}
    for node in graph.graph.find_nodes(op="call_function", target=ATTENTION):
        mask = node.args[3] if len(node.args) > 3 else None
        if isinstance(mask, fx.Node):
            if mask not in known:
                known[mask] = _is_causal(mask)
            if known[mask] and (_is_dense(mask) or _is_square(node)):
                node.update_arg(3, None)
                node.update_kwarg("causal", True)
                node.update_kwarg("window", None)
                changed += 1
    # Only what made those masks: fx takes a method that writes in place for dead if nothing reads what it returns.
    unread = {n for mask, causal in known.items() if causal for n in ancestors(mask)}
    graph.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output") or node not in unread)
    return changed


def _is_causal(mask: fx.Node) -> bool:
    order = ancestors(mask)
    free = [n for n in order if n.op == "placeholder"]
    if any(n.op == "get_attr" for n in order) or not all(map(_is_size, free)):
        return False
    largest = max((abs(n) for node in order for n in _numbers(node)), default=0)
    if largest > LARGEST:
        return False
    # A window or a chunk is a number of the formula: only sequences longer than all of them show that there is none.
    tried = (5, largest + 3) if free else (0,)
    return all(_equals_causal(mask, order, {node: first + i for i, node in enumerate(free)}) for first in tried)


def _numbers(node: fx.Node) -> list[int]:
    return [x for x in pytree.tree_leaves((node.args, node.kwargs)) if isinstance(x, int) and x != OPEN]


def _is_dense(mask: fx.Node) -> bool:
    return not is_reach(mask.meta.get("example_value"))


def _is_square(attention: fx.Node) -> bool:
    """Whether there are as many queries as keys, whatever the sizes."""
    q, k = (node.meta.get("example_value") for node in arguments(attention)[:2])
    return isinstance(q, Tensor) and isinstance(k, Tensor) and statically_known_true(q.shape[2] == k.shape[2])


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("example_value"), (int, torch.SymInt))


def _equals_causal(mask: fx.Node, order: list[fx.Node], sizes: dict[fx.Node, int]) -> bool:
    """Run the mask's part of the graph on plain numbers."""
    values: dict[fx.Node, Any] = {}
    try:
        with torch.utils._python_dispatch._disable_current_modes():
            for node in order:
                if node.op == "placeholder":
                    values[node] = sizes[node]
                    continue
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
                function: Any = getattr(args[0], str(node.target)) if node.op == "call_method" else node.target
                values[node] = function(*(args[1:] if node.op == "call_method" else args), **kwargs)
    except Exception:  # not made of only sizes, or these sizes do not fit: nothing is known of this mask
        return False
    found = values[mask]
    if isinstance(found, torch.Tensor) and is_reach(found) and found.dim() == 4:
        reach, first = parts(found)
        return bool((first == 0).all() and (reach >= reach.shape[1]).all())
    if not isinstance(found, torch.Tensor) or found.dim() != 4 or found.dtype != torch.bool:
        return False
    wanted = visible_keys(found.shape[2], found.shape[3], True, None, found.device)
    return bool(found.all()) if wanted is None else torch.equal(found, wanted.expand_as(found))


def sum_linears(graph: fx.GraphModule) -> int:
    """Projections of few tokens become sums, which Inductor writes itself and fuses with what is around them.

    Those are projections of one token (batch times length) to fewer than `TALL` channels, and of `FEW_TOKENS` to `THIN` times fewer
    than they read, as a layer's gates are. A product reads its weight in tiles; with one row to multiply there are too few of them
    to fill a card.
    """
    linears = graph.graph.find_nodes(op="call_function", target=torch._C._nn.linear)
    chosen = [node for node in linears if not node.kwargs and _is_small(node)]
    for node in chosen:
        node.target = sum_linear
    return len(chosen)


def _is_small(node: fx.Node) -> bool:
    x, weight, y = (n.meta.get("example_value") for n in (*arguments(node)[:2], node))
    if not (_is_plain(x) and _is_plain(weight) and weight.dim() == 2 and weight.stride(1) == 1):
        return False
    if not (x.dtype == weight.dtype == y.dtype and x.dtype.is_floating_point):  # autocast would cast
        return False
    tokens, (rows, columns) = math.prod(x.shape[:-1]), weight.shape
    return (tokens == 1 and rows < TALL) or (tokens <= FEW_TOKENS and rows * THIN <= columns)


def _is_plain(x: Any) -> bool:
    """A tensor of known sizes; not one under vmap, which shows the sizes of one sample, nor quantised or sharded."""
    return (
        isinstance(x, Tensor)
        and not is_traceable_wrapper_subclass(x)
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
        and all(isinstance(size, int) for size in x.shape)
    )


def sum_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., C] and weight [H, C] -> [..., H], summed in fp32 (fp64 of fp64)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = (x.to(wide).unsqueeze(-2) * weight.to(wide)).sum(-1)
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)


REWRITES: dict[str, Callable[[fx.GraphModule], int]] = {
    "drop-causal-masks": drop_causal_masks,
    "sum-linears": sum_linears,
}
PIPELINE = ",".join(REWRITES)
EXACT = "drop-causal-masks"  # what helps any compiler; one that does not fuse a product with its sum would store it

__all__ = ["EXACT", "PIPELINE", "REWRITES", "drop_causal_masks", "sum_linears"]

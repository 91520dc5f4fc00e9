"""prune-projections: a projection computes only the heads that are selected from its output."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from hydrasurgery import ops
from hydrasurgery.ir.graphs import arguments
from hydrasurgery.ir.region import KEPT, Region
from hydrasurgery.layers import rotate
from hydrasurgery.passes.base import Pass, PassResult, register

aten = torch.ops.aten
ELEMENTWISE = frozenset(
    {
        aten.mul.Tensor,
        aten.mul.Scalar,
        aten.add.Tensor,
        aten.add.Scalar,
        aten.sub.Tensor,
        aten.sub.Scalar,
        aten.div.Tensor,
        aten.div.Scalar,
        aten.neg.default,
        aten.pow.Tensor_Scalar,
        aten.rsqrt.default,
        aten.clamp.default,
        aten.to.dtype,
        aten._to_copy.default,
        aten.contiguous.default,
        aten.clone.default,
        aten.alias.default,
    }
)
SPLIT = frozenset({aten.view.default, aten.reshape.default, aten._unsafe_view.default})
FLAT, TOKENS, HEADS = (
    (2, 3),
    (2, 4),
    (1, 4),
)  # (dimension of the heads, number of dimensions) of [B,T,H*D], [B,T,H,D], [B,H,T,D]
Layout = tuple[int, int]


@dataclass(frozen=True)
class _Chain:
    """What follows a projection: nodes that treat each head alike, and the selections that end them."""

    projection: fx.Node
    num_heads: int
    views: tuple[fx.Node, ...]
    selects: tuple[fx.Node, ...]

    @property
    def heads(self) -> tuple[int, ...]:
        return tuple(arguments(self.selects[0])[1])


@register
@dataclass(frozen=True)
class PruneProjections(Pass):
    """`select_heads(f(W x))` becomes `f(W' x)`, W' holding the rows of the selected heads, in their order.

    Needs f to treat each head alike (views, transpose, rotary embedding, norms of one head's width), W to be an
    `nn.Linear`, and every reader of W x to select the same heads. Other projections (fused, full-width norms, read by
    both branches) stay as they are. Exact up to the rounding of a matrix product of another size.

    The child keeps its name but is a new module: the original and its parameters stay whole.
    """

    name: ClassVar[str] = "prune-projections"
    keeps_shapes: ClassVar[bool] = False

    def run(self, region: Region) -> PassResult:
        chains = [c for n in region.graph.nodes if (c := _chain(region, n)) is not None]
        for chain in chains:
            if chain.heads != tuple(range(chain.num_heads)):
                _shrink(region, chain)
            for select in chain.selects:
                remove_selection(region.graph, select)
        return PassResult(region, bool(chains))


def _chain(region: Region, projection: fx.Node) -> _Chain | None:
    """The chain that `projection` starts, or None if its rows cannot be pruned."""
    if not is_own_linear(region, projection):
        return None
    layouts: dict[fx.Node, Layout] = {projection: FLAT}
    views, selects = [], []
    for node in region.graph.nodes:
        if node is projection or not any(n in layouts for n in node.all_input_nodes):
            continue
        if node.target is ops.select_heads:
            if layouts[node.args[0]] != HEADS or node.args[2] != 1:
                return None
            selects.append(node)
            continue
        layout = _layout(region, node, layouts)
        if layout is None:
            return None
        if layouts.get(node.args[0]) == FLAT and layout == TOKENS:
            views.append(node)
        layouts[node] = layout
    return (
        _Chain(projection, views[0].meta["shape"][2], tuple(views), tuple(selects)) if _agree(views, selects) else None
    )


def is_own_linear(region: Region, node: fx.Node) -> bool:
    """A call of an `nn.Linear` whose weights nothing else reads; adapters and quantised layers are no such."""
    if node.op != "call_module" or type(region.module.get_submodule(str(node.target))) is not nn.Linear:
        return False
    called = region.find(node.target)
    read = [n for n in region.graph.nodes if n.op == "get_attr" and n.target.startswith(f"{node.target}.")]
    return len(called) == 1 and not read and len(node.meta.get("shape") or ()) == 3


def _agree(views: list[fx.Node], selects: list[fx.Node]) -> bool:
    """Whether all views cut the same heads and all selections take the same, each cached one from a node of its own."""
    return (
        len({n.meta["shape"][2:] for n in views}) == 1
        and len({tuple(arguments(n)[1]) for n in selects}) == 1
        and all(len(arguments(n)[0].users) == 1 for n in selects if _is_kept(n))
    )


def _is_kept(node: fx.Node) -> bool:
    """Whether the cache holds what the node gives."""
    return node.meta.get("role") in KEPT


def _layout(region: Region, node: fx.Node, layouts: dict[fx.Node, Layout]) -> Layout | None:
    """Where the heads are in the node's output, or None if it may mix heads or treat them differently."""
    if any(map(_is_kept, (node, *node.all_input_nodes))):
        return None  # the cache holds it: its heads are fixed
    inside = {layouts[n] for n in node.all_input_nodes if n in layouts}
    layout = inside.pop()
    axis, rank = layout
    last = (-1, rank - 1)
    if node.target is rotate:
        return layout if layout == HEADS and all(_is_broadcast(n, layout) for n in arguments(node)[1:3]) else None
    if inside:
        return None
    if node.op == "call_module":
        return layout if axis != rank - 1 and _is_head_norm(region, node) else None
    if node.target in ELEMENTWISE:
        others = [n for n in node.all_input_nodes if n not in layouts]
        return layout if all(_is_broadcast(n, layout) for n in others) else None
    x = arguments(node)[0]
    if node.target is aten.cat.default:
        dim = node.args[1] if len(node.args) > 1 else 0
        return layout if axis != rank - 1 and dim in last and all(n in layouts for n in x) else None
    if x not in layouts:
        return None
    if node.target is aten.slice.Tensor:
        dim = node.args[1] if len(node.args) > 1 else 0
        return layout if axis != rank - 1 and dim in last else None
    if node.target is aten.mean.dim:
        keeps = len(node.args) > 2 and node.args[2] is True
        return layout if axis != rank - 1 and keeps and list(arguments(node)[1]) in ([-1], [rank - 1]) else None
    if node.target is aten.transpose.int and rank == 4:
        swaps = {dim % 4 for dim in arguments(node)[1:]} == {1, 2}
        return (HEADS if layout == TOKENS else TOKENS) if swaps else None
    return TOKENS if layout == FLAT and _cuts_heads(node) else None


def _cuts_heads(node: fx.Node) -> bool:
    """[B, T, H * D] -> [B, T, H, D], by a view or by unflatten."""
    before, after = arguments(node)[0].meta.get("shape"), node.meta.get("shape")
    if before is None or after is None or len(after) != 4 or before[:2] != after[:2]:
        return False
    if not all(isinstance(size, int) for size in (before[2], *after[2:])) or before[2] != after[2] * after[3]:
        return False
    if node.target is aten.unflatten.int:
        return len(arguments(node)[2]) == 2
    return node.target in SPLIT and len(arguments(node)[1]) == 4


def _is_broadcast(node: fx.Node, layout: Layout) -> bool:
    """Whether an operand is the same for all heads."""
    shape, (axis, rank) = node.meta.get("shape"), layout
    if shape is None or len(shape) > rank:
        return False
    own = axis - (rank - len(shape))
    return own < 0 or shape[own] == 1


def _is_head_norm(region: Region, node: fx.Node) -> bool:
    """A norm over the last dimension: its weights, if any, are one vector of that width."""
    module, width = region.module.get_submodule(str(node.target)), arguments(node)[0].meta["shape"][-1]
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return tuple(module.normalized_shape) == (width,)
    if isinstance(module, (nn.Identity, nn.Dropout)):
        return True
    kind = type(module).__name__
    over_width = "norm" in kind.lower() and not any(word in kind.lower() for word in ("batch", "group", "instance"))
    return over_width and all(tuple(p.shape) == (width,) for p in module.parameters())


def _shrink(region: Region, chain: _Chain) -> None:
    """Replace the projection by one of the selected heads, and the head count that its views name."""

    def rows(_name: str, parameter: Tensor) -> Tensor:
        return ops.select_heads(parameter.unflatten(0, (chain.num_heads, -1)), chain.heads, 0).flatten(0, 1)

    replace_parameters(region, str(chain.projection.target), rows)
    for view in chain.views:
        place, index = (2, 0) if view.target is aten.unflatten.int else (1, 2)
        sizes = list(arguments(view)[place])
        if sizes[index] == chain.num_heads:
            sizes[index] = len(chain.heads)
            view.update_arg(place, sizes)


def replace_parameters(region: Region, path: str, change: Callable[[str, Tensor], Tensor]) -> None:
    """Put a new `nn.Linear` at `path` whose parameters are `change(name, old)`; the old module stays whole."""
    old = region.module.get_submodule(path)
    new: Any = copy.copy(old)  # keeps hooks and attributes; the parameters are set anew
    new._parameters = dict(old._parameters)
    for name, parameter in old.named_parameters(recurse=False):
        changed = change(name, parameter.detach()).clone()
        new._parameters[name] = nn.Parameter(changed, requires_grad=parameter.requires_grad)
    new.out_features, new.in_features = new.weight.shape
    _replace_child(region.module, path, new)


def _replace_child(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at `path`, in new containers: those between are the original module's too."""
    first, _, rest = path.partition(".")
    if rest:
        container = copy.copy(root.get_submodule(first))
        container._modules = dict(container._modules)
        _replace_child(container, rest, module)
        module = container
    root._modules[first] = module


def remove_selection(graph: fx.Graph, select: fx.Node) -> None:
    """Take a selection out; what the passes noted about it holds of its input now."""
    x = arguments(select)[0]
    x.meta.update({key: value for key, value in select.meta.items() if key in ("role", "branch")})
    select.replace_all_uses_with(x)
    graph.erase_node(select)

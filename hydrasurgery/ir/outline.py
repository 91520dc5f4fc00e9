"""An exported attention module as a region's graph: every child's nodes become one call of that child."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from hydrasurgery.dialect.names import ATTENTION
from hydrasurgery.errors import UnsupportedModelError
from hydrasurgery.ir.region import HIDDEN, Inputs

CACHE_ARGUMENTS = ("past_key_values", "past_key_value", "layer_past")
BATCH, LENGTH = 2, 11  # of the exported call; any dimension of an argument with such a size is dynamic


def outline(
    name: str, owner: nn.Module, program: torch.export.ExportedProgram, kwargs: dict[str, Any]
) -> tuple[fx.Graph, Inputs]:
    """The exported graph with every child's nodes folded into one call of that child."""
    signature = program.graph_signature
    attributes = {
        key: target.removeprefix("owner.")
        for key, target in {**signature.inputs_to_parameters, **signature.inputs_to_buffers}.items()
    }
    constants = {**signature.inputs_to_lifted_tensor_constants}
    leaves = pytree.tree_flatten_with_path(kwargs)[0]
    user_inputs = iter(leaves)
    nodes = [n for n in program.graph.nodes if not _is_assertion(n)]
    groups = _fold(owner, nodes)
    graph, made = fx.Graph(), dict[fx.Node, fx.Node]()
    paths: list[tuple[str, tuple[str | int, ...]]] = []
    source: fx.Node | None = None

    for node in nodes:
        if node.op == "placeholder":
            if node.name in attributes:
                continue  # made where it is used
            if node.name in constants:
                raise UnsupportedModelError(
                    f"{name} ({type(owner).__name__}) holds a tensor constant in its forward: {node.name}"
                )
            path, leaf = next(user_inputs)
            if isinstance(leaf, Tensor):
                steps = tuple(getattr(k, "key", getattr(k, "idx", 0)) for k in path)
                new = made[node] = graph.placeholder(node.name.removeprefix("call_"))
                new.target, new.meta["shape"] = new.name, _shape(node)
                if not leaf.is_floating_point():
                    new.meta["dtype"] = str(leaf.dtype).removeprefix("torch.")
                paths.append((new.name, steps))
                if source is None and new.meta["shape"][:-1] == ("B", "T"):
                    source = new
                    new.meta["role"] = HIDDEN
            continue
        if node.op == "output":
            values = pytree.tree_unflatten(
                [
                    made.get(a) if isinstance(a, fx.Node) else a
                    for a in pytree.tree_leaves(node.args[0], lambda x: x is None)
                ],
                program.module_call_graph[0].signature.out_spec,
            )
            graph.output(values)
            continue
        group = groups.get(node)
        if group is not None:
            if node is group.result:
                made[node] = graph.call_module(group.child, (made[group.argument],))
                made[node].meta["shape"] = _shape(node)
            continue
        size = _dynamic_size(node)
        if size is not None and source is not None:  # export may have read it from any input of that length
            made[node] = graph.call_function(torch.ops.aten.sym_size.int, (source, size))
            continue
        for used in node.all_input_nodes:
            if used.name in attributes and used not in made:
                made[used] = graph.get_attr(attributes[used.name])
                made[used].meta["shape"] = _shape(used)
        made[node] = graph.node_copy(node, lambda n: made[n])
        made[node].meta = {"shape": _shape(node)}
    graph.eliminate_dead_code(lambda n: n.op in ("placeholder", "output"))
    for node in reversed([n for n in graph.nodes if n.op == "placeholder" and not n.users]):
        paths = [p for p in paths if p[0] != node.target]
        graph.erase_node(node)
    named = [p.name for p in inspect.signature(owner.forward).parameters.values() if p.kind == p.POSITIONAL_OR_KEYWORD]
    cache = next((n for n in (*named, *kwargs) if n in CACHE_ARGUMENTS), None)
    if source is None:
        raise UnsupportedModelError(
            f"{name} ({type(owner).__name__}) takes no hidden states [batch, length, channels] of the tokens that it is given"
        )
    return graph, Inputs(tuple(named), tuple(paths), cache)


def _child_call(node: fx.Node) -> tuple[str, str] | None:
    """(key of the call, child's name) if the node was made inside a child of the exported module."""
    for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items():
        _, dot, child = path.partition(".")
        if dot:
            return key, child.split("@")[0]
    return None


def _dynamic_size(node: fx.Node) -> int | None:
    """0 for a size that is the batch, 1 for one that is the length."""
    if node.target != torch.ops.aten.sym_size.int or isinstance(node.meta["val"], int):
        return None
    return {BATCH: 0, LENGTH: 1}.get(node.meta["val"].node.hint)


def _is_assertion(node: fx.Node) -> bool:
    return node.op == "call_function" and any(word in str(node.target) for word in ("_assert", "sym_constrain"))


@dataclass
class _Call:
    child: str
    argument: fx.Node
    result: fx.Node


def _fold(owner: nn.Module, nodes: list[fx.Node]) -> dict[fx.Node, _Call]:
    """Each node inside a child of one argument, a tensor, and one tensor out -> that child's call. Other children stay inline."""
    members: dict[str, list[fx.Node]] = {}
    names: dict[str, str] = {}
    for node in nodes:
        call = _child_call(node) if node.op == "call_function" else None
        if call:
            members.setdefault(call[0], []).append(node)
            names[call[0]] = call[1]
    folded: dict[fx.Node, _Call] = {}
    for key, inside in members.items():
        own = set(inside)
        outside = {
            u: None
            for n in inside
            for u in n.all_input_nodes
            if u not in own and isinstance(u.meta.get("val"), Tensor) and not _is_parameter(u)
        }
        results = [n for n in inside if any(u not in own and not _is_assertion(u) for u in n.users)]
        if len(outside) == 1 and len(results) == 1 and _takes_one(owner.get_submodule(names[key])):
            folded.update(dict.fromkeys(inside, _Call(names[key], next(iter(outside)), results[0])))
    return folded


def _takes_one(child: nn.Module) -> bool:
    """Whether one argument is enough for a call."""
    needed = [p for p in inspect.signature(child.forward).parameters.values() if p.default is p.empty]
    return sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) for p in needed) <= 1


def _is_parameter(node: fx.Node) -> bool:
    return node.op == "placeholder" and node.name.startswith(("p_", "b_", "c_"))


def _shape(node: fx.Node) -> tuple[str | int, ...] | None:
    """The node's shape with the dynamic dimensions named B, T (and S for the keys of a mask)."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return None

    def name(size: Any) -> str | int:
        if isinstance(size, int):
            return size
        hint = size.node.hint
        return {BATCH: "B", LENGTH: "T"}.get(hint, str(size))

    return tuple(map(name, value.shape))


def free_dtype(graph: fx.Graph) -> None:
    """Cast q and k, where v is not cast, to the dtype of the hidden states, which need not stay that of the capture.

    A rotary embedding in full precision ends with `q.to(dtype)`, of which an exported graph holds only the number.
    """
    attention = next(n for n in graph.nodes if n.target == ATTENTION)
    q, k, v = attention.args[:3]
    casts = {x for x in (q, k) if x.target == torch.ops.aten.to.dtype}
    if casts and v.target != torch.ops.aten.to.dtype:
        source = next(n for n in graph.nodes if n.meta.get("role") == HIDDEN)
        with graph.inserting_after(source):
            dtype = graph.call_function(getattr, (source, "dtype"))
        dtype.meta["shape"] = ()
        for cast in casts:
            cast.update_arg(1, dtype)


def free_device(graph: fx.Graph) -> None:
    """Make new tensors where the hidden states are, which need not be the device of the capture."""
    placed = [
        n for n in graph.nodes if any(isinstance(x, torch.device) for x in pytree.tree_leaves((n.args, n.kwargs)))
    ]
    if not placed:
        return
    source = next(n for n in graph.nodes if n.meta.get("role") == HIDDEN)
    with graph.inserting_after(source):
        device = graph.call_function(getattr, (source, "device"))
    device.meta["shape"] = ()
    for node in placed:
        node.args, node.kwargs = pytree.tree_map_only(torch.device, lambda _: device, (node.args, node.kwargs))

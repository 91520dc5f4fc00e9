"""A graph for fewer launches: the same computation in larger operators, as GPUs run it.

It is made of a region's graph whenever that is compiled and is not seen otherwise: passes and exports work on the graph as it is.
"""

from __future__ import annotations

import copy
import operator
from typing import Any, cast

from torch import fx, nn

from hydrasurgery.dialect.heads import select_heads
from hydrasurgery.dialect.names import ROTATE
from hydrasurgery.dialect.tokens import token_flags
from hydrasurgery.ir.linear_branch import LinearBranch, linear_branch
from hydrasurgery.ir.state import STATE, TELLS, flags_of, previous_of, run_linear, step_heads, step_linear
from hydrasurgery.kernels.rotary import rotate
from hydrasurgery.layers import BetaGate, DecayGate, OutputGate, Projection


def fewer_launches(module: nn.Module, graph: fx.Graph, *, step: bool = False) -> fx.Graph:
    """A copy of a graph of `module` in which the linear heads are one operator, flags are made only of masks that there are, and
    only heads that are read are rotated. `step`: for one token that follows a state."""
    new = copy.deepcopy(graph)
    branch = linear_branch(module, new)
    if branch is not None:
        _fuse(new, branch, step)
    for node in new.find_nodes(op="call_function", target=rotate):
        _select_first(new, node)
    for node in new.find_nodes(op="call_function", target=token_flags):
        _ask_mask_first(new, node)
    new.eliminate_dead_code(lambda node: node.op in ("placeholder", "output") or node.target in TELLS)
    if step:
        _rotate_together(new)
    return new


def has_plain_gates(hydra: nn.Module) -> bool:
    """Whether the gates' modules are as they were made, so that a graph may read their parameters instead of calling them.

    Not so with adapters on their projections, or with hooks.
    """
    for name, kind, projection in GATES:
        gate = hydra._modules.get(name)
        if gate is None:
            continue
        linear = gate._modules[projection]
        if type(gate) is not kind or type(linear) is not Projection:
            return False
        if any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in (gate, linear)):
            return False
    return True


GATES = (("decay", DecayGate, "a_proj"), ("beta", BetaGate, "b_proj"), ("output_gate", OutputGate, "g_proj"))


def _fuse(graph: fx.Graph, branch: LinearBranch, step: bool) -> None:
    """One node, which reads the gates' parameters, for all of a branch."""
    decay, beta, gate = branch.gates
    state = next((n for n in graph.nodes if n.op == "placeholder" and n.target == STATE), None)
    read: Any = branch.flags[0].args[0]  # the node of both flags
    with graph.inserting_before(branch.fusion):
        parameters = [
            None if module is None else graph.get_attr(f"{module.target}.{name}")
            for module, name in (
                (decay, "a_proj.weight"),
                (decay, "A_log"),
                (decay, "dt_bias"),
                (beta, "b_proj.weight"),
                (beta, "b_proj.bias"),
                (gate, "g_proj.weight"),
            )
        ]
        flags = graph.call_function(flags_of, read.args, read.kwargs)
        known = [graph.call_function(operator.getitem, (flags, place)) for place in range(2)]
        heads, options = branch.heads, {"slots": branch.fusion.kwargs["linear_heads"], **branch.options}
        if step:
            heads, places = _unselected(heads, len(options["slots"]))
            options |= places
        else:
            known.append(graph.call_function(previous_of, (known[0], read.args[0])))
        inputs = (branch.hidden, *heads, branch.full, *parameters, branch.gamma, *branch.weights)
        target = step_heads if step else run_linear
        branch.replace(graph.call_function(target, (state, *inputs, *known, *branch.tables), options))


def _unselected(heads: tuple[fx.Node, ...], count: int) -> tuple[tuple[Any, ...], dict[str, list[int]]]:
    """q, k and v of all heads, and which of them the `count` linear ones read, where k and v are selected alike."""
    own = list(range(count))
    (q, q_heads), (k, kv_heads), (v, v_heads) = (_selection(x) or (x, own) for x in heads)
    if kv_heads != v_heads:
        (_, k, v), kv_heads = heads, own
    return (q, k, v), {"q_heads": q_heads, "kv_heads": kv_heads}


def _selection(node: fx.Node) -> tuple[Any, list[int]] | None:
    """What heads are selected from, and their numbers; None if `node` selects none."""
    if node.target is not select_heads:
        return None
    x, heads, dim = cast(Any, node.args)
    return (x, list(heads)) if dim in (1, -3) else None


def _ask_mask_first(graph: fx.Graph, flags: fx.Node) -> None:
    """Without a mask a step has no flags, rather than some that say nothing."""
    if any(user.target is not operator.getitem for user in flags.users):
        return
    readers = {reader for user in flags.users for reader in user.users}
    if not readers or any(reader.target is not step_linear for reader in readers):
        return
    with graph.inserting_before(flags):
        flags.replace_all_uses_with(graph.call_function(flags_of, flags.args, flags.kwargs))
    graph.erase_node(flags)


def _rotate_together(graph: fx.Graph) -> None:
    """One operator for queries and keys, where both are there before the first of them is rotated."""
    nodes: list[Any] = graph.find_nodes(op="call_function", target=rotate)
    if len(nodes) != 2 or nodes[0].args[1:] != nodes[1].args[1:]:
        return
    first, second = nodes
    source = second.args[0]
    if source.target is select_heads:  # comes after what reads the keys
        first.prepend(source)
    places = {node: place for place, node in enumerate(graph.nodes)}
    if any(places[node] > places[first] for node in (source, *source.all_input_nodes)):
        return
    with graph.inserting_before(first):
        both = graph.call_function(ROTATE, ([first.args[0], source], *first.args[1:]))
        for place, node in enumerate(nodes):
            node.replace_all_uses_with(graph.call_function(operator.getitem, (both, place)))
    for node in nodes:
        graph.erase_node(node)


def _select_first(graph: fx.Graph, turned: fx.Node) -> None:
    """Heads are selected and then rotated, where all that reads the rotated ones are selections."""
    users = list(turned.users)
    if not users or any(user.target is not select_heads or user.args[2] not in (1, -3) for user in users):
        return
    x, *turn = turned.args
    for user in users:
        with graph.inserting_before(user):
            chosen = graph.call_function(select_heads, (x, *user.args[1:]))
            user.replace_all_uses_with(graph.call_function(rotate, (chosen, *turn)))
        graph.erase_node(user)

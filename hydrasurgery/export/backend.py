"""`torch.compile(model, backend="hydra")`: rewrites of the captured graph, then Inductor.

The backend is found through the entry point `torch_dynamo_backends`. What dynamo hands over calls the dialect's ops, whose
backwards are ops too, so inference and training compile alike. A backend sees parameters as graph inputs: it can rewrite and
fuse, but not turn heads linear; run `hydrasurgery.rewrite` on the module first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from hydrasurgery.errors import PipelineError
from hydrasurgery.kernels.attention.reference import visible_keys
from hydrasurgery.passes.base import ancestors
from hydrasurgery.raising import ATTENTION

PIPELINE = "drop-causal-masks"
LARGEST = 8192  # tokens: a mask whose formula holds a larger number is left alone, for trying it would need more memory


def hydra(
    graph: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile a graph; called by torch.compile.

    Args:
        graph: what dynamo captured.
        example_inputs: its inputs, with free sizes.
        mode: as "mode" in `options`; torch.compile takes the one or the other.
        options: "pipeline" (names of graph rewrites, separated by commas; by default all), "mode" (one of Inductor's:
            "reduce-overhead" for CUDA graphs, "max-autotune", ...), "inner" (the backend that the graph is handed on to, by default
            "inductor"); the others are Inductor's, or those of the inner backend.

    Raises:
        PipelineError: the pipeline names an unknown rewrite, or an option is none of these ("plan" is none: see docs/export.md).
    """
    rest = dict(options or {})
    if "plan" in rest:
        raise PipelineError(
            "a plan is no option of the backend, which sees a graph and not the module that it would have to change; "
            "rewrite first: torch.compile(hydrasurgery.rewrite(model, plan), backend='hydra')"
        )
    pipeline, inner = rest.pop("pipeline", PIPELINE), rest.pop("inner", "inductor")
    mode = rest.pop("mode", mode)
    for name in filter(None, (part.strip() for part in pipeline.split(","))):
        if name not in REWRITES:
            raise PipelineError(f"no graph rewrite is called {name!r}; known: {', '.join(REWRITES)}")
        REWRITES[name](graph)
    graph.recompile()
    return _hand_on(graph, list(example_inputs), inner, mode, rest)


def _hand_on(
    graph: fx.GraphModule, inputs: list[Any], inner: str, mode: str | None, options: dict[str, Any]
) -> Callable[..., Any]:
    if inner == "inductor":
        from torch._inductor import config, list_mode_options
        from torch._inductor.compile_fx import compile_fx

        unknown = sorted(options.keys() - config.get_config_copy().keys())
        if unknown:
            raise PipelineError(
                f"the backend has no option {unknown[0]!r}; it has pipeline, mode, inner and what "
                "torch._inductor.list_options() names"
            )
        patches = {**(list_mode_options(mode) if mode else {}), **options}
        compiled: Any = compile_fx(graph, inputs, config_patches=patches)
        return compiled
    from torch._dynamo.backends.registry import lookup_backend

    given = {key: value for key, value in (("mode", mode), ("options", options)) if value}
    return lookup_backend(inner)(graph, inputs, **given)


def drop_causal_masks(graph: fx.GraphModule) -> int:
    """An attention whose mask is the causal one, whatever the sizes, gets `causal=True` in its place; says how many did.

    A mask that depends on sizes alone is computed for short sequences and for some longer than every number in its formula,
    and compared. Kernels skip what a causal flag hides, and
    the mask [B, 1, T, S] is never made.
    """
    changed = 0
    known: dict[fx.Node, bool] = {}
    for node in graph.graph.find_nodes(op="call_function", target=ATTENTION):
        mask = node.args[3] if len(node.args) > 3 else None
        if isinstance(mask, fx.Node):
            if mask not in known:
                known[mask] = _is_causal(graph, mask)
            if known[mask]:
                node.update_arg(3, None)
                node.update_kwarg("causal", True)
                node.update_kwarg("window", None)
                changed += 1
    # Only what made those masks: fx takes a method that writes in place for dead if nothing reads what it returns.
    unread = {n for mask, causal in known.items() if causal for n in ancestors(mask)}
    graph.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output") or node not in unread)
    return changed


def _is_causal(graph: fx.GraphModule, mask: fx.Node) -> bool:
    order = ancestors(mask)
    free = [n for n in order if n.op == "placeholder"]
    if any(n.op == "get_attr" for n in order) or not all(map(_is_size, free)):
        return False
    largest = max((abs(n) for node in order for n in _numbers(node)), default=0)
    if largest > LARGEST:
        return False
    # A window or a chunk is a number of the formula: only sequences longer than all of them show that there is none.
    tried = (5, largest + 3) if free else (0,)
    return all(_equals_causal(graph, mask, order, {node: first + i for i, node in enumerate(free)}) for first in tried)


def _numbers(node: fx.Node) -> list[int]:
    return [x for x in pytree.tree_leaves((node.args, node.kwargs)) if isinstance(x, int)]


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("example_value"), (int, torch.SymInt))


def _equals_causal(graph: fx.GraphModule, mask: fx.Node, order: list[fx.Node], sizes: dict[fx.Node, int]) -> bool:
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
    except Exception:  # not made of sizes alone, or these sizes do not fit: nothing is known of this mask
        return False
    found = values[mask]
    if not isinstance(found, torch.Tensor) or found.dim() != 4 or found.dtype != torch.bool:
        return False
    wanted = visible_keys(found.shape[2], found.shape[3], True, None, found.device)
    return bool(found.all()) if wanted is None else torch.equal(found, wanted.expand_as(found))


REWRITES: dict[str, Callable[[fx.GraphModule], int]] = {"drop-causal-masks": drop_causal_masks}

__all__ = ["drop_causal_masks", "hydra"]

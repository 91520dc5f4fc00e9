"""`torch.compile(model, backend="hydra")`: rewrites of the captured graph, then Inductor.

The backend is found through the entry point `torch_dynamo_backends`. What dynamo hands over calls the dialect's ops, whose
backwards are ops too, so inference and training compile alike. A backend sees parameters as graph inputs: it can rewrite and
fuse, but not turn heads linear; run `hydrasurgery.rewrite` on the module first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from hydrasurgery.errors import PipelineError
from hydrasurgery.export.graph_rewrites import EXACT, PIPELINE, REWRITES


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
        options: "pipeline": names of `graph_rewrites`, separated by commas; by default all, and only the exact ones for another
            inner backend or where Inductor freezes weights (it would store them as the sums read them, in fp32).
            "mode": one of Inductor's ("reduce-overhead" for CUDA graphs, "max-autotune", ...).
            "inner": the backend that the graph is handed on to, by default "inductor".
            Others are Inductor's, or those of the inner backend.

    Raises:
        PipelineError: the pipeline names an unknown rewrite, or an option is none of these ("plan" is none: see docs/export.md).
    """
    rest = dict(options or {})
    if "plan" in rest:
        raise PipelineError(
            "a plan is no option of the backend, which sees a graph and not the module that it would have to change; "
            "rewrite first: torch.compile(hydrasurgery.rewrite(model, plan), backend='hydra')"
        )
    inner = rest.pop("inner", "inductor")
    pipeline = rest.pop("pipeline", PIPELINE if inner == "inductor" and not _freezes() else EXACT)
    mode = rest.pop("mode", mode)
    for name in filter(None, (part.strip() for part in pipeline.split(","))):
        if name not in REWRITES:
            raise PipelineError(f"no graph rewrite is called {name!r}; known: {', '.join(REWRITES)}")
        REWRITES[name](graph)
    graph.recompile()
    return _hand_on(graph, list(example_inputs), inner, mode, rest)


def _freezes() -> bool:
    from torch._inductor import config

    return bool(config.freezing)


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


__all__ = ["hydra"]

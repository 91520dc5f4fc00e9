"""A region: one attention module as a graph, and the module that runs it in the attention's place."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from hydrasurgery.dialect.checks import DERIVATIVES, refuse_transforms
from hydrasurgery.dialect.names import ATTENTION, FULL, KINDS, LINEAR
from hydrasurgery.dialect.tokens import token_flags
from hydrasurgery.errors import UnsupportedModelError
from hydrasurgery.inference.cache import layer_state
from hydrasurgery.ir.code import compiled
from hydrasurgery.ir.launches import fewer_launches, has_plain_gates
from hydrasurgery.ir.state import STATE, exporting
from hydrasurgery.ir.text import MEANING, format_graph, parse_graph, show_options, unknown_functions

HIDDEN = "hidden-states"  # the role of the input that everything is computed from
KEPT = ("kept-keys", "kept-values")  # the roles of what the cache holds
LETTERS = {FULL: "F", LINEAR: "l"}


@dataclass(frozen=True)
class Inputs:
    """How a module's call becomes the graph's inputs.

    Attributes:
        parameters: names of the call's positional parameters.
        paths: each input with its path into the call's arguments, as in ("position_embeddings_0", ("position_embeddings", 0)).
        cache: the name of the argument that is a cache, if there is one.
    """

    parameters: tuple[str, ...] = ()
    paths: tuple[tuple[str, tuple[str | int, ...]], ...] = ()
    cache: str | None = None

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The call's arguments by parameter name."""
        return {**dict(zip(self.parameters, args, strict=False)), **kwargs}

    def flatten(self, bound: dict[str, Any]) -> list[Any]:
        """Values of the inputs, in order; an absent argument is None."""
        values = []
        for _, path in self.paths:
            value = bound.get(str(path[0]))
            for step in path[1:]:
                value = None if value is None else value[step]
            values.append(value)
        return values


@dataclass(eq=False, repr=False)
class Region:
    """One attention module as a graph. It owns what its module runs: change it, and the module runs the change.

    Assigning `graph` compiles it and drops the one-token graph that was made of another one. After changes inside a graph call
    `recompile()`, as for a `torch.fx.GraphModule`; `run_pipeline` does, and makes the one-token graph anew.

    Attributes:
        name: the module's path in the model.
        module: the `RegionModule` whose children and parameters the graph calls.
        num_heads, num_key_value_heads: query heads and KV heads.
        head_dim, value_dim: widths of a head's keys and values.
        inputs: how a call becomes the graph's inputs.
        window, softcap, sinks: the attention's variant.
        kinds: per slot, "full" or "linear".
        teacher_heads: which of the original module's heads each slot holds.
        options: what the passes were told (rule, full_norm, ...) and found (rotary), for later passes and for printing.
        decoded_by: the pass, as in a pipeline string, that made `decode`, or that will make it anew.
        later: passes that changed regions since the rewrite; `save_pretrained` adds them to the checkpoint's pipeline.

    Example:
        >>> import hydrasurgery as hs
        >>> from hydrasurgery.demo.teacher import load_teacher
        >>> teacher, _ = load_teacher()
        >>> region = hs.capture(teacher)[0]
        >>> region.name, region.num_heads, region.num_key_value_heads
        ('model.layers.0.self_attn', 16, 8)
    """

    name: str
    module: RegionModule
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    value_dim: int
    inputs: Inputs = Inputs()
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    kinds: tuple[str, ...] = ()
    teacher_heads: tuple[int, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    decoded_by: str = ""
    later: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.kinds = self.kinds or (FULL,) * self.num_heads
        self.teacher_heads = self.teacher_heads or tuple(range(self.num_heads))
        self._graph: fx.Graph = fx.Graph()
        self._decode: fx.Graph | None = None
        self._decoded: list[str] = []
        self.module.region = self

    @property
    def graph(self) -> fx.Graph:
        """Inputs are the call's tensors; the output is what the module returns."""
        return self._graph

    @graph.setter
    def graph(self, graph: fx.Graph) -> None:
        self._graph = graph
        self.recompile()

    @property
    def decode(self) -> fx.Graph | None:
        """Another graph for one token that follows a state, outside of training and tracing; None runs `graph` for it too."""
        return self._decode

    @decode.setter
    def decode(self, graph: fx.Graph | None) -> None:
        self._decode, self._decoded = graph, [] if graph is None else self.meaning()
        self.recompile()

    def meaning(self) -> list[str]:
        """The lines of the graph, without what only tells how it will run."""
        return format_graph(self._graph, notes=MEANING)

    def recompile(self) -> None:
        """Let the module run the graphs as they are now, without a one-token graph that was made of another graph."""
        if self._decode is not None and self._decoded != self.meaning():
            self._decode = None
        self.module.take(self)

    @property
    def full_heads(self) -> tuple[int, ...]:
        """Slots of the heads that stay softmax attention."""
        return tuple(h for h, kind in enumerate(self.kinds) if kind == FULL)

    @property
    def linear_heads(self) -> tuple[int, ...]:
        """Slots of the heads that become linear attention."""
        return tuple(h for h, kind in enumerate(self.kinds) if kind == LINEAR)

    @property
    def source(self) -> fx.Node:
        """The input of the hidden states [B, T, C]."""
        return next(n for n in self.graph.nodes if n.op == "placeholder" and n.meta.get("role") == HIDDEN)

    @property
    def hidden_size(self) -> int:
        """Width C of the hidden states."""
        return int(self.source.meta["shape"][-1])

    @property
    def threaded(self) -> bool:
        """Whether the graph reads and writes a cache layer: whether thread-state has run."""
        return any(n.op == "placeholder" and n.target == STATE for n in self.graph.nodes)

    @property
    def takes_reach(self) -> bool:
        """Whether masks may be of O(T) numbers: the operators read them as they are given."""
        masks = [node.args[3] for node in self.find(ATTENTION) if len(node.args) > 3]
        masks += [node.args[0] for node in self.find(token_flags)]
        return all(mask is None or (isinstance(mask, fx.Node) and mask.op == "placeholder") for mask in masks)

    @property
    def dtype(self) -> torch.dtype:
        """Of the first matrix among the parameters; of any parameter, or the default one, where there is none."""
        parameters = sorted(self.module.parameters(), key=lambda p: p.dim() < 2)  # vectors may be kept in fp32
        return next((p.dtype for p in parameters), torch.get_default_dtype())

    @property
    def device(self) -> torch.device:
        """Of the parameters; the CPU where there are none."""
        return next((p.device for p in self.module.parameters()), torch.device("cpu"))

    @property
    def kept_key_value_heads(self) -> int:
        """How many KV heads a full head reads: those whose keys a cache keeps."""
        return len({self.key_value_head(head) for head in self.full_heads})

    def key_value_head(self, head: int) -> int:
        """The KV head that query head `head` reads."""
        return head * self.num_key_value_heads // self.num_heads

    def wrong_heads(self) -> str | None:
        """What is wrong with `kinds` and `teacher_heads`, in words; None if nothing is."""
        if len(self.kinds) != self.num_heads or set(self.kinds) - set(KINDS):
            return f"kinds {self.kinds} do not name one kind for each of {self.num_heads} heads"
        if sorted(self.teacher_heads) != list(range(self.num_heads)):
            return f"teacher_heads {self.teacher_heads} do not name each of {self.num_heads} heads once"
        return None

    def find(self, target: Any) -> list[fx.Node]:
        """Nodes of `graph` that call `target` (an operator, a function or a child's name), in order."""
        return [node for node in self.graph.nodes if node.target == target]

    def add(self, name: str, added: nn.Module | nn.Parameter) -> str:
        """Put `added` under `<region>.hydra.<name>`, in the region's dtype and on its device; returns its path from the module.

        Args:
            name: an attribute's name that is not taken.
            added: a module, or a parameter.

        Raises:
            ValueError: something is called so.
        """
        if hasattr(self.module.hydra, name):
            raise ValueError(f"hydra.{name} is there already")
        if isinstance(added, nn.Parameter):
            added = nn.Parameter(added.detach().to(device=self.device, dtype=self.dtype), added.requires_grad)
        else:
            added = added.to(device=self.device, dtype=self.dtype)
        setattr(self.module.hydra, name, added)
        return f"hydra.{name}"

    def draft(self) -> Region:
        """A copy to be changed: graphs and modules of its own over the same parameters. `adopt` takes what became of it."""
        draft = self._with_copied_graphs(options=dict(self.options), module=self.module.shell())
        draft.module.region = draft
        return draft

    def adopt(self, draft: Region) -> None:
        """Become what `draft` is, in place: whoever holds this region or its module holds the new one."""
        self.module.become(draft.module)
        vars(self).update({key: value for key, value in vars(draft).items() if key != "module"})

    def _with_copied_graphs(self, **changes: Any) -> Region:
        new = Region.__new__(Region)
        graphs = {"_graph": copy.deepcopy(self._graph), "_decode": copy.deepcopy(self._decode)}
        vars(new).update({**vars(self), **graphs, **changes})
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> Region:
        new = memo[id(self)] = self._with_copied_graphs(options=copy.deepcopy(self.options, memo))
        new.module = copy.deepcopy(self.module, memo)
        new.module.retake()
        return new

    def __getstate__(self) -> dict[str, Any]:
        graphs = {"_graph": self._graph, "_decode": self._decode}
        lines = {key: None if graph is None else format_graph(graph) for key, graph in graphs.items()}
        functions = unknown_functions(*(graph for graph in graphs.values() if graph))
        return {**vars(self), **lines, "functions": functions}

    def __setstate__(self, state: dict[str, Any]) -> None:
        functions = state.pop("functions")
        for key in ("_graph", "_decode"):
            state[key] = None if state[key] is None else parse_graph(state[key], functions)[0]
        vars(self).update(state)
        self.module.retake()

    def __repr__(self) -> str:
        return f"<region {self.name}: {', '.join(self._shape())}>"

    def __str__(self) -> str:
        paths = {name: ".".join(map(str, path)) for name, path in self.inputs.paths}
        lines = [
            f"region {self.name}: {', '.join(self._shape())}",
            f"  kinds {''.join(map(LETTERS.__getitem__, self.kinds))}",
        ]
        if self.teacher_heads != tuple(range(self.num_heads)):
            lines.append(f"  teacher_heads {self.teacher_heads}")
        if self.options:
            lines.append(f"  options {show_options(self.options)}")
        if self.later:
            lines.append(f"  later {','.join(self.later)}")
        cache = () if self.inputs.cache is None else (f"cache={self.inputs.cache}",)
        lines.append(f"  call {', '.join((*self.inputs.parameters, *cache))}".rstrip())
        lines += (f"  {line}" for line in format_graph(self._graph, paths))
        if self.decoded_by:
            lines.append(f"decode by {self.decoded_by}")
        if self._decode is not None:
            lines += (f"  {line}" for line in format_graph(self._decode, paths))
        return "\n".join(lines)

    def _shape(self) -> list[str]:
        parts = [
            f"{self.num_heads} heads ({len(self.linear_heads)} linear)",
            f"{self.num_key_value_heads} KV heads of {self.head_dim}",
        ]
        values = None if self.value_dim == self.head_dim else self.value_dim
        named = (("values of", values), ("window", self.window), ("softcap", self.softcap))
        return [*parts, *(f"{name} {value}" for name, value in named if value is not None), *["sinks"] * self.sinks]


class RegionModule(nn.Module):
    """Runs a region's graphs in the place of the module it was cut from.

    Same call signature and return structure as that module; its children and parameters are the original objects;
    what the passes add lives under `.hydra`. Trains, deep-copies and pickles (the copy forgets the original module).

    Attributes:
        region: the `Region` that says what is run.
        hydra: what the passes added.
    """

    region: Region

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        vars(self).update({key: value for key, value in vars(_clone(owner)).items() if key != "forward"})
        if not isinstance(owner, RegionModule):
            self.hydra = nn.Module()
            self._original = (owner,)  # in a tuple, so that it is no child

    @property
    def original(self) -> nn.Module | None:
        """The module this one replaced; None in a copy or a loaded checkpoint."""
        return self._original[0]

    @property
    def kinds(self) -> tuple[str, ...]:
        """The region's: per slot, "full" or "linear"."""
        return self.region.kinds

    def take(self, region: Region) -> None:
        """Compile a region's graphs: `forward` runs them from now on."""
        self.region = region
        self._inputs, self._threaded = region.inputs, region.threaded
        roles = [node.meta.get("role") for node in region.graph.nodes if node.op == "placeholder"]
        self._hidden = roles.index(HIDDEN) if HIDDEN in roles else 0
        self._run = compiled(region.graph)
        self._run_fast = compiled(fewer_launches(self, region.graph))
        self._run_decode = self._run_step = None
        if region.decode is not None:
            self._run_decode = compiled(fewer_launches(self, region.decode))
            self._run_step = compiled(fewer_launches(self, region.graph, step=True))

    def retake(self) -> None:
        """Compile what was unpickled, once both the region and the module are there."""
        if "_modules" in vars(self) and "_graph" in vars(self.region):
            self.take(self.region)

    def shell(self) -> RegionModule:
        """The same tree of modules anew, over the same parameters: what is done to these modules leaves the old ones alone.

        Writing into a parameter in place does not.
        """
        clones: dict[nn.Module, nn.Module] = {}

        def clone(old: nn.Module) -> Any:
            if old not in clones:
                new = clones[old] = _clone(old)
                new._modules = {key: None if child is None else clone(child) for key, child in old._modules.items()}
            return clones[old]

        shell: RegionModule = clone(self)
        vars(shell)["_origins"] = {new: old for old, new in clones.items()}
        return shell

    def become(self, shell: RegionModule) -> None:
        """Hold what a shell holds. Modules that were left as they are stay the old objects."""
        origins: dict[nn.Module, nn.Module] = vars(shell).pop("_origins", {})
        settled: dict[nn.Module, nn.Module] = {}

        def settle(module: nn.Module) -> nn.Module:
            if module not in settled:
                for key, child in module._modules.items():
                    module._modules[key] = None if child is None else settle(child)
                origin = origins.get(module)
                settled[module] = origin if origin is not None and _equal(module, origin) else module
            return settled[module]

        settle(shell)
        for key, value in vars(shell).items():
            mine = vars(self).get(key)
            if isinstance(mine, dict):  # handles of hooks hold on to it
                mine.clear()
                mine.update(value)
            elif key not in ("region", "_original"):
                vars(self)[key] = value

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the replaced module's `forward`."""
        if hasattr(self.hydra, "_hf_hook"):
            raise UnsupportedModelError(
                f"{self.region.name}: accelerate offloads its weights, which its graph reads in place; keep the hybrid whole, on "
                "one device"
            )
        if (
            not torch.compiler.is_compiling()
        ):  # a name that is read is one that equal layers are not compiled together for
            refuse_transforms(f"{self.region.name} of a hybrid", "vmap", *DERIVATIVES)
        bound = self._inputs.bind(args, kwargs)
        values = self._inputs.flatten(bound)
        for (name, _), value in zip(self._inputs.paths, values, strict=True):
            if not (value is None or isinstance(value, Tensor)):
                raise UnsupportedModelError(
                    f"{self._get_name()}: {name} is a {type(value).__name__}, not a tensor; a hybrid reads complete masks: "
                    "call model.set_attn_implementation('sdpa')"
                )
        fast = values[self._hidden].is_cuda and not exporting() and has_plain_gates(self.hydra)
        if self._threaded:
            state = layer_state(bound.get(self._inputs.cache) if self._inputs.cache else None, self)
            values.append(state)
            # A compiler makes fewer launches of the plain graph by itself.
            step = self._run_step if fast and not torch.compiler.is_compiling() else self._run_decode
            if step is not None and self._continues(state, values[self._hidden]):
                return step(self, *values)
        return (self._run_fast if fast else self._run)(self, *values)

    @staticmethod
    def _continues(state: Any, hidden_states: Tensor) -> bool:
        """Whether this is one token that follows others, in plain inference. An exported graph must serve any number of tokens;
        torch.compile makes a graph of its own for one token."""
        if state is None or not state.states or torch.is_grad_enabled() or exporting():
            return False
        return hidden_states.shape[1] == 1

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """A move or a cast takes along what `restore` would bring back, such as projections that were pruned."""
        if recurse and self.original is not None:
            self.original._apply(fn)
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**{key: value for key, value in vars(self).items() if key not in COMPILED}, "_original": (None,)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.retake()

    def extra_repr(self) -> str:
        return "".join(map(LETTERS.__getitem__, self.kinds))


COMPILED = (
    "_inputs",
    "_threaded",
    "_hidden",
    "_run",
    "_run_fast",
    "_run_decode",
    "_run_step",
    "_origins",
)  # what is made anew in a copy


def _clone(module: Any) -> Any:
    """A module of the same class, attributes, children, parameters and hooks, in containers of its own."""
    new = module.__class__.__new__(module.__class__)
    vars(new).update({k: copy.copy(v) if isinstance(v, (dict, set)) else v for k, v in vars(module).items()})
    return new


def _equal(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules hold the same objects under the same names."""

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, dict) and isinstance(b, dict):
            return list(a) == list(b) and all(a[key] is b[key] for key in a)
        return a == b if isinstance(a, set) and isinstance(b, set) else a is b

    mine, theirs = vars(one), vars(other)
    return mine.keys() == theirs.keys() and all(same(mine[key], theirs[key]) for key in mine)

"""Regions: the attention modules of a decoder as small graphs, cut out, printed, and stitched back.

A region is one module that calls one attention op. `capture` runs the model once on a tiny input, finds every such
module, exports it, and outlines its children (`q_proj`, `q_norm`, ...) to calls of the original modules, so that
parameters, names, hooks and adapters stay where they were. `RegionModule` runs such a graph in the module's place.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from hydrasurgery.errors import UnsupportedModelError
from hydrasurgery.raising import ATTENTION, raise_attention

CACHE_ARGUMENTS = ("past_key_values", "past_key_value", "layer_past")
FACTS = ("num_heads", "num_key_value_heads", "head_dim", "value_dim", "window", "softcap", "sinks", "options")
BATCH, LENGTH = 2, 11  # of the capture's input; any dimension of an argument with such a size is dynamic


def register_interface() -> None:
    """Make `attn_implementation="hydra"` known to transformers: attention calls become `hydra::attention`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register("hydra", _interface)
    AttentionMaskInterface.register("hydra", sdpa_mask)


def _interface(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    if kwargs.get("position_bias") is not None:
        raise UnsupportedModelError(f"{type(module).__name__} adds a position bias to its attention: not supported")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    out = torch.ops.hydra.attention(
        query,
        key,
        value,
        attention_mask,
        s_aux,
        scale=scaling,
        causal=causal,
        window=sliding_window or None,
        softcap=softcap,
    )
    return out, None


@dataclass(frozen=True)
class Inputs:
    """How a module's call becomes graph inputs.

    Attributes:
        parameters: names of the call's positional parameters.
        paths: each placeholder with its path into the call's arguments.
        source: the placeholder of the hidden states [B, T, C].
        cache: the name of the argument that is a cache, if there is one.
    """

    parameters: tuple[str, ...]
    paths: tuple[tuple[str, tuple[str | int, ...]], ...]
    source: str
    cache: str | None = None

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The call's arguments by parameter name."""
        return {**dict(zip(self.parameters, args, strict=False)), **kwargs}

    def flatten(self, bound: dict[str, Any]) -> list[Any]:
        """Values of the placeholders, in order; an absent argument is None."""
        values = []
        for _, path in self.paths:
            value = bound.get(str(path[0]))
            for step in path[1:]:
                value = None if value is None else value[step]
            values.append(value)
        return values


@dataclass
class Region:
    """One attention module as a graph.

    Attributes:
        name: the module's path in the model.
        module: the `RegionModule` whose children the graph calls.
        graph: placeholders are the call's tensors; the output is what the module returns.
        num_heads, num_key_value_heads, head_dim, value_dim: query heads, KV heads and their widths.
        window, softcap, sinks: the attention's variant.
        kinds: per query head, "full" or "linear".
        source: the input [B, T, C] that the values are computed from: the hidden states.
        options: what the passes were told (rule, full_norm, ...), for printing and checks.
        decode: another graph for one token that follows a state, outside of training and tracing; None runs `graph` for it too.
    """

    name: str
    module: RegionModule
    graph: fx.Graph
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    value_dim: int
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    kinds: tuple[str, ...] = ()
    source: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    decode: fx.Graph | None = None

    @property
    def full_heads(self) -> tuple[int, ...]:
        """Slots of the heads that stay softmax attention."""
        return tuple(h for h, kind in enumerate(self.kinds) if kind == "full")

    @property
    def linear_heads(self) -> tuple[int, ...]:
        """Slots of the heads that become linear attention."""
        return tuple(h for h, kind in enumerate(self.kinds) if kind == "linear")

    def key_value_head(self, head: int) -> int:
        """The KV head that query head `head` reads."""
        return head * self.num_key_value_heads // self.num_heads

    def find(self, target: Any) -> list[fx.Node]:
        """Nodes that call `target` (an op, a function or a child's name)."""
        return [node for node in self.graph.nodes if node.target == target]

    def with_graph(self, graph: fx.Graph) -> Region:
        """The same region around another graph."""
        return replace(self, graph=graph)

    def __str__(self) -> str:
        variant = "".join(
            f", {name} {value}"
            for name, value in (("window", self.window), ("softcap", self.softcap), ("sinks", self.sinks or None))
            if value is not None
        )
        head = (
            f"region {self.name}: {self.num_heads} heads ({len(self.linear_heads)} linear), "
            f"{self.num_key_value_heads} KV heads of {self.head_dim}{variant}"
        )
        return "\n".join([head, *(f"  {line}" for line in map(format_node, self.graph.nodes) if line)])


def format_node(node: fx.Node) -> str:
    """One line: `name: [shape] = op(arguments)`, and in brackets the kernel if select-kernels has noted one."""

    def show(value: Any) -> str:
        if isinstance(value, fx.Node):
            return f"%{value.name}"
        if isinstance(value, (list, tuple)):
            return "[" + ", ".join(map(show, value)) + "]"
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    shape = node.meta.get("shape")
    label = f"%{node.name}" + (f": [{', '.join(map(str, shape))}]" if shape is not None else "")
    if node.op == "placeholder":
        return f"{label} = input"
    if node.op == "output":
        return f"return {show(node.args[0])}"
    if node.op == "get_attr":
        return f"{label} = {node.target}"
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    if isinstance(node.target, torch._ops.OpOverload):
        target = str(node.target).removeprefix("aten.").removesuffix(".default").replace("hydra.", "hydra::")
    arguments = [show(a) for a in node.args] + [f"{k}={show(v)}" for k, v in node.kwargs.items() if v is not None]
    kernel = f"  [{node.meta['kernel']}]" if "kernel" in node.meta else ""
    return f"{label} = {target}({', '.join(arguments)}){kernel}"


class RegionModule(nn.Module):
    """Runs a region's graph in the place of the module it was cut from.

    Same call signature and return structure as that module; its children and parameters are the original objects;
    what the passes add lives under `.hydra`. Trains, deep-copies and pickles (the copy forgets the original module).
    """

    def __init__(self, owner: nn.Module, graph: fx.Graph, inputs: Inputs) -> None:
        super().__init__()
        for key, value in owner.__dict__.items():
            if key not in self.__dict__ and key != "forward":
                self.__dict__[key] = value
        self._modules.update(owner._modules)
        self._parameters.update(owner._parameters)
        self._buffers.update(owner._buffers)
        self._non_persistent_buffers_set |= owner._non_persistent_buffers_set
        self.training = owner.training
        self.hydra = nn.Module()
        self.inputs = inputs
        self.kinds: tuple[str, ...] = ()
        self.teacher_heads: tuple[int, ...] = ()  # which of the original module's heads each slot holds
        self.facts: dict[str, Any] = {}
        self._original = (owner,)  # in a tuple, so that it is no child
        self.graph, self.decode = graph, None

    @property
    def graph(self) -> fx.Graph:
        """The graph that `forward` runs."""
        return self._graph

    @graph.setter
    def graph(self, graph: fx.Graph) -> None:
        self._graph = graph
        self._threaded = any(n.op == "placeholder" and n.target == "state" for n in graph.nodes)
        self._run = _compiled(graph)

    @property
    def decode(self) -> fx.Graph | None:
        """The graph for one token that follows a state; see `Region`."""
        return self._decode

    @decode.setter
    def decode(self, graph: fx.Graph | None) -> None:
        self._decode = graph
        self._run_decode = None if graph is None else _compiled(graph)

    @property
    def original(self) -> nn.Module | None:
        """The module this one replaced; None in a copy or a loaded checkpoint."""
        return self._original[0]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the replaced module's `forward`."""
        bound = self.inputs.bind(args, kwargs)
        values = self.inputs.flatten(bound)
        for (name, _), value in zip(self.inputs.paths, values, strict=True):
            if not (value is None or isinstance(value, Tensor)):
                raise UnsupportedModelError(
                    f"{self._get_name()}: {name} is a {type(value).__name__}, not a tensor; a hybrid reads complete masks: "
                    "call model.set_attn_implementation('sdpa')"
                )
        if self._threaded:
            from hydrasurgery.inference.cache import layer_state

            state = layer_state(bound.get(self.inputs.cache) if self.inputs.cache else None, self)
            values.append(state)
            hidden_states = values[[name for name, _ in self.inputs.paths].index(self.inputs.source)]
            if self._run_decode is not None and self._continues(state, hidden_states):
                return self._run_decode(self, *values)
        return self._run(self, *values)

    @staticmethod
    def _continues(state: Any, hidden_states: Tensor) -> bool:
        """Whether this is one token after others, in plain inference. An exported graph must serve any number of tokens, while
        torch.compile makes a graph of its own for one token."""
        if state is None or not state.states or torch.is_grad_enabled() or _exporting():
            return False
        return hidden_states.shape[1] == 1

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        del state["_run"], state["_run_decode"]
        state["_original"] = (None,)
        state["_graph"] = graph_to_data(self._graph)
        state["_decode"] = None if self._decode is None else graph_to_data(self._decode)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        graph, decode = graph_from_data(state.pop("_graph")), state.pop("_decode")
        super().__setstate__(state)
        self.graph = graph
        self.decode = None if decode is None else graph_from_data(decode)

    def extra_repr(self) -> str:
        return "".join("F" if kind == "full" else "l" for kind in self.kinds)


def _exporting() -> bool:
    compiler = torch.compiler
    if compiler.is_dynamo_compiling():
        return compiler._is_exporting_flag  # dynamo of PyTorch 2.11 takes `is_exporting()` to be True, whatever it is
    return compiler.is_compiling()


def _compiled(graph: fx.Graph) -> Callable[..., Any]:
    """The graph as a function of the module and its inputs."""
    code = graph.python_code("self")
    namespace = dict(code.globals)
    exec(compile(code.src, "<region>", "exec"), namespace)
    return namespace["forward"]


@dataclass(frozen=True)
class _Ref:
    name: str


def graph_to_data(graph: fx.Graph) -> list[tuple[Any, ...]]:
    """The graph's nodes as plain data (ops by name), for pickling and copying."""

    def encode(value: Any) -> Any:
        refer: Callable[[Any], Any] = lambda v: _Ref(v.name) if isinstance(v, fx.Node) else v  # noqa: E731
        return fx.node.map_aggregate(value, refer)

    def name_of(target: Any) -> Any:
        return ("op", str(target)) if isinstance(target, torch._ops.OpOverload) else target

    def plain(value: Any) -> Any:  # fx's immutable lists become ordinary ones
        if isinstance(value, (list, tuple)):
            return type(value)(map(plain, value)) if type(value) in (list, tuple) else list(map(plain, value))
        return {k: plain(v) for k, v in value.items()} if isinstance(value, dict) else value

    return [
        (n.name, n.op, name_of(n.target), plain(encode(n.args)), plain(encode(n.kwargs)), n.meta.get("shape"))
        for n in graph.nodes
    ]


def graph_from_data(data: list[tuple[Any, ...]]) -> fx.Graph:
    """Inverse of `graph_to_data`."""
    graph, made = fx.Graph(), dict[str, fx.Node]()
    for name, op, target, args, kwargs, shape in data:
        if isinstance(target, tuple):
            namespace, op_name, overload = target[1].split(".")
            target = getattr(getattr(getattr(torch.ops, namespace), op_name), overload)

        def decode(value: Any) -> Any:
            return pytree.tree_map(lambda v: made[v.name] if isinstance(v, _Ref) else v, value)

        made[name] = graph.create_node(op, target, decode(args), decode(kwargs), name=name)
        made[name].meta["shape"] = shape
    return graph


# --- capture ---------------------------------------------------------------------------------------------------------


class _Watch(TorchFunctionMode):
    """Notes which module is innermost when attention, or a bare softmax, is called."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[tuple[str, nn.Module, tuple[Any, ...], dict[str, Any]]] = []
        self.attention: list[tuple[str, nn.Module, tuple[Any, ...], dict[str, Any]]] = []
        self.softmax: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.stack:
            if func in (torch.nn.functional.scaled_dot_product_attention, torch.ops.hydra.attention):
                self.attention.append(self.stack[-1])
            elif func in (torch.softmax, torch.nn.functional.softmax, Tensor.softmax):
                self.softmax.append(self.stack[-1][0])
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _watched(model: nn.Module) -> Iterator[_Watch]:
    """Hooks that keep the stack of running modules, with the arguments each was called with."""
    watch, handles = _Watch(), []
    for name, module in model.named_modules():

        def enter(m: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
            watch.stack.append((name, m, args, kwargs))

        def leave(m: nn.Module, args: Any, output: Any) -> None:
            watch.stack.pop()

        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        with watch:
            yield watch
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def using_hydra_attention(model: nn.Module) -> Iterator[None]:
    """For the time of the block a Hugging Face model's attention calls become `hydra::attention`."""
    found: list[Any] = [getattr(m, "config", None) for m in model.modules()]
    configs = {id(config): config for config in found if hasattr(config, "_attn_implementation")}
    before = {key: config._attn_implementation for key, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation = "hydra"
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]


def _tiny_input(model: nn.Module, two_dimensional: bool) -> dict[str, Any]:
    device = next(model.parameters()).device
    ids = torch.ones(BATCH, LENGTH, dtype=torch.long, device=device)
    if not hasattr(model, "config"):
        return {"input": ids}
    if two_dimensional:
        mask = torch.ones_like(ids)
        if device.type != "meta":
            mask[0, :3] = 0  # left padding, so that the model hands a mask to its attention
    else:
        mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool, device=device).tril().expand(BATCH, 1, -1, -1)
    return {"input_ids": ids, "attention_mask": mask, "use_cache": False}


def _run_once(model: nn.Module, example: Any) -> _Watch:
    if example is not None:
        attempts = [example if isinstance(example, dict) else {"input": example}]
    else:
        attempts = [_tiny_input(model, two_dimensional) for two_dimensional in (False, True)]
    failure: Exception | None = None
    for inputs in attempts:
        try:
            with _watched(model) as watch, torch.no_grad():
                model(inputs["input"]) if "input" in inputs else model(**inputs)
            return watch
        except UnsupportedModelError:
            raise
        except Exception as error:
            failure = error
    if next(model.parameters()).is_meta:  # some models read values on the way (routing, positions): give them zeros
        return _run_twin(model, example)
    raise UnsupportedModelError(
        f"{type(model).__name__} could not be run on a tiny input ({type(failure).__name__}: {failure}); "
        "pass example_inputs=..., what its forward takes"
    ) from failure


def _run_twin(model: nn.Module, example: Any) -> _Watch:
    """Run a copy of an empty model on zeros, and note its attention calls as calls of `model` itself."""
    twin = copy.deepcopy(model).to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*twin.parameters(), *twin.buffers()):
            tensor.zero_()
    watch = _run_once(twin, example)
    watch.attention = [
        (name, model.get_submodule(name), *pytree.tree_map_only(Tensor, lambda t: t.to("meta"), (args, kwargs)))
        for name, _, args, kwargs in watch.attention
    ]
    return watch


def refuse_known(model: nn.Module) -> None:
    """Raise UnsupportedModelError for the architectures whose attention has no place in the dialect."""
    config = getattr(model, "config", None)
    if config is None:
        return
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    name = type(model).__name__
    if getattr(text, "alibi", False) or text.model_type in ("bloom", "mpt"):
        raise UnsupportedModelError(
            f"{name}: its attention adds ALiBi position biases and bypasses the attention interface; "
            "choose a model with rotary or learned positions"
        )
    if getattr(text, "kv_lora_rank", None):
        raise UnsupportedModelError(
            f"{name}: latent KV attention (MLA, kv_lora_rank={text.kv_lora_rank}) has no heads to cut"
        )
    if getattr(text, "num_kv_shared_layers", 0) or text.model_type.startswith(("gemma3n", "gemma4")):
        raise UnsupportedModelError(
            f"{name}: layers share one KV cache (num_kv_shared_layers); a head cannot be cut out of one layer"
        )


def capture(model: nn.Module, example_inputs: Any = None) -> list[Region]:
    """Cut every attention module of `model` out as a region; `model` itself is left as it was.

    Args:
        model: a Hugging Face decoder, or an nn.Module that calls `F.scaled_dot_product_attention`.
        example_inputs: for a plain module, what its forward takes (a tensor or a dict); by default token ids [2, 11].

    Raises:
        UnsupportedModelError: naming the module and the reason.
    """
    refuse_known(model)
    if region_modules(model):
        raise UnsupportedModelError(
            f"{type(model).__name__} is a hybrid already; pass the teacher it was made from, or hydrasurgery.restore it"
        )
    training = {m: m.training for m in model.modules()}
    try:
        model.eval()
        with using_hydra_attention(model):
            watch = _run_once(model, example_inputs)
            _check_owners(model, watch)
            cuts: dict[Any, tuple[fx.Graph, Inputs]] = {}
            regions = []
            for name, owner, args, kwargs in watch.attention:
                kwargs = _plain_call(owner, args, kwargs)
                key = _shape_key(owner, kwargs)
                if key not in cuts:
                    cuts[key] = _export(name, owner, kwargs)
                    raise_attention(name, cuts[key][0])
                    _free_dtype(*cuts[key])
                regions.append(_region(name, owner, *cuts[key]))
    finally:
        for module, mode in training.items():
            module.training = mode
    return regions


def _check_owners(model: nn.Module, watch: _Watch) -> None:
    names = [name for name, *_ in watch.attention]
    if not names:
        seen = f"; {watch.softmax[0]} computes softmax in code of its own" if watch.softmax else ""
        raise UnsupportedModelError(
            f"{type(model).__name__}: no call of an attention op was seen{seen}. It has no attention, or bypasses the "
            "attention interface"
        )
    for name in set(names):
        if names.count(name) > 1:
            raise UnsupportedModelError(
                f"{name} calls attention {names.count(name)} times; a region holds exactly one call"
            )
    kinds = {type(owner) for _, owner, *_ in watch.attention}
    all_owners = [name for name, module in model.named_modules() if type(module) in kinds]
    missing = sorted(set(all_owners) - set(names))
    if missing:
        raise UnsupportedModelError(f"{missing[0]} is an attention module but made no attention call in a forward pass")


def _plain_call(owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The call's arguments by name, caches dropped."""
    names = [p.name for p in inspect.signature(owner.forward).parameters.values() if p.kind == p.POSITIONAL_OR_KEYWORD]
    bound = {**dict(zip(names, args, strict=False)), **kwargs}
    return {k: None if k in CACHE_ARGUMENTS else v for k, v in bound.items()}


def _shape_key(owner: nn.Module, kwargs: dict[str, Any]) -> Any:
    """Two modules of one key have the same graph."""
    simple = {
        k: v for k, v in vars(owner).items() if isinstance(v, (bool, int, float, str, type(None))) and k != "layer_idx"
    }
    if simple.get("scale_attn_by_inverse_layer_idx"):
        simple["layer_idx"] = owner.__dict__["layer_idx"]
    shapes = tuple((n, tuple(p.shape), p.dtype) for n, p in owner.named_parameters())
    call = tuple((k, v is None) for k, v in kwargs.items())
    return type(owner), tuple(sorted(simple.items(), key=str)), shapes, call


class _OneArgument(nn.Module):
    """Calls `owner` with a dict of arguments: export then sees one tree of inputs, whatever the signature is."""

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        self.owner = owner

    def forward(self, call: dict[str, Any]) -> Any:
        return self.owner(**call)


def _export(name: str, owner: nn.Module, kwargs: dict[str, Any]) -> tuple[fx.Graph, Inputs]:
    sizes = torch.export.ShapesCollection()
    for leaf in pytree.tree_leaves(kwargs):
        if isinstance(leaf, Tensor):
            dynamic = {i: torch.export.Dim.AUTO for i, n in enumerate(leaf.shape) if n in (BATCH, LENGTH)}
            if dynamic:
                sizes[leaf] = dynamic
    try:
        # Fake tensors are remembered for a second trace, which does not come: a third of the time.
        with torch.no_grad(), torch._dynamo.config.patch(fake_tensor_cache_enabled=False):
            root = _OneArgument(owner).eval()
            shapes = sizes.dynamic_shapes(root, (kwargs,))
            program = torch.export.export(root, (kwargs,), strict=False, dynamic_shapes=shapes)
    except Exception as error:
        raise UnsupportedModelError(f"{name} ({type(owner).__name__}) cannot be exported: {error}") from error
    return _outline(owner, program, kwargs)


def _child_call(node: fx.Node) -> tuple[str, str] | None:
    """(key of the call, child's name) if the node was made inside a child of the exported module."""
    for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items():
        _, dot, child = path.partition(".")
        if dot:
            return key, child.split("@")[0]
    return None


def _outline(
    owner: nn.Module, program: torch.export.ExportedProgram, kwargs: dict[str, Any]
) -> tuple[fx.Graph, Inputs]:
    """The exported graph with every child's nodes folded into one call of that child."""
    signature = program.graph_signature
    attributes = {
        name: target.removeprefix("owner.")
        for name, target in {**signature.inputs_to_parameters, **signature.inputs_to_buffers}.items()
    }
    constants = {**signature.inputs_to_lifted_tensor_constants}
    leaves = pytree.tree_flatten_with_path(kwargs)[0]
    user_inputs = iter(leaves)
    nodes = [n for n in program.graph.nodes if not _is_assertion(n)]
    groups = _fold(nodes)
    graph, made = fx.Graph(), dict[fx.Node, fx.Node]()
    paths: list[tuple[str, tuple[str | int, ...]]] = []
    source: fx.Node | None = None

    for node in nodes:
        if node.op == "placeholder":
            if node.name in attributes:
                continue  # made where it is used
            if node.name in constants:
                raise UnsupportedModelError(
                    f"{type(owner).__name__} holds a tensor constant in its forward: {node.name}"
                )
            path, leaf = next(user_inputs)
            if isinstance(leaf, Tensor):
                steps = tuple(getattr(k, "key", getattr(k, "idx", 0)) for k in path)
                made[node] = graph.placeholder(node.name.removeprefix("call_"))
                made[node].meta["shape"] = _shape(node)
                paths.append((str(made[node].target), steps))
                if source is None and made[node].meta["shape"][:-1] == ("B", "T"):
                    source = made[node]
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
        raise UnsupportedModelError(f"{type(owner).__name__} takes no hidden states [batch, length, channels]")
    return graph, Inputs(tuple(named), tuple(paths), str(source.target), cache)


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


def _fold(nodes: list[fx.Node]) -> dict[fx.Node, _Call]:
    """Each node inside a child of one tensor in, one tensor out -> that child's call. Other children stay inline."""
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
        if len(outside) == 1 and len(results) == 1:
            folded.update(dict.fromkeys(inside, _Call(names[key], next(iter(outside)), results[0])))
    return folded


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


def _free_dtype(graph: fx.Graph, inputs: Inputs) -> None:
    """Cast q and k, where v is not cast, to the dtype of the hidden states, which need not stay that of the capture.

    A rotary embedding in full precision ends with `q.to(dtype)`, of which an exported graph has the number alone.
    """
    attention = next(n for n in graph.nodes if n.target == ATTENTION)
    q, k, v = attention.args[:3]
    casts = {x for x in (q, k) if x.target == torch.ops.aten.to.dtype}
    if casts and v.target != torch.ops.aten.to.dtype:
        source = next(n for n in graph.nodes if n.target == inputs.source)
        with graph.inserting_after(source):
            dtype = graph.call_function(getattr, (source, "dtype"))
        dtype.meta["shape"] = ()
        for cast in casts:
            cast.update_arg(1, dtype)


def _region(name: str, owner: nn.Module, graph: fx.Graph, inputs: Inputs) -> Region:
    graph = copy.deepcopy(graph)
    module = RegionModule(owner, graph, inputs)
    node = next(n for n in graph.nodes if n.target == ATTENTION)
    q, k, v = (a.meta["shape"] for a in node.args[:3])
    if q[3] != v[3]:
        raise UnsupportedModelError(
            f"{name}: keys of width {q[3]} and values of width {v[3]} (latent attention) are not supported"
        )
    region = Region(name, module, graph, q[1], k[1], q[3], v[3])
    region.window = node.kwargs.get("window")
    region.softcap = node.kwargs.get("softcap")
    region.sinks = len(node.args) > 4 and node.args[4] is not None
    region.kinds = ("full",) * region.num_heads
    region.source = inputs.source
    module.kinds, module.teacher_heads = region.kinds, tuple(range(region.num_heads))
    return region


# --- stitch ----------------------------------------------------------------------------------------------------------


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` at path `name` of `model`."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent) if parent else model, leaf, module)


def stitch(model: nn.Module, regions: list[Region]) -> nn.Module:
    """Put each region's module in its place; returns `model`."""
    for region in regions:
        region.module.graph, region.module.kinds = region.graph, region.kinds
        region.module.decode = region.decode
        region.module.facts = {fact: getattr(region, fact) for fact in FACTS}
        replace_module(model, region.name, region.module)
    return model


def regions(model: nn.Module) -> list[Region]:
    """The regions of a hybrid as they run now, for printing and for further passes; empty for any other model."""
    return [
        Region(
            name,
            module,
            module.graph,
            kinds=module.kinds,
            source=module.inputs.source,
            decode=module.decode,
            **module.facts,
        )
        for name, module in region_modules(model).items()
    ]


def region_modules(model: nn.Module) -> dict[str, RegionModule]:
    """The stitched attention modules of a model, by name, in order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, RegionModule)}


def restore(model: nn.Module) -> nn.Module:
    """Put the original attention modules back, in place; returns `model`.

    Raises:
        UnsupportedModelError: for a copy or a loaded checkpoint, which hold no originals.
    """
    modules = region_modules(model)
    for name, module in modules.items():
        if module.original is None:
            raise UnsupportedModelError(
                f"{name} holds no original (a copy or a loaded checkpoint); load the teacher instead"
            )
    for name, module in modules.items():
        assert module.original is not None
        replace_module(model, name, module.original)
    from hydrasurgery.pretrained import unmark

    unmark(model)
    return model


class HeadTap(nn.Module):
    """A region's attention node as a module, for hooks on q, k, v, mask and sinks and on what the heads give."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, sinks: Tensor | None = None, **options: Any
    ) -> Tensor:
        """`hydra::attention`."""
        return ATTENTION(q, k, v, mask, sinks, **options)


@contextlib.contextmanager
def head_taps(model: nn.Module, example_inputs: Any = None) -> Iterator[dict[str, HeadTap]]:
    """For the time of the block every attention module has a `HeadTap` in which its attention runs, under its name.

    Forward hooks on it read the heads' outputs [B, T, H, D] or, by returning a tensor, replace them. Its inputs are for hooks
    too. An output of more rows is one whose new rows had the inputs of row 0.
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
        originals[region.name] = model.get_submodule(region.name)
    try:
        with using_hydra_attention(model):
            stitch(model, regions)
        yield taps
    finally:
        for name, original in originals.items():
            replace_module(model, name, original)


def _put_tap(graph: fx.Graph, attention: fx.Node) -> None:
    """Call the tap instead of the attention, and let all that is used behind it have as many rows as its output."""
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


__all__ = [
    "Region",
    "RegionModule",
    "capture",
    "head_taps",
    "region_modules",
    "regions",
    "register_interface",
    "restore",
    "stitch",
    "using_hydra_attention",
]

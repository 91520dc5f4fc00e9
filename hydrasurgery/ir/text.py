"""Graphs as text and back: one line per node, with its shape and with what the passes noted on it.

    %q_full: [B, 2, T, 16] = select_heads(%add_2, (0, 3), 1)
    %o_full: [B, T, 2, 16] = hydra::attention(%q_full, %k_all, %v_all, %attention_mask, scale=0.25) {kind=full}

Operators are written `namespace::name`, children and parameters of the module `self.path`, methods of tensors `method::name`.
Functions of this package, of Python's `operator` and of `torch.nn.functional` go by their name, others as `module:name`.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import fx

from hydrasurgery import layers, ops
from hydrasurgery.errors import RegionTextError
from hydrasurgery.ir import state
from hydrasurgery.json_files import shown

MEANING = ("kind", "role", "branch", "state", "dtype")  # what passes note on nodes, in `node.meta`, for other passes
NOTES = (*MEANING, "kernel")
LIBRARIES = (ops, layers, state, operator, torch.nn.functional)
Functions = Mapping[str, Callable[..., Any]]

_NODE = re.compile(r"%(\w+)(?:: (\[.*?\]))? = (.+)")
_CALL = re.compile(r"([\w.:<>-]+)\((.*)\)")
_NOTES = re.compile(r" \{([^{}]*)\}$")
_NOTE = re.compile(r"(\w+)=(\"[^\"]*\"|[^,\s]+)")
_REFERENCE = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|%(\w+)")
# What Python raises for text that is no argument, or is nested too deeply for its parser.
UNREADABLE = (SyntaxError, ValueError, KeyError, AttributeError, RuntimeError, TypeError, MemoryError)
_WORDS = {"inf": float("inf"), "nan": float("nan"), "end": 2**63 - 1}  # `end` as export writes that of an open slice


# --- to text ---------------------------------------------------------------------------------------------------------


def format_graph(
    graph: fx.Graph, sources: Mapping[str, str] | None = None, notes: tuple[str, ...] = NOTES
) -> list[str]:
    """The graph's lines; `sources` says for an input's name what it is, by default its name; `notes` names what is shown."""
    return [_format_node(node, sources or {}, notes) for node in graph.nodes]


def _format_node(node: fx.Node, sources: Mapping[str, str], shown: tuple[str, ...]) -> str:
    if node.op == "output":
        return f"return {_show(node.args[0])}"
    shape = node.meta.get("shape")
    label = f"%{node.name}" + ("" if shape is None else f": [{', '.join(map(str, shape))}]")
    if node.op == "placeholder":
        text = f"input {sources.get(node.name, node.target)}"
    elif node.op == "get_attr":
        text = f"self.{node.target}"
    else:
        arguments = [_show(a) for a in node.args] + [f"{k}={_show(v)}" for k, v in node.kwargs.items()]
        text = f"{_target_name(node)}({', '.join(arguments)})"
    notes = ", ".join(f"{key}={_quote(node.meta[key])}" for key in shown if key in node.meta)
    return f"{label} = {text}" + (f" {{{notes}}}" if notes else "")


def unknown_functions(*graphs: fx.Graph) -> dict[str, Callable[..., Any]]:
    """The functions that graphs call and that are none of LIBRARIES, by the name in their text.

    Raises:
        RegionTextError: two functions have one name.
    """
    found: dict[str, Any] = {}
    for node in (node for graph in graphs for node in graph.nodes if node.op == "call_function"):
        name = "" if isinstance(node.target, torch._ops.OpOverload) else _function_name(node.target)
        if ":" in name and found.setdefault(name, node.target) is not node.target:
            raise RegionTextError(f"two functions of the graph are called {name}: give each a name of its own")
    return found


def _target_name(node: fx.Node) -> str:
    target: Any = node.target
    if node.op == "call_module":
        return f"self.{target}"
    if node.op == "call_method":
        return f"method::{target}"
    if isinstance(target, torch._ops.OpOverload):
        name = target._schema.name
        return name if target._overloadname == "default" else f"{name}.{target._overloadname}"
    return _function_name(target)


def _function_name(function: Any) -> str:
    name = getattr(function, "__name__", None) or type(function).__name__
    if function is getattr or any(getattr(library, name, None) is function for library in LIBRARIES):
        return str(name)
    return f"{function.__module__}:{getattr(function, '__qualname__', name)}"


def _show(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if isinstance(value, tuple):
        return f"({', '.join(map(_show, value))}{',' if len(value) == 1 else ''})"
    if isinstance(value, list):
        return f"[{', '.join(map(_show, value))}]"
    if isinstance(value, slice):
        return f"slice({_show(value.start)}, {_show(value.stop)}, {_show(value.step)})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {_show(part)}" for key, part in value.items()) + "}"
    if value is Ellipsis or (isinstance(value, int) and value == _WORDS["end"]):
        return "..." if value is Ellipsis else "end"
    return f"device({str(value)!r})" if isinstance(value, torch.device) else repr(value)


def _quote(value: Any) -> str:
    text = str(value)
    return text if re.fullmatch(r"[\w.-]+", text) else f'"{text}"'


# --- from text -------------------------------------------------------------------------------------------------------


def parse_graph(lines: Iterable[str], functions: Functions | None = None) -> tuple[fx.Graph, dict[str, str]]:
    """The graph of `format_graph`'s lines, and for each input's name what stood after `input`.

    Args:
        lines: in order; nodes are defined before they are used, and the last line returns.
        functions: what `module:name` in the text stands for. Nothing is imported by name.

    Raises:
        RegionTextError: naming the line and what is wrong with it.
    """
    graph, made, sources = fx.Graph(), dict[str, fx.Node](), dict[str, str]()
    for line in lines:
        text = line.strip()
        try:
            if any(node.op == "output" for node in reversed(graph.nodes)):
                raise ValueError("it comes after `return`")
            _parse_line(text, graph, made, sources, functions or {})
        except UNREADABLE as error:
            raise RegionTextError(f"{shown(text, 200)} cannot be read: {error}") from error
    if not any(node.op == "output" for node in graph.nodes):
        raise RegionTextError("the text has no line `return ...`")
    return graph, sources


def _parse_line(
    text: str, graph: fx.Graph, made: dict[str, fx.Node], sources: dict[str, str], functions: Functions
) -> None:
    if text.startswith("return "):
        graph.output(_read(text.removeprefix("return "), made))
        return
    notes = _NOTES.search(text)
    match = _NODE.fullmatch(text[: notes.start()] if notes else text)
    if match is None:
        raise ValueError("it is neither `%name: [shape] = ...` nor `return ...`")
    name, shape, body = match.groups()
    if name in made:
        raise ValueError(f"%{name} is defined twice")
    node = made[name] = _parse_body(name, body, graph, made, sources, functions)
    if node.name != name:
        raise ValueError(f"%{name} is no name that a node can have")
    node.meta["shape"] = None if shape is None else tuple(_sizes(shape))
    for key, value in _NOTE.findall(notes[1]) if notes else ():
        if key not in NOTES:
            raise ValueError(f"no note is called {key!r}; there are {', '.join(NOTES)}")
        node.meta[key] = value.strip('"')


def _sizes(shape: str) -> Iterator[str | int]:
    for size in filter(None, (part.strip() for part in shape[1:-1].split(","))):
        yield int(size) if size.isdecimal() else size


def _parse_body(
    name: str, body: str, graph: fx.Graph, made: dict[str, fx.Node], sources: dict[str, str], functions: Functions
) -> fx.Node:
    if body.startswith("input "):
        sources[name] = body.removeprefix("input ")
        return graph.create_node("placeholder", name, name=name)
    call = _CALL.fullmatch(body)
    if call is None:
        return graph.create_node("get_attr", _path(body), name=name)
    target, inside = call.groups()
    args, kwargs = _read_arguments(inside, made)
    if target.startswith("self."):
        return graph.create_node("call_module", _path(target), args, kwargs, name)
    if target.startswith("method::"):
        return graph.create_node("call_method", _identifier(target.removeprefix("method::")), args, kwargs, name)
    return graph.create_node("call_function", _function(target, functions), args, kwargs, name)


def _path(text: str) -> str:
    first, _, path = text.partition(".")
    if first != "self" or not path or not all(re.fullmatch(r"[\w-]+", step) for step in path.split(".")):
        raise ValueError(f"{text!r} is neither a call nor a path such as self.q_proj")
    return path


def _identifier(text: str) -> str:
    if not text.isidentifier():
        raise ValueError(f"{text!r} is no name")
    return text


def _function(text: str, functions: Functions) -> Any:
    if "::" in text:
        namespace, _, rest = text.partition("::")
        name, _, overload = rest.partition(".")
        found = getattr(getattr(getattr(torch.ops, namespace), name), overload or "default")
        if not isinstance(found, torch._ops.OpOverload):
            raise ValueError(f"{text!r} is no operator")
        return found
    if text in functions:
        return functions[text]
    if text == "getattr":
        return getattr
    for library in LIBRARIES:
        if isinstance(getattr(library, text, None), (FunctionType, BuiltinFunctionType)):
            return getattr(library, text)
    raise ValueError(f"no function is known as {text!r}; give it in `functions`")


def _read_arguments(text: str, made: Mapping[str, fx.Node]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    call = ast.parse(f"f({_python(text)})", mode="eval").body
    assert isinstance(call, ast.Call)
    return (
        tuple(_value(part, made) for part in call.args),
        {str(part.arg): _value(part.value, made) for part in call.keywords},
    )


def show_options(options: Mapping[str, Any]) -> str:
    """Options by name, as a call writes them: `rule='gated_delta', rotary=2`."""
    return ", ".join(f"{key}={value!r}" for key, value in options.items())


def read_options(text: str) -> dict[str, Any]:
    """Inverse of `show_options`; RegionTextError if a value is no constant."""
    try:
        return _read_arguments(text, {})[1]
    except UNREADABLE as error:
        raise RegionTextError(f"options {shown(text, 200)} cannot be read: {error}") from error


def _read(text: str, made: Mapping[str, fx.Node]) -> Any:
    return _value(ast.parse(_python(text), mode="eval").body, made)


def _python(text: str) -> str:
    """References to nodes as Python writes names; what stands in quotes stays."""
    return _REFERENCE.sub(lambda m: f"node.{m[1]}" if m[1] else m[0], text)


def _value(part: ast.AST, made: Mapping[str, fx.Node]) -> Any:
    """The value of a constant, a reference, or a list or tuple of them; nothing is evaluated."""
    match part:
        case ast.Constant(value=value):
            return value
        case ast.Tuple(elts=parts):
            return tuple(_value(p, made) for p in parts)
        case ast.Dict(keys=keys, values=parts):
            return {_value(k, made): _value(p, made) for k, p in zip(keys, parts, strict=True) if k is not None}
        case ast.List(elts=parts):
            return [_value(p, made) for p in parts]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, made)
        case ast.Name(id=word) if word in _WORDS:
            return _WORDS[word]
        case ast.Attribute(value=ast.Name(id="node"), attr=name):
            if name not in made:
                raise ValueError(f"%{name} is used before it is defined")
            return made[name]
        case ast.Attribute(value=ast.Name(id="torch"), attr=name):
            value = getattr(torch, name, None)
            if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
                return value
        case ast.Call(func=ast.Name(id="device"), args=[ast.Constant(value=str(place))]):
            return torch.device(place)
        case ast.Call(func=ast.Name(id="slice"), args=parts):
            return slice(*(_value(p, made) for p in parts))
    raise ValueError(f"{ast.unparse(part)} is no argument that a node can have")

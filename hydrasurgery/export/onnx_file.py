"""`export_onnx`: a decoder, hybrid or not, as one ONNX file that takes a prompt and single tokens alike."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hydrasurgery.decoders import end_tokens, position_limit
from hydrasurgery.errors import ExportError
from hydrasurgery.export.stateful import Traced, trace
from hydrasurgery.files import new_files

INPUTS = ("input_ids", "attention_mask", "position_ids")
BUILD_OPSET = 23  # the graph is built in it: the first with Attention, RMSNormalization and RotaryEmbedding
INLINE_LIMIT = 2**31 - 2**24  # bytes of weights that fit one protobuf message, with room for the graph
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class OnnxExport:
    """What `export_onnx` wrote.

    Attributes:
        path: the model file; with external data its weights are in `<name>.data` beside it.
        target, opset: what it is for.
        bytes: of all files.
        states: names of the past inputs; each `past_key_values.N.kind` comes out as `present.N.kind`.
        fallbacks: decompositions of what the target has no operator for, with how often each was needed.

    Example: see `export_onnx`.
    """

    path: Path
    target: str
    opset: int
    bytes: int
    states: tuple[str, ...]
    fallbacks: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [
            f"{self.path}: ONNX opset {self.opset} for {self.target}, {self.bytes:,} bytes, {len(self.states)} states"
        ]
        lines += [f"  decomposed: {what} ({count} times)" for what, count in self.fallbacks.items()]
        return "\n".join(lines)


def export_onnx(
    model: Any,
    path: str | os.PathLike[str],
    *,
    target: str = "onnxruntime",
    cache: bool = True,
    opset: int | None = None,
    external_data: bool | None = None,
    verbose: bool = True,
) -> OnnxExport:
    """Write `model` as ONNX, checked by the ONNX checker and shape inference; nothing is written if anything fails.

    Inputs: `input_ids` [batch, sequence], `attention_mask` [batch, past + sequence] (1: a token, 0: padding, anywhere),
    `position_ids` [batch, sequence], and with `cache` each state, empty or zero at the start. Outputs: `logits`
    [batch, sequence, vocabulary] and each state after the tokens. Every length fits, 0 of past and 1 of sequence included.

    Args:
        model: a Hugging Face decoder or a hybrid of one, in float32, float16 or bfloat16.
        path: the file to write, usually `*.onnx`; it must not exist.
        target: "onnxruntime" (com.microsoft LinearAttention and CausalConvWithState) or "opset27" (those of ai.onnx 27).
        cache: take and give states; without, the file maps whole sequences to logits.
        opset: a newer ai.onnx opset than the target's own, which None takes.
        external_data: weights in a file beside the model; by default where they exceed 2 GB.
        verbose: print what was written and what was decomposed.

    Returns:
        What was written.

    Raises:
        ExportError: an unknown target or too old an opset, an op or dtype that the target cannot express, a path that
            exists, a disk that is full.
        UnsupportedModelError: an architecture that this library refuses.
        ImportError: the extra `onnx` is not installed.
    """
    known = _target(target)
    opset = _check_opset(known, opset)
    path = Path(path)
    _check_dtype(model)
    with new_files(path, path.with_name(f"{path.name}.data")) as folder:
        drawn = draw(model, cache)
        _address(drawn.graph, known, opset)
        _save(drawn.graph, folder / path.name, external_data)
        size = sum(file.stat().st_size for file in folder.iterdir())
    written = OnnxExport(path, target, opset, size, drawn.states, drawn.fallbacks)
    if verbose:
        print(written)
    return written


@dataclass(frozen=True)
class Drawn:
    """A decoder as an onnx_ir model that every target shares, and what `OnnxExport` tells of it."""

    graph: Any
    states: tuple[str, ...]
    fallbacks: dict[str, int]


def draw(model: Any, cache: bool) -> Drawn:
    """All of an export that does not depend on its target, which is nearly all of its time.

    Raises: as `export_onnx`.
    """
    from hydrasurgery.export.lowering import Lowering

    traced, lowering = trace(model, cache), Lowering()
    graph = _convert(type(model).__name__, traced, lowering)
    _finish(graph, traced, model)
    return Drawn(graph, tuple(slot.past for slot in traced.slots or ()), dict(lowering.fallbacks))


def _target(name: str) -> Any:
    try:
        from hydrasurgery.export.lowering import TARGETS
    except ImportError as error:
        raise ImportError(f"export to ONNX needs the extra onnx ({error}): pip install 'hydrasurgery[onnx]'") from error
    if name not in TARGETS:
        raise ExportError(f"no target is called {name!r}; known: {', '.join(TARGETS)}")
    return TARGETS[name]


def _check_opset(target: Any, opset: int | None) -> int:
    import onnx

    opset = target.opset if opset is None else opset
    if opset < target.opset:
        raise ExportError(f"opset {opset} is too old: target {target.name} needs {target.opset} or newer")
    if opset > onnx.defs.onnx_opset_version():
        raise ExportError(
            f"opset {opset} is unknown to onnx {onnx.__version__}, which ends at {onnx.defs.onnx_opset_version()}"
        )
    return opset


def _check_dtype(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype not in DTYPES:
            raise ExportError(
                f"{name} is {parameter.dtype}; LinearAttention takes float32, float16 and bfloat16: convert the model"
            )


def _convert(name: str, traced: Traced, lowering: Any) -> Any:
    """The traced program as an onnx_ir model, the dialect's ops legalised."""
    table = lowering.table()
    strange = sorted(
        str(node.target)
        for node in traced.program.graph.nodes
        if getattr(node.target, "namespace", None) == "hydra" and node.target not in table
    )
    if strange:
        raise ExportError(f"{name}: ONNX cannot express {strange[0]}")
    slots = traced.slots or ()
    try:
        with _quiet(), _quick():
            program = torch.onnx.export(
                traced.program,
                dynamo=True,
                custom_translation_table=table,
                opset_version=BUILD_OPSET,
                input_names=[*INPUTS, *(slot.past for slot in slots)],
                output_names=["logits", *(slot.present for slot in slots)],
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, ExportError):
            raise ExportError(f"{name}: {cause}") from error
        raise ExportError(f"{name}: torch.onnx cannot translate the model: {cause}") from error
    assert program is not None
    return program.model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Inside the block torch.onnx does not tell of other packages that it supports, nor torch of its own deprecations."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _quick() -> Iterator[None]:
    """Inside the block onnxscript looks for slices that are a split where there is a slice, and not at every node.

    Each look lists all nodes of the graph, so that the time of an export would grow with the square of the number of layers.
    And torch remembers no fake tensors: that takes time, and hardly any of them comes back.
    """
    import torch._dynamo
    from onnxscript.rewriter.rules.common import slice_split_rule as rule

    look = type(rule).try_rewrite

    def look_at_slices(model: Any, graph: Any, node: Any, **options: Any) -> Any:
        return look(rule, model, graph, node, **options) if node.op_type == "Slice" else None

    setattr(rule, "try_rewrite", look_at_slices)  # noqa: B010  (mypy takes a method for no attribute)
    try:
        with torch._dynamo.config.patch(fake_tensor_cache_enabled=False):
            yield
    finally:
        vars(rule).pop("try_rewrite", None)  # which hid the class's; the export of another thread may have ended before


def _finish(graph: Any, traced: Traced, model: Any) -> None:
    """Name the free dimensions, drop the notes on where each node came from, say what the model is."""
    for node in graph.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    _equal_types(graph.graph)
    _name_dimensions(graph.graph, traced)
    graph.metadata_props["hydrasurgery.eos_token_ids"] = json.dumps(end_tokens(model))
    limit = position_limit(model)
    if limit is not None:
        graph.metadata_props["hydrasurgery.position_limit"] = json.dumps(limit)
    graph.metadata_props["hydrasurgery.model"] = type(model).__name__
    graph.producer_name = "hydrasurgery"


def _address(graph: Any, target: Any, opset: int) -> None:
    """Set the opset and the domain of the target's own operators."""
    from hydrasurgery.export.lowering import CONTRIB

    if target.domain != CONTRIB:
        for node in graph.graph.all_nodes():
            if node.domain == CONTRIB:
                node.domain = target.domain
        graph.opset_imports.pop(CONTRIB, None)
    # From 23 on the operators in use gained types and inputs, and changed in nothing that is used here.
    graph.opset_imports[""] = opset
    graph.metadata_props["hydrasurgery.target"] = target.name


def _equal_types(graph: Any) -> None:
    """RMSNormalization of one float type and scale of another: ONNX allows it, its own shape inference does not."""
    import onnx_ir as ir

    for node in list(graph.all_nodes()):
        if node.op_type == "RMSNormalization" and node.inputs[0].dtype != node.inputs[1].dtype:
            x, scale = node.inputs
            cast = ir.node("Cast", [x], attributes={"to": int(scale.dtype)})
            cast.outputs[0].dtype, cast.outputs[0].shape = scale.dtype, x.shape
            node.graph.insert_before(node, cast)
            node.replace_input_with(0, cast.outputs[0])


def _name_dimensions(graph: Any, traced: Traced) -> None:
    """`batch`, `sequence`, `past` and `total` in place of the exporter's symbols, in every shape."""
    names: dict[str, str] = {}
    slots = traced.slots or ()
    wanted: list[tuple[str | None, ...]] = [("batch", "sequence"), ("batch", "total"), ("batch", "sequence")]
    wanted += [("batch", None, "past" if slot.growing else None) for slot in slots]
    for value, dims in zip(graph.inputs, wanted, strict=True):
        for size, name in zip(value.shape, dims, strict=False):
            if name and not isinstance(size, int):
                names.setdefault(str(size.value), name)

    def rename(size: Any) -> Any:
        if isinstance(size, int) or size.value is None:  # unknown: a name would claim that all such sizes are one
            return size
        text = re.sub(r"\bs\d+\b", lambda found: names.get(found[0], found[0]), str(size.value))
        return {"past + sequence": "total", "sequence + past": "total"}.get(text, text)

    values = {id(v): v for v in graph.inputs}
    for node in graph.all_nodes():
        values.update((id(v), v) for v in node.outputs)
    for value in values.values():
        if value.shape is not None:
            value.shape = type(value.shape)([rename(size) for size in value.shape])


def _save(graph: Any, path: Path, external: bool | None) -> None:
    import onnx
    import onnx_ir as ir

    weights = sum(value.const_value.nbytes for value in graph.graph.initializers.values())
    if external is None:
        external = weights > INLINE_LIMIT
    ir.save(graph, path, external_data=f"{path.name}.data" if external else None)
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"{path.name}: the ONNX checker refuses the model: {error}") from error


__all__ = ["OnnxExport", "export_onnx"]

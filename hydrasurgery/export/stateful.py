"""A decoder as a function of tensors and nothing else: what it remembers goes in as tensors and comes out as tensors.

`StatefulDecoder` wraps a Hugging Face decoder (a hybrid or not): `forward(input_ids, attention_mask, position_ids, past)` returns
`(logits, *present)`, where `past` and `present` hold the keys and values of the kept heads, the convolutions' last inputs and the
recurrent states, in the order of `slots`. `trace` gives its `torch.export` program, free in batch, length and past length.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hydrasurgery.decoders import evaluating, takes
from hydrasurgery.errors import ExportError, UnsupportedModelError
from hydrasurgery.inference.cache import HybridLayer
from hydrasurgery.ir.interface import refuse_known, using_hydra_attention
from hydrasurgery.ir.stitch import region_modules
from hydrasurgery.ir.turns import in_turn

GROWING = ("key", "value")  # states whose dimension 2 is the number of tokens seen; the others have a constant size
BATCH, LENGTH, PAST = 3, 5, 7  # of the traced example: three sizes that no other dimension is taken for
LIMIT = 2**30  # of every free size


@dataclass(frozen=True)
class Slot:
    """One tensor of a layer's memory.

    Attributes:
        layer: the number of the attention layer.
        kind: "key" or "value" [B, kept KV heads, P, D], "recurrent" [B, H, K, V] fp32, "seen" [B] int64, or a convolution's name
            [B, C, W-1].
        shape: the example's shape; the batch comes first.
        dtype: of the tensor.
    """

    layer: int
    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def growing(self) -> bool:
        """Whether dimension 2 is the number of tokens seen."""
        return self.kind in GROWING

    @property
    def past(self) -> str:
        """The input's name."""
        return f"past_key_values.{self.layer}.{self.kind}"

    @property
    def present(self) -> str:
        """The output's name."""
        return f"present.{self.layer}.{self.kind}"

    def empty(self, batch: int, past: int = 0) -> Tensor:
        """The memory of `past` tokens, all zero."""
        shape = [batch, *self.shape[1:]]
        if self.growing:
            shape[2] = past
        return torch.zeros(shape, dtype=self.dtype)


class StatefulDecoder(nn.Module):
    """`forward(input_ids [B, T], attention_mask [B, P + T], position_ids [B, T], past) -> (logits [B, T, vocab], *present)`."""

    def __init__(self, model: nn.Module, slots: tuple[Slot, ...] | None) -> None:
        super().__init__()
        self.model, self.slots = model, slots
        self._positions = takes(model, "position_ids")
        self._hybrid: set[Any] = {module.layer_idx for module in region_modules(model).values()}

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: tuple[Tensor, ...] = ()
    ) -> tuple[Tensor, ...]:
        """Without slots (cache=False) the only output is the logits."""
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
        if self._positions:
            inputs["position_ids"] = position_ids
        if self.slots is None:
            return (self.model(**inputs, use_cache=False).logits,)
        seen = attention_mask.shape[1] - input_ids.shape[1]
        cache = _fill(self.slots, past, seen, self._hybrid)
        logits = self.model(**inputs, past_key_values=cache, use_cache=True).logits
        return (logits, *(_read(cache.layers[slot.layer], slot.kind) for slot in self.slots))


def _fill(slots: tuple[Slot, ...], past: tuple[Tensor, ...], seen: int, hybrid: Collection[int]) -> Any:
    """A cache that holds `past`, whose layers of the numbers `hybrid` belong to regions.

    Layers with a sliding window keep all keys: the mask does the sliding.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    cache: Any = DynamicCache()
    count = 1 + max(slot.layer for slot in slots)
    cache.layers = [HybridLayer() if number in hybrid else DynamicLayer() for number in range(count)]
    for slot, value in zip(slots, past, strict=True):
        layer = cache.layers[slot.layer]
        if slot.growing:
            setattr(layer, f"{slot.kind}s", value)
            layer.dtype, layer.device, layer.is_initialized = value.dtype, value.device, True
        else:
            layer.states[slot.kind] = value
    for layer in cache.layers:
        if isinstance(layer, HybridLayer) and not layer.is_initialized:
            layer.advance(seen)
    return cache


def _read(layer: Any, kind: str) -> Tensor:
    return getattr(layer, f"{kind}s") if kind in GROWING else layer.states[kind]


def find_slots(model: Any) -> tuple[Slot, ...]:
    """What each attention layer of `model` remembers, found by running it once.

    Raises:
        UnsupportedModelError: a layer's memory is none that this library knows.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    cache = DynamicCache()
    ids = torch.ones(BATCH, PAST, dtype=torch.long, device=model.device)
    with torch.no_grad():
        model(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, use_cache=True)
    slots = []
    for number, layer in enumerate(cache.layers):
        if not isinstance(layer, DynamicLayer):
            raise UnsupportedModelError(
                f"{type(model).__name__}: layer {number} keeps a {type(layer).__name__}, which cannot be exported; "
                "export with cache=False"
            )
        kinds = (*(GROWING if layer.is_initialized else ()), *getattr(layer, "states", ()))
        for kind in kinds:
            value = _read(layer, kind)
            slots.append(Slot(number, kind, tuple(value.shape), value.dtype))
    return tuple(slots)


@dataclass(frozen=True)
class Traced:
    """A `torch.export` program of a `StatefulDecoder`, with what it remembers (None: it was traced without a cache)."""

    program: torch.export.ExportedProgram
    slots: tuple[Slot, ...] | None


@contextlib.contextmanager
def exportable(model: Any) -> Iterator[None]:
    """For the time of the block: eval mode, attention as `hydra::attention`, experts as plain batched products."""
    experts = model.get_experts_implementation() if _has_experts(model) else None
    with evaluating(model):
        try:
            if experts is not None:
                model.set_experts_implementation("batched_mm")
            with using_hydra_attention(model):
                yield
        finally:
            if experts is not None:
                model.set_experts_implementation(experts)


MATMUL = (torch.matmul, Tensor.matmul, Tensor.__matmul__)


class _OuterProducts(TorchFunctionMode):
    """A @ b with one number a row and column as the product that it is, to the bit.

    transformers before 5.23 makes rotary angles so, of an expanded tensor, and torch 2.11 then exports no batch of 1.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in MATMUL and len(args) == 2 and args[0].dim() == args[1].dim() > 2:
            inner = args[0].shape[-1]
            if isinstance(inner, int) and inner == 1:
                return args[0] * args[1]
        return func(*args, **(kwargs or {}))


def _has_experts(model: Any) -> bool:
    return getattr(model, "_can_set_experts_implementation", lambda: False)()


@in_turn
def trace(model: Any, cache: bool = True) -> Traced:
    """Export `model` with explicit states; any batch, length and past length (0 and 1 included) fit the program.

    Raises:
        UnsupportedModelError: an architecture that this library refuses, or no Hugging Face decoder.
        ExportError: `torch.export` failed; the message says where.
    """
    if not hasattr(model, "config") or not hasattr(model, "get_output_embeddings"):
        raise UnsupportedModelError(f"{type(model).__name__}: only Hugging Face decoders can be exported")
    refuse_known(model)
    _check_positions(model)
    with exportable(model):
        slots = find_slots(model) if cache else None
        decoder = StatefulDecoder(model, slots).eval()
        arguments, shapes = _example(slots, model.device)
        program = _export(type(model).__name__, decoder, arguments, shapes)
    _check_attention(model, program)
    return Traced(program, slots)


def _check_positions(model: nn.Module) -> None:
    """One program serves all lengths: it cannot make other frequencies of rotation when a sequence grows."""
    for name, module in model.named_modules():
        kinds: Any = getattr(module, "rope_type", None)
        if any("dynamic" in str(kind) for kind in (kinds.values() if isinstance(kinds, dict) else [kinds])):
            raise ExportError(
                f"{name} of {type(model).__name__} computes its rotary frequencies anew as sequences grow (rope_type 'dynamic'), "
                "which a program for every length cannot; load the model with other rope_parameters ('linear' or 'yarn')"
            )


def _example(slots: tuple[Slot, ...] | None, device: torch.device) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Arguments of the traced call, and which of their dimensions are free."""
    batch, length, past_length = (torch.export.Dim(n, min=0, max=LIMIT) for n in ("batch", "length", "past"))
    total = torch.export.Dim.AUTO  # past + length, which a Dim cannot say
    past = 0 if slots is None else PAST
    ids = torch.ones(BATCH, LENGTH, dtype=torch.long, device=device)
    mask = torch.ones(BATCH, past + LENGTH, dtype=torch.long, device=device)
    positions = torch.arange(past, past + LENGTH, device=device).expand(BATCH, -1).contiguous()
    states = tuple(slot.empty(BATCH, PAST).to(device) for slot in slots or ())
    sizes = tuple({0: batch, 2: past_length} if slot.growing else {0: batch} for slot in slots or ())
    tokens = {0: batch, 1: length}
    return (ids, mask, positions, states), (tokens, {0: batch, 1: total}, tokens, sizes)


def _export(name: str, decoder: nn.Module, arguments: tuple[Any, ...], shapes: tuple[Any, ...]) -> Any:
    from torch.fx.experimental import _config

    settings: Any = _config
    try:
        # Sizes 0 and 1 stay free too: one program takes a whole prompt, one token, and no past.
        with (
            torch.no_grad(),
            settings.patch(backed_size_oblivious=True),
            torch._dynamo.config.patch(fake_tensor_cache_enabled=False),  # a third of the time, and hardly ever of use
            _OuterProducts(),
        ):
            return torch.export.export(decoder, arguments, dynamic_shapes=shapes, strict=False)
    except UnsupportedModelError:
        raise
    except Exception as error:
        raise ExportError(f"{name} cannot be exported by torch.export: {error}") from error


def _check_attention(model: Any, program: torch.export.ExportedProgram) -> None:
    """Every attention layer must show up as a node of the dialect: else the model computes attention in code of its own."""
    found = {node.target for node in program.graph.nodes}
    if not found & {torch.ops.hydra.attention.default, torch.ops.hydra.linear_attention.default}:
        raise UnsupportedModelError(
            f"{type(model).__name__}: no call of an attention op was seen in it; it bypasses the attention interface"
        )


__all__ = ["Slot", "StatefulDecoder", "Traced", "exportable", "find_slots", "trace"]

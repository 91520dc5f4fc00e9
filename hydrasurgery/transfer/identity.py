"""What a run is (its layers, teacher, data and recipe), and what of it differs from the run that a checkpoint is of."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hydrasurgery.ir.region import LETTERS
from hydrasurgery.ir.stitch import regions
from hydrasurgery.transfer.recipe import Recipe, Stage

_CHUNK = 1 << 24  # bytes or tokens looked at together
_BLOCK, _BLOCKS = 1 << 16, 1 << 12  # tokens in a block, and the most blocks of a corpus that are read
_SHOWN = 120  # characters of a value in a message


def identity(
    hybrid: nn.Module, teacher: nn.Module | None, source: Any, first_batches: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """All that decides what a run trains, but its recipe and seed, as JSON-ready data.

    Of the teacher all bytes of the weights count (BLAKE2b). Of the data what its source says of itself by a method
    `identity`, and of any source the first batch of each stage.

    Args:
        hybrid: what is trained; of it the layers count, not the weights, which a checkpoint brings.
        teacher: the model it follows, or None.
        source: where batches come from.
        first_batches: the tensors of the first batch of each stage, by name.
    """
    found = regions(hybrid)
    described = source.identity() if hasattr(source, "identity") else {"source": type(source).__name__}
    weights = {} if teacher is None else {k: v for k, v in teacher.state_dict().items() if isinstance(v, Tensor)}
    whole = {
        "plan": {
            region.name: {
                "kinds": "".join(LETTERS[kind] for kind in region.kinds),
                "teacher_heads": list(region.teacher_heads),
            }
            for region in found
        },
        "layer": {
            region.name: {"options": dict(region.options), "graph": hash_text(region.meaning())} for region in found
        },
        "teacher": None
        if teacher is None
        else {"model": type(teacher).__name__, "tensors": len(weights), "blake2b": hash_tensors(weights)},
        "data": {
            **described,
            "first_batches": [
                hash_tensors({key: value for key, value in batch.items() if isinstance(value, Tensor)})
                for batch in first_batches
            ],
        },
    }
    return json.loads(json.dumps(whole, default=str))


def difference(earlier: Any, now: Any, name: str) -> str | None:
    """The first entry in which two JSON values differ, in words with both; None if they are equal."""
    if isinstance(earlier, dict) and isinstance(now, dict):
        parts = (
            difference(earlier.get(key), now.get(key), f"{name}.{key}" if name else key) for key in {**earlier, **now}
        )
        return next((part for part in parts if part), None)
    if earlier == now:
        return None
    before, after = (json.dumps(value)[:_SHOWN] for value in (earlier, now))
    return f"{name} was {before}, is {after}"


def recipe_difference(earlier: Recipe, now: Recipe, stage: int, step: int) -> str | None:
    """What a recipe would have done otherwise in a run's first steps, up to step `step` of stage `stage`; None if nothing.

    Free to change are the name, `checkpoint_every`, `micro_batch`, `recompute` and `compile` (which change the rounding only),
    later stages, and the number of steps of the current stage if the learning rates of those that are done do not depend on it.
    """
    if stage >= len(now.stages) or now.stages[stage].name != earlier.stages[stage].name:
        return f"there is no such stage in recipe {now.name!r}: stage {stage} was {earlier.stages[stage].name!r}"
    for name in ("autocast", "teacher_dtype"):
        if found := difference(getattr(earlier, name), getattr(now, name), name):
            return found
    for index in range(stage + 1):
        old, new = earlier.stages[index], now.stages[index]
        if found := difference(_settings(old), _settings(new), f"stage {index}"):
            return found
        steps = difference(old.num_steps, new.num_steps, f"stage {index}.steps")
        if steps and index < stage:
            return steps
        if steps and new.num_steps < step:
            return f"{steps}, which the run is beyond: the stage has only {new.num_steps} steps now"
        if steps and step == old.num_steps and stage + 1 < len(earlier.stages):
            return f"{steps}, after the stage's end"
        if steps and any(old.rate(done) != new.rate(done) for done in range(step)):
            return f"{steps}, and with it the learning rates of steps that are done"
    return None


def _settings(stage: Stage) -> dict[str, Any]:
    free = ("micro_batch", "recompute", "steps", "tokens")
    fields = {key: value for key, value in dataclasses.asdict(stage).items() if key not in free}
    return json.loads(json.dumps(fields))


def hash_text(lines: Iterable[str]) -> str:
    """A hash of lines of text."""
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()


def hash_tensors(tensors: dict[str, Tensor]) -> str:
    """A hash of all bytes of tensors, their names, dtypes and shapes. Lazy copies stay lazy."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        for part in tensor.detach().contiguous().reshape(-1).view(torch.uint8).split(_CHUNK):
            digest.update(part.to("cpu", copy=True).numpy())  # of a copy, since NumPy would materialise a lazy one
    return digest.hexdigest()


def hash_tokens(tokens: np.ndarray) -> str:
    """A hash of a run of tokens [N], whatever its dtype.

    Up to 2^28 tokens all are read; of more, 4096 blocks of 65,536 evenly spread from the first to the last.
    """
    digest = hashlib.blake2b(repr(tokens.size).encode(), digest_size=16)
    blocks = -(-tokens.size // _BLOCK)
    read = range(blocks) if blocks <= _BLOCKS else np.linspace(0, blocks - 1, _BLOCKS).astype(int)
    for block in read:
        digest.update(np.ascontiguousarray(tokens[block * _BLOCK : (block + 1) * _BLOCK], "<i8").data)
    return digest.hexdigest()

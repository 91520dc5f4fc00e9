"""The result of scoring: a number for every head, where it came from, its file and its picture."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from hydrasurgery.errors import DataError
from hydrasurgery.files import atomic_write_text, json_lines
from hydrasurgery.json_files import load_json, parse_json, shown
from hydrasurgery.plan import MOST, UNITS, Heads, ModelInfo, Width, Words, layer_shape
from hydrasurgery.records import Bounds, Count, Name, Positive, Seed, read_record
from hydrasurgery.selection.plots import draw_coverage, draw_heat_maps, draw_histogram
from hydrasurgery.selection.ranks import SHARE
from hydrasurgery.selection.stability import Stability, stability

FORMAT, VERSION = "hydrasurgery-scores", 1
CRITICAL = 0.01  # paper section 2: an effect above this counts
SHOWN = 12
FILE_BYTES = 256 * 2**20  # pairs by heads by layers, at most
Row = Annotated[tuple[float, ...], MOST]
PICTURES = ("map", "groups", "histogram", "coverage")


@dataclass(frozen=True)
class LayerScores:
    """One attention layer's shape and the scores of its H query heads.

    Attributes:
        name: The attention module's path in the model.
        num_key_value_heads: KV heads.
        head_dim, value_dim: Widths of a head's keys and values.
        window: Tokens that a query sees at most; None for all.
        importance: [H]; for activation patching 1 is the whole effect of the answer, negative means the head hurt it.
        spread: [H], standard deviation of the importance between pairs.
        error: [H], relative error of the head's best linear stand-in (0 exact, 1 nothing explained); None unmeasured.
        samples: [P][H], each used pair's score; empty where a method has none.

    Example: see `HeadScores`.
    """

    name: Name
    num_key_value_heads: Heads
    head_dim: Width
    value_dim: Width
    window: Positive | None
    importance: Row
    spread: Row
    error: Row | None = None
    samples: tuple[Row, ...] = ()

    @property
    def num_heads(self) -> int:
        """Query heads, H."""
        return len(self.importance)


@dataclass(frozen=True)
class HeadScores:
    """Scores of every query head of a model, with what is needed to measure them again.

    `print(scores)` lists the top heads, `plot(path)` draws the map, `save`/`load` keep them as JSON.

    Attributes:
        layers: One a layer, in order.
        method: How they were measured, or the format that they were read from.
        unit: "head", or "kv-group" where a KV head was measured and all its query heads bear its score.
        model: The model that was measured.
        seed: Of the probes.
        length: Tokens of the prompts; several lengths where there were several.
        pairs: Pairs that were used; `dropped` says why others were not.
        dropped: A sentence for each pair that was not.
        tasks: [P], the probe of each used pair.
        replay: "readout" if frozen replays ran on the answer's tokens only, "full" if on whole prompts; empty if there were none.
        versions: Package -> version, of when they were measured.

    Example:
        >>> import hydrasurgery as hs
        >>> from hydrasurgery.demo.teacher import load_teacher
        >>> scores = hs.score_heads(*load_teacher(), length=48, count=2, progress=False)
        >>> len(scores.layers), scores.layers[0].num_heads, scores.pairs
        (8, 16, 2)
        >>> hs.HeadScores.from_json(scores.to_json()) == scores
        True
    """

    layers: Annotated[tuple[LayerScores, ...], MOST]
    method: Name
    unit: Name = "head"
    model: ModelInfo = field(default_factory=ModelInfo)
    seed: Seed = 0
    length: tuple[Positive, ...] = ()
    pairs: Count = 0
    dropped: Words = ()
    tasks: tuple[Name, ...] = ()
    replay: Name = ""
    versions: Annotated[dict[str, Name], Bounds(0, 1000)] = field(default_factory=dict)

    @property
    def ranking(self) -> list[tuple[int, int]]:
        """(layer, head) from the most to the least important; ties in order of layer and head."""
        heads = [(layer, head) for layer, scores in enumerate(self.layers) for head in range(scores.num_heads)]
        return sorted(heads, key=lambda at: (-self.layers[at[0]].importance[at[1]], at))

    def to_json(self) -> str:
        """The scores as JSON text, one layer a line; the unit is stated."""
        head = {"format": FORMAT, "version": VERSION, **vars(self), "model": dict(vars(self.model))}
        del head["layers"]
        return json_lines(head, "layers", [dict(vars(layer)) for layer in self.layers])

    @classmethod
    def from_json(cls, text: str, source: str = "scores") -> HeadScores:
        """Read `text`, which `to_json` gave. DataError names `source` if it is not a score file of this version."""
        return cls.from_dict(parse_json(text, source, DataError), source)

    @classmethod
    def from_dict(cls, value: Any, source: str = "scores") -> HeadScores:
        """The scores in `value`, the data of what `to_json` gave. `source` names the file in a DataError."""
        if not isinstance(value, dict) or value.get("format") != FORMAT or shown(value.get("version")) != str(VERSION):
            raise DataError(
                f"{source}: not a score file of version {VERSION}. Give one that HeadScores.save wrote, or score again."
            )
        fields = {key: item for key, item in value.items() if key not in ("format", "version")}
        scores = read_record(cls, fields, source, DataError)
        for number, layer in enumerate(scores.layers):
            _check_layer(layer, f"{source}: layers[{number}]")
        if not scores.layers:
            raise DataError(f"{source}: no layers. Score again.")
        if scores.unit not in UNITS:
            raise DataError(f"{source}: scores are per {shown(scores.unit)}, but units are {', '.join(UNITS)}.")
        return scores

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the scores to `path`, whole or not at all."""
        return atomic_write_text(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> HeadScores:
        """Read the scores that `save` wrote to `path`; DataError if the file is missing or is something else."""
        return cls.from_dict(load_json(path, DataError, FILE_BYTES), os.fspath(path))

    def plot(self, path: str | os.PathLike[str], kind: str = "map") -> Path:
        """Draw the scores (PNG).

        Args:
            path: The PNG to write.
            kind: "map" (layers x heads, reconstruction error beside it where it was measured), "groups" (layers x KV
                heads, the greatest importance of each KV head's query heads), "histogram" (of the heads' importance), or
                "coverage" (share of all positive importance that the top heads hold, and the top KV groups).

        Raises:
            ImportError: matplotlib is missing; the message names the extra.
            DataError: another kind.
        """
        if kind not in PICTURES:
            raise DataError(f"kind={kind!r} is not one of {', '.join(PICTURES)}.")
        label, title = f"importance ({self.method})", f"{self.model.architecture or 'model'}, {self.pairs} pairs"
        if kind == "map":
            panels = [(label, [layer.importance for layer in self.layers])]
            if all(layer.error is not None for layer in self.layers):
                panels.append(("reconstruction error", [layer.error for layer in self.layers if layer.error]))
            return draw_heat_maps(panels, title, "head", path)
        groups = [[[x.importance[h] for h in heads] for heads in layer_shape(x).groups] for x in self.layers]
        if kind == "groups":
            panels = [(f"{label}, max of a group", [tuple(map(max, row)) for row in groups])]
            return draw_heat_maps(panels, title, "KV head", path)
        values = [value for layer in self.layers for value in layer.importance]
        if kind == "histogram":
            return draw_histogram(values, label, path)
        lines = {"heads": values, "KV groups": [sum(heads) for row in groups for heads in row]}
        return draw_coverage(lines, f"share of {label}", path)

    def stability(self, *others: HeadScores, share: float = SHARE) -> Stability:
        """How far the ranking of heads depends on what it was measured on; `print` shows the table.

        By number of pairs: two draws of as many pairs each that have none in common, many times. By length, where there are
        several. By seed, where `others` are given.

        Args:
            others: The same measured with other seeds.
            share: Of the heads, that count as the top ones.

        Raises:
            DataError: The method keeps no score of each pair, or `others` are of another method or of other heads.

        Example:
            >>> import hydrasurgery as hs
            >>> from hydrasurgery.demo.teacher import load_teacher
            >>> scores = hs.score_heads(*load_teacher(), length=48, count=4, progress=False)
            >>> [row.what for row in scores.stability().rows]
            ['1 pairs / 1 others', '2 pairs / 2 others']
        """
        if not 0 < share < 1:
            raise DataError(f"share={share!r} is no share of the heads; give one between 0 and 1.")
        if not all(layer.samples for layer in self.layers):
            raise DataError(f"method {self.method!r} keeps no score of each pair, whose stability could be told.")
        for other in others:
            if (other.method, _shape(other)) != (self.method, _shape(self)):
                raise DataError(
                    f"scores by {other.method} of {len(other.layers)} layers are not those of the same heads and method."
                )
        samples = np.concatenate([np.array(layer.samples) for layer in self.layers], axis=1)
        lengths = [int(task.rpartition("@")[2]) for task in self.tasks if task.rpartition("@")[2].isdigit()]
        theirs = [np.concatenate([layer.importance for layer in other.layers]) for other in others]
        return stability(samples, lengths if len(lengths) == len(samples) else [], theirs, share=share)

    def __str__(self) -> str:
        critical = sum(value > CRITICAL for layer in self.layers for value in layer.importance)
        total = sum(layer.num_heads for layer in self.layers)
        who = self.model.architecture or self.model.model_type or "a model"
        dropped = f" ({len(self.dropped)} dropped)" if self.dropped else ""
        lines = [
            f"Scores of {who}: {len(self.layers)} layers, {total} heads, {self.method}, {self.pairs} pairs{dropped}",
            f"{critical} heads above {CRITICAL} ({critical / total:.1%})",
            *(f"dropped {reason}" for reason in self.dropped[:3]),
            "",
            "layer  head  importance  spread   error",
        ]
        for layer, head in self.ranking[:SHOWN]:
            scores = self.layers[layer]
            error = f"{scores.error[head]:.3f}" if scores.error else "-"
            lines.append(
                f"{layer:>5}  {head:>4}  {scores.importance[head]:>10.4f}  {scores.spread[head]:>6.4f}  {error:>6}"
            )
        return "\n".join(lines)


def _shape(scores: HeadScores) -> list[int]:
    return [layer.num_heads for layer in scores.layers]


def _check_layer(layer: LayerScores, where: str) -> None:
    rows = [layer.importance, layer.spread, *layer.samples, *([] if layer.error is None else [layer.error])]
    if {len(row) for row in rows} != {layer.num_heads} or not 1 <= layer.num_key_value_heads <= layer.num_heads:
        raise DataError(
            f"{where} ({layer.name}) needs one number per head in each of its lists, and 1 to as many KV heads. Score again."
        )

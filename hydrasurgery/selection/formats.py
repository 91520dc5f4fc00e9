"""Score files of other tools, read and written.

| format | file | unit |
|---|---|---|
| `duo-attention` | TSV of layers by KV heads, no header; a folder holds it as `full_attention_heads.tsv` | kv-group |
| `prulong` | the same with 0 and 1: a plan | kv-group |
| `retrieval-head` | JSON `{"layer-head": [score of each trial]}` | head |
| `qrhead` | JSON `[["layer-head", score], ...]`, best first | head |

Their keys look alike for query and KV heads, and none of them names its model: the shapes come from yours, and a file
that does not fit is refused with what was expected and what was found.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydrasurgery.choose import REDUCTIONS, model_shapes
from hydrasurgery.errors import DataError
from hydrasurgery.files import atomic_write_text
from hydrasurgery.json_files import load_bytes, parse_json, shown
from hydrasurgery.plan import LayerPlan, Plan
from hydrasurgery.records import read_value
from hydrasurgery.selection.scores import FILE_BYTES, HeadScores, LayerScores

UNIT = {"duo-attention": "kv-group", "prulong": "kv-group", "retrieval-head": "head", "qrhead": "head"}
TABLE = "full_attention_heads.tsv"  # the name of the table in a DuoAttention folder

Rows = list[list[list[float]]]  # [layer][unit] -> the scores of one or more trials


def read_scores(path: str | os.PathLike[str], source: Any, *, format: str) -> HeadScores:
    """Read another tool's file as scores of `source`'s heads.

    A KV head's score is that of each of its query heads, and the scores' unit says so.

    Args:
        path: The file, or a DuoAttention folder.
        source: The model, what `capture(model)` gives, scores or a plan: whatever knows the heads' shapes.
        format: "duo-attention", "prulong", "retrieval-head" or "qrhead".

    Raises:
        DataError: the file cannot be read or is of another shape; it names the file, what was expected and found.

    Example: see `write_scores`.
    """
    unit = _unit(format)
    file = Path(path)
    file = file / TABLE if format == "duo-attention" and file.is_dir() else file
    shapes, model = model_shapes(source)
    data = load_bytes(file, DataError, FILE_BYTES)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: cannot be read as {format} scores ({error}). Check the path.") from error
    rows = _table(text, str(file), shapes) if unit == "kv-group" else _listed(text, str(file), shapes, format)
    if format == "prulong" and any(value not in (0.0, 1.0) for row in rows for unit_ in row for value in unit_):
        raise DataError(f"{file}: expected a table of 0 and 1, found other numbers; is it format='duo-attention'?")
    layers = tuple(_layer(shape, row, unit) for shape, row in zip(shapes, rows, strict=True))
    trials = len(layers[0].samples)
    return HeadScores(layers, format, unit, model, pairs=trials, tasks=(format,) * trials)


def write_scores(
    scores: HeadScores | Plan, path: str | os.PathLike[str], *, format: str, group_score: str = "max"
) -> Path:
    """Write scores (for `prulong` a plan) as another tool reads them; the file appears whole or not at all.

    Args:
        scores: What to write.
        path: The file.
        format: "duo-attention", "prulong", "retrieval-head" or "qrhead".
        group_score: "max", "mean" or "sum" of the query heads of a KV head, where the format is by KV head.

    Returns:
        The path.

    Raises:
        DataError: an unknown format, a plan for a format of scores or the other way round.

    Example:
        >>> import tempfile
        >>> import hydrasurgery as hs
        >>> from hydrasurgery.demo.teacher import load_teacher
        >>> teacher, _ = load_teacher()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plan = hs.plan_heads(teacher, strategy="layerwise")
        ...     file = write_scores(plan, f"{folder}/heads.tsv", format="prulong")
        ...     read_scores(file, teacher, format="prulong").layers[7].importance[0]
        1.0
    """
    unit = _unit(format)
    if isinstance(scores, Plan) != (format == "prulong"):
        raise DataError(f"{os.fspath(path)}: format={format!r} holds {'a plan' if format == 'prulong' else 'scores'}.")
    if isinstance(scores, Plan):
        kept = [layer.kept_key_value_heads for layer in scores.layers]
        rows = [
            ["01"[g in own] for g in range(x.num_key_value_heads)] for x, own in zip(scores.layers, kept, strict=True)
        ]
        return atomic_write_text(path, _tsv(rows))
    if unit == "kv-group":
        reduce, shapes = REDUCTIONS[group_score], model_shapes(scores)[0]
        rows = [
            [repr(reduce([layer.importance[head] for head in heads])) for heads in shape.groups]
            for shape, layer in zip(shapes, scores.layers, strict=True)
        ]
        return atomic_write_text(path, _tsv(rows))
    value: Any = {f"{at[0]}-{at[1]}": trials for at, trials in _trials(scores)}
    if format == "qrhead":
        value = [[f"{layer}-{head}", scores.layers[layer].importance[head]] for layer, head in scores.ranking]
    return atomic_write_text(path, json.dumps(value) + "\n")


def _unit(format: str) -> str:
    if format not in UNIT:
        raise DataError(f"format={format!r} is not one of {', '.join(UNIT)}.")
    return UNIT[format]


def _table(text: str, file: str, shapes: Sequence[LayerPlan]) -> Rows:
    lines = [line.split("\t") for line in text.splitlines() if line.strip()]
    wanted, found = [shape.num_key_value_heads for shape in shapes], [len(line) for line in lines]
    if wanted != found:
        raise DataError(f"{file}: expected {_sizes(wanted, 'KV heads')}, found {_sizes(found, 'columns')}.")
    return [[[_number(word, file)] for word in line] for line in lines]


def _listed(text: str, file: str, shapes: Sequence[LayerPlan], format: str) -> Rows:
    value = parse_json(text, file, DataError)
    if format == "qrhead" and isinstance(value, list) and all(isinstance(x, list) and len(x) == 2 for x in value):
        if len({shown(key) for key, _ in value}) < len(value):
            raise DataError(f"{file}: expected each head once, found one twice.")
        value = {str(key): [score] for key, score in value}
    elif format == "qrhead" or not isinstance(value, dict) or not all(isinstance(x, list) for x in value.values()):
        form = '[["layer-head", score], ...]' if format == "qrhead" else '{"layer-head": [scores]}'
        raise DataError(f"{file}: expected {form}, found {text.strip()[:40]!r}.")
    keys = [f"{layer}-{head}" for layer, shape in enumerate(shapes) for head in range(shape.num_heads)]
    if set(keys) != set(value):
        odd = sorted(set(value) - set(keys)) or sorted(set(keys) - set(value))
        raise DataError(
            f"{file}: expected {_sizes([s.num_heads for s in shapes], 'query heads')}, {len(keys)} in all, found "
            f"{len(value)} entries; {shown(odd[0])} is {'unknown' if odd[0] in value else 'missing'}."
        )
    counts = {len(value[key]) for key in keys}
    if counts == {0} or len(counts) > 1:
        raise DataError(f"{file}: expected as many scores for each head, at least one, found {sorted(counts)}.")
    return [
        [list(_row(value[key := f"{layer}-{head}"], f"{file}: {key}")) for head in range(shape.num_heads)]
        for layer, shape in enumerate(shapes)
    ]


def _row(value: list[Any], where: str) -> tuple[float, ...]:
    return read_value(tuple[float, ...], value, where, DataError)


def _number(word: str, file: str) -> float:
    try:
        number = float(word)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"{file}: expected finite numbers, found {shown(word)}.")
    return number


def _sizes(sizes: list[int], what: str) -> str:
    each = " and ".join(map(str, sorted(set(sizes)))) or "no"
    return f"{len(sizes)} layers of {each} {what}"


def _layer(shape: LayerPlan, row: list[list[float]], unit: str) -> LayerScores:
    """The scores of a layer's query heads from those of its units, [unit][trial]."""
    if unit == "kv-group":
        row = [row[g] for g, heads in enumerate(shape.groups) for _ in heads]
    mean = [math.fsum(trials) / len(trials) for trials in row]
    spread = [
        math.sqrt(math.fsum((x - m) ** 2 for x in trials) / len(trials)) for trials, m in zip(row, mean, strict=True)
    ]
    samples = tuple(zip(*row, strict=True))
    place = (shape.name, shape.num_key_value_heads, shape.head_dim, shape.value_dim, shape.window)
    return LayerScores(*place, tuple(mean), tuple(spread), None, samples)


def _trials(scores: HeadScores) -> Iterator[tuple[tuple[int, int], list[float]]]:
    for number, layer in enumerate(scores.layers):
        for head in range(layer.num_heads):
            yield (number, head), [row[head] for row in layer.samples] or [layer.importance[head]]


def _tsv(rows: list[list[str]]) -> str:
    return "".join("\t".join(row) + "\n" for row in rows)

"""JSON that may come from anywhere, read within bounds: a file that hurts is refused before it costs time or memory."""

from __future__ import annotations

import json
import math
import os
import re
import stat
from pathlib import Path
from typing import Any

from hydrasurgery.errors import HydraError

FILE_BYTES = 64 * 2**20
DEPTH = 64  # lists and objects in each other
VALUES = 10**7
DIGITS = 100  # of a whole number
SHOWN = 40  # characters of a value in a message

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def load_json(path: str | os.PathLike[str], error: type[HydraError], limit: int = FILE_BYTES) -> Any:
    """The value in a JSON file, bounded as in `parse_json`; `error` also if there is no such file or it is over `limit` bytes."""
    return parse_json(load_bytes(path, error, limit), os.fspath(path), error)


def load_bytes(path: str | os.PathLike[str], error: type[HydraError], limit: int = FILE_BYTES) -> bytes:
    """What an ordinary file holds; an `error` that names it if there is none, it cannot be read, or it is over `limit` bytes."""
    name = os.fspath(path)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise error(f"{name}: cannot be read (it is no ordinary file). Check the path.")
        with Path(path).open("rb") as stream:
            data = stream.read(limit + 1)
    except (OSError, ValueError) as problem:  # a null character in a path is a ValueError
        raise error(f"{name}: cannot be read ({problem}). Check the path.") from problem
    if len(data) > limit:
        raise error(f"{name}: cannot be read (it is larger than {limit:,} bytes). Check the path.")
    return data


def parse_json(text: str | bytes, source: str, error: type[HydraError]) -> Any:
    """The value that a JSON text holds.

    Refused, by an `error` that begins with `source`: what is not UTF-8, a byte order mark, NaN and infinities, a key that stands
    twice in an object, and what has more values, levels or digits than any file of ours.
    """
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        if sum(map(text.count, ",[{")) > VALUES:
            raise ValueError(f"more than {VALUES:,} values")
        value = json.loads(
            text, object_pairs_hook=_object, parse_int=_whole, parse_float=_finite, parse_constant=_finite
        )
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")  # half a pair is no text
        _check_depth(value)
    except RecursionError:
        raise error(f"{source}: not JSON that can be read (more than {DEPTH} levels). Give another file.") from None
    except ValueError as problem:
        raise error(f"{source}: not JSON that can be read ({problem}). Give another file.") from problem
    return value


def shown(value: Any, characters: int = SHOWN) -> str:
    """A value in a message: short, whatever it is; `characters` of a text at most.

    Example:
        >>> shown(None), shown(0.5), shown("a" * 1000), shown([1, 2]), shown(10**5000)
        ('null', '0.5', "'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa'...", 'a list of 2', 'a number of more than 40 digits')
    """
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, int):
        return str(value) if abs(value) < 10**SHOWN else f"a number of more than {SHOWN} digits"
    if isinstance(value, str):
        return ascii(value[:characters]) + "..." * (len(value) > characters)
    if isinstance(value, (list, tuple, dict)):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    return repr(value) if isinstance(value, float) else f"a {type(value).__name__}"


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(DEPTH):
        held = (each.values() if isinstance(each, dict) else each for each in level if isinstance(each, (dict, list)))
        level = [item for items in held for item in items if isinstance(item, (dict, list))]
    if level:
        raise ValueError(f"more than {DEPTH} levels")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {shown(twice)} stands twice in an object")
    return found


def _whole(text: str) -> int:
    if len(text) > DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:SHOWN]} is no finite number")
    return value

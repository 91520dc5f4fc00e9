"""What a checkpoint's config.json may ask for: nothing that fetches or runs code, and no file outside its folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydrasurgery.errors import CheckpointError
from hydrasurgery.json_files import load_json, shown
from hydrasurgery.records import Name, read_value

# What transformers computes by itself. Any other name sends it to the loader of the `kernels` package (also "flash_attention_2",
# where flash_attn is not installed), which fetches a repository and runs it.
OWN = {
    "attn_implementation": ("eager", "sdpa", "flex_attention", "hydra"),
    "experts_implementation": ("eager", "grouped_mm", "batched_mm"),
}
SPELLINGS = {f"{before}{key}{after}": key for key in OWN for before in ("", "_") for after in ("", "_internal")}
KERNELS = ("use_kernels", "kernel_config", "allow_all_kernels")
FILES = ("transformers_weights", "configuration_files")


def check_config(values: Any, source: str) -> None:
    """Refuse a config that makes transformers fetch or run code, or read files of other names.

    Args:
        values: what config.json holds. Configs inside of it are looked at as well.
        source: the file's name, for the message.

    Raises:
        CheckpointError: naming the key and its value.

    Example:
        >>> check_config({"text_config": {"attn_implementation": "someone/kernel"}}, "config.json")
        Traceback (most recent call last):
        ...
        hydrasurgery.errors.CheckpointError: config.json: text_config.attn_implementation is 'someone/kernel', ...
    """
    for path, key, value in _entries(values):
        if key in SPELLINGS:
            own = OWN[SPELLINGS[key]]
            named = [*value.values()] if isinstance(value, dict) else [value]
            wrong = [name for name in named if name is not None and name not in own]
            if wrong:
                raise CheckpointError(
                    f"{source}: {path} is {shown(wrong[0])}, for which transformers may fetch and run code; a checkpoint runs "
                    f"none. Take the entry out of the file, or set it to one of {', '.join(own)}"
                )
        elif (key in KERNELS or key in FILES) and value:
            does = "reads files of other names" if key in FILES else "fetches and runs kernels"
            raise CheckpointError(
                f"{source}: {path} is {shown(value)}, by which transformers {does}; take the entry out of the file"
            )


def check_shards(path: str | os.PathLike[str] | None) -> None:
    """Refuse a local folder whose index of shards names files elsewhere; any other `path` is passed over.

    Raises:
        CheckpointError: naming the index and the file.
    """
    folder = Path(path) if path is not None else Path(os.devnull)
    for index in sorted(folder.glob("*.index.json")) if folder.is_dir() else ():
        shard_names(index)


def shard_names(index: Path) -> set[str]:
    """The files that an index of shards names, all of them in its own folder.

    Raises:
        CheckpointError: naming the index, if it is no index or names a file elsewhere.
    """
    value = load_json(index, CheckpointError)
    named = value.get("weight_map") if isinstance(value, dict) else None
    files = set(read_value(dict[str, Name], named, f"{index}: weight_map", CheckpointError).values())
    strange = sorted(name for name in files if name in ("", ".", "..") or Path(name).name != name)
    if strange:
        raise CheckpointError(
            f"{index}: names {shown(strange[0])}, which is not a file of its folder; save the model again"
        )
    return files


def _entries(values: Any, path: str = "") -> Iterator[tuple[str, str, Any]]:
    """(path, key, value) of every entry of every dict in `values`."""
    if isinstance(values, dict):
        for key, value in values.items():
            here = f"{path}.{key}" if path else str(key)
            yield here, str(key), value
            yield from _entries(value, here)
    elif isinstance(values, list):
        for number, value in enumerate(values):
            yield from _entries(value, f"{path}[{number}]")

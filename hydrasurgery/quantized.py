"""Quantised models as teachers: what of a hybrid is quantised, and how its config says so."""

from __future__ import annotations

from typing import Any


def keep_plain(hybrid: Any) -> None:
    """..."""

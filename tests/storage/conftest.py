"""One hybrid and the folder it was saved to, for the tests of a module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.storage.models import hybrid_of, small


@pytest.fixture(scope="module")
def hybrid() -> Any:
    return hybrid_of(small("qwen3"))


@pytest.fixture(scope="module")
def folder(hybrid: Any, tmp_path_factory: Any) -> Path:
    path = tmp_path_factory.mktemp("hybrid")
    hybrid.save_pretrained(path)
    return path

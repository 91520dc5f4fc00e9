"""What a hybrid's `generate` refuses before it computes anything."""

from __future__ import annotations

from functools import partial
from typing import Any, NoReturn

from hydrasurgery.errors import UnsupportedModelError


def limit_generation(model: Any) -> None:
    """Let a hybrid refuse what its cache cannot do: taking tokens back, and pages shared between requests.

    Both are attributes of this one model: its class is the teacher's.
    """
    model._is_stateful = True  # transformers' word for a model without assisted generation
    if hasattr(model, "init_continuous_batching"):
        model.init_continuous_batching = partial(_refuse_batching, type(model).__name__)


def free_generation(model: Any) -> None:
    """Take the limits away again, for a model that is no hybrid any more."""
    for name in ("_is_stateful", "init_continuous_batching"):
        vars(model).pop(name, None)


def _refuse_batching(name: str, *args: Any, **kwargs: Any) -> NoReturn:
    raise UnsupportedModelError(
        f"{name}: a hybrid's recurrent states have no pages, so there is no continuous batching (generate_batch, "
        "cache_implementation='paged'); call generate with a padded batch"
    )

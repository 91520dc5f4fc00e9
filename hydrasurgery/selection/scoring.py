"""`score_heads`: from a model to a number for each of its heads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hydrasurgery.calibration import LinearFit, fit_model
from hydrasurgery.errors import ProbeError, SequenceLengthError
from hydrasurgery.evaluation.tasks import Pair, needle_pairs
from hydrasurgery.plan import layer_shape, model_info, package_versions
from hydrasurgery.regions import capture
from hydrasurgery.selection.patching import PatchEffects, patch_heads
from hydrasurgery.selection.scores import HeadScores, LayerScores

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

METHODS = ("activation-patching", "reconstruction")
KEYS = (1, 4)  # sub-probes: one key, and one of several (paper section 2)
LENGTH = 4096
FIT_TOKENS, FIT_SEQUENCES = 2048, 4  # what the reconstruction error is measured on


def score_heads(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    method: str = "activation-patching",
    pairs: Sequence[Pair] | None = None,
    length: int | Sequence[int] | None = None,
    count: int = 12,
    seed: int = 0,
    batch_size: int = 4,
    rows: int = 64,
    progress: bool = True,
) -> HeadScores:
    """Measure how much each attention head matters for retrieval.

    Methods: `activation-patching` (paper section 2, eq. 9-10) averages, over the pairs that the model answers, the
    share of the answer's effect that a head carries; `reconstruction` takes the error of each head's linear stand-in.
    Both measure that error, by which a plan breaks ties. The model is left as it was.

    Args:
        model: A decoder with all heads full (the teacher).
        tokenizer: Writes the probes; not needed with `pairs`.
        pairs: Counterfactual prompts of your own instead of needles with one and with four keys.
        length: Tokens a probe, or several lengths; default 4096 or the model's position limit.
        count: Probes in all, shared between lengths and sub-probes.
        batch_size: Prompts run together, twice (clean and corrupt).
        rows: Patched heads run together: the bound on memory.
        progress: Show a bar.

    Raises:
        ProbeError: neither tokenizer nor pairs, an unknown method, or no pair that the clean model answers.
        SequenceLengthError: `length` is above the model's position limit.
    """
    if method not in METHODS:
        raise ProbeError(f"method={method!r} is not one of {', '.join(METHODS)}.")
    if pairs is None:
        pairs = _needles(model, tokenizer, length, count, seed)
    if not pairs:
        raise ProbeError(
            f"there is no pair to score {type(model).__name__} on; give count=... or pairs=... of at least 1."
        )
    regions = capture(model)
    with _progress("scoring heads", len(pairs) + 1, progress) as advance:
        patched = None
        if method == "activation-patching":
            patched = patch_heads(model, pairs, batch_size=batch_size, rows=rows, advance=advance)
        fits = fit_model(model, _calibration_ids(pairs))
        advance(1 if patched else len(pairs) + 1)
    return HeadScores(
        layers=tuple(_layer(region, fits[region.name], patched) for region in regions),
        method=method,
        model=model_info(model, len(regions)),
        seed=seed,
        length=tuple(sorted({len(pair.clean_ids) for pair in pairs})),
        pairs=len(pairs) - (len(patched.dropped) if patched else 0),
        dropped=patched.dropped if patched else (),
        replay=patched.replay if patched else "",
        versions=package_versions(),
    )


def _needles(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    length: int | Sequence[int] | None,
    count: int,
    seed: int,
) -> list[Pair]:
    if tokenizer is None:
        raise ProbeError("score_heads needs a tokenizer to write its probes, or pairs=... of your own.")
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None) or LENGTH
    if length is None:
        length = min(LENGTH, limit)
    lengths = (length,) if isinstance(length, int) else tuple(length)
    if max(lengths) > limit > 0 and hasattr(model, "config"):
        raise SequenceLengthError(
            f"length={max(lengths)} is above the {limit} positions of {type(model).__name__}; use a shorter length."
        )
    probes = [(tokens, keys) for tokens in lengths for keys in KEYS]
    shares = [count // len(probes) + (number < count % len(probes)) for number in range(len(probes))]
    return [
        pair
        for number, ((tokens, keys), share) in enumerate(zip(probes, shares, strict=True))
        for pair in needle_pairs(tokenizer, tokens, share, (seed, number), num_keys=keys)
    ]


def _calibration_ids(pairs: Sequence[Pair]) -> Tensor:
    """A few clean prompts cut to one length, [B, T]; spread over the pairs so that each sub-probe is in."""
    chosen = pairs[:: max(1, len(pairs) // FIT_SEQUENCES)][:FIT_SEQUENCES]
    tokens = min(FIT_TOKENS, *(len(pair.clean_ids) for pair in chosen))
    return torch.stack([pair.clean_ids[:tokens] for pair in chosen])


def _layer(region: Any, fit: LinearFit, patched: PatchEffects | None) -> LayerScores:
    error = tuple(fit.error.tolist())
    importance, spread = error, (0.0,) * len(error)
    if patched:
        effects = patched.effects[region.name].double()
        importance, spread = tuple(effects.mean(0).tolist()), tuple(effects.std(0, correction=0).tolist())
    shape = layer_shape(region)
    return LayerScores(
        shape.name, shape.num_key_value_heads, shape.head_dim, shape.value_dim, shape.window, importance, spread, error
    )


@contextmanager
def _progress(label: str, total: int, show: bool) -> Iterator[Any]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not show, transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda count: bar.advance(task, count)

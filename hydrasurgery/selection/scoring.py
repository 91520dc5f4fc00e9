"""`score_heads`: from a model to a number for each of its heads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from hydrasurgery.calibration import LinearFit
from hydrasurgery.decoders import check_length, position_limit
from hydrasurgery.errors import ProbeError
from hydrasurgery.evaluation.probes import PROBES, make_pairs
from hydrasurgery.evaluation.tasks import Pair
from hydrasurgery.plan import layer_shape, model_info, package_versions
from hydrasurgery.selection.measuring import open_meter
from hydrasurgery.selection.scorers import METHODS, SCORERS
from hydrasurgery.selection.scores import HeadScores, LayerScores

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RETRIEVAL = ("needle-1", "needle-4")  # sub-probes: one key, and one of several (paper section 2)
LENGTH = 4096


def score_heads(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    method: str = "activation-patching",
    probes: Sequence[str] = RETRIEVAL,
    pairs: Sequence[Pair] | None = None,
    length: int | Sequence[int] | None = None,
    count: int = 12,
    seed: int = 0,
    batch_size: int = 4,
    rows: int = 64,
    progress: bool = True,
) -> HeadScores:
    """Measure how much each attention head matters. The model is left as it was.

    A head's importance is its mean over the pairs that the clean model answers, its spread their standard deviation.
    Causal methods change a head and look at the answer, as shares of what corrupting the prompt does to it (eq. 10):

    - `activation-patching`: the head's corrupted output, later attention held (the paper's receiver score), and
      `activation-patching-unfrozen`: later attention running;
    - `attribution-patching`: the first by one gradient for all heads, the top eighth patched for real; `attribution`:
      the gradient only;
    - `sender-patching` (eq. 11): by way of the receivers only, and `path-patching`: the greater of receiver and sender;
    - `mean-ablation`: the head's mean output; `swap`: its calibrated linear stand-in, `swap-kl` the same in nats of
      divergence at the answer; `gates`: a learned mixture of head and stand-in.

    The others change nothing and look at the head: `logit-contribution`, `retrieval` (copy attention), `induction`, `echo`, and
    `reconstruction`, the error of its linear stand-in. Every method measures that error too, for a plan breaks ties by it.

    Args:
        model: A decoder with all heads full (the teacher).
        tokenizer: Writes the probes; not needed with `pairs`.
        method: One of those above.
        probes: Which prompts, of `hydrasurgery.evaluation.PROBES`.
        pairs: Counterfactual prompts of your own instead.
        length: Tokens a probe, or several lengths; default 4096 or the model's position limit.
        count: Pairs in all, shared between lengths and probes.
        seed: Of the probes, and of methods that draw; equal seeds give equal scores.
        batch_size: Prompts run together, twice (clean and corrupt), and whole prompts replayed together.
        rows: Changed heads that are replayed together: with `batch_size` the bound on memory.
        progress: Show a bar.

    Returns:
        The scores, which `plan_heads` takes.

    Raises:
        ProbeError: neither tokenizer nor pairs, an unknown method or probe, or no pair that the clean model answers.
        SequenceLengthError: `length` is above the model's position limit.

    Example:
        >>> import hydrasurgery as hs
        >>> from hydrasurgery.demo.teacher import load_teacher
        >>> scores = hs.score_heads(*load_teacher(), length=48, count=2, progress=False)
        >>> scores.ranking[0]  # (layer, head)
        (6, 0)
    """
    if method not in METHODS:
        raise ProbeError(f"method={method!r} is not one of {', '.join(METHODS)}.")
    if pairs is None:
        pairs = probe_pairs(model, tokenizer, probes=probes, length=length, count=count, seed=seed)
    if not pairs:
        raise ProbeError(
            f"there is no pair to score {type(model).__name__} on; give count=... or pairs=... of at least 1."
        )
    with (
        _progress("scoring heads", len(pairs), progress) as advance,
        open_meter(model, pairs, batch_size=batch_size, rows=rows, seed=seed, advance=advance) as meter,
    ):
        values = SCORERS[method](meter) if method in SCORERS else {}
        fits, dropped, used = meter.fits, tuple(meter.dropped.values()), meter.used
        replay = ("readout" if meter.replayer.local else "full") if values else ""
    return HeadScores(
        layers=tuple(_layer(region, fits[region.name], values.get(region.name)) for region in meter.regions),
        method=method,
        model=model_info(model, len(meter.regions)),
        seed=seed,
        length=tuple(sorted({len(pair.clean_ids) for pair in pairs})),
        pairs=len(used),
        dropped=dropped,
        tasks=tuple(pairs[number].task for number in used),
        replay=replay,
        versions=package_versions(),
    )


def probe_pairs(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    probes: Sequence[str] = RETRIEVAL,
    length: int | Sequence[int] | None = None,
    count: int = 12,
    seed: int = 0,
) -> list[Pair]:
    """The pairs that `score_heads` makes of the same arguments.

    Args:
        model: The decoder, for its position limit.
        tokenizer: Writes the probes.
        probes: Which prompts, of `hydrasurgery.evaluation.PROBES`.
        length: Tokens a probe, or several lengths; default 4096 or the model's position limit.
        count: Pairs in all, shared between lengths and probes.
        seed: Equal seeds give equal pairs.

    Raises:
        ProbeError: no tokenizer, or an unknown probe.
        SequenceLengthError: `length` is above the model's position limit.

    Example:
        >>> from hydrasurgery.demo.teacher import load_teacher
        >>> [pair.task for pair in probe_pairs(*load_teacher(), length=48, count=2)]
        ['needle-1@48', 'needle-4@48']
    """
    if tokenizer is None:
        raise ProbeError("score_heads needs a tokenizer to write its probes, or pairs=... of your own.")
    unknown = [name for name in probes if name not in PROBES]
    if unknown:
        raise ProbeError(f"probe {unknown[0]!r} is not one of {', '.join(PROBES)}.")
    if length is None:
        length = min(LENGTH, position_limit(model) or LENGTH)
    lengths = (length,) if isinstance(length, int) else tuple(length)
    check_length([model], max(lengths))
    return make_pairs(tokenizer, probes, lengths, count, seed)


def _layer(region: Any, fit: LinearFit, values: Tensor | None) -> LayerScores:
    shape, error = layer_shape(region), tuple(fit.error.tolist())
    samples: tuple[tuple[float, ...], ...] = ()
    importance, spread = error, (0.0,) * len(error)
    if values is not None:
        rows = values.double()
        importance, spread = tuple(rows.mean(0).tolist()), tuple(rows.std(0, correction=0).tolist())
        samples = tuple(map(tuple, values.tolist()))
    place = (shape.name, shape.num_key_value_heads, shape.head_dim, shape.value_dim, shape.window)
    return LayerScores(*place, importance, spread, error, samples)


@contextmanager
def _progress(label: str, total: int, show: bool) -> Iterator[Any]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not show, transient=True) as bar:
        task = bar.add_task(label, total=total)

        def advance(done: int, more: int) -> None:
            nonlocal total
            total += more
            bar.update(task, advance=done, total=total)

        yield advance

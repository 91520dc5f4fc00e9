"""What a model still knows: exact recall, perplexity and divergence from its teacher."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from hydrasurgery.decoders import check_length, check_vocabularies, evaluating, logits_at, takes, vocabulary_size
from hydrasurgery.errors import DataError
from hydrasurgery.evaluation.facts import has_symbols
from hydrasurgery.evaluation.tasks import TaskBatch, dense_recall, needles, plain_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MEMORY_BYTES = 2**30
VOCABULARY = 2**17  # taken for a model that does not say its own


@torch.no_grad()
def recall(model: nn.Module, batch: TaskBatch, *, memory_bytes: int = MEMORY_BYTES) -> float:
    """Share of questions whose whole answer is right: every token's argmax, given the true tokens before it.

    Args:
        model: a causal language model; afterwards in the modes (train or eval) that it had.
        batch: from `needles` or `dense_recall`.
        memory_bytes: bound on one forward's fp32 logits (held for a model that takes `logits_to_keep`, as
            transformers' do; for others at least one sequence's logits are made).

    Returns:
        From 0 to 1.

    Raises:
        DataError: the batch asks nothing.
        SequenceLengthError: the batch is longer than the model's position limit.

    Example:
        >>> from hydrasurgery.demo.teacher import load_teacher
        >>> model, tokenizer = load_teacher()
        >>> recall(model, needles(tokenizer, length=64, count=4, seed=0))
        1.0
    """
    if not batch.answer_positions.numel():
        raise DataError(f"recall: a {batch.task!r} batch asks no question; make one with `needles` or `dense_recall`")
    guesses = torch.full_like(batch.input_ids, -1)
    for chunk, places, (logits,) in _logits([model], batch.input_ids, batch.answer_positions.unique(), memory_bytes):
        guesses[chunk, places] = logits.argmax(-1).cpu()
    return _share_right(guesses, batch)


@torch.no_grad()
def perplexity(model: nn.Module, token_ids: Tensor, *, window: int = 512, memory_bytes: int = MEMORY_BYTES) -> float:
    """exp of the mean negative log-likelihood, every token but each sequence's first.

    Args:
        model: as in `recall`.
        token_ids: [B, T], or [N], which is cut into windows of `window` tokens (a shorter rest is left out, unless
            it is all there is).
        window: tokens that are read at once, where `token_ids` is [N].
        memory_bytes: as in `recall`.

    Raises:
        DataError: fewer than two tokens.
        SequenceLengthError: a sequence is longer than the model's position limit.

    Example:
        >>> from hydrasurgery.demo.teacher import load_teacher
        >>> from hydrasurgery.evaluation import encode_text, library_text
        >>> model, tokenizer = load_teacher()
        >>> text = encode_text(tokenizer, library_text("held-out"))[:512]
        >>> 1 < perplexity(model, text, window=128) < len(tokenizer)
        True
    """
    ids = _windows(token_ids, window)
    total = 0.0
    for chunk, places, (logits,) in _logits([model], ids, torch.arange(ids.shape[1] - 1), memory_bytes):
        total += _surprise(logits.float().log_softmax(-1), ids[chunk, places + 1])
    return math.exp(total / (ids.shape[0] * (ids.shape[1] - 1)))


@torch.no_grad()
def kl_to_teacher(
    student: nn.Module, teacher: nn.Module, input_ids: Tensor, *, memory_bytes: int = MEMORY_BYTES
) -> float:
    """KL(teacher || student) of the next token's distribution, in nats, the mean over all B * T positions.

    Args:
        student, teacher: causal language models with one vocabulary; left as they are.
        input_ids: [B, T], no padding.
        memory_bytes: as in `recall`, for each of the two models.

    Raises:
        SequenceLengthError: T is more than either model's position limit.
        PlanError: the vocabularies differ in size.

    Example:
        >>> from hydrasurgery.demo.teacher import load_teacher
        >>> model, tokenizer = load_teacher()
        >>> kl_to_teacher(model, model, needles(tokenizer, length=64, count=2, seed=0).input_ids)
        0.0
    """
    check_vocabularies(student, teacher)
    total = 0.0
    for _, _, (wanted, got) in _logits([teacher, student], input_ids, torch.arange(input_ids.shape[1]), memory_bytes):
        total += _divergence(wanted.float().log_softmax(-1), got.float().log_softmax(-1))
    return total / input_ids.numel()


def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    lengths: Sequence[int] = (256, 512, 1024),
    *,
    count: int = 32,
    seed: int = 0,
    num_keys: int = 4,
    text_ids: Tensor | None = None,
    teacher: nn.Module | None = None,
    memory_bytes: int = MEMORY_BYTES,
    progress: bool = True,
) -> dict[str, dict[str, float]]:
    """Measure a model at several lengths, with a progress bar on standard error.

    Args:
        model: a causal language model; left as it is.
        tokenizer: writes the tasks.
        lengths: tokens per sequence.
        count: sequences per task and length.
        seed: of the tasks; equal seeds give equal sequences.
        num_keys: facts in a needle sequence.
        text_ids: [N] text to hide needles in and to take perplexity of; by default as in `needles`.
        teacher: if given, the divergence from it is measured too, over the sequences of all tasks.
        memory_bytes: as in `recall`.
        progress: show a bar.

    Returns:
        {"needles": {"256": 1.0, ...}, "dense": {...}, "perplexity": {...}, "kl": {...}, "chance": {"needles": ...}};
        "dense" only for a tokenizer with the demo's tokens, "kl" only with a teacher.

    Raises:
        SequenceLengthError: a length is more than the model's position limit (before anything is measured).
        PlanError: the teacher's vocabulary is of another size.

    Example:
        >>> from hydrasurgery.demo.teacher import load_teacher
        >>> results = evaluate(*load_teacher(), lengths=(64,), count=4, progress=False)
        >>> results["needles"]
        {'64': 1.0}
    """
    for length in lengths:
        check_length([m for m in (model, teacher) if m is not None], length)
    if teacher is not None:
        check_vocabularies(model, teacher)
    makers: dict[str, Callable[[int], TaskBatch]] = {
        "needles": lambda n: needles(tokenizer, n, count, seed, num_keys=num_keys, text_ids=text_ids)
    }
    if has_symbols(tokenizer):
        makers["dense"] = lambda n: dense_recall(tokenizer, n, count, seed, text_ids=text_ids)
    makers["perplexity"] = lambda n: plain_text(tokenizer, n, count, seed, text_ids=text_ids)
    results: dict[str, dict[str, float]] = {name: {} for name in (*makers, "chance")}
    divergence: dict[str, list[float]] = {}
    with progress_bar(progress) as bar:
        task = bar.add_task("evaluate", total=len(makers) * len(lengths), note="")
        for length in lengths:
            for name, make in makers.items():
                batch = make(length)
                found = _measure(model, teacher, batch, memory_bytes)
                value = results[name][str(length)] = found["perplexity" if name == "perplexity" else "recall"]
                if name != "perplexity":
                    results["chance"][name] = batch.chance
                if teacher is not None:
                    divergence.setdefault(str(length), []).append(found["kl"])
                bar.update(task, advance=1, note=f"{name} at {length}: {value:.3f}")
    if teacher is not None:
        results["kl"] = {length: sum(values) / len(values) for length, values in divergence.items()}
    return results


@torch.no_grad()
def _measure(model: nn.Module, teacher: nn.Module | None, batch: TaskBatch, memory_bytes: int) -> dict[str, float]:
    """`recall` or `perplexity` of a batch, and with a teacher `kl_to_teacher`, by one run of each model."""
    if teacher is None:
        if batch.answer_positions.numel():
            return {"recall": recall(model, batch, memory_bytes=memory_bytes)}
        return {"perplexity": perplexity(model, batch.input_ids, memory_bytes=memory_bytes)}
    ids = batch.input_ids
    guesses, surprise, divergence = torch.full_like(ids, -1), 0.0, 0.0
    everywhere = torch.arange(ids.shape[1])
    for chunk, places, (wanted, got) in _logits([teacher, model], ids, everywhere, memory_bytes):
        log_p = got.float().log_softmax(-1)
        guesses[chunk, places] = log_p.argmax(-1).cpu()
        predicting = places[places < ids.shape[1] - 1]
        surprise += _surprise(log_p[:, : len(predicting)], ids[chunk, predicting + 1])
        divergence += _divergence(wanted.float().log_softmax(-1), log_p)
    found = {"kl": divergence / ids.numel()}
    if batch.answer_positions.numel():
        return {**found, "recall": _share_right(guesses, batch)}
    return {**found, "perplexity": math.exp(surprise / (len(ids) * (ids.shape[1] - 1)))}


def _share_right(guesses: Tensor, batch: TaskBatch) -> float:
    """Share of questions all of whose tokens are in `guesses` [B, T]."""
    positions = batch.answer_positions.flatten(1)
    right = guesses.gather(1, positions) == batch.input_ids.gather(1, positions + 1)
    return right.view(batch.answer_positions.shape).all(-1).double().mean().item()


def _surprise(log_p: Tensor, targets: Tensor) -> float:
    """Sum of -log p [B, P, V] of the targets [B, P]."""
    return -log_p.gather(-1, targets.to(log_p.device)[..., None]).double().sum().item()


def _divergence(log_teacher: Tensor, log_student: Tensor) -> float:
    """Sum over positions of KL(teacher || student), both [B, P, V]."""
    log_teacher = log_teacher.to(log_student.device)
    return (log_teacher.exp() * (log_teacher - log_student)).double().sum().item()


def _logits(
    models: Sequence[nn.Module], input_ids: Tensor, positions: Tensor, memory_bytes: int
) -> Iterator[tuple[slice, Tensor, list[Tensor]]]:
    """Yield (rows, positions, logits [rows, positions, V] of each model), every yield's fp32 logits within the bound.

    Where one sequence's logits are too large (32K tokens of a 150K vocabulary are 20 GB) the forward is repeated for
    each slice of positions: slower, and the only way that leaves the model's own head (scaling, softcap) in charge.
    """
    check_length(models, input_ids.shape[1])
    per_position = 4 * max(vocabulary_size(m) or VOCABULARY for m in models)
    rows = max(1, memory_bytes // (per_position * len(positions)))
    sliced = all(takes(m, "logits_to_keep") for m in models)
    places = max(1, memory_bytes // per_position) if sliced else len(positions)
    with evaluating(*models):
        for start in range(0, len(input_ids), rows):
            chunk = slice(start, min(start + rows, len(input_ids)))
            for part in positions.split(places):
                yield chunk, part, [logits_at(m, input_ids[chunk], part) for m in models]


def _windows(token_ids: Tensor, window: int) -> Tensor:
    if token_ids.ndim == 1:
        size = min(window, len(token_ids))
        token_ids = token_ids[: len(token_ids) // size * size].view(-1, size) if size else token_ids[None]
    if token_ids.ndim != 2 or token_ids.shape[1] < 2 or not len(token_ids):
        raise DataError(f"perplexity: token_ids {tuple(token_ids.shape)} predict nothing; give two tokens or more")
    return token_ids


def progress_bar(shown: bool) -> Progress:
    """A bar on standard error, with a note beside it (`update(..., note=...)`), if `shown`."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True), disable=not shown)

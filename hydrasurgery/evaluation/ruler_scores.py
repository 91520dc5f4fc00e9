"""What models answer to RULER's prompts, and how much of it is right."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hydrasurgery.decoders import check_vocabularies, end_tokens, evaluating, position_limit, text_config
from hydrasurgery.errors import DataError, SequenceLengthError
from hydrasurgery.evaluation.metrics import progress_bar
from hydrasurgery.evaluation.ruler import RULER, RulerSample, ruler_samples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_TOKENS = 2**16  # of a batch, where its size is not given


def ruler_score(answer: str, references: Sequence[str]) -> float:
    """Share of the references that stand in the answer, in whichever case (RULER's string_match_all), from 0 to 1.

    Args:
        answer: what a model wrote.
        references: at least one string.

    Example:
        >>> ruler_score("They are ABC and def.", ["abc", "xyz"])
        0.5
    """
    return sum(reference.lower() in answer.lower() for reference in references) / len(references)


@torch.no_grad()
def ruler_answers(
    model: Any, tokenizer: PreTrainedTokenizerBase, samples: Sequence[RulerSample], *, batch_size: int | None = None
) -> list[str]:
    """What a model writes after each prompt, always the likeliest token, by `model.generate` on left padded batches.

    Args:
        model: a causal language model of transformers; left as it is.
        tokenizer: the one that the samples were made with.
        samples: of one task.
        batch_size: prompts at once; by default as many as have 65,536 tokens together.

    Example:
        >>> from hydrasurgery.demo.teacher import load_teacher
        >>> model, tokenizer = load_teacher()
        >>> samples = ruler_samples(tokenizer, "fwe", length=512, count=1, seed=0)
        >>> len(ruler_answers(model, tokenizer, samples))
        1
    """
    answers: list[str] = []
    padding = next((id for id in (tokenizer.pad_token_id, tokenizer.eos_token_id) if id is not None), 0)
    with evaluating(model), _greedy(model):
        for chunk in _batches(samples, batch_size):
            ids, mask = (part.to(model.device) for part in _padded([sample.input_ids for sample in chunk], padding))
            wanted = {"max_new_tokens": chunk[0].new_tokens, "do_sample": False, "pad_token_id": padding}
            tokens = model.generate(input_ids=ids, attention_mask=mask, **wanted)
            answers += tokenizer.batch_decode(tokens[:, ids.shape[1] :], skip_special_tokens=True)
    return answers


def evaluate_ruler(
    models: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    lengths: Sequence[int] = (4096,),
    *,
    tasks: Sequence[str] = tuple(RULER),
    count: int = 32,
    seed: int = 0,
    text: str | None = None,
    chat: bool = False,
    batch_size: int | None = None,
    progress: bool = True,
) -> dict[str, dict[str, dict[str, float]]]:
    """Mean scores of models on the same samples, with a progress bar on standard error.

    Args:
        models: causal language models of transformers with one vocabulary, by any names; left as they are.
        tokenizer: theirs.
        lengths: tokens of prompt and answer together.
        tasks: names in `RULER`; by default all.
        count: samples per task and length.
        seed, text, chat: as in `ruler_samples`.
        batch_size: as in `ruler_answers`.
        progress: show a bar.

    Returns:
        {"model": {"niah_single_1": {"4096": 1.0, ...}, ...}, ...}, in the order of `models`.

    Raises:
        SequenceLengthError: a length is more than a model's positions are made for, YaRN and the like counted in (before
            anything is measured).
        DataError, TokenizerError: as `ruler_samples`; there is nothing to measure.
        PlanError: the models' vocabularies differ in size.

    Example:
        >>> from hydrasurgery.demo.teacher import load_teacher
        >>> model, tokenizer = load_teacher()
        >>> evaluate_ruler({"teacher": model}, tokenizer, (512,), tasks=["fwe"], count=1, progress=False)
        {'teacher': {'fwe': {'512': ...}}}
    """
    if not (models and lengths and tasks and count > 0):
        raise DataError("ruler: nothing to measure; give at least one model, length, task and sample")
    first, *others = models.values()
    for model in models.values():
        limit = scaled_limit(model)
        if limit is not None and max(lengths) > limit:
            raise SequenceLengthError.of(type(model).__name__, max(lengths), limit)
    for other in others:
        check_vocabularies(first, other)
    for task in tasks:  # what does not fit is refused before anything is measured
        ruler_samples(tokenizer, task, min(lengths), 1, seed, text=text, chat=chat)
    results: dict[str, dict[str, dict[str, float]]] = {name: {task: {} for task in tasks} for name in models}
    with progress_bar(progress) as bar:
        shown = bar.add_task("ruler", total=len(lengths) * len(tasks) * len(models), note="")
        for length in lengths:
            for task in tasks:
                samples = ruler_samples(tokenizer, task, length, count, seed, text=text, chat=chat)
                for name, model in models.items():
                    answers = ruler_answers(model, tokenizer, samples, batch_size=batch_size)
                    scores = [ruler_score(a, sample.references) for a, sample in zip(answers, samples, strict=True)]
                    value = results[name][task][str(length)] = sum(scores) / len(scores)
                    bar.update(shown, advance=1, note=f"{task} at {length}, {name}: {value:.3f}")
    return results


def scaled_limit(model: Any) -> int | None:
    """The longest sequence that the model's positions are made for, its config's rotary scaling counted in; None for no limit.

    YaRN and others of a fixed factor reach that many times the original positions, dynamic scaling any length.

    Args:
        model: a causal language model.

    Example:
        >>> from hydrasurgery.demo.teacher import load_teacher
        >>> model, _ = load_teacher()
        >>> model.config.rope_parameters |= {"rope_type": "yarn", "factor": 4.0}
        >>> scaled_limit(model)
        16384
    """
    plain = limit = position_limit(model)
    given = getattr(text_config(model), "rope_parameters", None) or {}
    for rope in (given, *(value for value in given.values() if isinstance(value, dict))):
        kind = rope.get("rope_type", "default")
        if plain is None or limit is None or kind == "dynamic":
            return None
        if kind != "default" and rope.get("factor"):
            limit = max(limit, int((rope.get("original_max_position_embeddings") or plain) * rope["factor"]))
    return limit


@contextmanager
def _greedy(model: Any) -> Iterator[None]:
    """Inside the block nothing that the model's generation config says counts, but its end tokens."""
    from transformers import GenerationConfig

    before = model.generation_config
    try:
        model.generation_config = GenerationConfig(eos_token_id=list(end_tokens(model)) or None)
        yield
    finally:
        model.generation_config = before


def _batches(samples: Sequence[RulerSample], size: int | None) -> Iterator[Sequence[RulerSample]]:
    longest = max((len(sample.input_ids) + sample.new_tokens for sample in samples), default=1)
    size = size or max(1, BATCH_TOKENS // longest)
    return (samples[start : start + size] for start in range(0, len(samples), size))


def _padded(rows: Sequence[Tensor], padding: int) -> tuple[Tensor, Tensor]:
    """Rows of tokens as one [B, T], filled up on the left, and the mask [B, T] that is 1 where a token is a row's own."""
    longest = max(map(len, rows))
    ids, mask = (torch.full((len(rows), longest), value) for value in (padding, 0))
    for number, row in enumerate(rows):
        ids[number, longest - len(row) :], mask[number, longest - len(row) :] = row, 1
    return ids, mask

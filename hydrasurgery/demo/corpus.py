"""The demo's tokenizer and training mixture: real text, needles hidden in it, and dense key-value recall."""

from __future__ import annotations

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hydrasurgery.evaluation.facts import KEY_TOKENS, VALUE_TOKENS
from hydrasurgery.evaluation.tasks import TaskBatch, dense_recall, needles, plain_text
from hydrasurgery.evaluation.text import library_text

TEXT_PIECES = 512
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>")
MIXTURE = (("needles", 0.45), ("dense", 0.40), ("text", 0.15))


def build_tokenizer(text: str | None = None) -> PreTrainedTokenizerFast:
    """Train the demo's tokenizer: 512 byte-level BPE pieces, then 128 key tokens, 64 value tokens and pad, bos, eos.

    Byte-level, so that every Unicode text encodes and decodes to itself; a bos token comes first, padding is left.

    Args:
        text: what the pieces are learned from; by default the training split of the Python reference.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TEXT_PIECES, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    core.train_from_iterator((text or library_text("train")).split("\n\n"), trainer)
    core.add_special_tokens([*KEY_TOKENS, *VALUE_TOKENS, *SPECIAL_TOKENS])
    bos = core.token_to_id("<bos>")
    core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )


def training_batch(
    tokenizer: PreTrainedTokenizerBase, text_ids: Tensor, length: int, tokens: int, seed: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """One mixed batch of 45 % needles, 40 % dense recall and 15 % text, `tokens // length` rows.

    The kinds are drawn for each row, so that short batches of long rows hold the mixture on average.

    Returns:
        input_ids [B, T] and answer labels [B, T] (-100 everywhere but on answers; text rows have none).
    """
    rows = max(1, tokens // length)
    drawn = np.random.default_rng(seed).multinomial(rows, [share for _, share in MIXTURE]).tolist()
    parts = [
        _part(kind, tokenizer, text_ids, length, count, (*seed, index))
        for index, ((kind, _), count) in enumerate(zip(MIXTURE, drawn, strict=True))
        if count
    ]
    labels = [torch.full_like(p.labels, -100) if p.task == "text" else p.labels for p in parts]
    return torch.cat([p.input_ids for p in parts]), torch.cat(labels)


def _part(
    kind: str, tokenizer: PreTrainedTokenizerBase, text_ids: Tensor, length: int, count: int, seed: tuple[int, ...]
) -> TaskBatch:
    if kind == "needles":
        # Several questions a row: with one, a step of four rows of 512 tokens would have two answers to learn from.
        keys = min(8, max(2, length // 16))
        return needles(tokenizer, length, count, seed, num_keys=keys, questions=min(4, keys), text_ids=text_ids)
    if kind == "dense":
        facts = (length - 1) // 3
        densest = 0.75 if length >= 128 else 0.5  # short sequences stay easy: look-up is learned on them
        pairs = min(len(KEY_TOKENS), round(facts * np.random.default_rng(seed).uniform(0.4, densest)))
        return dense_recall(tokenizer, length, count, seed, num_pairs=pairs, questions=facts - pairs, text_ids=text_ids)
    return plain_text(tokenizer, length, count, seed, text_ids=text_ids)

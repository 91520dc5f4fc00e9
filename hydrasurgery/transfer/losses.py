"""The losses of the transfer, and the split of a language model into backbone and head that keeps them small."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hydrasurgery.decoders import evaluating, standing_still
from hydrasurgery.transfer.data import Batch
from hydrasurgery.transfer.rows import IGNORED, MASK

_CHUNK_ELEMENTS = 1 << 26  # of one fp32 [tokens, vocabulary] matrix: 256 MiB


class SplitModel:
    """A causal language model run in two halves: hidden states of all tokens, then logits of a few at a time.

    The head is the model's own forward with the backbone standing still, so whatever a family does to its logits
    (soft caps, scales) is included. A model that cannot be split so, or whose halves do not give what the whole gives,
    counts as all backbone: its "hidden states" are the logits.

    Attributes:
        model: the whole model.
        backbone: the module that gives the hidden states; `model` itself if there is no split.

    Example:
        >>> from hydrasurgery.demo.teacher import load_teacher
        >>> model, ids = load_teacher()[0], torch.ones(1, 5, dtype=torch.long)
        >>> split = SplitModel(model)
        >>> logits = split.logits(split.hidden({"input_ids": ids})[0, -2:])
        >>> torch.allclose(logits, model(ids).logits[0, -2:], atol=1e-4)
        True
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.backbone = model
        decoder = cast(Any, model).get_decoder() if hasattr(model, "get_decoder") else model
        if decoder is not model and self._halves_agree(decoder):
            self.backbone = decoder

    def hidden(self, inputs: Mapping[str, Any]) -> Tensor:
        """Hidden states [B, T, hidden] after the final norm (logits [B, T, vocabulary] without a split).

        Args:
            inputs: arguments of the model's forward, `input_ids` [B, T] among them; they are moved to the model's device.
        """
        if self.backbone is self.model:
            return whole_logits(self.model, inputs)
        return self.backbone(**_beside(self.model, inputs), use_cache=False).last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [N, vocabulary] of hidden states: `hidden` [N, hidden]."""
        if self.backbone is self.model:
            return hidden
        with standing_still(self.backbone, output=self._output(last_hidden_state=hidden[None])):
            return self.model(input_ids=None, use_cache=False).logits[0]

    def _halves_agree(self, decoder: nn.Module) -> bool:
        ids = torch.ones(1, 2, dtype=torch.int64, device=next(self.model.parameters()).device)
        inputs = {"input_ids": ids, "attention_mask": ids, "use_cache": False}
        with evaluating(self.model), torch.no_grad():
            whole = self.model(**inputs).logits
            try:
                output = decoder(**inputs)
                self._output = type(output)
                with standing_still(decoder, output=self._output(last_hidden_state=output.last_hidden_state)):
                    halves = self.model(input_ids=None, use_cache=False).logits
                if torch.allclose(halves, whole, rtol=1e-3, atol=1e-3, equal_nan=True):
                    return True
                reason = "they give other logits"
            except (AttributeError, TypeError, ValueError, RuntimeError) as error:
                reason = str(error)
        warnings.warn(
            f"{type(self.model).__name__} cannot be run as backbone and head ({reason}): the logits of a whole batch "
            "are held at once, so use a small micro_batch",
            stacklevel=2,
        )
        return False


def whole_logits(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """Logits [B, T, vocabulary] of any decoder.

    Args:
        model: a decoder of transformers, or a plain module whose first argument is the tokens, whatever it calls them.
        inputs: arguments of the model's forward, `input_ids` [B, T] among them; they are moved to the model's device.
    """
    inputs = _beside(model, inputs)
    if hasattr(model, "get_decoder"):
        return model(**inputs, use_cache=False).logits
    output = model(inputs.pop("input_ids"), **inputs)
    return output if isinstance(output, Tensor) else output[0]


def _beside(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    device = next(model.parameters()).device
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}


def relative_error(output: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """|output - target|^2 / |target|^2 over the tokens of `mask` (paper section 4), in fp32.

    Args:
        output: [B, T, hidden], what the hybrid layer gives.
        target: [B, T, hidden], what the teacher's layer gives.
        mask: bool [B, T], True for tokens that count.

    Each may be on a device of its own; the error is where `output` is.

    Example:
        >>> target = torch.ones(1, 2, 4)
        >>> relative_error(1.5 * target, target, torch.tensor([[True, False]]))
        tensor(0.2500)
    """
    mask, target = mask.to(output.device), target.to(output.device)
    output, target = output[mask].float(), target[mask].float()
    return (output - target).square().sum() / target.square().sum().clamp_min(torch.finfo(torch.float32).tiny)


def language_loss(
    student: SplitModel,
    teacher: SplitModel | None,
    batch: Batch,
    *,
    ce_weight: float = 0.0,
    totals: tuple[int, int] | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """mean KL(teacher || student) + ce_weight * mean cross entropy, without ever holding all logits (paper section 4).

    The KL is the mean over tokens of `batch.mask` of sum_v p_teacher(v) (log p_teacher(v) - log p_student(v)); the
    cross entropy the mean over tokens whose *next* label counts. Only `chunk` tokens have logits at a time: each chunk
    is recomputed in the backward pass, so values and gradients are those of the plain loss up to rounding.

    Args:
        student: the model that is trained.
        teacher: the model it follows; None leaves the KL out.
        batch: tokens, mask and labels.
        ce_weight: the cross entropy's weight.
        totals: (tokens of the KL, tokens of the cross entropy) to divide by, when `batch` is a piece of a step.
        chunk: tokens with logits at a time; None takes as many as fill 256 MiB.

    Returns:
        The loss, a scalar with a gradient, and its parts without: `ce`, and `kl` if there is a teacher.

    Example:
        >>> from hydrasurgery.demo.teacher import load_teacher
        >>> model, ids = SplitModel(load_teacher()[0]), torch.ones(1, 5, dtype=torch.long)
        >>> loss, parts = language_loss(model, model, Batch({"input_ids": ids}, ids.bool(), ids))
        >>> loss.item(), sorted(parts)
        (0.0, ['ce', 'kl'])
    """
    targets = next_labels(batch)
    kl_total, ce_total = totals or loss_totals(batch)
    with torch.no_grad():  # before the student, whose activations are not there yet
        wanted = None if teacher is None else teacher.hidden(batch.inputs)
    hidden = student.hidden(batch.inputs)
    size = chunk or max(1, _CHUNK_ELEMENTS // _vocabulary(student, hidden))
    kl = ce = hidden.new_zeros((), dtype=torch.float32)
    for counts, follows in _groups(batch.mask, targets, teacher):
        rows = counts.reshape(-1).nonzero().squeeze(-1)
        tensors = (hidden, targets) if follows is None or wanted is None else (hidden, targets, wanted)
        chosen = [tensor.flatten(0, 1)[rows.to(tensor.device)] for tensor in tensors]
        for piece in zip(*(tensor.split(size) for tensor in chosen), strict=True):
            part = checkpoint(_token_sums, student, follows, *piece, use_reentrant=False, preserve_rng_state=False)
            kl, ce = kl + part[0], ce + part[1]
    kl, ce = kl / max(1, kl_total), ce / max(1, ce_total)
    if teacher is None:
        return ce_weight * ce, {"ce": ce.detach()}
    return kl + ce_weight * ce, {"kl": kl.detach(), "ce": ce.detach()}


def _groups(mask: Tensor, targets: Tensor, teacher: SplitModel | None) -> list[tuple[Tensor, SplitModel | None]]:
    """Which tokens [B, T] have a KL and a cross entropy, and which the second only, each with the teacher that it needs."""
    predicts = targets != IGNORED
    if teacher is None:
        return [(predicts, None)]
    alone = predicts & ~mask  # the token before the first one that counts
    return [(mask, teacher), *([(alone, None)] if alone.any() else [])]


def loss_totals(batch: Batch) -> tuple[int, int]:
    """How many tokens of `batch` count in the KL and in the cross entropy."""
    return int(batch.mask.sum()), int((next_labels(batch) != IGNORED).sum())


def next_labels(batch: Batch) -> Tensor:
    """For each position [B, T] the label of the next one; -100 at the end, and at padding, which predicts nothing."""
    following = F.pad(batch.labels[:, 1:], (0, 1), value=IGNORED)
    padding = batch.inputs.get(MASK)
    return following if padding is None else following.masked_fill(padding == 0, IGNORED)


def _vocabulary(model: SplitModel, hidden: Tensor) -> int:
    with torch.no_grad():
        return model.logits(hidden[:1, 0]).shape[-1]


def _token_sums(
    student: SplitModel,
    teacher: SplitModel | None,
    hidden: Tensor,
    targets: Tensor,
    teacher_hidden: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(KL, cross entropy where there is a target), summed over a chunk of tokens, in fp32 whatever the autocast."""
    log_student = student.logits(hidden).float().log_softmax(-1)
    ce = F.nll_loss(log_student, targets.to(hidden.device), ignore_index=IGNORED, reduction="sum")
    if teacher is None or teacher_hidden is None:
        return torch.zeros_like(ce), ce
    with torch.no_grad():
        log_teacher = teacher.logits(teacher_hidden).to(log_student.device).float().log_softmax(-1)
    return F.kl_div(log_student, log_teacher, reduction="sum", log_target=True), ce

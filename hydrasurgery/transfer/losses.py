"""The losses of the transfer, and the split of a language model into backbone and head that keeps them small."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hydrasurgery.decoders import evaluating, standing_still
from hydrasurgery.transfer.data import Batch
from hydrasurgery.transfer.rows import IGNORED, MASK

_CHUNK_ELEMENTS = 1 << 27  # of one fp32 [tokens, vocabulary] matrix, at most: 512 MiB
_ROWS = 128  # of a matrix, which matrix units want a multiple of


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

    def head(self, hidden: Tensor) -> tuple[int, list[Tensor]]:
        """The vocabulary's size, and the parameters that `logits` reads and that ask for a gradient.

        Args:
            hidden: hidden states [B, T, hidden], of which one is tried.
        """
        with torch.enable_grad():
            logits = self.logits(hidden[:1, 0].detach())
        return logits.shape[-1], _leaves(logits)

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


def beside(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`. What goes from the CPU to a GPU is queued there, without waiting for what it has to do before."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def _beside(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    device = next(model.parameters()).device
    return {name: beside(value, device) if isinstance(value, Tensor) else value for name, value in inputs.items()}


def _leaves(tensor: Tensor) -> list[Tensor]:
    """What a tensor was computed from that collects gradients."""
    found: dict[int, Tensor] = {}
    queue, seen = [tensor.grad_fn], set[Any]()
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found[id(node.variable)] = node.variable
        queue.extend(following for following, _ in node.next_functions)
    return list(found.values())


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
    left_out = ~mask.to(output.device)[..., None]
    # What stands there, NaN too, reaches neither the sums nor the gradient.
    output = output.float().masked_fill(left_out, 0.0)
    target = target.to(output.device).float().masked_fill(left_out, 0.0)
    return (output - target).square().sum() / target.square().sum().clamp_min(torch.finfo(torch.float32).tiny)


def token_sums(logits: Tensor, wanted: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(KL, cross entropy where there is a target), summed over tokens, in fp32 whatever the autocast.

    Args:
        logits: [N, vocabulary], the student's.
        wanted: [N, vocabulary], the teacher's; None leaves the KL at 0.
        targets: [N] token ids, -100 where there is none.
    """
    log_student = logits.float().log_softmax(-1)
    ce = F.nll_loss(log_student, targets, ignore_index=IGNORED, reduction="sum")
    if wanted is None:
        return torch.zeros_like(ce), ce
    log_teacher = wanted.float().log_softmax(-1)
    return F.kl_div(log_student, log_teacher, reduction="sum", log_target=True), ce


def language_loss(
    student: SplitModel,
    teacher: SplitModel | None,
    batch: Batch,
    *,
    ce_weight: float = 0.0,
    totals: tuple[int, int] | None = None,
    chunk: int | None = None,
    sums: Callable[[Tensor, Tensor | None, Tensor], tuple[Tensor, Tensor]] = token_sums,
) -> tuple[Tensor, dict[str, Tensor]]:
    """mean KL(teacher || student) + ce_weight * mean cross entropy, without ever holding all logits (paper section 4).

    The KL is the mean over tokens of `batch.mask` of sum_v p_teacher(v) (log p_teacher(v) - log p_student(v)); the
    cross entropy the mean over tokens whose *next* label counts. Only `chunk` tokens have logits at a time: each chunk's gradients
    are taken at once and kept for the backward pass, so values and gradients are those of the plain loss up to rounding.

    Args:
        student: the model that is trained.
        teacher: the model it follows; None leaves the KL out.
        batch: tokens, mask and labels; best on the CPU, where finding the tokens that count waits for no device.
        ce_weight: the cross entropy's weight.
        totals: (tokens of the KL, tokens of the cross entropy) to divide by, when `batch` is a piece of a step.
        chunk: tokens with logits at a time; None takes as many as fill 512 MiB.
        sums: what is run on a chunk's logits: `token_sums`, or that compiled.

    Returns:
        The loss, a scalar with a gradient that can be taken once, and its parts without: `ce`, and `kl` if there is a teacher.

    Example:
        >>> from hydrasurgery.demo.teacher import load_teacher
        >>> model, ids = SplitModel(load_teacher()[0]), torch.ones(1, 5, dtype=torch.long)
        >>> loss, parts = language_loss(model, model, Batch({"input_ids": ids}, ids.bool(), ids))
        >>> loss.item(), sorted(parts)
        (0.0, ['ce', 'kl'])
    """
    kl_total, ce_total = (max(1, total) for total in totals or loss_totals(batch))
    with torch.no_grad():  # before the student, whose activations are not there yet
        wanted = None if teacher is None else teacher.hidden(batch.inputs).flatten(0, 1)
    hidden = student.hidden(batch.inputs)
    width, head = student.head(hidden)
    gradients = _Gradients(hidden, head)
    targets = beside(next_labels(batch).flatten(), hidden.device)
    kl = ce = hidden.new_zeros((), dtype=torch.float32)
    for rows, diverges in _groups(batch, teacher):
        for some in _chunks(rows, len(targets), chunk or _chunk_tokens(width), hidden.device):
            piece = gradients.leaf(some)
            theirs = _logits(teacher, wanted, some, hidden.device) if diverges else None
            part = sums(student.logits(piece), theirs, targets[some])
            gradients.add(part[0] / kl_total + ce_weight / ce_total * part[1], piece, some)
            kl, ce = kl + part[0].detach(), ce + part[1].detach()
    kl, ce = kl / kl_total, ce / ce_total
    if teacher is None:
        return gradients.attach(ce_weight * ce), {"ce": ce}
    return gradients.attach(kl + ce_weight * ce), {"kl": kl, "ce": ce}


class _Gradients:
    """The gradients of a loss in hidden states [B, T, hidden] and in the head's parameters, added up chunk by chunk."""

    def __init__(self, hidden: Tensor, head: list[Tensor]) -> None:
        self._hidden, self._flat = hidden, hidden.detach().flatten(0, 1)
        taken = torch.is_grad_enabled()
        self._of_hidden = torch.zeros_like(self._flat) if taken and hidden.requires_grad else None
        self._head = head if taken else []
        self._of_head: list[Tensor | None] = [None] * len(self._head)

    def leaf(self, some: slice | Tensor) -> Tensor:
        """The hidden states of some tokens, to compute a part of the loss from."""
        return self._flat[some].requires_grad_(self._of_hidden is not None)

    def add(self, part: Tensor, leaf: Tensor, some: slice | Tensor) -> None:
        """Take the gradients of a part of the loss that was computed from `leaf`, and free what it was computed with."""
        if not part.requires_grad:
            return
        first = [] if self._of_hidden is None else [leaf]
        found = torch.autograd.grad(part, [*first, *self._head], allow_unused=True)
        if self._of_hidden is not None and found[0] is not None:
            self._of_hidden[some] = found[0]
        for place, more in enumerate(found[len(first) :]):
            before = self._of_head[place]
            if more is not None:
                self._of_head[place] = more if before is None else before.add_(more)

    def attach(self, loss: Tensor) -> Tensor:
        """`loss` with these gradients."""
        inputs, found = list(self._head), self._of_head
        if self._of_hidden is not None:
            inputs, found = [self._hidden, *inputs], [self._of_hidden.view_as(self._hidden), *found]
        return _WithGradients.apply(loss, found, *inputs) if inputs else loss


class _WithGradients(torch.autograd.Function):
    """A loss whose gradients in its inputs are known."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor | None], *inputs: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, factor: Tensor) -> Any:
        if ctx.gradients is None:
            raise RuntimeError("the gradient of a language_loss can be taken once: compute the loss again")
        gradients, ctx.gradients = ctx.gradients, None
        return None, None, *(None if each is None else each.mul_(factor) for each in gradients)


def _logits(teacher: SplitModel | None, hidden: Tensor | None, some: slice | Tensor, device: torch.device) -> Tensor:
    assert teacher is not None and hidden is not None
    with torch.no_grad():
        return teacher.logits(hidden[some.to(hidden.device) if isinstance(some, Tensor) else some]).to(device)


def _groups(batch: Batch, teacher: SplitModel | None) -> list[tuple[Tensor | None, bool]]:
    """Which tokens of the flattened batch have a KL and a cross entropy, and which the second only, each with whether it has the
    first. Tokens are rows [N], or None for all."""
    predicts = next_labels(batch) != IGNORED
    if batch.mask.all():  # but the last ones, which have no next label
        return [(None, teacher is not None)]
    if teacher is None:
        return [(_places(predicts), False)]
    alone = predicts & ~batch.mask  # the token before the first one that counts
    return [(_places(batch.mask), True), *([(_places(alone), False)] if alone.any() else [])]


def _places(chosen: Tensor) -> Tensor:
    return chosen.flatten().nonzero().squeeze(-1)


def _chunk_tokens(width: int) -> int:
    """Tokens whose logits, `width` of each, are computed at once. Each chunk adds up the gradient of the whole head once."""
    most = max(1, _CHUNK_ELEMENTS // width)
    return most - most % _ROWS if most > _ROWS else most


def _chunks(rows: Tensor | None, count: int, size: int, device: torch.device) -> Iterable[slice | Tensor]:
    """Indices of at most `size` of `count` tokens at a time: of those in `rows`, or of all."""
    if rows is None:
        return [slice(start, start + size) for start in range(0, count, size)]
    return beside(rows, device).split(size) if len(rows) else []


def loss_totals(batch: Batch) -> tuple[int, int]:
    """How many tokens of `batch` count in the KL and in the cross entropy."""
    return int(batch.mask.sum()), int((next_labels(batch) != IGNORED).sum())


def next_labels(batch: Batch) -> Tensor:
    """For each position [B, T] the label of the next one; -100 at the end, and at padding, which predicts nothing."""
    following = F.pad(batch.labels[:, 1:], (0, 1), value=IGNORED)
    padding = batch.inputs.get(MASK)
    return following if padding is None else following.masked_fill(padding == 0, IGNORED)

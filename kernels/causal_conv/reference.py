"""Depthwise causal convolution with a carried state, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(
    x: Tensor, weight: Tensor, state: Tensor | None, reset: Tensor | None, previous: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """y_t = sum_j weight[:, W-1-j] x_{t-j} over the taps of t's own document; shapes as in `hydrasurgery.ops.causal_conv`."""
    line = _Line(x, weight, state, reset, previous)
    width, length = weight.shape[1], x.shape[1]
    taps = weight.to(line.values.dtype)
    y = torch.zeros(x.shape, dtype=taps.dtype, device=x.device)
    for tap in range(width):
        y += _own(line.values[:, tap : tap + length] * taps[:, tap], line.document, tap, width)
    return line.apart(y).to(x.dtype), _tail(line.values, line.document, width).mT.to(x.dtype)


def backward(
    grad: Tensor,
    grad_state: Tensor,
    x: Tensor,
    weight: Tensor,
    state: Tensor | None,
    reset: Tensor | None,
    previous: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of x, weight and state: the transposed convolution, the correlation of x with `grad`, and the carried tail."""
    line = _Line(x, weight, state, reset, previous)
    width, length = weight.shape[1], x.shape[1]
    taps, grad = weight.to(line.values.dtype), line.together(grad.to(line.values.dtype))
    dvalues, dweight = torch.zeros_like(line.values), torch.zeros_like(taps)
    for tap in range(width):
        own = _own(grad, line.document, tap, width)
        dvalues[:, tap : tap + length] += own * taps[:, tap]
        dweight[:, tap] = (own * line.values[:, tap : tap + length]).sum((0, 1))
    dvalues[:, length:] += _tail(grad_state.to(taps.dtype).mT, line.document, width)
    dpast, dx = line.split(dvalues)
    return dx.to(x.dtype), dweight.to(weight.dtype), None if state is None else dpast.mT.to(state.dtype)


class _Line:
    """The state and x as one sequence [B, W-1+T, C], `values`, and the number of each position's document (None: only one).

    With padding, all of it stands first and the state and the tokens follow: each then stands behind the one that it follows, and
    a convolution that knows of no padding is right. `order` [B, W-1+T] says which position comes where; None: as they are.
    """

    def __init__(
        self, x: Tensor, weight: Tensor, state: Tensor | None, reset: Tensor | None, previous: Tensor | None
    ) -> None:
        dtype = torch.promote_types(x.dtype, torch.float32)
        self.before = weight.shape[1] - 1
        past = x.new_zeros(x.shape[0], self.before, x.shape[2]) if state is None else state.mT
        self.values = torch.cat([past.to(dtype), x.to(dtype)], dim=1)
        self.valid = None if previous is None else previous[:, 1:] == torch.arange(x.shape[1], device=x.device)
        self.order = None
        if previous is not None and self.valid is not None:
            self.values = self.values.masked_fill(~self._all(self.valid)[..., None], 0)
            if not _is_in_place(previous, self.valid, state is not None):
                self.order = self._all(self.valid).to(torch.int8).argsort(dim=1, stable=True)
                self.values = self.values.gather(1, self.order[..., None].expand_as(self.values))
        self.document = None
        if reset is not None:
            # What the state holds precedes every document that starts in x, so it is number 0.
            number = reset.to(torch.int32).cumsum(1)
            self.document = torch.cat([number.new_zeros(x.shape[0], self.before), number], dim=1)
            if self.order is not None:
                self.document = self.document.gather(1, self.order)

    def _all(self, valid: Tensor) -> Tensor:
        return torch.cat([valid.new_ones(valid.shape[0], self.before), valid], dim=1)

    def together(self, tokens: Tensor) -> Tensor:
        """Tokens [B, T, C] where those of x stand now."""
        if self.valid is not None:
            tokens = tokens.masked_fill(~self.valid[..., None], 0)
        if self.order is None:
            return tokens
        whole = torch.cat([tokens.new_zeros(tokens.shape[0], self.before, tokens.shape[2]), tokens], dim=1)
        return whole.gather(1, self.order[..., None].expand_as(whole))[:, self.before :]

    def apart(self, tokens: Tensor) -> Tensor:
        """`together` undone: tokens [B, T, C] back in x's places, 0 at padding."""
        if self.order is not None:
            whole = torch.cat([tokens.new_zeros(tokens.shape[0], self.before, tokens.shape[2]), tokens], dim=1)
            tokens = self._back(whole)[:, self.before :]
        return tokens if self.valid is None else tokens.masked_fill(~self.valid[..., None], 0)

    def split(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """What belongs to the state and what to x, of numbers like `values`."""
        if self.order is not None:
            values = self._back(values)
        past, tokens = values[:, : self.before], values[:, self.before :]
        return past, tokens if self.valid is None else tokens.masked_fill(~self.valid[..., None], 0)

    def _back(self, whole: Tensor) -> Tensor:
        assert self.order is not None
        return torch.zeros_like(whole).scatter(1, self.order[..., None].expand_as(whole), whole)


def _is_in_place(previous: Tensor, valid: Tensor, has_state: bool) -> bool:
    """Whether each token stands right behind the one it follows as it is: padding on the left alone, and no state before it.

    Looked at on a CPU only: elsewhere to ask would be to wait.
    """
    if previous.device.type != "cpu":
        return False
    place = torch.arange(previous.shape[1], device=previous.device)
    follows = previous == place - 1
    if not has_state:
        follows |= previous == -1
    return bool((follows | ~torch.nn.functional.pad(valid, (0, 1), value=True)).all())


def _own(values: Tensor, document: Tensor | None, tap: int, width: int) -> Tensor:
    """`values` [B, T, C] with 0 where this tap reaches into another document than that of its token."""
    if document is None or tap == width - 1:
        return values
    length = values.shape[1]
    other = document[:, tap : tap + length] != document[:, width - 1 :]
    return values.masked_fill(other[..., None], 0)


def _tail(values: Tensor, document: Tensor | None, width: int) -> Tensor:
    """The last W-1 positions, with 0 for those of a document that has ended: a later call must not see them."""
    tail = values[:, values.shape[1] - (width - 1) :]
    if document is None:
        return tail
    ended = document[:, document.shape[1] - (width - 1) :] != document[:, -1:]
    return tail.masked_fill(ended[..., None], 0)

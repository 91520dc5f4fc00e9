"""What a mask says of tokens, with the operators that count them and find the last one before each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hydrasurgery.dialect.checks import check_mask_dtype, expect
from hydrasurgery.dialect.operators import operator
from hydrasurgery.kernels.attention.reach import is_reach, parts

MASKED = -1.0e4  # what additive masks hold where a token may not attend is this or less, in every dtype


def token_flags(
    mask: Tensor | None,
    hidden_states: Tensor,
    first_key: Tensor | int | None = None,
    *,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """What a complete attention mask says of each token: is it one (not padding), and does a document start with it?

    Token t is key `first_key + t`. `valid[t]`: t may attend to itself. `reset[t]`: t is valid and may not attend to the last valid
    token before it; padding between the two says nothing. A call's first valid token is asked for all keys before the call: it
    starts a document if it sees none of them. With a `window`, keys outside of it say nothing either, and what comes before a
    call is taken to go on: padding as long as the window cannot be told from another document. The mask's first head is read.

    Args:
        mask: [B or 1, H or 1, T, S], bool (True = may attend) or float (-1e4 or less = may not); a reach mask; or None.
        hidden_states: [B, T, ...]; only its shape and device are used.
        first_key: which of the S keys the first token is, a number or a tensor [1] or []; S - T if None. A reach mask says it.
        window: the number of keys that the attention sees, the query's own included.

    Returns:
        (valid [B, T], reset [B, T]), bool; all True and all False without a mask.

    Raises:
        ValueError: the mask has another shape, or holds integers.

    Example:
        Padding, then two documents of one token each.

        >>> mask = torch.tensor([[0, 0, 0], [0, 1, 0], [0, 0, 1]]).bool()[None, None]
        >>> token_flags(mask, torch.empty(1, 3, 8))
        (tensor([[False,  True,  True]]), tensor([[False, False,  True]]))
    """
    batch, length = hidden_states.shape[:2]
    if mask is None:
        flags = hidden_states.new_ones((batch, length), dtype=torch.bool)
        return flags, ~flags
    if is_reach(mask):
        return _known_flags(mask, length, window)
    expect_mask(mask, length)
    first = mask[:, 0]
    start = first.shape[2] - first.shape[1] if first_key is None else first_key
    # Gathered and not sliced along a diagonal: that would need slices of T - 1, and an exported graph would exclude T = 2.
    own = torch.arange(first.shape[1], device=mask.device) + start
    valid = _look(first, own.expand(first.shape[0], -1))
    reset = _starts(first, valid, own, start, window)
    return valid.expand(batch, length), reset.expand(batch, length)


def _starts(first: Tensor, valid: Tensor, own: Tensor, start: Tensor | int, window: int | None) -> Tensor:
    """`reset` of `token_flags`, from the mask of one head [B, T, S] and the keys `own` [T] that the tokens are."""
    length = valid.shape[1]
    if _is(length, 0):
        return valid
    if _is(length, 1):
        before, row = None, first[:, 0]
    else:
        previous = torch.ops.hydra.previous_tokens.default(valid)
        before = previous.narrow(1, 0, length)
        unseen = (previous.narrow(1, 1, length) < 0).sum(1, keepdim=True).clamp(max=length - 1)  # the first valid token
        row = first.gather(1, unseen[:, :, None].expand(-1, -1, first.shape[2]))[:, 0]
    if window is None and not _is(start, 0):
        past = may_attend(row) & (torch.arange(first.shape[2], device=first.device) < start)
        goes_on = past.any(1, keepdim=True) | (own.narrow(0, 0, 1) == 0)
    else:
        goes_on = torch.ones_like(valid)
    if before is None:
        return valid & ~goes_on
    follows = _look(first, (before + start).clamp(min=0))
    if window is not None:
        follows = follows | (torch.arange(length, device=first.device) - before >= window)
    return valid & ~((before >= 0) & follows) & ~((before < 0) & goes_on)


def _known_flags(mask: Tensor, length: int, window: int | None) -> tuple[Tensor, Tensor]:
    """`_flags_of_reach`, once for all layers that are given one mask."""
    if torch.compiler.is_compiling() or mask.is_inference():
        return _flags_of_reach(mask, length, window)
    key = (length, window, mask._version)
    known: dict[Any, tuple[Tensor, Tensor]] = vars(mask).setdefault("_hydra_flags", {})
    if key not in known:
        known[key] = _flags_of_reach(mask, length, window)
    return known[key]


def _flags_of_reach(mask: Tensor, length: int, window: int | None) -> tuple[Tensor, Tensor]:
    """`token_flags` of a mask of reaches [B, 1, 1, S + 1]."""
    reach, start = parts(mask)
    own = start + torch.arange(length, device=mask.device, dtype=mask.dtype)
    valid = reach.gather(1, own.long()) > own
    if length == 0:
        return valid, valid
    previous = torch.ops.hydra.previous_tokens.default(valid)
    before = previous.narrow(1, 0, length)
    follows = reach.gather(1, (before + start).clamp(min=0)) > own
    if window is not None:
        follows = follows | (torch.arange(length, device=mask.device) - before >= window)
        goes_on = torch.ones_like(valid)
    else:
        unseen = (previous.narrow(1, 1, length) < 0).sum(1, keepdim=True)  # tokens before the first valid one
        key = torch.arange(reach.shape[1], device=mask.device)
        goes_on = ((key < start) & (reach > start + unseen)).any(1, keepdim=True) | (own == 0).narrow(1, 0, 1)
    return valid, valid & ~((before >= 0) & follows) & ~((before < 0) & goes_on)


def _look(first: Tensor, columns: Tensor) -> Tensor:
    """Which of the keys `columns` [B, T], one a token, the tokens may attend to."""
    return may_attend(first.gather(2, columns[:, :, None]))[..., 0]


def _is(size: Any, number: int) -> bool:
    """Whether a size is this number, as far as is known without asking: a symbol of an exported graph is none."""
    return isinstance(size, int) and size == number


def expect_mask(mask: Tensor, length: int) -> None:
    """Raise unless a mask has a row a token, of a dtype that says what it means."""
    check_mask_dtype(mask)
    if mask.dim() != 4 or mask.shape[2] != length:
        raise ValueError(
            f"an attention mask must be complete, [batch or 1, heads or 1, {length}, keys], found {list(mask.shape)}: "
            "linear heads read which keys each token may attend to"
        )


def may_attend(mask: Tensor) -> Tensor:
    """Where a bool or additive mask lets a query attend to a key."""
    return mask if mask.dtype == torch.bool else mask > MASKED


def previous_tokens(valid: Tensor, mask: Tensor | None = None) -> Tensor | None:
    """For each token, and for the one that will come next, the last valid token before it.

    Args:
        valid: [B, T] bool, of `token_flags`.
        mask: what `valid` was read from; with None every token is valid, and nothing needs to be looked up.

    Returns:
        [B, T + 1] int64, -1 where there is none in this call; None without a mask.

    Raises:
        ValueError: a shape does not fit; the message names the argument.

    Example:
        >>> previous_tokens(torch.tensor([[1, 0, 0, 1]]).bool(), torch.ones(1, 1, 4, 4))
        tensor([[-1,  0,  0,  0,  3]])
    """
    expect("valid", valid, (None, None))
    if mask is None:
        return None
    if _is(valid.shape[1], 1):
        return torch.nn.functional.pad(valid.long() - 1, (1, 0), value=-1)
    if torch.compiler.is_compiling() or not is_reach(mask) or valid.is_inference():
        return torch.ops.hydra.previous_tokens.default(valid)
    known = vars(valid)  # once for all layers that are given one mask, as the flags
    if "_hydra_previous" not in known:
        known["_hydra_previous"] = torch.ops.hydra.previous_tokens.default(valid)
    found: Tensor = known["_hydra_previous"]
    return found


def token_positions(valid: Tensor, reset: Tensor, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Each token's place in its document, padding not counted: `p_t = n_t - 1`, n_t its tokens up to and including t.

    Not the model's position ids: those of a batch that is padded on the left may count the padding.

    Args:
        valid, reset: [B, T], of `token_flags`.
        seen: [B] int64, tokens of the last document before the first token here; 0 if None.

    Returns:
        positions [B, T] int64 (of padding, its predecessor's, at least 0) and `seen` after the last token [B] int64.

    Raises:
        ValueError: a shape does not fit; the message names the argument.

    Example:
        >>> valid, reset = torch.tensor([[0, 1, 1, 1]]).bool(), torch.tensor([[0, 1, 0, 1]]).bool()
        >>> token_positions(valid, reset)
        (tensor([[0, 0, 1, 0]]), tensor([1]))
    """
    expect("valid", valid, (None, None))
    expect("reset", reset, tuple(valid.shape))
    if seen is not None:
        expect("seen", seen, (valid.shape[0],))
    return torch.ops.hydra.token_positions.default(valid, reset, seen)


@operator("previous_tokens", "(Tensor valid) -> Tensor")
def _previous_tokens(valid: Tensor) -> Tensor:
    place = torch.arange(valid.shape[1], device=valid.device)
    last = torch.where(valid, place, -1)
    if valid.shape[1]:
        last = last.cummax(1).values
    return torch.nn.functional.pad(last, (1, 0), value=-1)


@_previous_tokens.register_fake
def _(valid):
    return valid.new_empty(valid.shape[0], valid.shape[1] + 1, dtype=torch.int64)


@operator("token_positions", "(Tensor valid, Tensor reset, Tensor? seen=None) -> (Tensor, Tensor)")
def _token_positions(valid: Tensor, reset: Tensor, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
    count = valid.long().cumsum(1)
    if seen is not None:
        count = count + seen[:, None]
    if count.shape[1] == 0:
        return count, count.new_zeros(count.shape[0]) if seen is None else seen.clone()
    # What was counted before a document's first token is subtracted again, until another document begins.
    before = torch.where(reset, count - 1, 0).cummax(1).values
    inside = count - before
    return (inside - 1).clamp_(min=0), inside[:, -1].clone()


@_token_positions.register_fake
def _(valid, reset, seen=None):
    return valid.new_empty(valid.shape, dtype=torch.int64), valid.new_empty(valid.shape[:1], dtype=torch.int64)

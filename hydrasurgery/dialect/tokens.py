"""What a mask says of tokens, and `hydra::token_positions`, which counts them."""

from __future__ import annotations

import torch
from torch import Tensor

from hydrasurgery.dialect.checks import expect

MASKED = -1.0e4  # what additive masks hold where a token may not attend is this or less, in every dtype


def token_flags(
    mask: Tensor | None, hidden_states: Tensor, first_key: Tensor | int | None = None
) -> tuple[Tensor, Tensor]:
    """What a complete attention mask says of each token: is it one (not padding), and does a document start with it?

    Token t is key `first_key + t`. `valid[t]`: t may attend to itself.
    `reset[t]`: t is valid and may not attend to the key before it (False if there is none). The mask's first head is read.

    Args:
        mask: [B or 1, H or 1, T, S], bool (True = may attend) or float (-1e4 or less = may not), or None.
        hidden_states: [B, T, ...]; only its shape and device are used.
        first_key: which of the S keys the first token is, a number or a tensor [1] or []; S - T if None.

    Returns:
        (valid [B, T], reset [B, T]), bool; all True and all False without a mask.

    Example:
        Padding, then two documents of one token each.

        >>> mask = torch.tensor([[0, 0, 0], [0, 1, 0], [0, 0, 1]]).bool()[None, None]
        >>> token_flags(mask, torch.empty(1, 3, 8))
        (tensor([[False,  True,  True]]), tensor([[False,  True,  True]]))
    """
    batch, length = hidden_states.shape[:2]
    if mask is None:
        flags = hidden_states.new_ones((batch, length), dtype=torch.bool)
        return flags, ~flags
    first = mask[:, 0]
    start = first.shape[2] - first.shape[1] if first_key is None else first_key
    own = torch.arange(first.shape[1], device=mask.device) + start
    # Gathered and not sliced along a diagonal: that would need slices of T - 1, and an exported graph would exclude T = 2.
    columns = (own, (own - 1).clamp(min=0))
    valid, follows = (_may_attend(first.gather(2, c[:, None].expand(first.shape[0], -1, 1)))[..., 0] for c in columns)
    reset = valid & ~follows & (own > 0)
    return valid.expand(batch, length), reset.expand(batch, length)


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


def _may_attend(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask > MASKED


@torch.library.custom_op("hydra::token_positions", mutates_args=())
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

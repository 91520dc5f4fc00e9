"""The readout of an answer (paper section 2, eq. 9), and numbers for what a change does to it."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from hydrasurgery.evaluation.tasks import Pair
from hydrasurgery.selection.recording import Head, Run

DISCOUNT = 0.9


def readout(logits: Tensor, pair: Pair) -> Tensor:
    """m(x) of eq. 9: logits [..., A, vocabulary] -> [...] in fp32, the answer's lead over the distractor."""
    answer, distractor = (ids.to(logits.device) for ids in (pair.answer_ids, pair.distractor_ids))
    at = torch.arange(len(answer), device=logits.device)
    lead = logits[..., at, answer].float() - logits[..., at, distractor].float()
    weight = DISCOUNT ** at.float()
    return (lead * weight).sum(-1) / weight.sum()


def whole_effect(pair: Pair, run: Run) -> Tensor:
    """m(x) - m(x'), the denominator of eq. 10."""
    return readout(run.clean_logits, pair) - readout(run.corrupt_logits, pair)


def divergence(logits: Tensor, _pair: Pair) -> Tensor:
    """KL(row 0 || row r) in nats, the mean over the answer's positions: logits [1 + N, A, V] -> [N]."""
    own = logits.float().log_softmax(-1)
    return (own[:1].exp() * (own[:1] - own[1:])).sum(-1).mean(-1)


def top_heads(values: Mapping[str, Tensor], share: float) -> list[Head]:
    """The given share (rounded up) of heads with the largest values, layer name -> [H]; the first of equals."""
    heads = [(name, head) for name, row in values.items() for head in range(len(row))]
    heads.sort(key=lambda at: -float(values[at[0]][at[1]]))
    return heads[: math.ceil(share * len(heads))]

"""A copy of the teacher in a lower precision, for the time of a run."""

from __future__ import annotations

import copy

import torch
from torch import nn


def lowered(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of `model` in eval mode whose parameters of floating point are of `dtype`; buffers stay in their own.

    Parameters that are of `dtype` already, and those of no floating point type or of a class of their own (quantised ones), are
    shared with `model`, which stays as it is.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> lowered(model, torch.bfloat16).weight.dtype, model.weight.dtype
        (torch.bfloat16, torch.float32)
    """
    made: dict[int, nn.Parameter] = {}  # deepcopy takes these for the copies of the parameters
    for parameter in model.parameters():
        plain = type(parameter) is nn.Parameter and parameter.is_floating_point()
        if plain and parameter.dtype != dtype:
            made[id(parameter)] = nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
        else:
            made[id(parameter)] = parameter
    return copy.deepcopy(model, memo=dict(made)).eval()

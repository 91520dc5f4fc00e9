"""What graphs and plans call things: the operators as targets of nodes, and the kinds of heads."""

from __future__ import annotations

from typing import Literal, get_args

import torch

import hydrasurgery.ops  # noqa: F401  (registers the operators)

ATTENTION = torch.ops.hydra.attention.default
LINEAR_ATTENTION = torch.ops.hydra.linear_attention.default
CAUSAL_CONV = torch.ops.hydra.causal_conv.default
FUSION = torch.ops.hydra.scale_norm_fusion.default
TOKEN_POSITIONS = torch.ops.hydra.token_positions.default
DECODE_STEP = torch.ops.hydra.decode_step.default
SDPA = torch.ops.aten.scaled_dot_product_attention.default

FULL, LINEAR = "full", "linear"
KINDS = (FULL, LINEAR)
Rule = Literal["linear", "gated", "delta", "gated_delta"]
RULES = get_args(Rule)

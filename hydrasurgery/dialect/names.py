"""What graphs and plans call things: the operators as targets of nodes, the kinds of heads, and the rules.

Importing it registers the operators.
"""

import torch

from hydrasurgery.dialect import (  # noqa: F401
    attention,
    causal_conv,
    decode_step,
    linear_attention,
    linear_heads,
    rotate,
    scale_norm_fusion,
    tokens,
)
from hydrasurgery.kernels.linear_attention.reference import DECAY_RULES, DELTA_RULES, RULES, Rule

ATTENTION = torch.ops.hydra.attention.default
LINEAR_ATTENTION = torch.ops.hydra.linear_attention.default
CAUSAL_CONV = torch.ops.hydra.causal_conv.default
FUSION = torch.ops.hydra.scale_norm_fusion.default
PREVIOUS_TOKENS = torch.ops.hydra.previous_tokens.default
TOKEN_POSITIONS = torch.ops.hydra.token_positions.default
DECODE_STEP = torch.ops.hydra.decode_step.default
LINEAR_HEADS = torch.ops.hydra.linear_heads.default
STEP_HEADS = torch.ops.hydra.step_heads.default
ROTATE = torch.ops.hydra.rotate.default
SDPA = torch.ops.aten.scaled_dot_product_attention.default

FULL, LINEAR = "full", "linear"
KINDS = (FULL, LINEAR)

__all__ = [
    "ATTENTION",
    "CAUSAL_CONV",
    "DECAY_RULES",
    "DECODE_STEP",
    "DELTA_RULES",
    "FULL",
    "FUSION",
    "KINDS",
    "LINEAR",
    "LINEAR_ATTENTION",
    "LINEAR_HEADS",
    "PREVIOUS_TOKENS",
    "ROTATE",
    "RULES",
    "Rule",
    "SDPA",
    "STEP_HEADS",
    "TOKEN_POSITIONS",
]

"""The operators that region graphs are written in, as functions that check shapes and say what is wrong.

There are four pure ones, one that does the work of several at once (`decode_step`, for one token), two that count and look up
tokens, and two helpers on heads and masks. GPUs run others in their place, made of the same kernels: `hydra::linear_heads` for many
tokens, and for one, where nothing compiles, `hydra::step_heads` and `hydra::rotate`.

An operator is `torch.ops.hydra.<name>`, in a file of its own in `hydrasurgery.dialect`: a schema, a fake kernel, an analytic
backward that is an operator too (`hydra::<name>_backward`; decoding, counting and looking up have none), and kernels in
`hydrasurgery.kernels.<name>`, of which `kernels.registry` chooses one for each call (counting and looking up are plain PyTorch
everywhere).
`hydra::linear_attention_forward` is the forward of linear attention that trains: it also returns what its backward needs again.
Layouts and meanings follow ONNX where ONNX has the operator. Graphs call the operators themselves. Inside, arithmetic is fp32
(fp64 for fp64 inputs). Autocast lowers what heads read, the q, k, v of `attention`, `linear_attention` and `decode_step` and the
x of `causal_conv`, together, as it does for PyTorch's own attention; gates and recurrent states stay in fp32.
"""

from hydrasurgery.dialect.attention import attention
from hydrasurgery.dialect.causal_conv import causal_conv
from hydrasurgery.dialect.decode_step import decode_step
from hydrasurgery.dialect.heads import select_heads
from hydrasurgery.dialect.linear_attention import linear_attention
from hydrasurgery.dialect.names import RULES
from hydrasurgery.dialect.scale_norm_fusion import scale_norm_fusion
from hydrasurgery.dialect.tokens import previous_tokens, token_flags, token_positions

__all__ = [
    "RULES",
    "attention",
    "causal_conv",
    "decode_step",
    "linear_attention",
    "previous_tokens",
    "scale_norm_fusion",
    "select_heads",
    "token_flags",
    "token_positions",
]

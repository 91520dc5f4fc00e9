"""Passes over regions: one pass a file, a pipeline is a string of their names."""

from hydrasurgery.passes.base import PRESETS, REGISTRY, Pass, PassResult, parse, run_pipeline
from hydrasurgery.passes.canonicalize_attention import CanonicalizeAttention
from hydrasurgery.passes.fuse_heads import FuseHeads
from hydrasurgery.passes.linearize_heads import LinearizeHeads
from hydrasurgery.passes.split_heads import SplitHeads
from hydrasurgery.passes.thread_state import ThreadState

__all__ = [
    "PRESETS",
    "REGISTRY",
    "CanonicalizeAttention",
    "FuseHeads",
    "LinearizeHeads",
    "Pass",
    "PassResult",
    "SplitHeads",
    "ThreadState",
    "parse",
    "run_pipeline",
]

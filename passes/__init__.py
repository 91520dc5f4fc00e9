"""Passes over regions: one pass a file, a pipeline is a string of their names."""

from hydrasurgery.passes.base import REGISTRY, Pass, PassResult, register
from hydrasurgery.passes.canonicalize_attention import CanonicalizeAttention
from hydrasurgery.passes.canonicalize_rotary import CanonicalizeRotary
from hydrasurgery.passes.fuse_decode import FuseDecode
from hydrasurgery.passes.fuse_heads import FuseHeads
from hydrasurgery.passes.linearize_heads import LinearizeHeads
from hydrasurgery.passes.manager import run_pipeline
from hydrasurgery.passes.order_heads import OrderHeads
from hydrasurgery.passes.pipeline import PRESETS, parse
from hydrasurgery.passes.place_heads import PlaceHeads
from hydrasurgery.passes.prune_projections import PruneProjections
from hydrasurgery.passes.select_kernels import SelectKernels
from hydrasurgery.passes.split_heads import SplitHeads
from hydrasurgery.passes.thread_state import ThreadState
from hydrasurgery.passes.untie_projections import UntieProjections

__all__ = [
    "PRESETS",
    "REGISTRY",
    "CanonicalizeAttention",
    "CanonicalizeRotary",
    "FuseDecode",
    "FuseHeads",
    "LinearizeHeads",
    "OrderHeads",
    "Pass",
    "PassResult",
    "PlaceHeads",
    "PruneProjections",
    "SelectKernels",
    "SplitHeads",
    "ThreadState",
    "UntieProjections",
    "parse",
    "register",
    "run_pipeline",
]

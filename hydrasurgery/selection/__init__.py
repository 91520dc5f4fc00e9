"""Which heads matter: probes, scorers, score files and their pictures."""

from hydrasurgery.selection.ablation import ablation_curve
from hydrasurgery.selection.agreement import compare
from hydrasurgery.selection.auditing import audit
from hydrasurgery.selection.formats import read_scores, write_scores
from hydrasurgery.selection.fusion import confidence, fuse_scores, split_half
from hydrasurgery.selection.scorers import METHODS
from hydrasurgery.selection.scores import HeadScores, LayerScores
from hydrasurgery.selection.scoring import probe_pairs, score_heads
from hydrasurgery.selection.swap import swap_check

__all__ = [
    "METHODS",
    "HeadScores",
    "LayerScores",
    "ablation_curve",
    "audit",
    "compare",
    "confidence",
    "fuse_scores",
    "probe_pairs",
    "read_scores",
    "score_heads",
    "split_half",
    "swap_check",
    "write_scores",
]

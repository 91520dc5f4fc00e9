"""Which heads matter: probes, scorers, score files and their pictures."""

from hydrasurgery.selection.scorers import METHODS
from hydrasurgery.selection.scores import HeadScores, LayerScores
from hydrasurgery.selection.scoring import score_heads

__all__ = ["METHODS", "HeadScores", "LayerScores", "score_heads"]

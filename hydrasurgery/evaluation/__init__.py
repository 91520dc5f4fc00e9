"""Tasks with known answers and what a model scores on them; used by scoring, transfer and the command line."""

from hydrasurgery.decoders import evaluating
from hydrasurgery.evaluation.facts import KEY_TOKENS, VALUE_TOKENS, has_symbols
from hydrasurgery.evaluation.metrics import evaluate, kl_to_teacher, perplexity, recall
from hydrasurgery.evaluation.probes import PROBES, fact_pairs, make_pairs, sum_pairs, variable_pairs
from hydrasurgery.evaluation.ruler import RULER, RulerSample, ruler_samples
from hydrasurgery.evaluation.ruler_scores import evaluate_ruler, ruler_answers, ruler_score
from hydrasurgery.evaluation.tasks import (
    Pair,
    TaskBatch,
    dense_recall,
    needle_pairs,
    needles,
    plain_text,
)
from hydrasurgery.evaluation.text import encode_text, library_text, load_text

__all__ = [
    "KEY_TOKENS",
    "PROBES",
    "RULER",
    "VALUE_TOKENS",
    "Pair",
    "RulerSample",
    "TaskBatch",
    "dense_recall",
    "encode_text",
    "evaluate",
    "evaluate_ruler",
    "evaluating",
    "fact_pairs",
    "has_symbols",
    "kl_to_teacher",
    "library_text",
    "load_text",
    "make_pairs",
    "needle_pairs",
    "needles",
    "perplexity",
    "plain_text",
    "recall",
    "ruler_answers",
    "ruler_samples",
    "ruler_score",
    "sum_pairs",
    "variable_pairs",
]

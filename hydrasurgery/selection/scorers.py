"""Every way of scoring heads, by name: a scorer takes a meter and gives each usable pair's score of each head."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from hydrasurgery.selection.ablation import mean_ablation
from hydrasurgery.selection.attention import echo, induction, retrieval
from hydrasurgery.selection.attribution import attribution, attribution_patching
from hydrasurgery.selection.gates import learned_gates
from hydrasurgery.selection.logits import logit_contribution
from hydrasurgery.selection.measuring import HeadMeter
from hydrasurgery.selection.patching import activation_patching, unfrozen_patching
from hydrasurgery.selection.paths import path_patching, sender_patching
from hydrasurgery.selection.swap import swap, swap_divergence

Scorer = Callable[[HeadMeter], dict[str, Tensor]]
"""Layer name -> [P, H] for the P usable pairs; larger is more important. Raises ProbeError if no pair can be used."""

SCORERS: dict[str, Scorer] = {
    "activation-patching": activation_patching,
    "activation-patching-unfrozen": unfrozen_patching,
    "attribution-patching": attribution_patching,
    "attribution": attribution,
    "sender-patching": sender_patching,
    "path-patching": path_patching,
    "mean-ablation": mean_ablation,
    "swap": swap,
    "swap-kl": swap_divergence,
    "gates": learned_gates,
    "logit-contribution": logit_contribution,
    "retrieval": retrieval,
    "induction": induction,
    "echo": echo,
}

RECONSTRUCTION = "reconstruction"  # needs no pair that the model answers: the error of each head's linear stand-in
METHODS = (*SCORERS, RECONSTRUCTION)

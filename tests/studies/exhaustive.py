"""Every subset of up to three full heads of a 2-layer model, against what each scorer says.

`python -m tests.studies.exhaustive` trains the model (a minute or two on one core, kept in runs/), swaps all heads but
the subset's for their calibrated linear stand-ins, and prints the table of docs/selection.md. A head's true worth is
the mean lead (readout of eq. 9, share of the clean one) of the subsets that keep it, less that of the subsets that do
not.
"""

from __future__ import annotations

import argparse
import json
import math
from itertools import combinations
from pathlib import Path

import numpy as np
import torch

from hydrasurgery.choose import plan_heads
from hydrasurgery.demo.corpus import build_tokenizer
from hydrasurgery.demo.teacher import Phase, Recipe, load_teacher, save_teacher, train
from hydrasurgery.evaluation import needle_pairs
from hydrasurgery.ir.capture import capture
from hydrasurgery.selection import METHODS, score_heads
from hydrasurgery.selection.agreement import spearman
from hydrasurgery.selection.swap import swap_check

LENGTH, KEYS, LARGEST = 48, 4, 3
RECIPE = Recipe(
    layers=2,
    heads=8,
    kv_heads=4,
    steps=600,
    tokens=1024,
    curriculum=(Phase(16, 0.5, 0.2), Phase(32, 0.75, 0.2), Phase(48, 1.0)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/two-layers"), help="where the trained model is kept")
    parser.add_argument("--pairs", type=int, default=16)
    options = parser.parse_args()
    if not options.folder.exists():
        model, reached = train(RECIPE, build_tokenizer(), options.folder.with_suffix(".jsonl"))
        save_teacher(model, build_tokenizer(), options.folder, reached)
        print(f"trained: {json.dumps(reached)}")
    model, tokenizer = load_teacher(options.folder)
    held_out = needle_pairs(tokenizer, LENGTH, options.pairs, 1, num_keys=KEYS)
    heads = [(layer, head) for layer in range(RECIPE.layers) for head in range(RECIPE.heads)]
    subsets = [set(s) for size in range(LARGEST + 1) for s in combinations(heads, size)]
    regions = capture(model)
    plans = {str(i): plan_heads(regions, strategy="all-linear", keep=kept) for i, kept in enumerate(subsets)}
    found = list(swap_check(model, plans, held_out, batch_size=16, rows=48).values())
    lead = np.array([check.lead for check in found])
    worth = np.array(
        [np.mean(lead[[h in s for s in subsets]]) - np.mean(lead[[h not in s for s in subsets]]) for h in heads]
    )
    of = {frozenset(s): check for s, check in zip(subsets, found, strict=True)}

    print(f"{len(subsets)} subsets of {len(heads)} heads, {options.pairs} pairs; no head kept: {row(of[frozenset()])}")
    print(
        "\n| scorer | rank correlation with the truth | "
        + " | ".join(f"top {k}: accuracy, lead" for k in range(1, 4))
        + " |"
    )
    print("|---|---|---|---|---|")
    best = [max((c for s, c in of.items() if len(s) == k), key=lambda c: c.lead) for k in range(1, 4)]
    print("| best subset (truth) | - | " + " | ".join(map(row, best)) + " |")
    probes = needle_pairs(tokenizer, LENGTH, options.pairs, 0, num_keys=KEYS)
    for method in METHODS:
        scores = score_heads(model, pairs=probes, method=method, batch_size=16, progress=False)
        values = np.array([scores.layers[layer].importance[head] for layer, head in heads])
        kept = [of[frozenset(scores.ranking[:k])] for k in range(1, 4)]
        print(f"| {method} | {spearman(values, worth):.2f} | " + " | ".join(map(row, kept)) + " |", flush=True)
    chance = [[c for s, c in of.items() if len(s) == k] for k in range(1, 4)]
    means = [f"{np.mean([c.accuracy for c in cs]):.2f}, {np.mean([c.lead for c in cs]):.2f}" for cs in chance]
    print("| random (mean of all subsets) | 0 | " + " | ".join(means) + " |")
    assert len(subsets) == sum(math.comb(len(heads), k) for k in range(LARGEST + 1))


def row(check: object) -> str:
    return f"{check.accuracy:.2f}, {check.lead:.2f}"  # type: ignore[attr-defined]


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

"""Strategies of choosing heads on the shipped teacher, before any training: the table of docs/selection.md.

`python -m tests.studies.strategies` scores the teacher's heads (by path patching), makes a plan by each strategy, and
measures each with the swap check: all linear heads replaced by their calibrated stand-ins, nothing trained.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import numpy as np
import torch

from hydrasurgery.choose import plan_heads
from hydrasurgery.demo.teacher import load_teacher
from hydrasurgery.dialect.names import FULL, LINEAR
from hydrasurgery.evaluation import make_pairs
from hydrasurgery.ir.capture import capture
from hydrasurgery.plan import Plan
from hydrasurgery.selection import score_heads, split_half, swap_check

PROBES, SEEDS = ("needle-1", "needle-4"), range(5)


def plans(scores, regions, ratio: str, tie: float) -> dict[str, list[Plan]]:
    """Strategy -> its plans, several where chance is in it."""
    full = plan_heads(regions, strategy="all-full")
    made = {
        "global": [plan_heads(scores, ratio=ratio, tie=tie, strategy="global")],
        "constrained": [plan_heads(scores, ratio=ratio, tie=tie)],
        "KV group, global": [plan_heads(scores, ratio=ratio, tie=tie, strategy="global", unit="kv-group")],
        "KV group, constrained": [plan_heads(scores, ratio=ratio, tie=tie, unit="kv-group")],
        "per layer": [plan_heads(scores, ratio=ratio, tie=tie, strategy="per-layer")],
        "random, constrained": [plan_heads(regions, ratio=ratio, strategy="random", seed=s) for s in SEEDS],
        "random, free": [
            plan_heads(regions, ratio=ratio, strategy="random", seed=s, min_full_per_layer=0) for s in SEEDS
        ],
        "spaced layers": [plan_heads(regions, ratio=ratio, strategy="layerwise")],
    }
    for number, layer in enumerate(full.layers):
        if layer.num_heads == made["global"][0].num_full:
            made[f"only layer {number}"] = [only(full, number)]
    return {**made, "all linear": [plan_heads(regions, strategy="all-linear")]}


def only(plan: Plan, number: int) -> Plan:
    """The plan that keeps one whole layer."""
    kinds = [FULL if i == number else LINEAR for i in range(len(plan.layers))]
    layers = [replace(layer, kinds=(kind,) * layer.num_heads) for layer, kind in zip(plan.layers, kinds, strict=True)]
    return replace(plan, layers=tuple(layers))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--ratios", default="7:1,3:1,1:1")
    parser.add_argument("--method", default="path-patching")
    parser.add_argument("--tie", type=float, default=1e-3, help="plan_heads' tie; finer for scores that are small")
    options = parser.parse_args()
    model, tokenizer = load_teacher()
    regions = capture(model)
    probes, held_out = (make_pairs(tokenizer, PROBES, (options.length,), options.pairs, seed) for seed in (0, 1))
    scores = score_heads(model, pairs=probes, method=options.method, batch_size=16, progress=False)
    critical = sum(value > 0.01 for layer in scores.layers for value in layer.importance)
    print(f"{critical} of 128 heads above 0.01, split-half correlation {split_half(scores):.3f}, {scores.pairs} pairs")
    for ratio in options.ratios.split(","):
        made = plans(scores, regions, ratio, options.tie)
        flat = {f"{name}/{i}": plan for name, group in made.items() for i, plan in enumerate(group)}
        found = swap_check(model, flat, held_out, batch_size=4, rows=8)
        print(
            f"\n{ratio}\n\n| strategy | full heads | KV heads kept | accuracy | lead | KL |\n|---|---|---|---|---|---|"
        )
        for name, group in made.items():
            rows = np.array([list(vars(found[f"{name}/{i}"]).values()) for i in range(len(group))])
            kept = np.mean([sum(len(layer.kept_key_value_heads) for layer in plan.layers) for plan in group])
            cells = [
                f"{m:.2f}" + (f" +- {s:.2f}" if len(group) > 1 else "")
                for m, s in zip(rows.mean(0), rows.std(0), strict=True)
            ]
            print(f"| {name} | {group[0].num_full} | {kept:.0f} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

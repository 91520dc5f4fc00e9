"""What each option of the layer costs, before training and after a little of it: the tables of docs/layer.md.

`python -m tests.studies.layer_options` rewrites the shipped teacher by one plan (7:1, at random) with each layer, fits the start
values, and measures the divergence from the teacher on its own mixture of tasks; with `--steps N` again after N steps of
stage 2 (all parameters, 2,048 tokens per step).
"""

from __future__ import annotations

import argparse

import torch

import hydrasurgery as hs
from hydrasurgery.demo.arms import Mixture
from hydrasurgery.demo.teacher import load_teacher
from hydrasurgery.evaluation import encode_text, library_text
from hydrasurgery.evaluation.metrics import kl_to_teacher
from hydrasurgery.transfer import Recipe, Stage

LAYERS = """
default gate=false conv=none conv=native linear_rope=false untie=true full_norm=paper full_gate=true log_length=true
full_rope=false hydrahead,full_rope=true hydrahead
""".split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--layers", nargs="*", default=LAYERS)
    options = parser.parse_args()
    teacher, tokenizer = load_teacher()
    data = Mixture(tokenizer, encode_text(tokenizer, library_text("train")))
    stage = Stage("distil", batch_size=8, length=256, lr=2e-3, lr_end=1e-4, steps=max(1, options.steps), warmup=5)

    def batch(seed: int) -> torch.Tensor:
        return torch.as_tensor(data.batch(0, stage, torch.Generator().manual_seed(seed))["input_ids"])

    plan = hs.plan_heads(teacher, ratio="7:1", strategy="random")
    for layer in options.layers:
        hybrid = hs.rewrite(teacher, plan, layer=layer)
        hs.calibrate(hybrid, teacher, batch(0))
        found = [kl_to_teacher(hybrid, teacher, batch(1))]
        if options.steps:
            hs.distill(hybrid, teacher, data, recipe=Recipe("study", (stage,)), progress=False)
            found.append(kl_to_teacher(hybrid, teacher, batch(1)))
        print(f"| `{layer}` | {' | '.join(f'{kl:.3f}' for kl in found)} |", flush=True)


if __name__ == "__main__":
    main()

"""Seconds to score all heads of a Qwen3-1.7B-shaped model with random weights: `python -m tests.gpu.time_selection`.

Eight pairs of 4,096 tokens that differ half-way. What the model says is taken for the answer, so that no pair is dropped. Times
hold everything that `score_heads` does: capture, clean and corrupt runs, linear stand-ins, replays. `--tiny --device cpu` tries it.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import nn
from transformers import AutoModelForCausalLM, Qwen3Config

import hydrasurgery as hs
from hydrasurgery.evaluation.tasks import Pair
from tests.gpu.check_compiled_decode import QWEN3_1_7B, TINY

CHANGED, ASKED = 64, 2


@torch.no_grad()
def make_pair(model: nn.Module, length: int, device: str) -> Pair:
    """A random prompt, and one with other tokens half-way; the distractor is the token that gains most by them."""
    vocabulary = model.config.vocab_size
    clean = torch.randint(3, vocabulary, (length,))
    places = length // 2 + torch.arange(min(CHANGED, length // 4))
    corrupt = clean.index_copy(0, places, torch.randint(3, vocabulary, places.shape))
    asked = torch.arange(length - ASKED, length)
    before, after = (model(x[None].to(device), logits_to_keep=ASKED).logits[0].float() for x in (clean, corrupt))
    answer = before.argmax(-1)
    gain = (after - before).scatter(1, answer[:, None], -torch.inf)
    return Pair(clean, corrupt, asked, answer.cpu(), gain.argmax(-1).cpu(), places, "random")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--methods", nargs="*", default=["attribution", "attribution-patching", "activation-patching"])
    options = parser.parse_args()
    torch.manual_seed(0)
    with torch.device(options.device):
        dtype = torch.float32 if options.tiny else torch.bfloat16
        model = AutoModelForCausalLM.from_config(Qwen3Config(**(TINY if options.tiny else QWEN3_1_7B)), dtype=dtype)
    model.eval()
    pairs = [make_pair(model, options.length, options.device) for _ in range(options.pairs)]
    for method in options.methods:
        start = time.perf_counter()
        try:
            scores = hs.score_heads(model, pairs=pairs, method=method, progress=False)
        except Exception as error:  # the others are still worth their time
            print(f"{method:24} failed: {type(error).__name__}: {str(error)[:300]}", flush=True)
            continue
        heads = sum(len(layer.importance) for layer in scores.layers)
        print(
            f"{method:24} {heads} heads, {scores.pairs} pairs ({len(scores.dropped)} dropped) of {options.length} tokens: "
            f"{time.perf_counter() - start:.1f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()

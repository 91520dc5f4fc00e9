"""Unfrozen activation patching against TransformerLens, on the same model and pairs: equal scores, and the time of each.

`python -m tests.studies.transformer_lens` needs TransformerLens 4 (`pip install transformer-lens`), which is no part of
the test environment. Its `get_act_patch_attn_head_out_all_pos` puts each head's output of the corrupt run into the
clean run, one forward per head, and gives one number per head: asked pair by pair it gives each pair's scores, as
`score_heads` does, and asked for all pairs in one batch only their mean.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from hydrasurgery.demo.teacher import SHIPPED, load_teacher
from hydrasurgery.evaluation import needle_pairs
from hydrasurgery.selection import score_heads
from hydrasurgery.selection.effects import readout


@torch.no_grad()
def theirs(bridge, pairs) -> torch.Tensor:
    """[layers, heads] of eq. 10, the mean over pairs of one length."""
    from transformer_lens.patching import get_act_patch_attn_head_out_all_pos as patch

    clean, corrupt = (torch.stack(ids) for ids in zip(*((p.clean_ids, p.corrupt_ids) for p in pairs), strict=True))

    def leads(logits) -> torch.Tensor:
        return torch.stack([readout(z[pair.answer_positions], pair) for z, pair in zip(logits, pairs, strict=True)])

    corrupt_logits, cache = bridge.run_with_cache(corrupt)
    lead = leads(bridge(clean))
    whole = lead - leads(corrupt_logits)
    return patch(bridge, clean, cache, lambda logits: ((lead - leads(logits)) / whole).mean())


def ours(model, pairs, rows: int) -> torch.Tensor:
    """[P, layers, heads] by `score_heads`, the linear stand-ins that it fits included."""
    scores = score_heads(
        model, pairs=pairs, method="activation-patching-unfrozen", batch_size=rows, rows=rows, progress=False
    )
    return torch.stack([torch.tensor(layer.samples) for layer in scores.layers], 1)


def main() -> None:
    from transformer_lens.model_bridge import TransformerBridge

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=SHIPPED)
    parser.add_argument("--length", type=int, default=48)
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    model, tokenizer = load_teacher(options.model)
    pairs = needle_pairs(tokenizer, options.length, options.pairs, 0, num_keys=2)
    reference, _ = load_teacher(options.model)
    bridge = TransformerBridge.boot_transformers(str(options.model), hf_model=reference, tokenizer=tokenizer)
    ways: dict[str, Callable[[], torch.Tensor]] = {
        "ours": lambda: ours(model, pairs, options.rows),
        "TransformerLens, a pair per call": lambda: torch.stack([theirs(bridge, [pair]) for pair in pairs]),
        "TransformerLens, all pairs in a batch (only their mean)": lambda: theirs(bridge, pairs),
    }
    ours(model, pairs[:1], options.rows), bridge(pairs[0].clean_ids[None])  # what is done once is not timed
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    found = {}
    for _ in range(options.repeats):
        for way, call in ways.items():
            begun = time.process_time()
            found[way] = call()
            seconds[way].append(time.process_time() - begun)
    mine, single, batched = found.values()
    print(f"{single[0].numel()} heads, {len(pairs)} pairs of {options.length} tokens, one thread")
    print(
        f"largest difference {float((mine - single).abs().max()):.2g} of scores up to {float(single.abs().max()):.2g}"
    )
    print(f"of the means {float((mine.mean(0) - batched).abs().max()):.2g}")
    own = statistics.median(seconds["ours"])
    for way, times in seconds.items():
        median = statistics.median(times)
        print(f"{way}: {median:.2f} s CPU time ({min(times):.2f} to {max(times):.2f}), ratio {median / own:.1f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

"""Unfrozen activation patching against TransformerLens, on the same model and pairs: equal scores, and the time of each.

`python -m tests.studies.transformer_lens` needs TransformerLens 4 (`pip install transformer-lens`), which is no part of
the test environment. Its `get_act_patch_attn_head_out_all_pos` puts each head's output of the corrupt run into the
clean run, one forward a head.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from hydrasurgery.demo.teacher import SHIPPED, load_teacher
from hydrasurgery.evaluation import needle_pairs
from hydrasurgery.selection import score_heads
from hydrasurgery.selection.bench import readout


@torch.no_grad()
def theirs(bridge, pairs) -> torch.Tensor:
    """[P, layers, heads] of eq. 10."""
    from transformer_lens.patching import get_act_patch_attn_head_out_all_pos as patch

    found = []
    for pair in pairs:
        clean, corrupt = pair.clean_ids[None], pair.corrupt_ids[None]
        corrupt_logits, cache = bridge.run_with_cache(corrupt)

        def lead(logits, pair=pair):
            return readout(logits[0, pair.answer_positions], pair)

        whole = lead(bridge(clean)) - lead(corrupt_logits)
        found.append((lead(bridge(clean)) - patch(bridge, clean, cache, lead)) / whole)
    return torch.stack(found)


def ours(model, pairs, rows: int) -> torch.Tensor:
    """The same by `score_heads`, the linear stand-ins that it fits included."""
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
    options = parser.parse_args()
    model, tokenizer = load_teacher(options.model)
    pairs = needle_pairs(tokenizer, options.length, options.pairs, 0, num_keys=2)
    reference, _ = load_teacher(options.model)
    bridge = TransformerBridge.boot_transformers(str(options.model), hf_model=reference, tokenizer=tokenizer)
    ours(model, pairs[:1], options.rows), bridge(pairs[0].clean_ids[None])  # what is done once is not timed
    begun = time.process_time()
    a = ours(model, pairs, options.rows)
    middle = time.process_time()
    b = theirs(bridge, pairs)
    seconds = middle - begun, time.process_time() - middle
    print(f"{a.shape[1] * a.shape[2]} heads, {len(a)} pairs of {options.length} tokens, one thread")
    print(f"largest difference {float((a - b).abs().max()):.2g} of scores up to {float(b.abs().max()):.2g}")
    print(f"CPU time: ours {seconds[0]:.2f} s, TransformerLens {seconds[1]:.2f} s, ratio {seconds[1] / seconds[0]:.1f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

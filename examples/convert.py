"""Turn a Hugging Face decoder into a 7:1 hybrid: score, plan, rewrite, calibrate, distil, save.

    python examples/convert.py Qwen/Qwen3-0.6B corpus.txt --out qwen3-hydra

Start a run that stopped again with the same arguments: the transfer goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hydrasurgery as hs
from hydrasurgery.transfer import as_source, get_recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder or a name on the hub")
    parser.add_argument("corpus", help="a text file (UTF-8), or tokens as .npy")
    parser.add_argument(
        "--out", default="hybrid", help="folder of the finished hybrid; OUT-run keeps scores and checkpoints"
    )
    parser.add_argument("--recipe", default="hydrahead", help="a preset, or the path of a recipe's JSON file")
    parser.add_argument("--length", type=int, help="tokens of the probes that score the heads")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()

    teacher = AutoModelForCausalLM.from_pretrained(options.model, dtype="float32").to(options.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    scores = hs.score_heads(teacher, tokenizer, length=options.length)
    scores.plot(f"{options.out}-run/heads.png")
    plan = hs.plan_heads(scores, ratio="7:1", unit="kv-group")
    print(plan, hs.forecast(plan, length=131072), sep="\n\n")

    hybrid = hs.rewrite(teacher, plan)
    print(hs.regions(hybrid)[0])
    recipe = get_recipe(options.recipe)
    data = as_source(options.corpus, tokenizer=tokenizer)
    batch = data.batch(0, recipe.stages[0], None)["input_ids"]
    hs.calibrate(hybrid, teacher, batch[:4])
    hs.distill(hybrid, teacher, data, recipe=recipe, out=f"{options.out}-run")
    hybrid.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)


if __name__ == "__main__":
    main()

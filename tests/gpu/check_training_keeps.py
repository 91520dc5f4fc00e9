"""What a training forward keeps is kept in compiled graphs too: `python -m tests.gpu.check_training_keeps`.

A step of forward and backward is profiled, eager and compiled. Where the backward gets what the forward kept, the kernel that
finds it runs once a layer; else twice. These launches and the milliseconds of a step are printed; exit code 1 if it runs twice.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

import hydrasurgery as hs
from hydrasurgery.export.backend import hydra

PREPARING = ("_prepare", "kkt_solve")  # of our Triton kernels, of FlashQLA


def step_of(call: Callable[..., object], hybrid: torch.nn.Module, ids: torch.Tensor) -> Callable[[], None]:
    def step() -> None:
        call(ids, use_cache=False).last_hidden_state.float().square().mean().backward()  # type: ignore[attr-defined]
        hybrid.zero_grad()

    return step


def launches(step: Callable[[], None]) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    return sum(event.count for event in profile.key_averages() if any(name in event.key for name in PREPARING))


def milliseconds(step: Callable[[], None]) -> float:
    found = []
    for _ in range(8):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        step()
        torch.cuda.synchronize()
        found.append(1e3 * (time.perf_counter() - begun))
    return statistics.median(found[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--lengths", type=int, nargs="*", default=[2048, 8192])
    options = parser.parse_args()
    config = Qwen3Config(
        vocab_size=1024, hidden_size=2048, intermediate_size=6144, num_hidden_layers=options.layers, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128,
    )  # fmt: skip
    with torch.device("cuda"):
        teacher = Qwen3ForCausalLM._from_config(config, dtype=torch.bfloat16)
    hybrid = hs.rewrite(teacher, hs.plan_heads(teacher, ratio="7:1", strategy="random")).train().model
    print(torch.cuda.get_device_name(), torch.__version__)
    wrong = False
    for length in options.lengths:
        ids = torch.randint(0, 1024, (1, length), device="cuda")
        for name, backend in (("eager", "eager"), ("inductor", "inductor"), ("hydra", hydra)):
            torch.compiler.reset()
            step = step_of(hybrid if name == "eager" else torch.compile(hybrid, backend=backend), hybrid, ids)
            for _ in range(3):
                step()
            count = launches(step)
            print(
                f"{length:>6} tokens, {name:<9} {count} of {options.layers} layers  {milliseconds(step):.1f} ms",
                flush=True,
            )
            wrong |= count != options.layers
    sys.exit(wrong)


if __name__ == "__main__":
    main()

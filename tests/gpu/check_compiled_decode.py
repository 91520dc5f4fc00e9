"""What torch.compile makes of a hybrid: decoding with a static cache, and a training step, beside eager PyTorch.

    python -m tests.gpu.check_compiled_decode                   # on CUDA: the shape of Qwen3-1.7B at 7:1, random weights, bf16
    python -m tests.gpu.check_compiled_decode --tiny --device cpu

Every case's steps get the same tokens; the table gives the largest difference of a logit from the first case of the same model (the
eager one, unless `--only` leaves it out), relative to the largest logit. A case that fails prints its message and the others go on.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen3Config, StaticCache

import hydrasurgery as hs
from hydrasurgery.export import backend
from hydrasurgery.surgery import hybrid_pipeline

QWEN3_1_7B = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "tie_word_embeddings": True,
}
TINY = {
    **QWEN3_1_7B,
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "head_dim": 32,
}
WARM_UP = 6  # compiled calls before the clock starts: compilation, and the first two of CUDA graphs
GRAPHS = {"mode": "reduce-overhead"}
# It searches each kernel's sizes: a minute more for 6 layers.
TUNED = {"triton.cudagraphs": True, "coordinate_descent_tuning": True}
Measured = Iterator[tuple["Case", float, Tensor, float]]  # case, milliseconds, what must be alike, seconds it took


@dataclass(frozen=True)
class Case:
    """One way to run a model; `plain` leaves out the pass fuse-decode, `options` are torch.compile's."""

    name: str
    model: str = "hybrid"  # "hybrid", "plain" (without fuse-decode) or "teacher"
    backend: str = ""
    options: dict[str, Any] | None = None

    def compiled(self, models: dict[str, nn.Module]) -> Any:
        """The model as this case runs it."""
        model = models[self.model]
        if not self.backend:
            return model
        if self.backend == "inductor":
            return torch.compile(model, backend="inductor", **(self.options or {}))
        return torch.compile(model, backend=backend.hydra, options=self.options)


def decode_cases(ablate: bool) -> list[Case]:
    """Eager, Inductor without our passes, ours; with `ablate` also ours with only one of the graph rewrites each time."""
    few = [
        Case("eager"),
        Case("inductor, no passes, graphs", "plain", "inductor", GRAPHS),
        Case("hydra, graphs", "hybrid", "hydra", GRAPHS),
        Case("teacher inductor, graphs", "teacher", "inductor", GRAPHS),
        Case("hydra, no graphs", "hybrid", "hydra", {}),
    ]
    more = [
        Case("eager, no fuse-decode", "plain"),
        Case("inductor, fuse-decode, graphs", "hybrid", "inductor", GRAPHS),
        *_each_alone(GRAPHS, ", graphs"),
        Case("teacher eager", "teacher"),
        Case("inductor tuned, no passes, graphs", "plain", "inductor", {"options": TUNED}),
        Case("hydra tuned, graphs", "hybrid", "hydra", TUNED),
    ]
    return few + more if ablate else few


def training_cases(ablate: bool) -> list[Case]:
    """The same for a training step, without CUDA graphs."""
    few = [
        Case("eager", "plain"),
        Case("inductor, no passes", "plain", "inductor"),
        Case("hydra", "hybrid", "hydra", {}),
    ]
    more = [*_each_alone({}, ""), Case("teacher eager", "teacher"), Case("teacher inductor", "teacher", "inductor")]
    return few + more if ablate else few


def _each_alone(options: dict[str, Any], suffix: str) -> Iterator[Case]:
    for name in ("", *backend.REWRITES):
        yield Case(f"hydra, {name or 'no rewrites'} alone{suffix}", "hybrid", "hydra", {**options, "pipeline": name})


def build(args: argparse.Namespace) -> dict[str, nn.Module]:
    """Teacher, hybrid at 7:1 by KV groups, and the hybrid without its decode graph; all share the teacher's tensors."""
    torch.manual_seed(0)
    config = Qwen3Config(**(TINY if args.tiny else QWEN3_1_7B))
    config.num_hidden_layers = args.layers or config.num_hidden_layers
    with torch.device(args.device):
        teacher = AutoModelForCausalLM.from_config(config, dtype=args.dtype).eval()
    plan = hs.plan_heads(teacher, ratio="7:1", unit="kv-group", strategy="random")
    plain = hybrid_pipeline().removesuffix(",fuse-decode")
    return {
        "teacher": teacher,
        "hybrid": hs.rewrite(teacher, plan),
        "plain": hs.rewrite(teacher, plan, pipeline=plain),
    }


def fresh() -> None:
    """Nothing of the last case's compilation or memory is left."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        from torch._inductor.cudagraph_trees import reset_cudagraph_trees

        reset_cudagraph_trees()
        torch.cuda.empty_cache()


def median_ms(calls: list[Callable[[], Any]], device: str) -> float:
    """Median milliseconds of calls made one after the other, between synchronised events."""
    if device != "cuda":
        spent = []
        for call in calls:
            start = time.perf_counter()
            call()
            spent.append(1e3 * (time.perf_counter() - start))
        return statistics.median(spent)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(calls) + 1)]
    torch.cuda.synchronize()
    marks[0].record()
    for call, mark in zip(calls, marks[1:], strict=True):
        call()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in zip(marks, marks[1:], strict=False))


@torch.no_grad()
def decode(case: Case, models: dict[str, nn.Module], batch: int, args: argparse.Namespace) -> tuple[float, Tensor]:
    """Milliseconds per token at the context's end, and the logits of the first steps [batch, WARM_UP, vocab]."""
    model = models[case.model]
    generator = torch.Generator().manual_seed(batch)
    length = args.context + WARM_UP + args.steps
    ids = torch.randint(3, model.config.vocab_size, (batch, length), generator=generator).to(args.device)
    cache = StaticCache(config=model.config, max_cache_len=length)
    model(ids[:, : args.context], past_key_values=cache, logits_to_keep=1)
    run = case.compiled(models)
    tokens = [x.contiguous() for x in ids[:, args.context :].split(1, dim=1)]

    def step(token: Tensor) -> Tensor:
        if case.backend:
            torch.compiler.cudagraph_mark_step_begin()
        return run(token, past_key_values=cache).logits

    logits = torch.cat([step(token).clone() for token in tokens[:WARM_UP]], dim=1)
    return median_ms([lambda t=t: step(t) for t in tokens[WARM_UP:]], args.device), logits


def train(cases: list[Case], models: dict[str, nn.Module], length: int, args: argparse.Namespace) -> Measured:
    """Milliseconds of a forward and backward pass of one sequence, and the gradient of the first layer's query weights.

    Cases take turns, for the host's share of a step changes with what else it does.
    """
    vocabulary, generator = models["teacher"].config.vocab_size, torch.Generator().manual_seed(1)
    ids = torch.randint(3, vocabulary, (1, length), generator=generator).to(args.device)

    def prepared(case: Case) -> tuple[Callable[[], None], Tensor]:
        model = models[case.model].train()
        run = case.compiled(models)

        def step() -> None:
            model.zero_grad(set_to_none=True)
            run(ids, labels=ids, use_cache=False).loss.backward()

        for _ in range(2):
            step()
        weight = model.get_submodule("model.layers.0.self_attn.q_proj").weight
        watched = weight.grad.float().clone()
        model.zero_grad(set_to_none=True)
        return step, watched

    fresh()
    ready = list(_each(cases, prepared, args.until))
    turns = [[median_ms([step] * args.train_steps, args.device) for _, (step, _), _ in ready] for _ in range(3)]
    for model in models.values():
        model.zero_grad(set_to_none=True)
        model.eval()
    for (case, (_, watched), seconds), times in zip(ready, zip(*turns, strict=True), strict=True):
        yield case, statistics.median(times), watched, seconds


def _each(cases: list[Case], measure: Callable[[Case], Any], until: float) -> Iterator[tuple[Case, Any, float]]:
    """(case, what is measured, seconds that it took) of each case that succeeds; none begins after `until`."""
    for case in cases:
        start = time.perf_counter()
        if start > until:
            print(f"{case.name:44} no time left", flush=True)
            continue
        try:
            found = measure(case)
        except Exception as error:
            print(f"{case.name:44} failed: {type(error).__name__}: {str(error)[:300]}", flush=True)
            continue
        yield case, found, time.perf_counter() - start


def decode_all(cases: list[Case], models: dict[str, nn.Module], batch: int, args: argparse.Namespace) -> Measured:
    def measure(case: Case) -> tuple[float, Tensor]:
        fresh()
        return decode(case, models, batch, args)

    for case, (ms, logits), seconds in _each(cases, measure, args.until):
        yield case, ms, logits, seconds


def chosen(cases: Callable[[bool], list[Case]], args: argparse.Namespace) -> list[Case]:
    """Those that `--only` names, in the table's order; without it the few, or all with `--ablate`."""
    return [case for case in cases(True) if case.name in args.only] if args.only else cases(args.ablate)


def table(title: str, measured: Measured, tokens: int) -> None:
    """A row each; ratios are to eager and to Inductor without our passes, differences to the first row of the same model.

    The last column is the seconds that the case took, compilation included.
    """
    heads = f"{'ms':>9} {'tokens/s':>10} {'x eager':>8} {'x inductor':>10} {'difference':>10}  s"
    print(f"\n{title}\n{'case':44} {heads}", flush=True)
    base: dict[str, float] = {}
    wanted: dict[str, Tensor] = {}
    for case, ms, found, seconds in measured:
        if case.name == "eager":
            base["eager"] = ms
        if case.name.startswith("inductor, no passes"):
            base["inductor"] = ms
        like = wanted.setdefault("teacher" if case.model == "teacher" else "hybrid", found)
        difference = ((found - like).abs().max() / like.abs().max()).item()
        ratios = [f"{base[n] / ms:.2f}" if n in base else "" for n in ("eager", "inductor")]
        print(
            f"{case.name:44} {ms:9.3f} {1e3 * tokens / ms:10.0f} {ratios[0]:>8} {ratios[1]:>10} {difference:10.1e}"
            f"  {seconds:.0f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="two small layers, short contexts: does everything run?")
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--dtype", type=lambda name: getattr(torch, name), default=None, help="bfloat16; float32 if tiny"
    )
    parser.add_argument("--context", type=int, default=None, help="tokens in the cache: 4096; 40 if tiny")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 16])
    parser.add_argument("--train-lengths", type=int, nargs="*", default=None, help="2048; 48 if tiny")
    parser.add_argument("--steps", type=int, default=32, help="decoded tokens that are timed")
    parser.add_argument("--train-steps", type=int, default=5)
    parser.add_argument("--layers", type=int, default=None, help="fewer compile faster")
    parser.add_argument("--ablate", action="store_true", help="each graph rewrite by itself, and the teacher")
    parser.add_argument("--only", nargs="*", default=[], help="the cases to run, by name")
    parser.add_argument("--limit", type=float, default=480.0, help="seconds after which no case begins")
    args = parser.parse_args()
    args.dtype = args.dtype or (torch.float32 if args.tiny else torch.bfloat16)
    args.context = args.context or (40 if args.tiny else 4096)
    lengths = args.train_lengths if args.train_lengths is not None else ([48] if args.tiny else [2048])
    known = [case.name for case in decode_cases(True) + training_cases(True)]
    if unknown := [name for name in args.only if name not in known]:
        parser.error(f"no case is called {unknown[0]!r}; there are: {'; '.join(known)}")
    start = time.perf_counter()
    models = build(args)
    device = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(f"{device}, torch {torch.__version__}, {args.dtype}, built in {time.perf_counter() - start:.0f} s")
    args.until = start + args.limit
    for batch in args.batches:
        title = f"decode, batch {batch}, {args.context} tokens in a static cache"
        table(title, decode_all(chosen(decode_cases, args), models, batch, args), batch)
    for length in lengths:
        title = f"training step, batch 1, {length} tokens"
        table(title, train(chosen(training_cases, args), models, length, args), length)


if __name__ == "__main__":
    main()

"""Whole models: what a user's own calls take, hybrid and teacher side by side in one run.

Weights are random where a shape is named and not a folder, which changes no time. Every number is of a public call: the model
itself, `generate`, a training step, `hydrasurgery.distill`.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hydrasurgery.errors import HydraError
from hydrasurgery.loading import check_files, load_model

Row = dict[str, Any]

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-1.7b": (
        "qwen3",
        {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
    ),
    "smollm2-135m": (
        "llama",
        {
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
        },
    ),
    "tiny": (
        "qwen3",
        {
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 16,
        },
    ),
}
LONG = 8.0  # seconds of repeating a call, about, at most
TURN = 1024  # tokens of a second turn
TOKENS = 64  # that `generate` writes


@dataclass(frozen=True)
class Request:
    """What is measured: a shape's name or a model's folder, cases, sizes in tokens, and how the hybrid is made."""

    model: str = "qwen3-1.7b"
    cases: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()
    dtype: torch.dtype = torch.bfloat16
    layers: int | None = None
    batch: int = 8
    contenders: tuple[str, ...] = ("teacher", "hybrid")


def bench_model(request: Request, device: torch.device) -> Iterator[Row]:
    """One row a case, size and model, as it is measured: `ms`, `tokens_s`, `peak_GiB`, or `why` there is none.

    Args:
        request: what is measured.
        device: where.

    Returns:
        Rows of suite "model": `case`, `size` (tokens), `contender` ("hybrid" or "teacher") and the numbers.

    Raises:
        HydraError: the model is neither a known shape nor a folder.

    Example:
        >>> rows = list(bench_model(Request("tiny", ("prefill",), (16,), torch.float32), torch.device("cpu")))
        >>> [(row["case"], row["contender"]) for row in rows]
        [('prefill', 'teacher'), ('prefill', 'hybrid')]
    """
    import hydrasurgery as hs

    unknown = [name for name in request.cases if name not in CASES]
    if unknown:
        raise HydraError(f"no case is called {unknown[0]!r}; there are {', '.join(CASES)}")
    teacher = _teacher(request, device)
    plan = hs.plan_heads(teacher, ratio="7:1", unit="kv-group", strategy="random")
    for name in request.cases or tuple(CASES):
        case, training = CASES[name]
        for contender in request.contenders:
            model = teacher if contender == "teacher" else hs.rewrite(teacher, plan)
            model.train(training)
            for size in request.sizes or (1024 if training else 4096,):
                place = {"suite": "model", "case": name, "size": size, "contender": contender}
                yield from _rows(place, case(model, teacher, size, request))
            del model
            _free(device)


def _rows(place: Row, found: Iterable[Row]) -> Iterator[Row]:
    try:
        for row in found:
            yield {**place, **row}
    except (torch.OutOfMemoryError, RuntimeError, HydraError) as error:  # a result: this model cannot do it
        yield {**place, "why": _first_line(error)}


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:160]


def check_model(name: str) -> None:
    """Refuse, before anything is measured, what is neither a shape nor a folder with a model.

    Raises:
        HydraError: naming it, or the file in it that is missing or broken.
    """
    if name in SHAPES:
        return
    if not Path(name).is_dir():
        raise HydraError(f"{name} is no folder and no known shape ({', '.join(SHAPES)})")
    check_files(name)


def _teacher(request: Request, device: torch.device) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    longest = max(request.sizes, default=4096) + TURN + TOKENS + 1
    if request.model in SHAPES:
        kind, fields = SHAPES[request.model]
        fields = {**fields, "max_position_embeddings": longest, "tie_word_embeddings": True}
        if request.layers:
            fields["num_hidden_layers"] = request.layers
        config = AutoConfig.for_model(kind, **fields)
        config.eos_token_id = config.pad_token_id = config.bos_token_id = None
        torch.manual_seed(0)
        with torch.device(device):
            return AutoModelForCausalLM.from_config(config, dtype=request.dtype).eval()
    check_model(request.model)
    model: Any = load_model(request.model, dtype=request.dtype)
    return model.to(device)


# --- cases --------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _prefill(model: Any, teacher: Any, size: int, request: Request) -> Iterator[Row]:
    ids = _tokens(model, 1, size)
    yield _timed(model, lambda: model(ids, past_key_values=_cache(model), use_cache=True, logits_to_keep=1), size)


@torch.no_grad()
def _decode(model: Any, teacher: Any, size: int, request: Request) -> Iterator[Row]:
    """Single tokens by the model itself, without graphs."""
    ids, cache = _tokens(model, 1, size), _cache(model)
    model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    one = ids[:, :1]

    def step() -> None:
        model(one, past_key_values=cache, use_cache=True)

    yield _timed(model, step, 1, repeats=16)


@torch.no_grad()
def _count(model: Any, teacher: Any, size: int, request: Request) -> Iterator[Row]:
    """Launches a layer, and what the card computes in, of a prompt and of a single token. Last of all cases: a process that was
    traced launches slower."""
    ids, cache = _tokens(model, 1, size), _cache(model)
    layers = model.config.get_text_config().num_hidden_layers
    if not ids.is_cuda:
        return
    prompt = _launches(lambda: model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1))
    step = _launches(lambda: model(ids[:, :1], past_key_values=cache, use_cache=True))
    for what, (count, ms) in (("prompt", prompt), ("token", step)):
        yield {"how": what, "launches_a_layer": count / layers, "device_ms": ms}


@torch.no_grad()
def _turn(model: Any, teacher: Any, size: int, request: Request) -> Iterator[Row]:
    """A second turn of TURN tokens on the cache of the first."""
    ids, cache = _tokens(model, 1, size), _cache(model)
    model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    following = ids[:, :TURN]
    run = lambda: model(following, past_key_values=cache, use_cache=True, logits_to_keep=1)  # noqa: E731
    yield _timed(model, run, following.shape[1], repeats=3)


@torch.no_grad()
def _padded(model: Any, teacher: Any, size: int, request: Request) -> Iterator[Row]:
    """Two prompts, the first an eighth shorter and padded on the left; `plain_ms` is of two as long."""
    ids = _tokens(model, 2, size)
    mask = torch.ones_like(ids)
    mask[0, : size // 8] = 0
    plain = _timed(model, lambda: model(ids, use_cache=False, logits_to_keep=1), 2 * size)
    row = _timed(model, lambda: model(ids, attention_mask=mask, use_cache=False, logits_to_keep=1), 2 * size)
    yield {**row, "plain_ms": plain["ms"], "plain_peak_GiB": plain.get("peak_GiB")}


def _generate(model: Any, teacher: Any, size: int, request: Request) -> Iterator[Row]:
    """`generate` as README calls it: median milliseconds from one token to the next, and of the first one; the first call apart,
    which compiles kernels."""
    from transformers import StoppingCriteria

    ids, marks = _tokens(model, 1, size), [0.0]

    class Clock(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
            _wait(input_ids.device)
            marks.append(time.perf_counter())
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def run() -> float:
        _wait(ids.device)
        marks[:] = [time.perf_counter()]
        count = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS}
        model.generate(ids, **count, do_sample=False, stopping_criteria=[Clock()])
        return marks[-1] - marks[0]

    first = run()
    _reset_peak(ids.device)
    run()
    steps = [1e3 * (stop - start) for start, stop in zip(marks[1:], marks[2:], strict=False)]
    yield {
        "ms": statistics.median(steps),
        "first_call_s": first,
        "first_token_ms": 1e3 * (marks[1] - marks[0]),
        "slowest_step_ms": max(steps),
        **_peak(ids.device),
    }


def _train(model: Any, teacher: Any, size: int, request: Request) -> Iterator[Row]:
    """A training step: cross entropy, bf16 autocast, fused AdamW; eager, then compiled by Inductor."""
    model = (copy.deepcopy(model) if model is teacher else model).float()  # the teacher is needed as it is
    ids = _tokens(model, request.batch, size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=ids.is_cuda)
    for how, call in (("eager", model), ("compiled", torch.compile(model))):

        def step(call: Any = call) -> None:
            with torch.autocast(ids.device.type, dtype=torch.bfloat16):
                loss = call(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        start = time.perf_counter()
        try:
            step()
            _wait(ids.device)
            first = time.perf_counter() - start
            yield {"how": how, "first_call_s": first, **_timed(model, step, ids.numel(), repeats=6)}
        except torch.OutOfMemoryError as error:  # compiled steps may fit where eager ones do not
            yield {"how": how, "why": _first_line(error)}
        optimizer.zero_grad(set_to_none=True)
        _free(ids.device)
    torch.compiler.reset()


def _transfer(name: Literal["align", "distil"]) -> Callable[[Any, Any, int, Request], Iterator[Row]]:
    def run(model: Any, teacher: Any, size: int, request: Request) -> Iterator[Row]:
        """A stage of `distill`, by its own records, without its first steps, in which it compiles (`first_call_s`)."""
        import hydrasurgery as hs
        from hydrasurgery.transfer.recipe import Recipe, Stage

        if model is teacher:
            return
        device, steps, skipped = next(model.parameters()).device, 14, 6
        stage = Stage(name, batch_size=request.batch, length=size, steps=steps, lr=1e-4, lr_end=1e-4, warmup=0)
        data = torch.randint(0, model.config.get_text_config().vocab_size, (4 * request.batch * size,))
        _reset_peak(device)
        recipe = Recipe("bench", (stage,), autocast="bfloat16")
        start = time.perf_counter()
        records = hs.distill(model.float(), teacher, data, recipe=recipe, progress=False).history
        whole = time.perf_counter() - start
        seconds = statistics.median(record["seconds"] for record in records[skipped:])
        tokens = request.batch * size
        first = {"first_call_s": whole - sum(record["seconds"] for record in records[skipped:])}
        yield {"ms": 1e3 * seconds, "tokens_s": tokens / seconds, **first, **_peak(device)}

    return run


CASES: dict[str, tuple[Callable[[Any, Any, int, Request], Iterator[Row]], bool]] = {
    "prefill": (_prefill, False),
    "decode": (_decode, False),
    "turn": (_turn, False),
    "padded": (_padded, False),
    "generate": (_generate, False),
    "train": (_train, True),
    "align": (_transfer("align"), True),
    "distil": (_transfer("distil"), True),
    "launches": (_count, False),
}


# --- clocks -------------------------------------------------------------------------------------------------------------------


def _timed(model: nn.Module, run: Callable[[], object], tokens: int, repeats: int = 4) -> Row:
    """Median milliseconds of a call by the host's clock, waited for, after one that warms up; tokens a second; peak memory."""
    device = next(model.parameters()).device
    start = time.perf_counter()
    run()
    _wait(device)
    repeats = max(1, min(repeats, int(LONG / (time.perf_counter() - start))))
    _reset_peak(device)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        _wait(device)
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times)
    return {"ms": 1e3 * seconds, "tokens_s": tokens / seconds, **_peak(device)}


def _launches(step: Callable[[], object]) -> tuple[int, float]:
    """How many there are, and the milliseconds that they take on the card."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    launched = [event for event in found.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return len(launched), 1e-3 * sum(event.self_device_time_total for event in launched)


def _tokens(model: Any, batch: int, length: int) -> Tensor:
    device = next(model.parameters()).device
    return torch.randint(0, model.config.get_text_config().vocab_size, (batch, length), device=device)


def _cache(model: Any) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> Row:
    return {"peak_GiB": torch.cuda.max_memory_allocated(device) / 2**30} if device.type == "cuda" else {}


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()

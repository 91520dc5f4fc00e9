"""The progress bar of a run: loss, rate, tokens per second, and the share of a card's peak that they are."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from hydrasurgery.ir.stitch import region_modules
from hydrasurgery.transfer.recipe import Stage

# Operations a second of dense bf16 products, by words of a card's name: the first entry whose words are all there.
PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
}


def flops_per_token(hybrid: nn.Module, teacher: nn.Module | None, stage: Stage) -> float:
    """Floating-point operations that a stage does for a token, counted by parameters alone: 2 for each that a forward pass reads, 2
    for the gradient of what it was read for, and 2 for its own gradient where it is trained.

    Embeddings are looked up and do not count, except as the head. `recompute` does not count.

    Args:
        hybrid: what is trained, its `requires_grad` being that of the stage.
        teacher: the model it follows, if there is one.
        stage: says which parts run.

    Example:
        >>> import hydrasurgery as hs
        >>> from hydrasurgery.demo.teacher import load_teacher
        >>> teacher, _ = load_teacher()
        >>> hybrid = hs.rewrite(teacher, hs.plan_heads(teacher, strategy="all-linear"))
        >>> stage = Stage("lengthen", batch_size=1, length=64, steps=1, lr=1e-3, lr_end=1e-3, warmup=0)
        >>> flops_per_token(hybrid, None, stage) == 6 * sum(p.numel() for p in hybrid.parameters())  # its head is its embedding
        True
    """
    if stage.name == "align":
        inside = {id(p): p for region in region_modules(hybrid).values() for p in region.parameters()}
        ours, head = _count(inside.values()), _head(teacher)
    else:
        inside, head = _counted(hybrid), None
        ours = _count(inside.values())
    trained = _count(p for p in inside.values() if p.requires_grad)
    followed = _counted(teacher) if teacher is not None and stage.name != "lengthen" else {}
    theirs = _count(p for p in followed.values() if p is not head)
    return 4.0 * ours + 2.0 * trained + 2.0 * theirs


def peak_tokens(hybrid: nn.Module, teacher: nn.Module | None, stage: Stage) -> float | None:
    """Tokens a second that the hybrid's card would train on if it did nothing but bf16 products; None where that is not known.

    The arguments are those of `flops_per_token`.
    """
    device = next(hybrid.parameters()).device
    if device.type != "cuda":
        return None
    rate = peak(torch.cuda.get_device_name(device))
    return None if rate is None else rate / flops_per_token(hybrid, teacher, stage)


def peak(card: str) -> float | None:
    """Operations a second of dense bf16 products on a card of this name; None for one that is not in the table.

    Example:
        >>> peak("NVIDIA H100 80GB HBM3"), peak("GeForce")
        (989000000000000.0, None)
    """
    words = set(re.split(r"[\s-]+", card))
    return next((rate for name, rate in PEAKS.items() if words.issuperset(name.split())), None)


@contextlib.contextmanager
def progress_bar(enabled: bool) -> Iterator[Callable[..., None]]:
    """Yield `show(stage, record, peak_tokens)`, which moves the bar of the stage; see `describe`."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:<9}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}"),
    )
    bars: dict[int, Any] = {}
    with Progress(*columns, TimeRemainingColumn(), disable=not enabled) as bar:

        def show(stage: Stage, record: dict[str, Any], fastest: float | None) -> None:
            text = describe(record, fastest)
            if record["stage_index"] not in bars:
                bars[record["stage_index"]] = bar.add_task(stage.name, total=stage.num_steps, text=text)
            bar.update(bars[record["stage_index"]], completed=record["step"], text=text)

        yield show


def describe(record: dict[str, Any], peak_tokens: float | None) -> str:
    """A step in words.

    Args:
        record: what `distill` notes of it.
        peak_tokens: tokens a second at the card's peak; None leaves the share out.

    Example:
        >>> describe({"loss": 0.5, "lr": 1e-4, "tokens": 1000, "seconds": 0.1}, 40_000)
        'loss 0.5  lr 1.00e-04  10,000 tokens/s, 25% of the peak'
    """
    pace = record["tokens"] / max(record["seconds"], 1e-9)
    share = "" if peak_tokens is None else f", {pace / peak_tokens:.0%} of the peak"
    return f"loss {record['loss']:.4g}  lr {record['lr']:.2e}  {pace:,.0f} tokens/s{share}"


def _counted(model: nn.Module) -> dict[int, nn.Parameter]:
    """A model's parameters without embeddings, but with the head."""
    head = _head(model)
    looked_up = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding) and m.weight is not head}
    return {id(p): p for p in model.parameters() if id(p) not in looked_up}


def _head(model: Any) -> Any:
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return getattr(output, "weight", None)


def _count(parameters: Any) -> int:
    return sum(p.numel() for p in parameters)

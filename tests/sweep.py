"""Which causal language models of the installed transformers convert, and which are refused: docs/models.md.

    python -m tests.sweep                     # every type of the mapping, and writes docs/models.md
    python -m tests.sweep --only llama gpt2   # those only, and writes nothing

Each type is made tiny and examined in a process of its own: heads left as they are must give the teacher's very numbers, and a
hybrid must be the same decoder however it is called.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import StaticCache
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import hydrasurgery as hs
from hydrasurgery.decoders import understands
from hydrasurgery.errors import UnsupportedModelError
from hydrasurgery.plan import LayerPlan, Plan
from tests.families import same, stir
from tests.zoo import TYPES, tiny_model

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
CONVERTS, REFUSED, FAILS = "converts", "refused", "FAILS"
IDS = torch.arange(3, 27).view(2, 12)
PADS = 3
BOUND = 1e-5  # of the largest logit, in float64: norms and rotary embeddings of many models compute in float32

ROUNDING = 2e-6  # of the largest logit, in float32


@dataclass
class Row:
    """What was found of a type."""

    model_type: str
    verdict: str = FAILS
    reason: str = ""
    checks: dict[str, str] = field(default_factory=dict)  # what each gave: "" is as it should be


def examine(model_type: str) -> Row:
    """Build, capture, rewrite and check a tiny model of the type."""
    row = Row(model_type)
    try:
        teacher = tiny_model(model_type)
        try:
            plan = plan_of(teacher)
            row.checks["exact"] = exact(teacher, hs.rewrite(teacher, plan("full")))
            teacher = in_float64(teacher)
            hybrid = stir(hs.rewrite(teacher, plan("full", "linear", "linear", "full")))
        except UnsupportedModelError as error:
            row.verdict, row.reason = REFUSED, str(error)
            return row
        row.checks.update(
            {check.__name__: check(teacher, hybrid) for check in (linear, causal, cached, static, padded, saved)}
        )
    except Exception as error:
        row.reason = f"{type(error).__name__}: {error} ({traceback.extract_tb(error.__traceback__)[-1].name})"
        return row
    wrong = [f"{name}: {found}" for name, found in row.checks.items() if found and not found.startswith("as ")]
    row.verdict, row.reason = (FAILS, "; ".join(wrong)) if wrong else (CONVERTS, "")
    return row


def in_float64(model: nn.Module) -> nn.Module:
    """The model in float64, with experts one after the other: grouped products know no float64."""
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model.double()


def plan_of(teacher: nn.Module) -> Any:
    """A function from kinds, repeated over each layer's heads, to a plan."""
    regions = hs.capture(teacher)

    def plan(*kinds: str) -> Plan:
        layers = tuple(
            LayerPlan(
                name=region.name,
                kinds=tuple(kinds[head % len(kinds)] for head in range(region.num_heads)),
                num_key_value_heads=region.num_key_value_heads,
                head_dim=region.head_dim,
                value_dim=region.value_dim,
                window=region.window,
            )
            for region in regions
        )
        return Plan(layers=layers, unit="head", strategy="given", min_full_per_layer=1)

    return plan


def exact(teacher: nn.Module, stitched: nn.Module) -> str:
    """Without a linear head the numbers are the teacher's: whole, left-padded, and token by token over a cache."""
    ids, mask = _left_padded(teacher)
    for how, call in {
        "whole": lambda model: run(model, IDS),
        "left-padded": lambda model: run(model, ids, attention_mask=mask)[:, PADS:],
        "cached": lambda model: in_pieces(model, (6, 1, 1, 1, 1, 1, 1)),
    }.items():
        expected = attempt(call, teacher)
        got = attempt(call, stitched)
        if isinstance(expected, str) or isinstance(got, str):
            if not (isinstance(expected, str) and isinstance(got, str)):
                return f"{how}: one runs and the other does not: {got if isinstance(got, str) else expected}"
        elif not same(got, expected):
            gap = distance(got, expected)
            return f"{'as rounding, ' if gap < ROUNDING else ''}{how}: differs by {gap:.1e}"
    return ""


def linear(teacher: nn.Module, hybrid: nn.Module) -> str:
    """Linear heads are not the teacher's."""
    return "" if distance(run(hybrid, IDS), run(teacher, IDS)) > 1e-4 else "linear heads change nothing"


def causal(teacher: nn.Module, hybrid: nn.Module) -> str:
    """No later token matters."""
    changed = IDS.clone()
    changed[:, 8:] = 50
    return compared(lambda model: (run(model, changed)[:, :8], run(model, IDS)[:, :8]), hybrid)


def cached(teacher: nn.Module, hybrid: nn.Module) -> str:
    """Token by token over a cache gives what the whole gives; where a teacher's cache takes more tokens at once, in pieces too."""
    found = [
        compared(lambda model: (in_pieces(model, sizes), run(model, IDS)), hybrid, teacher)  # noqa: B023
        for sizes in ((6, 1, 1, 1, 1, 1, 1), (5, 1, 3, 1, 1, 1))
    ]
    return found[0] or (found[1] and f"in pieces: {found[1]}" if not found[1].startswith("as ") else "")


def static(teacher: nn.Module, hybrid: nn.Module) -> str:
    """A cache of fixed size does as well."""

    def both(model: Any) -> tuple[Tensor, Tensor]:
        cache = StaticCache(config=model.config, max_cache_len=16)
        return in_pieces(model, (6, 1, 1, 1, 1, 1, 1), cache=cache), run(model, IDS)

    return compared(both, hybrid, teacher)


def padded(teacher: nn.Module, hybrid: nn.Module) -> str:
    """Padding on the left changes nothing."""
    ids, mask = _left_padded(hybrid)
    whole = torch.ones_like(IDS)

    def both(model: nn.Module) -> tuple[Tensor, Tensor]:
        return run(model, ids, attention_mask=mask)[:, PADS:], run(model, IDS, attention_mask=whole)

    return compared(both, hybrid, teacher)


def saved(teacher: nn.Module, hybrid: nn.Module) -> str:
    """A saved hybrid comes back."""
    with tempfile.TemporaryDirectory() as folder:
        hybrid.save_pretrained(folder)
        eager = {"experts_implementation": "eager"} if hasattr(hybrid, "set_experts_implementation") else {}
        loaded = type(hybrid).from_pretrained(folder, dtype=torch.float64, **eager).eval()
        return compared(lambda model: (run(loaded, IDS), run(model, IDS)), hybrid, bound=0)


def compared(call: Any, hybrid: nn.Module, teacher: nn.Module | None = None, bound: float = BOUND) -> str:
    """ "" if the two results of `call` agree on the hybrid; "as the teacher" if they do not on the teacher either."""
    got = attempt(call, hybrid)
    wrong = got if isinstance(got, str) else "" if (gap := distance(*got)) <= bound else f"differs by {gap:.1e}"
    if not wrong or teacher is None:
        return wrong
    own = attempt(call, teacher)
    if isinstance(own, str):
        return f"as the teacher: {own}"
    return f"as the teacher: {gap:.1e}" if (gap := distance(*own)) > bound else wrong


def attempt(call: Any, model: nn.Module) -> Any:
    """What the call gives, or the error in words."""
    try:
        return call(model)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"


@torch.no_grad()
def run(model: nn.Module, ids: Tensor, **options: Any) -> Tensor:
    """Logits [B, T, vocabulary], without a cache; the first token that is not padding stands at 0."""
    if "attention_mask" in options and understands(model, "position_ids"):
        options["position_ids"] = (options["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return model(input_ids=ids, use_cache=False, **options).logits


@torch.no_grad()
def in_pieces(model: nn.Module, sizes: tuple[int, ...], ids: Tensor = IDS, cache: Any = None) -> Tensor:
    """Logits [B, T, vocabulary], so many tokens at a time, over the model's own cache or the one given."""
    parts: list[Tensor] = []
    for piece in ids.split(sizes, dim=1):
        seen = sum(part.shape[1] for part in parts) + piece.shape[1]
        out = model(
            input_ids=piece,
            past_key_values=cache,
            use_cache=True,
            attention_mask=torch.ones(len(ids), seen, dtype=torch.long),
        )
        cache = out.past_key_values
        parts.append(out.logits)
    return torch.cat(parts, dim=1)


def _left_padded(model: Any) -> tuple[Tensor, Tensor]:
    pad = getattr(model.config.get_text_config(), "pad_token_id", None)
    ids = torch.cat([torch.full((2, PADS), 90 if pad is None else pad), IDS], dim=1)
    mask = torch.ones_like(ids)
    mask[:, :PADS] = 0
    return ids, mask


def distance(one: Tensor, other: Tensor) -> float:
    """The largest difference over the largest number."""
    return ((one - other).abs().max() / other.abs().max()).item()


def sweep(names: Iterable[str], seconds: float) -> Iterator[Row]:
    """A row for each type, each from a process of its own that is stopped after so many seconds."""
    context = multiprocessing.get_context("fork")
    for name in names:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_report, args=(name, sender))
        process.start()
        sender.close()
        row = Row(name, reason=f"took more than {seconds:.0f} s")
        try:
            if receiver.poll(seconds):
                row = receiver.recv()
        except EOFError:
            row.reason = "the process died"
        process.kill()
        process.join()
        yield row


def _report(name: str, sender: Any) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    sender.send(examine(name))


HEAD = """# Which models convert

Of the {types} causal language model types of transformers {version}, {converts} convert and {refused} are refused at `capture`,
before any work. `python -m tests.sweep` makes each type tiny, with random weights and a layer of every kind, runs it on a CPU and
writes this page. A type converts if

- with every head left as it is, the logits are the teacher's bit for bit: whole, left-padded, and token by token over a cache;
- with half the heads linear, in float64: no token sees a later one; decoding over a cache, one token or several at a time, gives
  what the whole sequence gives, and so does a static cache; padding on the left changes nothing; a saved hybrid comes back bit for
  bit.

Where a teacher does not hold to one of these itself, the table says so: its hybrid was not asked for more. Types that can be
encoders are examined with `is_decoder=True`; set to attend in both directions, any type is refused. A type that reads images or
sound is examined on text. A type that cannot be built here (gemma3n needs timm; transformers refuses its own gemma4_assistant) is
judged by its config.

| type | class | verdict | remarks |
|---|---|---|---|
"""


def page(rows: list[Row]) -> str:
    """docs/models.md."""
    counts = Counter(row.verdict for row in rows)
    lines = []
    for row in sorted(rows, key=lambda row: row.model_type):
        remarks = row.reason or "; ".join(_remark(name, found) for name, found in row.checks.items() if found)
        cells = (row.model_type, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[row.model_type], row.verdict, remarks)
        lines.append("| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |\n")
    head = HEAD.format(
        types=len(rows), version=transformers.__version__, converts=counts[CONVERTS], refused=counts[REFUSED]
    )
    return head + "".join(lines)


def _remark(check: str, found: str) -> str:
    why, _, how = found.partition(": " if check != "exact" else ", ")
    return f"equal to rounding ({how})" if check == "exact" else f"{check}: {why.replace('as', 'no, nor', 1)} ({how})"


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="Which causal language models convert.")
    parser.add_argument("--only", nargs="+", choices=TYPES, metavar="TYPE", help="these types; nothing is written")
    parser.add_argument("--seconds", type=float, default=180, help="the time limit of a type")
    given = parser.parse_args()
    rows = []
    for number, row in enumerate(sweep(given.only or TYPES, given.seconds), 1):
        rows.append(row)
        notes = "; ".join(f"{name} {found}" for name, found in row.checks.items() if found)
        print(f"{number:3} {row.model_type:28} {row.verdict:9} {row.reason or notes}", flush=True)
    counts = Counter(row.verdict for row in rows)
    print(f"{len(rows)} types: " + ", ".join(f"{counts[verdict]} {verdict}" for verdict in (CONVERTS, REFUSED, FAILS)))
    if not given.only and not counts[FAILS]:
        PAGE.write_text(page(rows), encoding="utf-8")
    return int(counts[FAILS] > 0)


if __name__ == "__main__":
    sys.exit(main())

"""What the clean and the corrupt run of a pair leave for replays: heads' outputs, keys, values and hidden states."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from hydrasurgery.decoders import list_member, logits_at
from hydrasurgery.evaluation.tasks import Pair
from hydrasurgery.selection.watching import LastAttention, Taps, watch_taps

Head = tuple[str, int]  # the layer's name, the head's number
Attended = tuple[Tensor, Tensor, Tensor | None]  # k [1, Hk, T, K], v [1, Hk, T, V] and mask of a prompt's attention


@dataclass
class Run:
    """What a pair's clean and corrupt run leave at `positions`, the tokens a replay runs on.

    Attributes:
        ids: The clean prompt, [T].
        positions: [P], all of 0 to T - 1, those from `start` on, or those that predict the answer.
        asked: [A], where in `positions` the tokens stand that predict the answer.
        clean_logits, corrupt_logits: [A, vocabulary].
        clean, corrupt: Heads' outputs by layer, [P, H, D].
        attended: Of the clean run, for live replays: the keys, values and mask of a layer's attention on the whole prompt.
        leaving: Of the clean run, for live replays: what a layer's block gave (hidden states [1, P, C], or a tuple that begins
            with them).
        start: The tokens before it are attended to and do not run.
    """

    ids: Tensor
    positions: Tensor
    asked: Tensor
    clean_logits: Tensor
    corrupt_logits: Tensor
    clean: dict[str, Tensor] = field(default_factory=dict)
    corrupt: dict[str, Tensor] = field(default_factory=dict)
    attended: dict[str, Attended] = field(default_factory=dict)
    leaving: dict[str, Any] = field(default_factory=dict)
    start: int = 0

    def at_answer(self) -> Run:
        """A run of whole prompts narrowed to the tokens that predict the answer."""
        clean, corrupt = ({n: x[self.asked] for n, x in outputs.items()} for outputs in (self.clean, self.corrupt))
        places = torch.arange(len(self.asked), device=self.asked.device)
        return Run(self.ids, self.positions[self.asked], places, self.clean_logits, self.corrupt_logits, clean, corrupt)


@torch.no_grad()
def record(
    model: nn.Module, taps: Taps, pairs: Sequence[Pair], *, whole: bool = False, live: bool = False
) -> list[Run]:
    """Run the clean and the corrupt prompts of pairs of one shape together, and keep what replays need.

    Args:
        model: In evaluation mode.
        taps: Of `model`, from `head_taps`.
        pairs: With prompts of one length and answers of one length.
        whole: Keep the heads' outputs at every position, not only where the answer is predicted.
        live: Keep what live replays need as well, which implies `whole`.

    Example:
        >>> from hydrasurgery.demo.teacher import load_teacher
        >>> from hydrasurgery.ir.taps import head_taps
        >>> from hydrasurgery.selection import probe_pairs
        >>> model, tokenizer = load_teacher()
        >>> pairs = probe_pairs(model, tokenizer, length=48, count=2)
        >>> with head_taps(model) as taps:
        ...     runs = record(model, taps, pairs[:1], live=True)
        >>> runs[0].clean["model.layers.0.self_attn"].shape  # [P, H, D]
        torch.Size([48, 16, 16])
    """
    whole = whole or live
    device = next(model.parameters()).device
    ids = torch.stack([pair.clean_ids for pair in pairs] + [pair.corrupt_ids for pair in pairs]).to(device)
    asked = torch.stack([pair.answer_positions for pair in pairs]).to(device)
    positions = torch.arange(ids.shape[1], device=device).expand(len(pairs), -1) if whole else asked
    kept: dict[str, Tensor] = {}
    attended: dict[str, Attended] = {}
    left: dict[str, Any] = {}

    def keep(name: str, last: LastAttention, output: Tensor) -> None:
        at = positions.repeat(2, 1).to(output.device)
        kept[name] = output[torch.arange(len(at), device=output.device)[:, None], at]
        if live:
            attended[name] = last.k[: len(pairs)].clone(), last.v[: len(pairs)].clone(), last.mask

    def leave(name: str) -> Callable[..., None]:
        def hook(_block: nn.Module, _args: object, out: Any) -> None:
            if isinstance(out[0] if isinstance(out, tuple) else out, Tensor):  # else no replay skips this block
                left[name] = map_hidden(out, lambda x: x[: len(pairs)].clone())

        return hook

    with ExitStack() as stack:
        stack.enter_context(watch_taps(taps, keep))
        for name, block in decoder_blocks(model, taps).items() if live else ():
            stack.callback(block.register_forward_hook(leave(name)).remove)
        needed = torch.unique(asked)
        logits = logits_at(model, ids, needed)
    runs = []
    for clean, pair in enumerate(pairs):
        corrupt = clean + len(pairs)
        at = torch.searchsorted(needed, asked[clean]).to(logits.device)
        inside = asked[clean] if whole else torch.arange(len(pair.answer_ids), device=device)
        run = Run(ids[clean], positions[clean], inside, logits[clean, at], logits[corrupt, at])
        run.clean = {name: outputs[clean] for name, outputs in kept.items()}
        run.corrupt = {name: outputs[corrupt] for name, outputs in kept.items()}
        run.attended = {name: _of_row(clean, *parts) for name, parts in attended.items()}
        run.leaving = {name: map_hidden(out, itemgetter(slice(clean, clean + 1))) for name, out in left.items()}
        runs.append(run)
    return runs


def decoder_blocks(model: nn.Module, layers: Iterable[str]) -> dict[str, nn.Module]:
    """The decoder block that each layer (a module's name) stands in, in order.

    None at all unless two or more layers stand in module lists, a block each.
    """
    found = {name: list_member(model, name) for name in layers}
    blocks = {name: model.get_submodule(path) for name, path in found.items() if path}
    return blocks if len(set(blocks.values())) == len(found) > 1 else {}


def map_hidden(out: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A block's output with its hidden states [B, T, C], which are all of it or the first of a tuple, changed."""
    return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)


def _of_row(row: int, k: Tensor, v: Tensor, mask: Tensor | None) -> Attended:
    at = slice(row, row + 1)
    return k[at], v[at], mask if mask is None or len(mask) == 1 else mask[at]

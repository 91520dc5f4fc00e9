"""Replays of a recorded run: forwards in which every head's output may be read and changed.

Two kinds exist:

- frozen: every attention output is a recorded one, so that no token reads another any more, and what is changed at a
  position reaches the logits of that position only, through the residual stream and the MLPs. It is run on the few
  tokens that predict the answer: exact, and thousands of times less work than whole prompts. A model to which this does
  not apply (a token mixer besides attention) is recognised by comparing logits, and is replayed on whole prompts.
- live: attention runs as it does, on a whole prompt or, after recorded keys and values, from one of its tokens on. Where
  one head a row is changed, a row joins the batch after the attention of its layer, blocks before all changed heads give
  what they gave, and in the last layer only the answer's tokens ask and go on. Each of these is tried on a pair first.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import cached_property, partial
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from hydrasurgery.decoders import logits_at, standing_still
from hydrasurgery.evaluation.tasks import Pair
from hydrasurgery.ir.taps import HeadTap
from hydrasurgery.selection.recording import Attended, Head, Run, decoder_blocks, map_hidden, record
from hydrasurgery.selection.watching import Taps

Edit = Callable[[str, Tensor], Tensor]  # a layer's name and its heads' live outputs [R, T, H, D] -> their replacement
Change = Callable[[str, list[int]], Tensor]  # a layer's name and heads -> what those give instead [N, T, D]


class _Reached(Exception):
    """A replay has come as far as is wanted."""


class Replayer:
    """Replays runs of a tapped model, by the shortest way that gives the logits of the whole prompt.

    Which ways do so is tried on a pair when it is first asked for.

    Args:
        model: In evaluation mode.
        taps: Of `model`, from `head_taps`.
        pairs: Those whose runs will be replayed.

    Example:
        >>> from hydrasurgery.demo.teacher import load_teacher
        >>> from hydrasurgery.ir.taps import head_taps
        >>> from hydrasurgery.selection import probe_pairs
        >>> model, tokenizer = load_teacher()
        >>> pairs = probe_pairs(model, tokenizer, length=48, count=2)
        >>> with torch.no_grad(), head_taps(model) as taps:
        ...     replayer = Replayer(model, taps, pairs[:1])
        ...     (run,) = record(model, taps, pairs[:1], whole=not replayer.local)
        ...     logits = replayer.replay(run, 1, frozen(run, 1))[0]
        >>> torch.allclose(logits, run.clean_logits, atol=1e-3)
        True
    """

    def __init__(self, model: nn.Module, taps: Taps, pairs: Sequence[Pair]) -> None:
        self.model, self.taps, self.pairs = model, taps, pairs

    @cached_property
    def blocks(self) -> dict[str, nn.Module]:
        """The decoder block that each layer stands in, as `decoder_blocks` finds them."""
        return decoder_blocks(self.model, self.taps)

    @cached_property
    def local(self) -> bool:
        """Whether a frozen replay of nothing but the answer's tokens gives the logits of the whole prompt."""
        if not self.pairs:
            return True
        run = record(self.model, self.taps, self.pairs[:1])[0]
        error = (self.replay(run, 1, frozen(run, 1))[0] - run.clean_logits).abs().max()
        tolerance = torch.finfo(next(self.model.parameters()).dtype).eps ** 0.5
        if error <= tolerance * run.clean_logits.abs().max():
            return True
        warnings.warn(
            f"{type(self.model).__name__} mixes tokens outside its attention heads or ignores position_ids (logits off "
            f"by {error:.2g}), so each patched run takes the whole prompt: slower, same scores.",
            stacklevel=2,
        )
        return False

    @cached_property
    def joins(self) -> bool:
        """Whether rows may join a replay at a tap, and answer tokens leave it, with no others: tried, logits compared."""
        if not (self.blocks and self.local):
            return False
        names, run = list(self.taps), record(self.model, self.taps, self.pairs[:1], live=True)[0]
        heads = [(names[len(names) // 2], 0), (names[-1], 0)]
        return _agrees(run, lambda: self.replay_joined(run, heads, lambda _name, output: output))

    @cached_property
    def resumes(self) -> bool:
        """Whether a live replay may start after recorded keys and values: tried on a pair, and the logits compared."""
        pair = next((p for p in self.pairs if torch.equal(p.clean_ids[:1], p.corrupt_ids[:1])), self.pairs[0])
        run = record(self.model, self.taps, [pair], live=True)[0]
        later = _resumed(pair, run)
        return _agrees(run, lambda: self.replay(later, 1, lambda _name, output: output))

    def from_change(self, pair: Pair, run: Run) -> Run:
        """The run of a whole prompt from the pair's first changed token on: nothing before it can change."""
        return _resumed(pair, run) if self.resumes else run

    def replay(self, run: Run, count: int, edit: Edit) -> Tensor:
        """Logits [count, A, vocabulary] of `count` copies of a run, every layer's head outputs passed through `edit`."""
        with ExitStack() as stack:
            for name, tap in self.taps.items():
                hook = tap.register_forward_hook(lambda _tap, _args, output, name=name: edit(name, output))
                stack.callback(hook.remove)
            if run.start:
                stack.enter_context(_after_past(self.taps, run.attended, run.start))
            ids, places = (x.expand(count, -1) for x in (run.ids[run.positions], run.positions))
            return logits_at(self.model, ids, run.asked, position_ids=places)

    def replay_joined(self, run: Run, heads: Sequence[Head], edit: Edit) -> Tensor:
        """Live replay in which row r + 1 differs from row 0 at the layer of head r, and joins after its attention.

        Only where `joins` holds. `heads` [N] are in the layers' order. Blocks before the first give what they gave in `run`,
        and in the last layer, where no token reads another any more, only the answer's tokens ask and go on.

        Returns:
            Logits [1 + N, A, vocabulary].
        """
        names, counts = list(self.taps), Counter(name for name, _ in heads)
        blocks, before = list(self.blocks.values()), names.index(heads[0][0])
        last, first = names[-1], int(run.asked.min())
        entered: list[Tensor] = []
        given: list[Tensor] = []

        def join(x: Tensor, name: str) -> Tensor:
            return torch.cat([x, x[:1].expand(counts[name], *x.shape[1:])])

        def enter(x: Tensor) -> Tensor:
            entered.append(join(x[:, run.asked.to(x.device)], last))
            return x

        def ask(_tap: HeadTap, args: tuple[Any, ...]) -> tuple[Any, ...]:
            q, k, v, mask, sinks = (*args, None, None)[:5]
            q = q[:, :, first:]
            return q, k, v, None if mask is None else mask[:, :, -q.shape[2] :], sinks

        def joined(name: str, output: Tensor) -> Tensor:
            output = edit(name, join(output, name) if name in counts else output)
            if name == last:
                given.append(output[:, (run.asked - first).to(output.device)])
                raise _Reached
            return output

        with ExitStack() as stack:
            if before:
                stack.enter_context(standing_still(*blocks[:before], output=run.leaving[names[before - 1]]))
            for name, count in counts.items():
                if name != last:
                    attention = self.model.get_submodule(name)
                    stack.enter_context(_entering(self.blocks[name], partial(join, name=name)))
                    stack.enter_context(_entering(attention, itemgetter(slice(None, -count))))
            stack.enter_context(_entering(self.blocks[last], enter))
            stack.callback(self.taps[last].register_forward_pre_hook(ask).remove)
            stack.enter_context(suppress(_Reached))
            self.replay(run, 1, joined)
        with standing_still(*blocks[:-1], output=map_hidden(run.leaving[names[-2]], lambda _: entered[0])):
            return self.replay(run.at_answer(), 1, lambda _name, _output: given[0])


def frozen(run: Run, count: int) -> Edit:
    """The edit that holds every head at its clean output, in `count` rows."""
    return lambda name, _output: run.clean[name].repeat(count, 1, 1, 1)


def changed(run: Run, heads: Sequence[Head], change: Change, *, live: bool) -> Edit:
    """The edit that changes head r of `heads` in row r + 1; all others run (`live`) or are held at their clean output."""
    hold = frozen(run, 1 + len(heads))

    def edit(name: str, output: Tensor) -> Tensor:
        at = [(row, head) for row, (layer, head) in enumerate(heads, start=1) if layer == name]
        out = hold(name, output) if not live else output.clone() if at else output
        if at:
            rows, numbers = map(list, zip(*at, strict=True))
            out[rows, :, numbers] = change(name, numbers)[:, -out.shape[1] :].to(out.dtype)  # of the tokens that ask
        return out

    return edit


def _agrees(run: Run, shorter: Callable[[], Tensor]) -> bool:
    """Whether every row of a replay that changes nothing has the clean run's logits."""
    try:
        logits = shorter()
    except (
        RuntimeError,
        TypeError,
        ValueError,
        LookupError,
        AttributeError,
    ):  # a layer was given shapes that it cannot take
        return False
    tolerance = torch.finfo(logits.dtype).eps ** 0.5 * run.clean_logits.abs().max()
    return bool((logits - run.clean_logits).abs().max() <= tolerance)


def _resumed(pair: Pair, run: Run) -> Run:
    """The run of a whole prompt, from the first token on that the corruption changes or that predicts the answer."""
    changes = (pair.clean_ids != pair.corrupt_ids).nonzero().flatten().tolist()
    start = min(changes[0], int(run.asked.min())) if changes else 0
    if not start:
        return run
    return replace(
        run,
        positions=run.positions[start:],
        asked=run.asked - start,
        clean={name: outputs[start:] for name, outputs in run.clean.items()},
        corrupt={name: outputs[start:] for name, outputs in run.corrupt.items()},
        leaving={name: map_hidden(out, lambda x: x[:, start:]) for name, out in run.leaving.items()},
        start=start,
    )


@contextmanager
def _after_past(taps: Taps, whole: dict[str, Attended], start: int) -> Iterator[None]:
    """Inside the block attention runs on a prompt's tokens from `start` on, after recorded keys and values."""

    def after(k: Tensor, v: Tensor, mask: Tensor | None) -> Callable[..., Any]:
        def hook(_tap: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            q, later_k, later_v, _, sinks = (*args, None, None)[:5]
            rows = len(q), -1, -1, -1
            together = (
                torch.cat([past[:, :, :start].expand(rows), later], 2) for past, later in ((k, later_k), (v, later_v))
            )
            return q, *together, None if mask is None else mask[:, :, -q.shape[2] :], sinks

        return hook

    with ExitStack() as stack:
        for name, attended in whole.items():
            stack.callback(taps[name].register_forward_pre_hook(after(*attended)).remove)
        yield


@contextmanager
def _entering(block: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside the block a decoder block gets changed hidden states."""

    def hook(_block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    handle = block.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()

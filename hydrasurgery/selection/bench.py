"""The bench that heads are measured on: a model with taps on its heads, the pairs it answers, and replays of its runs.

A replay is a forward in which every head's output may be read and changed. Two kinds exist:

- frozen: every attention output is a recorded one, so that no token reads another any more, and what is changed at a
  position reaches the logits of that position only, through the residual stream and the MLPs. It is run on the few
  tokens that predict the answer: exact, and thousands of times less work than whole prompts. A model to which this does
  not apply (a token mixer besides attention) is found out by comparing logits, and is replayed on whole prompts.
- live: attention runs as it does, on a whole prompt or, behind recorded keys and values, from one of its tokens on. Where
  one head a row is changed, a row joins the batch behind the attention of its layer, blocks in front of all changed heads
  give what they gave, and in the last layer the answer's tokens ask and go on alone. Each of these is tried on a pair first.
"""

from __future__ import annotations

import inspect
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from hydrasurgery.calibration import (
    Attended,
    LastAttention,
    LinearFit,
    behind_past,
    fit_linear_heads,
    run_model,
    watch_taps,
)
from hydrasurgery.errors import ProbeError
from hydrasurgery.evaluation.tasks import Pair
from hydrasurgery.ir.region import Region
from hydrasurgery.ir.stitch import regions
from hydrasurgery.ir.taps import HeadTap, head_taps
from hydrasurgery.selection.effects import whole_effect

FIT_TOKENS, FIT_SEQUENCES = 2048, 4  # what the linear stand-ins are fitted on

Taps = dict[str, HeadTap]
Head = tuple[str, int]  # the layer's name, the head's number
Advance = Callable[[int, int], None]  # pairs just finished, pairs that were added to the work
Edit = Callable[[str, Tensor], Tensor]  # a layer's name and its heads' live outputs [R, T, H, D] -> their replacement
Change = Callable[[str, list[int]], Tensor]  # a layer's name and heads -> what those give instead [N, T, D]


class _Reached(Exception):
    """A replay has come as far as is wanted."""


@dataclass
class Run:
    """What a pair's clean and corrupt run leave behind at `positions`, the tokens a replay runs on.

    `clean` and `corrupt` are head outputs by layer, [P, H, D]; the logits are [A, vocabulary]; `asked` [A] are the
    places of the answer in `positions`. For live replays two more things of the clean run are kept, by layer: `attended`,
    the keys, values and mask of its attention, and `leaving`, what its block gave (hidden states [1, P, C], or a tuple
    that begins with them). `positions` may then begin behind a `start`: the tokens in front are attended to.
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


class Bench:
    """A tapped model in evaluation mode and the pairs to measure its heads on; made by `open_bench`.

    Attributes:
        dropped: A sentence for each pair that cannot be used, by its number; known after the first `runs`.
        seed: For scorers that draw.
        rows: Changed heads that are replayed together (on whole prompts at most `batch_size`, behind a start a few more).
    """

    def __init__(
        self,
        model: nn.Module,
        regions: Sequence[Region],
        taps: Taps,
        pairs: Sequence[Pair],
        *,
        batch_size: int,
        rows: int,
        seed: int,
        advance: Advance,
    ) -> None:
        self.model, self.regions, self.taps, self.pairs = model, regions, taps, pairs
        self.batch_size, self.rows, self.seed, self.advance = batch_size, rows, seed, advance
        self.dropped: dict[int, str] = {} if pairs else {0: "none was given"}
        self._passes = 0

    @cached_property
    def local(self) -> bool:
        """Whether a frozen replay on the answer's tokens alone gives the logits of the whole prompt."""
        if not self.pairs:
            return True
        run = self._observe(self.pairs[:1])[0]
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
    def blocks(self) -> dict[str, nn.Module]:
        """The decoder block that each layer stands in, in order; none unless two or more stand in module lists, a block each."""
        found = {name: _listed(self.model, name) for name in self.taps}
        apart = len(set(found.values())) == len(found) > 1 and None not in found.values()
        return {name: block for name, block in found.items() if block and apart}

    @cached_property
    def joins(self) -> bool:
        """Whether rows may join a replay at a tap, and answer tokens leave it alone: tried, and the logits compared."""
        if not (self.blocks and self.local):
            return False
        names, run = list(self.taps), self._observe(self.pairs[:1], live=True)[0]
        heads = [(names[len(names) // 2], 0), (names[-1], 0)]
        return self._agrees(run, lambda: self._replay_joined(run, heads, lambda _name, output: output))

    @cached_property
    def fits(self) -> dict[str, LinearFit]:
        """The best linear stand-in of every head, by layer, fitted on a few clean prompts."""
        found: dict[str, LinearFit] = {}

        def visit(name: str, last: LastAttention, output: Tensor) -> None:
            found[name] = fit_linear_heads(last.q, last.k, last.v, output)

        with watch_taps(self.taps, visit):
            self.forward(_calibration_ids(self.pairs))
        return found

    @property
    def used(self) -> list[int]:
        """Numbers of the pairs that `measure` has given effects of."""
        return [number for number in range(len(self.pairs)) if number not in self.dropped]

    def runs(self, *, whole: bool = False, live: bool = False) -> Iterator[tuple[Pair, Run]]:
        """Each usable pair with its recorded run: where a frozen replay needs it, or at every position (`whole`), and with
        what shortens live replays (`live`)."""
        if self._passes:
            self.advance(0, len(self.pairs))
        whole = whole or not self.local
        for start, group in _batches(self.pairs, self.batch_size):
            for number, (pair, run) in enumerate(zip(group, self._observe(group, whole, live), strict=True), start):
                reason = _unusable(pair, run)
                if reason:
                    self.dropped[number] = f"pair {number}: {reason}"
                else:
                    yield pair, run
            self.advance(len(group), 0)
        self._passes += 1

    def measure(
        self, score: Callable[[Pair, Run], Mapping[str, Tensor]], *, whole: bool = False, live: bool = False
    ) -> dict[str, Tensor]:
        """Stack each usable pair's scores: layer name -> [P, H] fp32 on the CPU; `whole` and `live` as in `runs`.

        Raises:
            ProbeError: no pair can be used.
        """
        found: dict[str, list[Tensor]] = {}
        for pair, run in self.runs(whole=whole, live=live):
            for name, values in score(pair, run).items():
                found.setdefault(name, []).append(values.detach().float().cpu())
        if not found:
            raise ProbeError(
                f"{type(self.model).__name__}: none of {len(self.pairs)} pairs can be scored "
                f"({'; '.join(list(self.dropped.values())[:1])}). Use a model that has learned retrieval, shorter "
                "prompts (length=...) or pairs it can answer (pairs=...)."
            )
        return {name: torch.stack(values) for name, values in found.items()}

    def heads(self, run: Run) -> list[Head]:
        """Every head, layer by layer."""
        return [(name, head) for name in self.taps for head in range(run.clean[name].shape[1])]

    def sweep(
        self, run: Run, change: Change, *, live: bool, heads: Sequence[Head] | None = None
    ) -> Iterator[tuple[Sequence[Head], Tensor]]:
        """Replay with one head changed at a time: some heads, in the layers' order, and their logits [1 + N, A, vocabulary].

        Row 0 is unchanged and stands in the same batch, so that a head without effect scores exactly 0 in low
        precision too.
        """
        heads = self.heads(run) if heads is None else heads
        size = self.rows if len(run.positions) == len(run.asked) else min(self.rows, self.batch_size)
        if run.start:  # a row holds keys and values of the whole prompt, and all else of the tokens that run
            size = 2 * size * len(run.ids) // (len(run.ids) + len(run.positions))
        joined = live and self.joins
        for start in range(0, len(heads), size):
            batch = heads[start : start + size]
            edit = changed(run, batch, change, live=live)
            yield batch, self._replay_joined(run, batch, edit) if joined else self.replay(run, 1 + len(batch), edit)

    def replay(self, run: Run, count: int, edit: Edit) -> Tensor:
        """Logits [count, A, vocabulary] of `count` copies of a run, every layer's head outputs passed through `edit`."""
        with ExitStack() as stack:
            for name, tap in self.taps.items():
                hook = tap.register_forward_hook(lambda _tap, _args, output, name=name: edit(name, output))
                stack.callback(hook.remove)
            if run.start:
                stack.enter_context(behind_past(self.taps, run.attended, run.start))
            ids, places = (x.expand(count, -1) for x in (run.ids[run.positions], run.positions))
            return _logits(self.model, ids, run.asked, position_ids=places)

    def _replay_joined(self, run: Run, heads: Sequence[Head], edit: Edit) -> Tensor:
        """Live replay in which row r + 1 differs from row 0 at the layer of head r, and joins behind its attention.

        `heads` are in the layers' order. Blocks in front of the first give what they gave in `run`, and in the last
        layer, where no token reads another any more, only the answer's tokens ask and go on. Logits [1 + N, A, vocabulary].
        """
        names, counts = list(self.taps), Counter(name for name, _ in heads)
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
            stack.enter_context(self._skipped(names[: names.index(heads[0][0])], run.leaving))
            for name, count in counts.items():
                if name != last:
                    attention = self.model.get_submodule(name)
                    stack.enter_context(_entering(self.blocks[name], partial(join, name=name)))
                    stack.enter_context(_entering(attention, itemgetter(slice(None, -count))))
            stack.enter_context(_entering(self.blocks[last], enter))
            stack.callback(self.taps[last].register_forward_pre_hook(ask).remove)
            stack.enter_context(suppress(_Reached))
            self.replay(run, 1, joined)
        before = _map_hidden(run.leaving[names[-2]], lambda _: entered[0])
        with self._skipped(names[:-1], {names[-2]: before}):
            return self.replay(run.at_answer(), 1, lambda _name, _output: given[0])

    @contextmanager
    def _skipped(self, names: Sequence[str], leaving: Mapping[str, Any]) -> Iterator[None]:
        """For the time of the block the blocks of these first layers do nothing but give what the last of them gave."""
        own = [(vars(self.blocks[name]), vars(self.blocks[name]).get("forward")) for name in names]
        try:
            for attributes, _ in own:
                attributes["forward"] = lambda *_args, **_kwargs: leaving[names[-1]]
            yield
        finally:
            for attributes, forward in own:
                attributes.pop("forward", None)
                attributes.update({"forward": forward} if forward else {})

    @cached_property
    def resumes(self) -> bool:
        """Whether a live replay may start behind recorded keys and values: tried on a pair, and the logits compared."""
        pair = next((p for p in self.pairs if torch.equal(p.clean_ids[:1], p.corrupt_ids[:1])), self.pairs[0])
        run = self._observe([pair], live=True)[0]
        later = self._resumed(pair, run)
        return self._agrees(run, lambda: self.replay(later, 1, lambda _name, output: output))

    def _agrees(self, run: Run, shorter: Callable[[], Tensor]) -> bool:
        """Whether every row of a replay that changes nothing has the clean run's logits."""
        try:
            logits = shorter()
        except (RuntimeError, TypeError, ValueError, LookupError, AttributeError):  # a layer told its shapes otherwise
            return False
        tolerance = torch.finfo(logits.dtype).eps ** 0.5 * run.clean_logits.abs().max()
        return bool((logits - run.clean_logits).abs().max() <= tolerance)

    def from_change(self, pair: Pair, run: Run) -> Run:
        """The run of a whole prompt from the pair's first changed token on: nothing in front of it can change."""
        return self._resumed(pair, run) if self.resumes else run

    def _resumed(self, pair: Pair, run: Run) -> Run:
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
            leaving={name: _map_hidden(out, lambda x: x[:, start:]) for name, out in run.leaving.items()},
            start=start,
        )

    def forward(self, ids: Tensor) -> Tensor:
        """Logits [B, 1, vocabulary] behind prompts [B, T], taps running."""
        return _logits(self.model, ids, torch.tensor([ids.shape[1] - 1]))

    def _observe(self, pairs: Sequence[Pair], whole: bool = False, live: bool = False) -> list[Run]:
        """Run the clean and the corrupt prompts of pairs of one shape, and keep what a replay needs; as in `runs`."""
        whole = whole or live
        device = next(self.model.parameters()).device
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
                    left[name] = _map_hidden(out, lambda x: x[: len(pairs)].clone())

            return hook

        with ExitStack() as stack:
            stack.enter_context(watch_taps(self.taps, keep))
            for name, block in self.blocks.items() if live else ():
                stack.callback(block.register_forward_hook(leave(name)).remove)
            needed = torch.unique(asked)
            logits = _logits(self.model, ids, needed)
        runs = []
        for clean, pair in enumerate(pairs):
            corrupt = clean + len(pairs)
            at = torch.searchsorted(needed, asked[clean]).to(logits.device)
            inside = asked[clean] if whole else torch.arange(len(pair.answer_ids), device=device)
            run = Run(ids[clean], positions[clean], inside, logits[clean, at], logits[corrupt, at])
            run.clean = {name: outputs[clean] for name, outputs in kept.items()}
            run.corrupt = {name: outputs[corrupt] for name, outputs in kept.items()}
            run.attended = {name: _of_row(clean, *parts) for name, parts in attended.items()}
            run.leaving = {name: _map_hidden(out, itemgetter(slice(clean, clean + 1))) for name, out in left.items()}
            runs.append(run)
        return runs


@contextmanager
def open_bench(
    model: nn.Module,
    pairs: Sequence[Pair],
    *,
    batch_size: int = 4,
    rows: int = 64,
    seed: int = 0,
    advance: Advance = lambda done, more: None,
) -> Iterator[Bench]:
    """For the time of the block `model` has taps on its heads and is in evaluation mode, without gradients."""
    with torch.no_grad(), _evaluating(model), head_taps(model) as taps:
        yield Bench(model, regions(model), taps, pairs, batch_size=batch_size, rows=rows, seed=seed, advance=advance)


def frozen(run: Run, count: int) -> Edit:
    """The edit that holds every head at its clean output."""
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


def _unusable(pair: Pair, run: Run) -> str | None:
    guess = run.clean_logits.argmax(-1).cpu()
    if not torch.equal(guess, pair.answer_ids.cpu()):
        return f"the clean model answers {guess.tolist()} instead of {pair.answer_ids.tolist()}"
    effect = whole_effect(pair, run)
    return None if effect > 0 else f"the corrupt prompt does not weaken the answer (effect {effect:.3g})"


def _logits(model: nn.Module, ids: Tensor, positions: Tensor, position_ids: Tensor | None = None) -> Tensor:
    """Logits [B, P, vocabulary] at `positions` [P] of ids [B, T]; the head runs on those alone where the model can."""
    accepted = inspect.signature(model.forward).parameters
    anything = hasattr(model, "config") and any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    options = {"position_ids": position_ids, "logits_to_keep": positions}
    options = {key: v for key, v in options.items() if v is not None and (key in accepted or anything)}
    out = run_model(model, ids, **options)
    logits = out[0] if isinstance(out, tuple) else getattr(out, "logits", out)
    return logits if logits.shape[1] == len(positions) else logits[:, positions.to(logits.device)]


def _listed(model: nn.Module, name: str) -> nn.Module | None:
    """The member of the innermost module list that a module stands in."""
    while name:
        above, _, _ = name.rpartition(".")
        if isinstance(model.get_submodule(above), nn.ModuleList):
            return model.get_submodule(name)
        name = above
    return None


def _of_row(row: int, k: Tensor, v: Tensor, mask: Tensor | None) -> Attended:
    at = slice(row, row + 1)
    return k[at], v[at], mask if mask is None or len(mask) == 1 else mask[at]


@contextmanager
def _entering(block: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """For the time of the block a decoder block gets changed hidden states."""

    def hook(_block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    handle = block.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _map_hidden(out: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A block's output with its hidden states [B, T, C], alone or the first of a tuple, changed."""
    return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)


def _calibration_ids(pairs: Sequence[Pair]) -> Tensor:
    """A few clean prompts cut to one length, [B, T]; spread over the pairs so that each sub-probe is in."""
    chosen = pairs[:: max(1, len(pairs) // FIT_SEQUENCES)][:FIT_SEQUENCES]
    tokens = min(FIT_TOKENS, *(len(pair.clean_ids) for pair in chosen))
    return torch.stack([pair.clean_ids[:tokens] for pair in chosen])


def _batches(pairs: Sequence[Pair], size: int) -> Iterator[tuple[int, Sequence[Pair]]]:
    """Runs of up to `size` neighbours of one shape, with the first one's number."""
    start = 0
    for end in range(1, len(pairs) + 1):
        if end == len(pairs) or end - start == size or _shape(pairs[end]) != _shape(pairs[start]):
            yield start, pairs[start:end]
            start = end


def _shape(pair: Pair) -> tuple[int, int]:
    return len(pair.clean_ids), len(pair.answer_ids)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the time of the block; each module's own mode is restored."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode

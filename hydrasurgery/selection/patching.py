"""Receiver activation patching (paper section 2): how much of the answer a head carries to the logits directly.

With the attention outputs of every other head held at their clean values, no token reads another one any more: what a
patched head changes at a position reaches the logits of that position only. So the patched runs are made on the few
tokens that predict the answer, with all attention outputs replaced by recorded ones: exact, and thousands of times less
work than whole prompts. A model to which this does not apply (a token mixer besides attention) is found out by
comparing logits, and is run on whole prompts.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hydrasurgery.calibration import run_model
from hydrasurgery.errors import ProbeError
from hydrasurgery.evaluation.tasks import Pair
from hydrasurgery.regions import head_taps

DISCOUNT = 0.9

Taps = dict[str, nn.Identity]


@dataclass(frozen=True)
class PatchEffects:
    """Effects of each used pair, and why others were dropped.

    Attributes:
        effects: Layer name -> [P, H] fp32 on the CPU, eq. 10 for each of the P used pairs.
        dropped: A sentence for each pair that could not be used.
        replay: "readout" where patched runs covered the answer's tokens only, "full" where they covered whole prompts.
    """

    effects: dict[str, Tensor]
    dropped: tuple[str, ...]
    replay: str


@dataclass
class _Run:
    """What a pair's clean and corrupt run leave behind at `positions`, the tokens a replay runs on.

    `clean` and `corrupt` are head outputs by layer, [P, H, D]; the logits are [A, vocabulary]; `asked` [A] are the
    places of the answer in `positions`.
    """

    ids: Tensor
    positions: Tensor
    asked: Tensor
    clean_logits: Tensor
    corrupt_logits: Tensor
    clean: dict[str, Tensor] = field(default_factory=dict)
    corrupt: dict[str, Tensor] = field(default_factory=dict)


def patch_heads(
    model: nn.Module,
    pairs: Sequence[Pair],
    *,
    batch_size: int = 4,
    rows: int = 64,
    advance: Callable[[int], None] = lambda count: None,
) -> PatchEffects:
    """Score every head of `model` on counterfactual pairs.

    Readout (eq. 9): m(x) = sum_j 0.9^j (z_j[a+_j] - z_j[a-_j]) / sum_j 0.9^j over the answer's positions, z logits.
    Effect (eq. 10): IE(l, h) = (m(x) - m(x; O_lh <- O_lh(x'))) / (m(x) - m(x')), later layers' attention outputs held
    at their clean values. 1 is the whole effect of the corruption; nothing is clamped.

    Args:
        batch_size: Pairs whose clean and corrupt prompts are run together.
        rows: Patched heads that are run together (`batch_size` of them where whole prompts have to be replayed).
        advance: Called with the count of pairs just finished.

    Raises:
        ProbeError: no pair is answered by the clean model, so nothing can be measured.
    """
    effects: dict[str, list[Tensor]] = {}
    dropped: list[str] = [] if pairs else ["none was given"]
    with torch.no_grad(), _evaluating(model), head_taps(model) as taps:
        whole = not _is_local(model, taps, pairs)
        rows = min(rows, batch_size) if whole else rows
        for start, group in _batches(pairs, batch_size):
            for number, (pair, run) in enumerate(zip(group, _observe(model, taps, group, whole), strict=True), start):
                reason = _unusable(pair, run)
                if reason:
                    dropped.append(f"pair {number}: {reason}")
                    continue
                for name, effect in _effects(model, taps, pair, run, rows).items():
                    effects.setdefault(name, []).append(effect)
            advance(len(group))
    if not effects:
        raise ProbeError(
            f"{type(model).__name__}: none of {len(pairs)} pairs can be scored ({'; '.join(dropped[:1])}). Use a "
            "model that has learned retrieval, shorter prompts (length=...) or pairs it can answer (pairs=...)."
        )
    return PatchEffects({n: torch.stack(e) for n, e in effects.items()}, tuple(dropped), "full" if whole else "readout")


def readout(logits: Tensor, pair: Pair) -> Tensor:
    """m(x) of eq. 9: logits [..., A, vocabulary] -> [...] in fp32, the answer's lead over the distractor."""
    answer, distractor = (ids.to(logits.device) for ids in (pair.answer_ids, pair.distractor_ids))
    at = torch.arange(len(answer), device=logits.device)
    lead = logits[..., at, answer].float() - logits[..., at, distractor].float()
    weight = DISCOUNT ** at.float()
    return (lead * weight).sum(-1) / weight.sum()


def _effects(model: nn.Module, taps: Taps, pair: Pair, run: _Run, rows: int) -> dict[str, Tensor]:
    """Eq. 10 for every head: layer name -> [H]."""
    heads = [(name, head) for name in taps for head in range(run.clean[name].shape[1])]
    whole = readout(run.clean_logits, pair) - readout(run.corrupt_logits, pair)
    effects: dict[str, list[Tensor]] = {name: [] for name in taps}
    for start in range(0, len(heads), rows):
        patches = heads[start : start + rows]
        scores = readout(_replay(model, taps, run, patches), pair)
        for (name, _), effect in zip(patches, ((scores[0] - scores[1:]) / whole).cpu(), strict=True):
            effects[name].append(effect)
    return {name: torch.stack(values) for name, values in effects.items()}


def _replay(model: nn.Module, taps: Taps, run: _Run, patches: Sequence[tuple[str, int]]) -> Tensor:
    """Logits [1 + R, A, vocabulary] with every attention output recorded: row 0 clean, row r with patch r corrupt.

    The clean row stands in the same batch, so that a head without effect scores exactly 0 in low precision too.
    """
    count = 1 + len(patches)

    def held(name: str) -> Callable[..., Tensor]:
        def hook(_module: nn.Module, _args: object, _output: Tensor) -> Tensor:
            out = run.clean[name].repeat(count, 1, 1, 1)
            for row, (layer, head) in enumerate(patches, start=1):
                if layer == name:
                    out[row, :, head] = run.corrupt[name][:, head]
            return out

        return hook

    with ExitStack() as stack:
        for name, tap in taps.items():
            stack.callback(tap.register_forward_hook(held(name)).remove)
        ids = run.ids[run.positions].expand(count, -1)
        return _logits(model, ids, run.asked, position_ids=run.positions.expand(count, -1))


def _observe(model: nn.Module, taps: Taps, pairs: Sequence[Pair], whole: bool) -> list[_Run]:
    """Run the clean and the corrupt prompts of pairs of one shape, and keep what a replay needs."""
    device = next(model.parameters()).device
    ids = torch.stack([pair.clean_ids for pair in pairs] + [pair.corrupt_ids for pair in pairs]).to(device)
    asked = torch.stack([pair.answer_positions for pair in pairs]).to(device)
    positions = torch.arange(ids.shape[1], device=device).expand(len(pairs), -1) if whole else asked
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: object, output: Tensor) -> None:
            at = positions.repeat(2, 1).to(output.device)
            kept[name] = output[torch.arange(len(at), device=output.device)[:, None], at]

        return hook

    with ExitStack() as stack:
        for name, tap in taps.items():
            stack.callback(tap.register_forward_hook(keep(name)).remove)
        needed = torch.unique(asked)
        logits = _logits(model, ids, needed)
    runs = []
    for clean, pair in enumerate(pairs):
        corrupt = clean + len(pairs)
        at = torch.searchsorted(needed, asked[clean]).to(logits.device)
        inside = asked[clean] if whole else torch.arange(len(pair.answer_ids), device=device)
        run = _Run(ids[clean], positions[clean], inside, logits[clean, at], logits[corrupt, at])
        run.clean = {name: outputs[clean] for name, outputs in kept.items()}
        run.corrupt = {name: outputs[corrupt] for name, outputs in kept.items()}
        runs.append(run)
    return runs


def _is_local(model: nn.Module, taps: Taps, pairs: Sequence[Pair]) -> bool:
    """Whether a replay on the answer's tokens alone gives the logits of the whole prompt."""
    if not pairs:
        return True
    run = _observe(model, taps, pairs[:1], whole=False)[0]
    error = (_replay(model, taps, run, [])[0] - run.clean_logits).abs().max()
    tolerance = torch.finfo(next(model.parameters()).dtype).eps ** 0.5
    if error <= tolerance * run.clean_logits.abs().max():
        return True
    warnings.warn(
        f"{type(model).__name__} mixes tokens outside its attention heads or ignores position_ids (logits off by "
        f"{error:.2g}), so each patched run takes the whole prompt: slower, same scores.",
        stacklevel=3,
    )
    return False


def _unusable(pair: Pair, run: _Run) -> str | None:
    guess = run.clean_logits.argmax(-1).cpu()
    if not torch.equal(guess, pair.answer_ids.cpu()):
        return f"the clean model answers {guess.tolist()} instead of {pair.answer_ids.tolist()}"
    effect = readout(run.clean_logits, pair) - readout(run.corrupt_logits, pair)
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

"""Learned gates (after DuoAttention): each head's mixture of itself and its linear stand-in, trained to be cheap."""

from __future__ import annotations

import torch
from torch import Tensor

from hydrasurgery.calibration import LinearFit
from hydrasurgery.selection.measuring import HeadMeter
from hydrasurgery.selection.recording import Run
from hydrasurgery.selection.swap import stand_in
from hydrasurgery.selection.watching import LastAttention

STEPS, RATE, PRICE = 40, 0.1, 0.05  # Adam's steps per pair and its rate; nats that all heads together cost


def learned_gates(meter: HeadMeter) -> dict[str, Tensor]:
    """alpha of O <- alpha O + (1 - alpha) O^, learned for each pair from alpha = 1: [P, H] in [0, 1].

    The loss is KL(clean || gated) at the answer plus 0.05 times the mean gate, so a gate stays open only where it saves
    divergence. In the backward pass the stand-ins O^ are constants; later heads' softmax outputs are not.
    """
    fits = meter.fits
    with LastAttention(meter.taps) as last:
        return meter.measure(lambda pair, run: _learn(meter, run, last, fits), whole=True)


def _learn(meter: HeadMeter, run: Run, last: LastAttention, fits: dict[str, LinearFit]) -> dict[str, Tensor]:
    device = run.ids.device
    gates = {name: torch.ones(x.shape[1], device=device, requires_grad=True) for name, x in run.clean.items()}
    optimizer = torch.optim.Adam(gates.values(), lr=RATE)
    wanted = run.clean_logits.float().log_softmax(-1)

    def edit(name: str, output: Tensor) -> Tensor:
        heads = list(range(output.shape[2]))
        with torch.no_grad():
            other = stand_in(last, fits[name], [0] * len(heads), heads).transpose(0, 1)[None]
        return (other + gates[name][:, None] * (output - other)).to(output.dtype)

    for _ in range(STEPS):
        with torch.enable_grad():
            got = meter.replayer.replay(run, 1, edit)[0].float().log_softmax(-1)
            loss = (wanted.exp() * (wanted - got)).sum(-1).mean() + PRICE * torch.cat(list(gates.values())).mean()
            slopes = torch.autograd.grad(loss, list(gates.values()))
        for gate, slope in zip(gates.values(), slopes, strict=True):
            gate.grad = slope
        optimizer.step()
        for gate in gates.values():
            gate.clamp_(0, 1)
    return gates

"""Mean ablation: what is lost when a head says the same thing everywhere; and how fast, head after head."""

from __future__ import annotations

from torch import Tensor

from hydrasurgery.selection.bench import Bench, effects


def mean_ablation(bench: Bench) -> dict[str, Tensor]:
    """Share of the corruption's effect that is lost when the head's output is its mean, other heads running, [P, H]."""
    means = mean_outputs(bench)

    def change(name: str, _rows: list[int], heads: list[int]) -> Tensor:
        return means[name][heads][:, None]

    return bench.measure(lambda pair, run: effects(bench, pair, run, change, live=True), whole=True)


def mean_outputs(bench: Bench) -> dict[str, Tensor]:
    """Each head's mean output over all tokens of the clean prompts that can be used: layer name -> [H, D]."""
    device = next(bench.model.parameters()).device
    rows = bench.measure(lambda pair, run: {name: x.float().mean(0) for name, x in run.clean.items()}, whole=True)
    return {name: means.mean(0).to(device) for name, means in rows.items()}

"""What follows from Eq. 6, measured with the code that trains and drawn beside the formulas: T2, T8, T10 of the method.

W_i are N experts, m is their mean, D_i = W_i - m, b the share rate, lam = 1 - bN/(N-1).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

import pointewa.ewa as ewa
from pointewa.viz.panels import BACKGROUND, FAINT, palette

SHARE_RATE, EXPERTS = 0.3, (2, 4, 8, 16)
_LR = 0.1


def factor(num_experts: int, share_rate: float) -> float:
    """lam, by which an averaging shrinks the D_i."""
    return 1 - share_rate * num_experts / (num_experts - 1)


def contraction(num_experts: int, share_rate: float, steps: int) -> list[float]:
    """||D|| after 0 to ``steps`` averagings of random experts, relative to that before: T2 says lam^t."""
    weights = torch.randn(num_experts, 1000, dtype=torch.float64, generator=_generator())
    norms = [(weights - weights.mean(0)).norm().item()]
    for _ in range(steps):
        ewa.average_experts_(weights, share_rate)
        norms.append((weights - weights.mean(0)).norm().item())
    return [norm / norms[0] for norm in norms]


def stationary_spread(num_experts: int, share_rate: float, steps: int = 200, coordinates: int = 2000) -> float:
    """sum_i D_i^2 / lr^2 of a coordinate after many SGD steps on unit noise, each followed by an averaging."""
    generator = _generator()
    weights = torch.zeros(num_experts, coordinates, dtype=torch.float64)
    for _ in range(steps):
        weights -= _LR * torch.randn(weights.shape, dtype=torch.float64, generator=generator)
        ewa.average_experts_(weights, share_rate)
    return (weights - weights.mean(0)).square().sum(0).mean().item() / _LR**2


def expected_spread(num_experts: int, share_rate: float) -> float:
    """T8: (N-1) lam^2 / (1 - lam^2), in units of lr^2."""
    square = factor(num_experts, share_rate) ** 2
    return (num_experts - 1) * square / (1 - square)


def fold_gaps(num_experts: int, deviations: Sequence[float]) -> list[float]:
    """`ewa.fold_gap` of an FFN whose experts deviate by each of these ||D||/||m||; T10: of second order."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ffn = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)).double()
        moe = ewa.RandomPartitionMoE(ffn, num_experts, init="copy")
        tokens = torch.randn(512, 64, dtype=torch.float64)
        directions = [torch.randn_like(stacked) for stacked in moe.experts.parameters()]
    equal = [stacked.detach().clone() for stacked in moe.experts.parameters()]
    gaps = []
    for deviation in deviations:
        for stacked, mean, direction in zip(moe.experts.parameters(), equal, directions, strict=True):
            apart = direction - direction.mean(0)
            stacked.data = mean + deviation * apart * (mean[0].norm() / apart.norm())
        gaps += ewa.fold_gap(moe, tokens).values()
    return gaps


def theory_figure() -> tuple[Any, dict[str, Any]]:
    """A matplotlib figure of three panels, measured values as dots on the formulas as lines; and these values."""
    from matplotlib.figure import Figure  # without pyplot: no display is looked for, no state is left

    figure = Figure((13, 4), facecolor=BACKGROUND, layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    steps, rates, deviations = range(21), [0.02 * i for i in range(1, 26)], [10 ** (-i / 4) for i in range(2, 13)]
    measured: dict[str, Any] = {"contraction": {}, "spread": {}}
    for experts, colour in zip(EXPERTS, palette(len(EXPERTS)), strict=True):
        lam = factor(experts, SHARE_RATE)
        norms = measured["contraction"][experts] = contraction(experts, SHARE_RATE, steps[-1])
        left.plot(steps, [lam**step for step in steps], color=colour, linewidth=1)
        left.plot(steps, norms, "o", color=colour, markersize=4, label=f"N={experts}, lam={lam:.3f}")
        allowed = [rate for rate in rates if rate <= (experts - 1) / experts]
        spread = measured["spread"][experts] = [stationary_spread(experts, rate) for rate in allowed[::2]]
        middle.plot(allowed, [expected_spread(experts, rate) for rate in allowed], color=colour, linewidth=1)
        middle.plot(allowed[::2], spread, "o", color=colour, markersize=4, label=f"N={experts}")
    gaps = measured["fold_gap"] = dict(zip(deviations, fold_gaps(4, deviations), strict=True))
    colour = palette(1)[0]
    through = gaps[deviations[-1]] / deviations[-1] ** 2
    right.plot(deviations, [through * deviation**2 for deviation in deviations], color=colour, linewidth=1)
    right.plot(*zip(*gaps.items(), strict=True), "o", color=colour, markersize=4, label="N=4; the line has slope 2")
    left.set(title=f"T2: experts under averaging alone, b={SHARE_RATE}", xlabel="averagings",
             ylabel="||D|| / ||D at 0||", yscale="log")  # fmt: skip
    middle.set(title="T8: what gradient noise keeps apart", xlabel="share rate b", yscale="log",
               ylabel="sum of squared D, in lr²")  # fmt: skip
    right.set(title="T10: what folding changes", xlabel="||D|| / ||m||", ylabel="fold gap", xscale="log", yscale="log")
    for axes in (left, middle, right):
        axes.grid(color=FAINT, alpha=0.5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
    return figure, measured


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)

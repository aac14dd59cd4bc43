"""How far the experts of a run are from each other: over its training, and now."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pointewa.ewa.experts import moe_layers
from pointewa.viz.panels import BACKGROUND, FAINT, INK, palette

_KEY = "ewa/disagreement/"


@torch.no_grad()
def pairwise_distances(model: nn.Module) -> dict[str, Tensor]:
    """``||W_i - W_j|| / ||m||`` of the experts of each MoE layer, all parameters of an expert taken as one vector:
    ``[N, N]`` in float64, m being their mean."""
    result = {}
    for name, moe in moe_layers(model).items():
        experts = torch.cat([stacked.detach().double().flatten(1) for stacked in moe.experts.parameters()], 1)
        mean = experts.mean(0)
        centred = experts - mean
        result[name] = torch.stack([(centred - one).norm(dim=1) for one in centred]) / mean.norm()
    return result


def disagreements(records: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """The disagreement of each MoE layer after each epoch, counted from 1, for which it was recorded."""
    series: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        for key, value in record.items():
            if key.startswith(_KEY) and isinstance(value, int | float):
                series.setdefault(key.removeprefix(_KEY), []).append((record["epoch"] + 1, float(value)))
    return series


def experts_figure(series: dict[str, list[tuple[int, float]]], distances: dict[str, Tensor], title: str) -> Any:
    """A matplotlib figure: disagreement over training on the left, on the right the distances of each layer, in shades,
    under the smallest and the largest.

    Args:
        series: of `disagreements`.
        distances: of `pairwise_distances`, one layer at least.
        title: above.
    """
    from matplotlib.figure import Figure  # without pyplot: no display is looked for, no state is left
    from matplotlib.ticker import MaxNLocator

    columns = min(3, len(distances))
    rows = -(-len(distances) // columns)
    figure = Figure((5 + 2.3 * columns, 0.8 + max(3.4, 2.3 * rows)), facecolor=BACKGROUND, layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(4.6, 2.3 * columns + 0.4))
    figure.suptitle(title, color=INK, fontsize=12)
    axes = left.subplots()
    for (name, values), colour in zip(series.items(), palette(len(series)), strict=True):
        epochs, heights = zip(*values, strict=True)
        axes.plot(epochs, heights, color=colour, label=_short(name), marker="o" if len(epochs) < 3 else None)
    if any(height > 0 for values in series.values() for _, height in values):
        axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(color=FAINT, alpha=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("epoch")
    axes.set_ylabel("disagreement of the experts")
    if series:
        axes.legend(frameon=False, fontsize=8)
    largest = max(float(one.max()) for one in distances.values()) or 1.0
    factor, decimals, unit = _rounding(largest)
    grid = right.subplots(rows, columns, squeeze=False)
    for one in grid.flat[len(distances) :]:
        one.set_axis_off()
    for one, (name, matrix) in zip(grid.flat, distances.items(), strict=False):
        image = one.imshow(matrix.cpu().numpy() / factor, cmap="Blues", vmin=0, vmax=largest / factor)
        others = matrix[~torch.eye(len(matrix), dtype=torch.bool)] / factor
        low, high = (f"{value:.{decimals}f}" for value in (others.min(), others.max()))
        found = "all equal" if not others.any() else low if low == high else f"{low} to {high}"
        one.set_title(f"{_short(name)}: {found}", fontsize=9, color=INK)
        ticks = range(0, len(matrix), -(-len(matrix) // 12))
        one.set_xticks(ticks, [str(i + 1) for i in ticks], fontsize=8)
        one.set_yticks(ticks, [str(i + 1) for i in ticks], fontsize=8)
    bar = right.colorbar(image, ax=grid.ravel().tolist(), shrink=0.8, aspect=30)
    bar.set_label(f"distance of two experts /\nnorm of their mean{unit and f', {unit}'}", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    return figure


def _rounding(largest: float) -> tuple[float, int, str]:
    """How distances up to ``largest`` are written: in multiples of which power of ten, with how many decimals, and
    what says so."""
    exponent = math.floor(math.log10(largest))
    if -1 <= exponent <= 1:
        return 1.0, 1 - exponent, ""
    return 10.0**exponent, 1, rf"$\times\,10^{{{exponent}}}$"


def _short(name: str) -> str:
    """``block 3`` for ``blocks.blocks.3.mlp``."""
    numbers = [part for part in name.split(".") if part.isdigit()]
    return f"block {numbers[0]}" if len(numbers) == 1 else name

"""Images in a grid."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def images_figure(images: Sequence[Tensor], titles: Sequence[str], columns: int = 4) -> Any:
    """Images ``[3, H, W]`` in [-1, 1], each over its title, as a matplotlib figure."""
    from matplotlib.figure import Figure  # without pyplot: no display is looked for, no state is left

    rows = -(-len(images) // columns)
    figure = Figure((2.4 * columns, 2.7 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, image, title in zip(grid, images, titles, strict=False):
        axes.imshow(((image.cpu().permute(1, 2, 0) + 1) / 2).clamp(0, 1).numpy(), interpolation="nearest")
        axes.set_title(title, fontsize=8, y=-0.04, va="top")
    for axes in grid:
        axes.set_axis_off()
    return figure

"""The confusion matrix, as text and as a picture."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def confusion_text(matrix: Tensor, names: Sequence[str]) -> str:
    """Rows are true classes, columns predicted ones, numbered like the rows; a dot is 0.

    Args:
        matrix: int64 ``[C, C]``, `pointewa.tasks.classification.Evaluation.confusion`.
        names: C names.
    """
    width, cell = max(map(len, names)), len(str(int(matrix.max()))) + 1
    cell = max(cell, len(str(len(names) - 1)) + 1)
    lines = [" " * (width + 4) + "".join(f"{number:>{cell}}" for number in range(len(names)))]
    for number, (name, row) in enumerate(zip(names, matrix.tolist(), strict=True)):
        lines.append(f"{name:>{width}} {number:>3}" + "".join(f"{value or '.':>{cell}}" for value in row))
    return "\n".join(lines)


def confusion_figure(matrix: Tensor, names: Sequence[str], title: str) -> Any:
    """The matrix int64 ``[C, C]`` as a matplotlib figure: the shade is the share of the true class, the number counts
    objects."""
    from matplotlib.figure import Figure  # without pyplot: no display is looked for, no state is left

    share = matrix.double() / matrix.sum(1, keepdim=True).clamp(min=1)
    size = 2.5 + 0.27 * len(names)
    figure = Figure((size, size), layout="constrained")
    axes = figure.subplots()
    axes.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    axes.set(title=title, xlabel="predicted", ylabel="true")
    for row, column in matrix.nonzero().tolist():
        shade = "white" if share[row, column] > 0.5 else "black"
        axes.text(column, row, int(matrix[row, column]), ha="center", va="center", fontsize=6, color=shade)
    return figure

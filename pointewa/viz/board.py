"""What TensorBoard shows of a finished run besides its curves: clouds that turn, features, hyperparameters."""

from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from io import StringIO
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pointewa.viz.embedding import embed
from pointewa.viz.panels import Panel

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def add_cloud(board: "SummaryWriter", tag: str, panel: Panel, step: int) -> None:
    """A cloud for the mesh plugin, which turns it."""
    fitted = panel.fitted()
    points, colours = (torch.from_numpy(array).unsqueeze(0) for array in (fitted.points, fitted.colours))
    board.add_mesh(tag, points, colours, None, {"material": {"cls": "PointsMaterial", "size": 0.03}}, step)


def add_features(board: "SummaryWriter", features: Tensor, labels: Tensor, names: Sequence[str], step: int) -> None:
    """Features ``[N, F]`` for the embedding projector, with the classes of labels ``[N]``.

    It draws three of at most 200 dimensions: the 50 directions of largest variance are enough, and small to load."""
    reduced = torch.from_numpy(embed(features, "pca", 50))
    with redirect_stdout(StringIO()):  # it prints a warning if the folder exists
        board.add_embedding(reduced, [names[label] for label in labels.tolist()], global_step=step, tag="features")


def add_hyperparameters(
    board: "SummaryWriter", values: Mapping[str, Any], metrics: Mapping[str, float], step: int
) -> None:
    """Hyperparameters and the metrics that they led to, for the table of all runs.

    Args:
        board: where to.
        values: by their names; those that are neither numbers nor text are written as text.
        metrics: by their names.
        step: the iteration.
    """
    plain = {key: value if isinstance(value, bool | int | float | str) else str(value) for key, value in values.items()}
    board.add_hparams(plain, {f"result/{name}": value for name, value in metrics.items()}, None, ".", step)

"""What TensorBoard shows of a finished run besides its curves: clouds that turn, features, hyperparameters."""

from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from io import StringIO
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pointewa.config import Config
from pointewa.viz.embedding import embed
from pointewa.viz.panels import Panel

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_PLACES = ("data.root", "data.stream")  # they say where a run was made, not how


def add_cloud(board: "SummaryWriter", tag: str, panel: Panel, step: int) -> None:
    """A cloud for the mesh plugin, which turns it."""
    fitted = panel.fitted()
    points, colours = (torch.from_numpy(array).unsqueeze(0) for array in (fitted.points, fitted.colours))
    board.add_mesh(tag, points, colours, None, {"material": {"cls": "PointsMaterial", "size": 0.03}}, step)


def add_features(board: "SummaryWriter", features: Tensor, labels: Tensor, names: Sequence[str], step: int) -> None:
    """Features ``[N, F]`` for the embedding projector, with the classes of labels ``[N]``.

    It draws three dimensions of at most 200: the 50 directions of largest variance are enough, and small to load."""
    reduced = torch.from_numpy(embed(features, "pca", 50))
    with redirect_stdout(StringIO()):  # it prints a warning where the folder is there
        board.add_embedding(reduced, [names[label] for label in labels.tolist()], global_step=step, tag="features")


def add_hyperparameters(board: "SummaryWriter", config: Config, figures: Mapping[str, float], step: int) -> None:
    """The configuration and the figures that it led to, for the table of all runs."""
    flat = {f"{group}.{key}": value for group, keys in asdict(config).items() for key, value in keys.items()}
    told = {key: _scalar(value) for key, value in flat.items()
            if value is not None and not key.startswith("run.") and key not in _PLACES}  # fmt: skip
    board.add_hparams(told, {f"result/{name}": value for name, value in figures.items()}, None, ".", step)


def _scalar(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | str) else str(value)

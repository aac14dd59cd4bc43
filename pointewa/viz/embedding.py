"""The features of a set in two or three dimensions."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pointewa.viz.panels import BACKGROUND, INK, Panel, Picture, palette, rgb

METHODS = ("pca", "tsne")
_LONGEST = 24  # letters of a class's name in a figure


def embed(features: Tensor, method: str, dimensions: int = 2, seed: int = 0) -> np.ndarray:
    """Features ``[N, F]``, each scaled to mean 0 and variance 1, as points ``[N, dimensions]``.

    Args:
        features: of the model.
        method: "pca": the directions of largest variance; "tsne": neighbours stay neighbours, distances mean little.
        dimensions: 2 or 3.
        seed: of t-SNE.

    Raises:
        ValueError: an unknown method, or fewer than 4 objects.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if len(features) < 4:
        raise ValueError(f"expected at least 4 objects, got {len(features)}")
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    x = features.double()
    x = ((x - x.mean(0)) / x.std(0).clamp(min=1e-12)).cpu().numpy()
    if not x.any():  # all objects are equal: PCA would divide by 0, and t-SNE crash
        return np.zeros((len(x), dimensions))
    x = PCA(min(50, *x.shape), random_state=seed).fit_transform(x)
    x = np.pad(x, [(0, 0), (0, max(0, dimensions - x.shape[1]))])  # of fewer features than dimensions
    if method == "tsne":
        perplexity = min(30, (len(x) - 1) / 3)
        x = TSNE(dimensions, perplexity=perplexity, init="pca", random_state=seed, n_jobs=1).fit_transform(x)
    return x[:, :dimensions]


def embedding_figure(places: np.ndarray, labels: Tensor, names: Sequence[str], title: str) -> Any:
    """A matplotlib figure of places ``[N, 2]`` coloured by labels ``[N]``, each class's name at its median, or, where
    another name is, as near as there is room, with a line to the median."""
    from matplotlib.figure import Figure  # without pyplot: no display is looked for, no state is left
    from matplotlib.patheffects import withStroke

    # The names of many classes need room.
    shown = {number: _shortened(names[number]) for number in torch.unique(labels).tolist()}
    grown = max(1.0, (sum(len(name) + 2 for name in shown.values()) / 450) ** 0.5)
    figure = Figure((8.5 * grown, 7.2 * grown), facecolor=BACKGROUND)
    axes = figure.add_axes((0.02, 0.02, 0.96, 0.93))
    labels, colours, texts = labels.cpu().numpy(), palette(len(names)), []
    size = float(np.clip(9000 / len(labels), 8, 30))
    for number, name in shown.items():
        mine, colour = places[labels == number], colours[number]
        axes.scatter(*mine.T, s=size, color=colour, alpha=0.75, linewidths=0)
        stroke = [withStroke(linewidth=3, foreground=BACKGROUND)]
        texts.append(axes.text(*np.median(mine, 0), name, ha="center", va="center", fontsize=9, fontweight="bold",
                               color=colour, path_effects=stroke, parse_math=False, zorder=3))  # fmt: skip
    axes.set_title(title, color=INK, fontsize=12, parse_math=False)
    axes.set(xticks=[], yticks=[], xlim=axes.get_xlim(), ylim=axes.get_ylim())
    axes.spines[:].set_visible(False)
    _part(axes, texts)
    return figure


def _shortened(name: str) -> str:
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"


def _part(axes: Any, texts: Sequence[Any]) -> None:
    """Move texts apart: each to the first free place on a spiral about its own, to which a line leads back."""
    to_data, steps = axes.transData.inverted(), np.arange(4000)
    angle, radius = 2.4 * steps, 3 * np.sqrt(steps) * (1 + steps / 1000)  # the golden angle covers a disc evenly
    spiral = np.stack([1.6 * radius * np.cos(angle), radius * np.sin(angle)], 1)  # names are wider than high
    frame, taken = axes.get_window_extent(), np.empty((0, 4))  # in pixels: left, bottom, right, top
    for text in texts:
        own, box = np.array(text.get_position()), text.get_window_extent()
        half = np.array([box.width / 2 + 2, box.height / 2 + 1])
        centres = np.clip(axes.transData.transform(own) + spiral, frame.min + half, frame.max - half)
        boxes = np.concatenate([centres - half, centres + half], 1)
        apart = (boxes[:, None, :2] >= taken[:, 2:]) | (boxes[:, None, 2:] <= taken[:, :2])
        chosen = int(apart.any(2).all(1).argmax())  # the first free place
        taken = np.concatenate([taken, boxes[chosen : chosen + 1]])
        place = to_data.transform(centres[chosen])
        text.set_position(place)
        if np.linalg.norm(centres[chosen] - centres[0]) > half[1]:
            axes.plot(*zip(own, place, strict=True), color=text.get_color(), linewidth=0.8, zorder=2)


def embedding_picture(places: np.ndarray, labels: Tensor, names: Sequence[str], title: str) -> Picture:
    """Places ``[N, 3]`` as one cloud that turns, with a legend of the classes that occur."""
    colours = palette(len(names))
    labels = labels.cpu()
    # A single outlier would make all others small: the frame holds 99 of 100.
    middle = np.median(places, 0)
    frame = places[np.argsort(np.linalg.norm(places - middle, axis=1))[: max(2, int(0.99 * len(places)))]]
    each = np.array([rgb(colours[label]) for label in labels.tolist()])
    legend = [(colours[label], names[label]) for label in torch.unique(labels).tolist()]
    sizes = np.full(len(places), 0.6, np.float32)
    return Picture([Panel(places.astype(np.float32), each, "", sizes, frame.astype(np.float32))], title, 1, legend)

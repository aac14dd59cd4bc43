"""The features of a set in two or three dimensions."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pointewa.viz.panels import BACKGROUND, INK, Panel, Picture, palette, rgb

METHODS = ("pca", "tsne")


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
    """A matplotlib figure of places ``[N, 2]`` coloured by labels ``[N]``, each class's name at its median."""
    from matplotlib.figure import Figure  # without pyplot: no display is looked for, no state is left
    from matplotlib.patheffects import withStroke

    figure = Figure((8.5, 7.2), facecolor=BACKGROUND, layout="constrained")
    axes = figure.subplots()
    labels = labels.cpu().numpy()
    size = float(np.clip(9000 / len(labels), 8, 30))
    for number, (name, colour) in enumerate(zip(names, palette(len(names)), strict=True)):
        mine = places[labels == number]
        if len(mine):
            axes.scatter(*mine.T, s=size, color=colour, alpha=0.75, linewidths=0)
            x, y = np.median(mine, 0)
            axes.text(x, y, name, ha="center", va="center", fontsize=9, color=colour, fontweight="bold",
                      path_effects=[withStroke(linewidth=3, foreground=BACKGROUND)], zorder=3)  # fmt: skip
    axes.set_title(title, color=INK, fontsize=12)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    return figure


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

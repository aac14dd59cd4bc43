"""Drawings of clouds and of what models make of them: each a picture or a figure, and the numbers behind it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from pointewa.errors import ConfigError, counted, first_line
from pointewa.models import PointTransformerClassifier, Reconstruction
from pointewa.viz.embedding import embed, embedding_figure, embedding_picture
from pointewa.viz.experts import disagreements, experts_figure, pairwise_distances
from pointewa.viz.mistakes import confident_mistakes, mistake_title
from pointewa.viz.panels import Picture, plain_panel
from pointewa.viz.patches import cut, patch_panels
from pointewa.viz.reconstruction import reconstruction_picture
from pointewa.viz.saliency import SALIENCY_LEGEND, saliency, saliency_panels


@dataclass(frozen=True)
class Item:
    """An object: points ``[P, 3]`` as the model takes them, and where they are known its class and the labels
    int64 ``[P]`` of its points."""

    points: Tensor
    name: str
    class_name: str | None = None
    point_labels: Tensor | None = None

    @property
    def title(self) -> str:
        """Its name, and its class unless the name says it."""
        known = self.class_name is None or self.class_name in self.name
        return self.name if known else f"{self.class_name}, {self.name}"


class Drawing(NamedTuple):
    """What is drawn.

    Args:
        picture: clouds in a grid; or a function from what it is for ("png", "html") to such a grid or to a matplotlib
            figure.
        numbers: what it shows, as plain values.
    """

    picture: Picture | Callable[[str], Any]
    numbers: dict[str, Any]

    def of(self, kind: str) -> Any:
        """The `Picture` or matplotlib figure for "png" or "html"."""
        return self.picture if isinstance(self.picture, Picture) else self.picture(kind)


def clouds(items: Sequence[Item], heading: str = "", columns: int | None = None) -> Drawing:
    """Clouds in a grid, under a heading unless all of them are files, which belong to no data set."""
    known = any(item.class_name for item in items)
    panels = [plain_panel(item.points, item.title) for item in items]
    return Drawing(Picture(panels, heading if known else "", columns), _names(items))


def patches(items: Sequence[Item], num_groups: int, group_size: int) -> Drawing:
    """How each object is cut into patches, a row an object.

    Raises:
        ConfigError: an object with fewer points than groups.
    """
    panels = []
    for item in items:
        with _fitting(item.name):
            panels += patch_panels(item.points, cut(item.points, num_groups, group_size), item.title)
    heading = (
        f"{counted(num_groups, 'patch', 'es')} of {counted(group_size, 'point')}, {len(items[0].points)} points a cloud"
    )
    return Drawing(Picture(panels, heading, 3), _names(items) | {"num_groups": num_groups, "group_size": group_size})


def saliencies(
    model: PointTransformerClassifier, class_names: Sequence[str], items: Sequence[Item], heading: str = ""
) -> Drawing:
    """What the prediction for each object rests on, a row an object.

    Raises:
        ConfigError: a model of one patch.
    """
    panels, numbers = [], []
    for item in items:
        with _fitting(item.name):
            found = saliency(model, item.points)
        predicted = class_names[found.predicted]
        panels += saliency_panels(item.points, found, item.title, predicted)
        numbers.append({"object": item.name, "truth": item.class_name, "predicted": predicted,
                        "probability": found.probabilities[found.predicted].item(),
                        "drops": found.drops.tolist()})  # fmt: skip
    return Drawing(Picture(panels, heading, 3, SALIENCY_LEGEND), {"objects": numbers})


def mistakes(
    logits: Tensor,
    labels: Tensor,
    class_names: Sequence[str],
    at: Callable[[Sequence[int]], Sequence[Item]],
    count: int = 12,
    columns: int | None = None,
    model: str = "",
) -> Drawing:
    """The mistakes that a classifier is most confident of, in that order.

    Args:
        logits: ``[N, C]`` of a set.
        labels: ``[N]``.
        class_names: C names.
        at: from numbers of objects to the objects.
        count: how many are drawn at most.
        columns: of the grid.
        model: named in the heading.

    Raises:
        ConfigError: there is no mistake.
    """
    every = confident_mistakes(logits, labels)
    shown = every[:count]
    if not shown:
        raise ConfigError(
            f"{model or 'the model'} makes no mistake on {counted(len(labels), 'object')}: there is nothing to draw"
        )
    items = at([one.index for one in shown])
    panels = [plain_panel(item.points, mistake_title(one, class_names)) for one, item in zip(shown, items, strict=True)]
    heading = f"the {len(shown)} most confident of {counted(len(every), 'mistake')} on {counted(len(labels), 'object')}"
    heading += f", {model}" if model else ""
    rows = [{"index": one.index, "object": item.name, "truth": class_names[one.truth],
             "predicted": class_names[one.predicted], "confidence": one.confidence}
            for one, item in zip(shown, items, strict=True)]  # fmt: skip
    numbers = {"mistakes": len(every), "objects": len(labels), "shown": rows}
    return Drawing(Picture(panels, heading, columns), numbers)


class Reconstructing(Protocol):
    """A model that predicts what was masked, such as `pointewa.models.MaskedAutoencoder`."""

    def reconstruct(self, points: Tensor) -> Reconstruction:
        """Of clouds ``[B, P, 3]``."""
        ...


def reconstructions(model: Reconstructing, items: Sequence[Item], seed: int = 0, heading: str = "") -> Drawing:
    """Masked input, prediction, and truth, a row an object.

    Args:
        model: in evaluation mode.
        items: of equally many points.
        seed: of the masks.
        heading: above.

    Raises:
        ConfigError: objects of different sizes.
    """
    with _fitting("objects"), torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        found = model.reconstruct(torch.stack([item.points for item in items]))
    return Drawing(reconstruction_picture(found, [item.title for item in items], heading), _names(items))


def embedding(
    features: Tensor, labels: Tensor, class_names: Sequence[str], method: str, seed: int = 0, title: str = ""
) -> Drawing:
    """Features ``[N, F]`` coloured by labels ``[N]``: a flat figure as PNG, a cloud that turns as HTML.

    Args:
        features: of a set.
        labels: of the set.
        class_names: C names.
        method: one of `pointewa.viz.embedding.METHODS`.
        seed: of t-SNE.
        title: above.

    Raises:
        ConfigError: on drawing, fewer than 4 objects.
    """

    def draw(kind: str) -> Any:
        make, dimensions = (embedding_figure, 2) if kind == "png" else (embedding_picture, 3)
        with _fitting("embedding"):
            places = embed(features, method, dimensions, seed)
        return make(places, labels, class_names, title)

    return Drawing(draw, {"objects": len(features), "features": features.shape[1], "method": method})


def experts(model: nn.Module, records: Sequence[Mapping[str, Any]], title: str = "") -> Drawing:
    """How far the experts of a model are from each other: over its training, and now.

    Args:
        model: with MoE layers.
        records: of the training's epochs.
        title: above.
    """
    distances, series = pairwise_distances(model), disagreements(records)
    numbers = {"distances": {name: matrix.tolist() for name, matrix in distances.items()}, "disagreement": series}
    return Drawing(lambda kind: experts_figure(series, distances, title), numbers)


@contextmanager
def _fitting(what: str) -> Iterator[None]:
    """Objects of too few points, or too few objects, are the user's to mend."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"{what}: {first_line(error)}") from error


def _names(items: Sequence[Item]) -> dict[str, Any]:
    return {"objects": [item.name for item in items]}

"""Parts of objects: the true ones, the predicted ones, and where they differ."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from pointewa.models.parts import EVERY, Parts
from pointewa.viz.panels import FAINT, FOR, Panel, Picture, palette, rgb


@dataclass(frozen=True)
class SegmentedCloud:
    """One object with its parts.

    Args:
        points: ``[P, 3]``, y up.
        predicted: parts, int64 ``[P]``.
        truth: parts, int64 ``[P]``; None where they are not known.
        title: drawn under it.
    """

    points: Tensor
    predicted: Tensor
    truth: Tensor | None
    title: str


def part_colours(parts: Parts) -> list[str]:
    """A colour ("#rrggbb") for each part. Within a category they are those of a palette of as many colours as it has
    parts, and further hues for parts of all categories."""
    members = {one: [i for i, other in enumerate(parts.classes) if other == one] for one in set(parts.classes)}
    every = members.pop(EVERY, [])
    colours = [""] * len(parts)
    for mine in (members or {0: []}).values():
        for part, colour in zip([*mine, *every], palette(len(mine) + len(every)), strict=True):
            colours[part] = colour
    return colours


def parts_picture(
    clouds: Sequence[SegmentedCloud], parts: Parts, class_names: Sequence[str], heading: str = ""
) -> Picture:
    """A row an object: truth, prediction, errors; of one whose truth is not known the prediction only.

    Args:
        clouds: objects, all with their truth or all without.
        parts: what ``predicted`` and ``truth`` count.
        class_names: names of the categories.
        heading: above the picture.
    """
    shown = sorted({int(part) for cloud in clouds for one in (cloud.predicted, cloud.truth) if one is not None
                    for part in one.unique()})  # fmt: skip
    categories = {parts.classes[part] for part in shown}
    # Beside each other each part has a colour of its own; the parts of one category have the same in every picture.
    colours = part_colours(parts)
    if len(categories) > 1:
        for part, colour in zip(shown, palette(len(shown)), strict=True):
            colours[part] = colour
    table = np.array([rgb(colour) for colour in colours])
    panels = []
    for cloud in clouds:
        points = cloud.points.detach().float().cpu().numpy()
        predicted = cloud.predicted.cpu().numpy()
        if cloud.truth is None:
            panels.append(Panel(points, table[predicted], cloud.title))
            continue
        truth = cloud.truth.cpu().numpy()
        wrong = (predicted != truth)[:, None]
        panels += [
            Panel(points, table[truth], f"{cloud.title}\ntruth"),
            Panel(points, table[predicted], "prediction"),
            Panel(points, np.where(wrong, rgb(FOR), rgb(FAINT)), f"errors: {wrong.sum()} of {len(points)} points"),
        ]
    several = len(categories - {EVERY}) > 1
    legend = [(colours[part], part_name(parts, part, class_names if several else ())) for part in shown]
    known = any(cloud.truth is not None for cloud in clouds)
    return Picture(panels, heading, 3 if known else None, (*legend, *([(FOR, "predicted wrongly")] if known else [])))


def part_name(parts: Parts, part: int, class_names: Sequence[str] = ()) -> str:
    """The name of a part, after that of its category where names of categories are given."""
    of, name = parts.classes[part], parts.names[part]
    return name if of == EVERY or not class_names else f"{class_names[of]}: {name}"

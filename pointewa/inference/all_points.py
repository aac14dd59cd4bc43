"""From a sample of an object to all of its points."""

import torch
from torch import Tensor

from pointewa.ops import interpolate


def distinct(points: Tensor) -> int:
    """How many points of ``[P, 3]`` there are before they start over, as those of objects do that have fewer than the
    others of their set."""
    for again in (points[1:] == points[0]).all(1).nonzero().squeeze(1).tolist():
        count = again + 1
        if torch.equal(points[count:], points[: len(points) - count]):
            return count
    return len(points)


def on_all_points(logits: Tensor, sample: Tensor, points: Tensor) -> Tensor:
    """Logits of all points of an object, from those of a sample of it: of the three nearest points of the sample,
    weighted by their inverse squared distances (`pointewa.ops.interpolate`).

    Args:
        logits: ``[K, M]``.
        sample: ``[K, 3]``, whose points may start over.
        points: ``[P, 3]``.
    """
    count = distinct(sample)
    return interpolate(points[None], sample[None, :count], logits[None, :count])[0]

"""From a sample of an object to all of its points."""

from torch import Tensor

from pointewa.ops import distinct, interpolate


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

"""What a task has to say."""

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """Clouds as the loaders give them, on the device of the training.

    Args:
        points: float32 ``[B, P, 3]``.
        labels: int64 ``[B]``, of the clouds.
        point_labels: int64 ``[B, P]``, of their points, in step with them; None where the data set has none.
    """

    points: Tensor
    labels: Tensor
    point_labels: Tensor | None = None

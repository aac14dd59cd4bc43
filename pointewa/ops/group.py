"""Gathering points by index."""

import torch
from torch import Tensor


def group(points: Tensor, index: Tensor) -> Tensor:
    """Gather points of each cloud.

    Args:
        points: ``[B, N, C]``.
        index: int64 ``[B, ...]`` with values in [0, N).

    Returns:
        ``[B, ..., C]``, differentiable with respect to ``points``.

    Raises:
        ValueError: different batch sizes.
    """
    if len(points) != len(index):
        raise ValueError(f"points and index must have the same batch size, got {len(points)} and {len(index)}")
    batch = torch.arange(len(points), device=points.device).view(-1, *[1] * (index.ndim - 1))
    return points[batch, index]

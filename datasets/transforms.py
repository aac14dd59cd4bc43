"""Augmentations, each for a whole batch at once, on the batch's device and from its generator."""

import math

import torch
from torch import Generator, Tensor

# Point-BERT and Point-MAE draw 1024 points at random from a farthest-point sample of 1200.
_POOL = 1200 / 1024


def random_subset(points: Tensor, num_points: int, generator: Generator) -> Tensor:
    """``num_points`` of each cloud at random from a slightly larger farthest-point sample, in random order.

    The order matters: it makes the model's own farthest point sampling start anywhere, not at one fixed point.

    Args:
        points: ``[B, P, 3]`` in farthest-point order, P >= ``num_points``.
        num_points: points to draw.
        generator: of the same device.
    """
    batch, available, _ = points.shape
    pool = min(available, math.ceil(num_points * _POOL))
    order = torch.rand(batch, pool, device=points.device, generator=generator).argsort(1)[:, :num_points]
    return points.gather(1, order.unsqueeze(-1).expand(-1, -1, 3))


def scale_shift(points: Tensor, generator: Generator) -> Tensor:
    """Scale each axis of each cloud ``[B, P, 3]`` by U(2/3, 3/2), then shift it by U(-0.2, 0.2), as Point-BERT and
    Point-MAE do."""
    scale, shift = torch.rand(2, len(points), 1, 3, device=points.device, generator=generator)
    return points * (2 / 3 + scale * (3 / 2 - 2 / 3)) + (shift * 0.4 - 0.2)


AUGMENTATIONS = {"none": lambda points, generator: points, "scale_shift": scale_shift}

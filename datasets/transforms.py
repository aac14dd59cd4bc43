"""Augmentations, each for a whole batch at once, on the batch's device and from its generator."""

import math

import torch
from torch import Generator, Tensor


def pool_size(num_points: int) -> int:
    """Size of the farthest-point sample that ``num_points`` are drawn from: Point-BERT's and Point-MAE's 1200 for
    1024."""
    return math.ceil(num_points * 1200 / 1024)


def random_subset(points: Tensor, num_points: int, generator: Generator) -> Tensor:
    """``num_points`` of each cloud at random from a slightly larger farthest-point sample, in random order.

    The order matters: it makes the model's own farthest point sampling start anywhere, not at one fixed point.

    Args:
        points: ``[B, P, 3]`` in farthest-point order, P >= ``num_points``.
        num_points: points to draw.
        generator: of the same device.
    """
    batch, available, _ = points.shape
    pool = min(available, pool_size(num_points))
    order = torch.rand(batch, pool, device=points.device, generator=generator).argsort(1)[:, :num_points]
    return points.gather(1, order.unsqueeze(-1).expand(-1, -1, 3))


def scale_shift(points: Tensor, generator: Generator) -> Tensor:
    """Scale each axis of each cloud ``[B, P, 3]`` by U(2/3, 3/2), then shift it by U(-0.2, 0.2), as Point-BERT and
    Point-MAE do."""
    scale, shift = torch.rand(2, len(points), 1, 3, device=points.device, generator=generator)
    return points * (2 / 3 + scale * (3 / 2 - 2 / 3)) + (shift * 0.4 - 0.2)


def rotate_up(points: Tensor, generator: Generator) -> Tensor:
    """Turn each cloud ``[B, P, 3]`` about the up axis, y, by a uniform angle, as later work does on ScanObjectNN."""
    angle = torch.rand(len(points), device=points.device, generator=generator) * (2 * math.pi)
    sin, cos = angle.sin(), angle.cos()
    zero, one = torch.zeros_like(sin), torch.ones_like(sin)
    matrix = torch.stack([cos, zero, sin, zero, one, zero, -sin, zero, cos], 1).view(-1, 3, 3)
    return points @ matrix


AUGMENTATIONS = {"none": lambda points, generator: points, "scale_shift": scale_shift, "rotate_up": rotate_up}

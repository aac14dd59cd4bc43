"""Augmentations, each for a whole batch at once, on the batch's device and from its generator."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Generator, Tensor

from pointewa.datasets.base import Labelled


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
    return select(Labelled(points), subset_indices(points, generator, num_points)).points


def subset_indices(points: Tensor, generator: Generator, num_points: int) -> Tensor:
    """Which points `random_subset` draws, int64 ``[B, num_points]``."""
    batch, available, _ = points.shape
    pool = min(available, pool_size(num_points))
    return torch.rand(batch, pool, device=points.device, generator=generator).argsort(1)[:, :num_points]


def select(clouds: Labelled, index: Tensor) -> Labelled:
    """The points ``index`` ``[B, K]`` of each cloud, with their labels."""
    points, labels = clouds
    points = points.gather(1, index.unsqueeze(-1).expand(-1, -1, 3))
    return Labelled(points, None if labels is None else labels.gather(1, index))


def scale_shift(points: Tensor, generator: Generator) -> Tensor:
    """Scale each axis of each cloud ``[B, P, 3]`` by U(2/3, 3/2), then shift it by U(-0.2, 0.2), as Point-BERT and
    Point-MAE do."""
    scale, shift = torch.rand(2, len(points), 1, 3, device=points.device, generator=generator)
    return points * (2 / 3 + scale * (3 / 2 - 2 / 3)) + (shift * 0.4 - 0.2)


def scale_shift_uniform(points: Tensor, generator: Generator) -> Tensor:
    """Scale each cloud ``[B, P, 3]`` by U(0.8, 1.25), all axes alike, then shift each axis by U(-0.1, 0.1), as
    PointNet++ and after it Point-BERT and Point-MAE do in part segmentation."""
    scale = torch.rand(len(points), 1, 1, device=points.device, generator=generator)
    shift = torch.rand(len(points), 1, 3, device=points.device, generator=generator)
    return points * (0.8 + scale * 0.45) + (shift * 0.2 - 0.1)


def rotate_up(points: Tensor, generator: Generator) -> Tensor:
    """Turn each cloud ``[B, P, 3]`` about the up axis, y, by a uniform angle, as later work does on ScanObjectNN."""
    angle = torch.rand(len(points), device=points.device, generator=generator) * (2 * math.pi)
    sin, cos = angle.sin(), angle.cos()
    zero, one = torch.zeros_like(sin), torch.ones_like(sin)
    matrix = torch.stack([cos, zero, sin, zero, one, zero, -sin, zero, cos], 1).view(-1, 3, 3)
    return points @ matrix


def jitter(points: Tensor, generator: Generator, sigma: float = 0.01, clip: float = 0.05) -> Tensor:
    """Move each coordinate of ``[B, P, 3]`` by a Gaussian of ``sigma``, clipped to ``clip``, as PointNet does; both are
    meant for clouds of largest norm 1."""
    noise = torch.randn(points.shape, device=points.device, generator=generator)
    return points + (sigma * noise).clamp(-clip, clip)


def dropout_indices(points: Tensor, generator: Generator, most: float = 0.875) -> Tensor:
    """PointNet++'s random dropout of points: of each cloud a share of U(0, ``most``) is replaced by its first point.

    Args:
        points: ``[B, P, 3]``; P stays as it is.
        generator: of the same device.
        most: largest share.

    Returns:
        For each place the point that comes there, int64 ``[B, P]``.
    """
    batch, count, _ = points.shape
    share = most * torch.rand(batch, 1, device=points.device, generator=generator)
    dropped = torch.rand(batch, count, device=points.device, generator=generator) < share
    return torch.arange(count, device=points.device).masked_fill(dropped, 0)


MOVES: dict[str, Callable[[Tensor, Generator], Tensor]] = {
    "scale_shift": scale_shift, "scale_shift_uniform": scale_shift_uniform, "rotate_up": rotate_up, "jitter": jitter,
}  # fmt: skip
CHOICES: dict[str, Callable[[Tensor, Generator], Tensor]] = {"dropout": dropout_indices}
AUGMENTATIONS = (*MOVES, *CHOICES)


def augment(clouds: Labelled, names: Iterable[str], generator: Generator) -> Labelled:
    """One augmentation after the other; each label stays with its point.

    Args:
        clouds: a batch.
        names: of `AUGMENTATIONS`, in the order in which they are applied.
        generator: of the batch's device.
    """
    for name in names:
        if name in MOVES:
            clouds = clouds._replace(points=MOVES[name](clouds.points, generator))
        else:
            clouds = select(clouds, CHOICES[name](clouds.points, generator))
    return clouds

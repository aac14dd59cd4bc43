"""Corruptions to measure a classifier's robustness by, each for a whole batch at once, at five severities.

In the spirit of ModelNet40-C (Sun et al., arXiv 2201.12296) and ModelNet-C (Ren et al., arXiv 2202.03377), written
anew: numbers are comparable between models evaluated here, not with those published for either benchmark.

Clouds have the y axis up. The functions of single corruptions take them centred, with largest norm 1 (the object's
radius, the unit of all lengths here); `corrupt` takes them at any place and scale. Each cloud is corrupted in its own
way, but all keep or gain the same number of points, so that a batch stays one tensor.
"""

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor
from torch.nn.functional import normalize

from pointewa.errors import DataError
from pointewa.ops import group, unit_sphere

SEVERITIES = (1, 2, 3, 4, 5)
_REGIONS = 4  # neighbourhoods that dropout_local removes


def jitter(points: Tensor, std: float, generator: Generator) -> Tensor:
    """Gaussian noise on every coordinate of ``[B, P, 3]``."""
    return points + std * torch.randn(points.shape, device=points.device, generator=generator)


def dropout_global(points: Tensor, share: float, generator: Generator) -> Tensor:
    """Remove a share of the points of ``[B, P, 3]``, drawn at random."""
    score = torch.rand(points.shape[:2], device=points.device, generator=generator)
    return _without(points, score, round(share * points.shape[1]))


def dropout_local(points: Tensor, share: float, generator: Generator) -> Tensor:
    """Remove a share of the points of ``[B, P, 3]`` as neighbourhoods: one after another, the points nearest to one
    that is drawn among those left."""
    batch, total, _ = points.shape
    removed = 0
    for region in range(1, _REGIONS + 1):
        index = torch.randint(points.shape[1], (batch, 1), device=points.device, generator=generator)
        nearness = -(points - group(points, index)).norm(dim=-1)
        size = round(share * total * region / _REGIONS) - removed
        points, removed = _without(points, nearness, size), removed + size
    return points


def outliers(points: Tensor, share: float, generator: Generator) -> Tensor:
    """Add points uniform in the unit ball, as a share of the P of ``[B, P, 3]``."""
    shape = (len(points), round(share * points.shape[1]), 1)
    radius = torch.rand(shape, device=points.device, generator=generator) ** (1 / 3)
    return _with(points, radius * _directions(points, generator, shape[1]), generator)


def scale(points: Tensor, limit: float, generator: Generator) -> Tensor:
    """Stretch each axis of each cloud ``[B, P, 3]`` by a factor between 1/``limit`` and ``limit``, uniform in its
    logarithm: shrinking is as likely as growing."""
    exponent = 2 * torch.rand(len(points), 1, 3, device=points.device, generator=generator) - 1
    return points * limit**exponent


def shear(points: Tensor, slope: float, generator: Generator) -> Tensor:
    """Slide the layers of each cloud ``[B, P, 3]`` along a random plane through its centre, by ``slope`` times their
    distance from it. Volumes stay."""
    normal = _directions(points, generator)
    along = normalize(torch.linalg.cross(normal, _directions(points, generator)), dim=-1)
    return points + slope * (points * normal).sum(-1, keepdim=True) * along


def rotation(points: Tensor, limit: float, generator: Generator) -> Tensor:
    """Turn each cloud ``[B, P, 3]`` about a random axis by an angle between 0 and ``limit`` degrees."""
    axis = _directions(points, generator)
    angle = math.radians(limit) * torch.rand(len(points), 1, 1, device=points.device, generator=generator)
    parallel = (points * axis).sum(-1, keepdim=True) * axis
    sideways = torch.linalg.cross(axis, points)
    return parallel + (points - parallel) * angle.cos() + sideways * angle.sin()


def background(points: Tensor, share: float, generator: Generator) -> Tensor:
    """Add a square patch of the floor that each cloud ``[B, P, 3]`` stands on and one of a wall that it touches on a
    random side, together a share of P points. The patches grow with the share, so that clutter is always
    equally dense."""
    batch, total, _ = points.shape
    edge, count = 2 * math.sqrt(share), round(share * total)
    side = 2 * math.pi * torch.rand(batch, 1, 1, device=points.device, generator=generator)
    zero = torch.zeros_like(side)
    to_wall = torch.cat([side.cos(), zero, side.sin()], -1)
    along_wall = torch.cat([-side.sin(), zero, side.cos()], -1)
    up = torch.tensor([0.0, 1, 0], device=points.device)
    bottom = (points * up).sum(-1).amin(1)[:, None, None]
    reach = (points * to_wall).sum(-1).amax(1)[:, None, None]
    u, v = edge * (torch.rand(2, batch, count, 1, device=points.device, generator=generator) - 0.5)
    floor = u * to_wall + bottom * up
    wall = reach * to_wall + (bottom + u + edge / 2) * up
    on_floor = torch.arange(count, device=points.device)[:, None] % 2 == 0
    return _with(points, v * along_wall + torch.where(on_floor, floor, wall), generator)


def occlusion(points: Tensor, share: float, generator: Generator) -> Tensor:
    """Remove the share of the points of ``[B, P, 3]`` that lies farthest from a viewer in a random direction."""
    depth = (points * _directions(points, generator)).sum(-1)
    return _without(points, depth, round(share * points.shape[1]))


def _directions(points: Tensor, generator: Generator, count: int = 1) -> Tensor:
    """``count`` unit vectors a cloud, ``[B, count, 3]``, uniform on the sphere."""
    return normalize(torch.randn(len(points), count, 3, device=points.device, generator=generator), dim=-1)


def _without(points: Tensor, score: Tensor, count: int) -> Tensor:
    """Each cloud ``[B, P, 3]`` without the ``count`` points of highest score ``[B, P]``, the others in their order."""
    index = score.topk(points.shape[1] - count, largest=False).indices
    return group(points, index.sort(1).values)


def _with(points: Tensor, added: Tensor, generator: Generator) -> Tensor:
    """Both sets of points in random order: a prefix, or where sampling starts, must not tell object from clutter."""
    points = torch.cat([points, added], 1)
    return group(points, torch.rand(points.shape[:2], device=points.device, generator=generator).argsort(1))


def _graded(
    corruption: Callable[[Tensor, float, Generator], Tensor], *strengths: float
) -> Callable[[Tensor, int, Generator], Tensor]:
    return lambda points, severity, generator: corruption(points, strengths[severity - 1], generator)


# The levels of jitter, outliers and (but for its 0.675) dropout_global are ModelNet-C's; those of scale start where
# `pointewa.datasets.transforms.scale_shift` ends.
CORRUPTIONS: dict[str, Callable[[Tensor, int, Generator], Tensor]] = {
    "jitter": _graded(jitter, 0.01, 0.02, 0.03, 0.04, 0.05),  # standard deviation, in radii of the object
    "dropout_global": _graded(dropout_global, 0.25, 0.375, 0.5, 0.625, 0.75),  # share of the points removed
    "dropout_local": _graded(dropout_local, 0.1, 0.2, 0.3, 0.4, 0.5),  # share removed
    "outliers": _graded(outliers, 0.01, 0.02, 0.03, 0.04, 0.05),  # points added, as a share of P
    "scale": _graded(scale, 1.5, 1.75, 2.0, 2.25, 2.5),  # largest factor, inverse of the smallest
    "shear": _graded(shear, 0.1, 0.2, 0.3, 0.4, 0.5),  # slope
    "rotation": _graded(rotation, 10, 20, 30, 40, 50),  # largest angle, degrees
    "background": _graded(background, 0.1, 0.2, 0.3, 0.4, 0.5),  # points added, as a share of P
    "occlusion": _graded(occlusion, 0.1, 0.2, 0.3, 0.4, 0.5),  # share removed
}


def corrupt(points: Tensor, name: str, severity: int, generator: Generator, normalize: bool = True) -> Tensor:
    """One corruption of a batch, done in the unit sphere and brought back to the place and the scale of the cloud.

    Args:
        points: ``[B, P, 3]``, y axis up.
        name: one of `CORRUPTIONS`.
        severity: one of `SEVERITIES`, 5 the strongest.
        generator: of the same device. From the same state a cloud is turned about the same axis, seen from the same
            side, and so on, at every severity.
        normalize: the result is centred at the clean cloud's mean and scaled to its largest norm, as a scan is
            normalised as it was taken, with its clutter and without what is hidden: for models whose clouds are
            normalised. Without, what the corruption leaves of the object keeps its coordinates: for models that take
            clouds as they come.

    Returns:
        ``[B, P', 3]``: P' < P for dropouts and occlusion, P' > P for outliers and background, and the same for every
        batch of this P. No longer in farthest-point order: use all points, not a prefix.

    Raises:
        DataError: an unknown name or severity.
    """
    if name not in CORRUPTIONS:
        raise DataError(f"corruption: expected one of {', '.join(CORRUPTIONS)}, found {name!r}")
    if severity not in SEVERITIES:
        raise DataError(f"severity: expected 1 to {SEVERITIES[-1]}, found {severity!r}")
    center = points.mean(1, keepdim=True)
    radius = (points - center).norm(dim=-1).amax(1)[:, None, None].clamp(min=1e-12)
    corrupted = CORRUPTIONS[name]((points - center) / radius, severity, generator)
    return (unit_sphere(corrupted) if normalize else corrupted) * radius + center

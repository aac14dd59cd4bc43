"""An order of the points that follows from where they are, and where one starts over."""

import torch
from torch import Tensor

from pointewa.ops.backend import check_points
from pointewa.ops.group import group


@torch.no_grad()
def canonical_order(points: Tensor) -> Tensor:
    """An order that is the same for the same points in any order: of what it gathers, every bit is equal.

    The point farthest from the centroid comes first, which is where `farthest_point_sample` starts, and the others
    follow sorted by x, y and z.

    Args:
        points: ``[B, N, 3]``, finite.

    Returns:
        Indices int64 ``[B, N]``, a permutation of the points of each cloud; for `group`.

    Raises:
        ValueError: a wrong shape or an empty cloud.
    """
    check_points("points", points, check_finite=False)
    order = points[..., 2].argsort(dim=1, stable=True)
    for axis in (1, 0):
        order = order.gather(1, points[..., axis].gather(1, order).argsort(dim=1, stable=True))
    ordered = group(points, order)  # first of all, since the digits of a mean depend on the order of its terms
    distance = (ordered - ordered.mean(1, keepdim=True)).square().sum(-1)
    rank = torch.arange(points.shape[1], device=points.device).expand_as(order)
    rank = rank.scatter(1, distance.argmax(1, keepdim=True), -1)
    return order.gather(1, rank.argsort(1))


def distinct(points: Tensor) -> int:
    """How many points of ``[P, 3]`` there are before they start over, as those of objects do that have fewer than the
    others of their set."""
    for again in (points[1:] == points[0]).all(1).nonzero().squeeze(1).tolist():
        count = again + 1
        if torch.equal(points[count:], points[: len(points) - count]):
            return count
    return len(points)

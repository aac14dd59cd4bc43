"""The canonical order, against a sort in plain Python, and where points start over."""

import pytest
import torch

from pointewa.ops import canonical_order, distinct, group


def naive(cloud):
    points = sorted(cloud.tolist())
    middle = cloud[[cloud.tolist().index(point) for point in points]].mean(0)
    distances = [((torch.tensor(point) - middle) ** 2).sum().item() for point in points]
    first = points.pop(distances.index(max(distances)))
    return [first, *points]


@pytest.mark.parametrize("grid", [False, True])
def test_the_farthest_point_from_the_centroid_is_first_and_the_others_are_sorted(grid):
    clouds = torch.randn(3, 50, 3, generator=torch.Generator().manual_seed(0))
    clouds = (2 * clouds).round() if grid else clouds  # with equal coordinates, points and distances
    order = canonical_order(clouds)
    assert order.dtype == torch.int64
    assert torch.equal(order.sort(1).values, torch.arange(50).expand(3, -1))
    assert group(clouds, order).tolist() == [naive(cloud) for cloud in clouds]
    permuted = clouds[:, torch.randperm(50, generator=torch.Generator().manual_seed(1))]
    assert torch.equal(group(permuted, canonical_order(permuted)), group(clouds, order))


def test_one_point_and_no_point():
    assert canonical_order(torch.randn(2, 1, 3)).tolist() == [[0], [0]]
    with pytest.raises(ValueError, match="no points"):
        canonical_order(torch.zeros(1, 0, 3))


def test_points_that_start_over_are_found():
    points = torch.randn(7, 3)
    assert distinct(points) == 7
    assert distinct(points.repeat(3, 1)[:17]) == 7
    assert distinct(points.repeat(2, 1)[:8]) == 7
    assert distinct(torch.cat([points, points[:1], torch.randn(7, 3)])) == 15  # a point that comes twice is no start
    assert distinct(points[:1].repeat(4, 1)) == 1

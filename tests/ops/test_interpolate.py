"""Interpolation from the nearest centres, against a loop over points."""

import pytest
import torch

from pointewa.ops import interpolate


def naive(points, centers, features, k=3):
    """Point by point, by the definition."""
    rows = []
    for cloud, at, values in zip(points, centers, features, strict=True):
        for point in cloud:
            distance = ((at - point) ** 2).sum(1)
            nearest = sorted(range(len(at)), key=lambda one, distance=distance: distance[one].item())[:k]
            weights = [1 / (distance[one] + 1e-8) for one in nearest]
            rows.append(sum(w * values[one] for w, one in zip(weights, nearest, strict=True)) / sum(weights))
    return torch.stack(rows).unflatten(0, points.shape[:2])


def inputs(num_centers, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    sizes = ((2, 9, 3), (2, num_centers, 3), (2, num_centers, 5))
    return [torch.randn(size, generator=generator, dtype=dtype) for size in sizes]


@pytest.mark.parametrize("k", [1, 3, 4])
@pytest.mark.parametrize("num_centers", [1, 2, 3, 8])
def test_it_equals_the_naive_twin_also_its_gradients(num_centers, k):
    given = inputs(num_centers)
    twins = [one.clone().requires_grad_() for one in given]
    given = [one.requires_grad_() for one in given]
    found, expected = interpolate(*given, k), naive(*twins, k)
    assert (found.shape, found.dtype) == ((2, 9, 5), torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn(found.shape, dtype=found.dtype)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    for ours, theirs in zip(given, twins, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9)


def test_a_point_in_the_place_of_a_centre_takes_its_features():
    _, centers, features = inputs(8)
    torch.testing.assert_close(interpolate(centers, centers, features), features, rtol=0, atol=1e-6)
    centers[:, 1] = centers[:, 0]  # of two in one place the mean
    found = interpolate(centers[:, :1], centers, features)[:, 0]
    torch.testing.assert_close(found, features[:, :2].mean(1), rtol=0, atol=1e-6)


def test_constant_features_stay_constant_and_types_are_kept():
    points, centers, features = inputs(8, torch.float32)
    assert (interpolate(points, centers, torch.full_like(features, 3)) - 3).abs().max() < 1e-5
    expected = interpolate(points, centers, features)
    with torch.autocast("cpu", torch.bfloat16):
        found = interpolate(points, centers, features.bfloat16())
        assert torch.equal(interpolate(points, centers, features), expected)
    assert found.dtype == torch.bfloat16
    assert (found - expected).abs().max() < 0.02
    # Distances of bfloat16 would not tell these points from their neighbours.
    near = torch.tensor([[[100.0, 0, 0], [100.25, 0, 0], [0.0, 0, 0]]])
    with torch.autocast("cpu", torch.bfloat16):
        found = interpolate(near[:, :2], near, torch.tensor([[[0.0], [1.0], [2.0]]]))
    assert found.flatten().tolist() == pytest.approx([0, 1], abs=1e-4)


def test_refusals():
    points, centers, features = inputs(8)
    with pytest.raises(
        ValueError, match=r"features must be of shape \[B, G, C\] for centers \[B, G, 3\], got \[2, 7, 5\]"
    ):
        interpolate(points, centers, features[:, :7])
    with pytest.raises(ValueError, match="num_neighbors must be at least 1, got 0"):
        interpolate(points, centers, features, 0)
    with pytest.raises(ValueError, match="points has no points"):
        interpolate(points, centers[:, :0], features[:, :0])
    points[1, 3, 0] = torch.nan
    with pytest.raises(ValueError, match=r"queries has non-finite values in cloud\(s\) \[1\] of 2"):
        interpolate(points, centers, features)

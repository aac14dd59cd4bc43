"""Corruptions: what each does to a cloud, in numbers; that severity is strength; that all comes from the generator."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from pointewa.datasets.layouts import shapes
from pointewa.errors import DataError
from pointewa.inference.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from pointewa.ops import unit_sphere

P = 256
KEEP_ORDER = ("jitter", "scale", "shear", "rotation")
REMOVED = {  # points of 256
    "dropout_global": [64, 96, 128, 160, 192],
    "dropout_local": [26, 51, 77, 102, 128],
    "occlusion": [26, 51, 77, 102, 128],
}
ADDED = {"outliers": [3, 5, 8, 10, 13], "background": [26, 51, 77, 102, 128]}


@pytest.fixture(scope="module")
def clouds():
    rng = np.random.default_rng(0)
    points = np.stack([shapes.sample(name, rng, P) for name in shapes.CLASSES])
    return unit_sphere(torch.from_numpy(points).float())


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def raw(points, name, severity, seed=0):
    """A corruption before its result is normalised."""
    return CORRUPTIONS[name](points, severity, seeded(seed))


def absent(points, others):
    """``[B, P]``: which points of each cloud are not among the others'."""
    return ~(points[:, :, None] == others[:, None]).all(-1).any(2)


def chamfer(a, b):
    distance = torch.cdist(a, b)
    return (distance.amin(1).mean() + distance.amin(2).mean()).item()


def linear_maps(points, out):
    """The matrices ``[B, 3, 3]`` with out = points @ matrix; the corruption must be linear."""
    maps = torch.linalg.lstsq(points.double(), out.double()).solution
    torch.testing.assert_close(points.double() @ maps, out.double(), rtol=0, atol=1e-5)
    return maps


def increases(values):
    return all(a < b for a, b in pairwise(values))


def test_the_suite_is_complete():
    assert list(CORRUPTIONS) == [
        "jitter", "dropout_global", "dropout_local", "outliers", "scale", "shear", "rotation", "background",
        "occlusion",
    ]  # fmt: skip


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_everything_drawn_comes_from_the_generator(clouds, name):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    before = clouds.clone()
    one = corrupt(clouds, name, 3, seeded(1))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(one, corrupt(clouds, name, 3, seeded(1)))
    other = corrupt(clouds, name, 3, seeded(2))
    assert (one != other).flatten(1).any(1).all()
    assert torch.equal(clouds, before)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_raw_cloud_keeps_its_place_and_its_scale(clouds, name):
    """What is done to it is what is done to the normalised one."""
    center, radius = torch.tensor([5.0, -2, 1]), 40.0
    out = corrupt(clouds * radius + center, name, 2, seeded(), normalize=False)
    torch.testing.assert_close((out - center) / radius, raw(clouds, name, 2), rtol=0, atol=2e-5)
    out = corrupt(clouds * radius + center, name, 2, seeded())
    torch.testing.assert_close((out - center) / radius, corrupt(clouds, name, 2, seeded()), rtol=0, atol=2e-5)


@pytest.mark.parametrize("normalize", [True, False])
def test_a_corruption_that_does_nothing_changes_nothing(clouds, monkeypatch, normalize):
    monkeypatch.setitem(CORRUPTIONS, "jitter", lambda points, severity, generator: points)
    for points in (clouds, clouds * 40 + 5, clouds[:, :100]):  # the last: a sample of a normalised cloud is not quite
        out = corrupt(points, "jitter", 1, seeded(), normalize)
        torch.testing.assert_close(out, points, rtol=0, atol=1e-6 * points.abs().max().item())


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_clouds_of_a_batch_are_corrupted_differently(clouds, name):
    out = corrupt(clouds[:1].expand(6, -1, -1), name, 2, seeded())
    assert all(not torch.equal(out[i], out[j]) for i in range(6) for j in range(i))


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_results_are_in_the_unit_sphere_and_farther_from_the_cloud_with_severity(clouds, name):
    counts = {"removed": REMOVED.get(name, [0] * 5), "added": ADDED.get(name, [0] * 5)}
    distances = []
    for severity in SEVERITIES:
        out = corrupt(clouds, name, severity, seeded())
        count = P - counts["removed"][severity - 1] + counts["added"][severity - 1]
        assert out.shape == (len(clouds), count, 3)
        assert out.dtype == torch.float32
        torch.testing.assert_close(out.mean(1), torch.zeros(len(clouds), 3), rtol=0, atol=1e-6)
        torch.testing.assert_close(out.norm(dim=-1).amax(1), torch.ones(len(clouds)))
        distances.append(chamfer(clouds, out))
    assert distances[0] > 0.005
    assert increases(distances)


def test_jitter_is_gaussian_of_the_stated_deviation(clouds):
    for severity, std in zip(SEVERITIES, (0.01, 0.02, 0.03, 0.04, 0.05), strict=True):
        noise = raw(clouds, "jitter", severity) - clouds
        assert noise.std().item() == pytest.approx(std, rel=0.03)
        assert noise.mean().abs() < 0.05 * std
        assert (noise.abs() < std).float().mean().item() == pytest.approx(0.683, abs=0.015)


@pytest.mark.parametrize("name", REMOVED)
def test_removals_keep_the_other_points_as_they_are(clouds, name):
    for severity in SEVERITIES:
        out = raw(clouds, name, severity)
        assert absent(clouds, out).sum(1).eq(REMOVED[name][severity - 1]).all()
        assert not absent(out, clouds).any()


@pytest.mark.parametrize("name", ADDED)
def test_additions_keep_the_cloud_and_mix_with_it(clouds, name):
    for severity in SEVERITIES:
        out = raw(clouds, name, severity)
        assert not absent(clouds, out).any()
        new = absent(out, clouds)
        assert new.sum(1).eq(ADDED[name][severity - 1]).all()
    place = torch.arange(new.shape[1]).expand_as(new)[new].float()
    assert place.mean().item() == pytest.approx(new.shape[1] / 2, rel=0.1)


def test_global_dropout_takes_points_of_any_place(clouds):
    points = clouds[:1].expand(400, -1, -1)
    out = raw(points, "dropout_global", 3)
    assert (out.mean((0, 1)) - clouds[0].mean(0)).abs().max() < 0.01
    gone = absent(points, out).float().mean(0)
    assert gone.min() > 0.35
    assert gone.max() < 0.65


def test_local_dropout_takes_neighbourhoods(clouds):
    def alone(name):  # share of the points whose nearest neighbour in the clean cloud shares their fate
        nearest = (torch.cdist(clouds, clouds) + 9 * torch.eye(P)).argmin(2)
        gone = absent(clouds, raw(clouds, name, 1 if name == "dropout_global" else 3)).float()
        return (gone == gone.gather(1, nearest)).float().mean()

    assert alone("dropout_local") > 0.85  # 77 points removed
    assert alone("dropout_global") < 0.7  # 64 removed: 0.625 expected
    # a line of points loses at most four stretches, wherever they lie
    line = torch.zeros(40, P, 3)
    line[..., 0] = torch.linspace(-1, 1, P)
    gone = absent(line, raw(line, "dropout_local", 3)).long()
    stretches = (gone.diff(dim=1, prepend=torch.zeros(40, 1).long()) == 1).sum(1)
    assert stretches.max() <= 4
    assert stretches.float().mean() > 2
    assert len(gone.unique(dim=0)) == 40


def test_outliers_are_uniform_in_the_unit_ball(clouds):
    points = clouds[:1].expand(400, -1, -1)
    out = raw(points, "outliers", 5)
    new = out[absent(out, points)]
    assert len(new) == 13 * 400
    volume = new.norm(dim=1) ** 3  # within a point's radius: uniform in [0, 1]
    assert volume.max() <= 1 + 1e-6
    quartiles = torch.histc(volume, 4, 0, 1) / len(new)
    torch.testing.assert_close(quartiles, torch.full((4,), 0.25), rtol=0, atol=0.03)
    torch.testing.assert_close(new.mean(0), torch.zeros(3), rtol=0, atol=0.03)
    torch.testing.assert_close(new.T.cov(), torch.eye(3) / 5, rtol=0, atol=0.02)


def test_scale_stretches_along_the_axes_within_its_limits(clouds):
    points = clouds[:1].expand(1000, -1, -1)
    for severity, limit in zip(SEVERITIES, (1.5, 1.75, 2.0, 2.25, 2.5), strict=True):
        maps = linear_maps(points, raw(points, "scale", severity))
        factors = maps.diagonal(dim1=1, dim2=2)
        torch.testing.assert_close(maps, torch.diag_embed(factors), rtol=0, atol=1e-4)
        exponents = factors.log() / math.log(limit)
        assert 0.99 < exponents.abs().max() < 1 + 1e-4
        assert exponents.abs().mean(0) == pytest.approx([0.5] * 3, abs=0.04)
        assert exponents.mean(0).abs().max() < 0.07
        assert exponents.T.corrcoef().sub(torch.eye(3)).abs().max() < 0.12  # per axis


def test_shear_slides_layers_in_every_direction(clouds):
    points = clouds[:1].expand(1000, -1, -1)
    for severity, slope in zip(SEVERITIES, (0.1, 0.2, 0.3, 0.4, 0.5), strict=True):
        slide = linear_maps(points, raw(points, "shear", severity)) - torch.eye(3)
        singular = torch.linalg.svdvals(slide)
        torch.testing.assert_close(singular[:, 0], torch.full((1000,), slope).double(), rtol=0, atol=1e-4)
        assert singular[:, 1].max() < 1e-4  # one direction of sliding
        assert (slide @ slide).abs().max() < 1e-4  # within the layers
        assert (slide + torch.eye(3)).det().sub(1).abs().max() < 1e-4
    # the slide along each axis by each coordinate: E[n_i^2 a_j^2] is 1/15 where i = j, 2/15 elsewhere
    expected = (torch.full((3, 3), 2 / 15) - torch.eye(3) / 15).double()
    torch.testing.assert_close((slide**2).mean(0) / slope**2, expected, rtol=0, atol=0.03)


def test_rotation_is_one_about_any_axis_by_a_bounded_angle(clouds):
    points = clouds[:1].expand(1000, -1, -1)
    for severity, limit in zip(SEVERITIES, (10, 20, 30, 40, 50), strict=True):
        out = raw(points, "rotation", severity)
        torch.testing.assert_close(
            torch.cdist(out[:3], out[:3]), torch.cdist(points[:3], points[:3]), rtol=0, atol=2e-3
        )
        maps = linear_maps(points, out)
        assert (maps @ maps.mT - torch.eye(3)).abs().max() < 1e-4
        assert maps.det().sub(1).abs().max() < 1e-4  # no mirroring
        axis = torch.stack(
            [maps[:, 1, 2] - maps[:, 2, 1], maps[:, 2, 0] - maps[:, 0, 2], maps[:, 0, 1] - maps[:, 1, 0]]
        )
        sine, cosine = axis.norm(dim=0) / 2, (maps.diagonal(dim1=1, dim2=2).sum(1) - 1) / 2
        angle = torch.atan2(sine, cosine).rad2deg()
        assert 0.99 * limit < angle.max() < limit + 0.01
        assert angle.mean().item() == pytest.approx(limit / 2, rel=0.05)
    axis = axis[:, angle > 1]
    axis = axis / axis.norm(dim=0)
    assert axis.mean(1).abs().max() < 0.06
    torch.testing.assert_close((axis**2).mean(1), torch.full((3,), 1 / 3).double(), rtol=0, atol=0.04)


def test_background_is_a_floor_under_the_cloud_and_a_wall_beside_it(clouds):
    for severity, share in zip(SEVERITIES, (0.1, 0.2, 0.3, 0.4, 0.5), strict=True):
        out = raw(clouds, "background", severity)
        new = absent(out, clouds)
        sides = []
        for cloud, points, added in zip(clouds, out, new, strict=True):
            added = points[added]
            bottom = cloud[:, 1].min()
            assert added[:, 1].min() > bottom - 1e-5
            on_floor = added[:, 1] < bottom + 1e-5
            assert abs(on_floor.sum().item() - len(added) / 2) <= 1
            floor, wall = added[on_floor], added[~on_floor]
            # the wall is upright, and touches the cloud, which lies on one side of it
            plane = torch.linalg.svd(wall - wall.mean(0)).Vh[2]
            plane = plane * (wall.mean(0) @ plane).sign()
            assert plane[1].abs() < 1e-4
            torch.testing.assert_close(wall @ plane, (cloud @ plane).amax().expand(len(wall)), rtol=0, atol=1e-4)
            edge = 2 * share**0.5
            assert 0.5 * edge < wall[:, 1].max() - bottom < edge + 1e-5
            assert 0.5 * edge < 2 * floor.norm(dim=1).max()
            assert floor[:, [0, 2]].norm(dim=1).max() < edge / 2**0.5 + 1e-5
            sides.append(torch.atan2(plane[2], plane[0]))
        assert torch.stack(sides).std() > 1


def test_occlusion_takes_the_far_side():
    n, batch = 400, 100
    height = 1 - (2 * torch.arange(n) + 1) / n  # a spiral, evenly over the sphere: what is removed is a cap
    angle = torch.arange(n) * math.pi * (3 - 5**0.5)
    radius = (1 - height**2).sqrt()
    points = torch.stack([radius * angle.cos(), height, radius * angle.sin()], 1).expand(batch, -1, -1)
    for severity, share in zip(SEVERITIES, (0.1, 0.2, 0.3, 0.4, 0.5), strict=True):
        gone = absent(points, raw(points, "occlusion", severity))
        side = (points * gone[..., None]).sum(1, keepdim=True)
        side = side / side.norm(dim=-1, keepdim=True)
        depth = (points * side).sum(-1)
        plane = 1 - 2 * share  # that cuts the share off the sphere
        assert depth[gone].min().item() == pytest.approx(plane, abs=0.06)
        assert depth[~gone].max().item() == pytest.approx(plane, abs=0.06)
    side = side.squeeze(1)
    assert side.mean(0).abs().max() < 0.2  # seen from anywhere
    torch.testing.assert_close((side**2).mean(0), torch.full((3,), 1 / 3), rtol=0, atol=0.1)


def test_all_severities_of_an_occlusion_look_from_the_same_side(clouds):
    gone = [absent(clouds, raw(clouds, "occlusion", severity)) for severity in SEVERITIES]
    for less, more in pairwise(gone):
        assert (less <= more).all()


def test_what_is_not_in_the_suite_is_refused(clouds):
    with pytest.raises(DataError, match=r"corruption: expected one of jitter, .*, occlusion, found 'blur'"):
        corrupt(clouds, "blur", 1, seeded())
    for severity in (0, 6):
        with pytest.raises(DataError, match=f"severity: expected 1 to 5, found {severity}"):
            corrupt(clouds, "jitter", severity, seeded())

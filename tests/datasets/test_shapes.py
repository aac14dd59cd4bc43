"""The procedural set: reproducible, on the surface, uniform by area."""

from itertools import islice

import numpy as np
import pytest

from pointewa import datasets
from pointewa.datasets.layouts import shapes


def test_the_set_is_what_it_says():
    train, test = (datasets.load("shapes", "", split) for split in ("train", "test"))
    classes = len(shapes.CLASSES)
    assert classes >= 12
    assert train.points.shape == (64 * classes, 1024, 3)
    assert test.labels.bincount().tolist() == [32] * classes
    assert list(train.class_names) == sorted(shapes.CLASSES)


def first(split, count):
    clouds = islice(datasets.open_source("shapes", "", split).clouds(1024), count)
    return np.stack([cloud.points for cloud in clouds])


def test_an_object_depends_on_its_split_and_number_only():
    one, few = first("test", 20), first("test", 3)
    assert np.array_equal(one[:3], few)
    assert len(np.unique(np.concatenate([one, first("train", 20)])[:, 0], axis=0)) == 40


@pytest.mark.parametrize("name", shapes.CLASSES)
def test_objects_fit_the_unit_sphere_and_differ(name):
    a, b = (shapes.sample(name, np.random.default_rng(seed), 512, scanned=False) for seed in (1, 2))
    assert a.shape == (512, 3)
    assert np.linalg.norm(a, axis=1).max() == pytest.approx(1)
    assert np.abs(a - b).max() > 0.01


N = 40_000


def draw(part):
    area, sampler = part
    return area, sampler(np.random.default_rng(0), N)


def test_box_is_uniform_on_its_faces():
    area, points = draw(shapes.box(1, 2, 3))
    assert area == pytest.approx(22)
    on_x = np.isclose(np.abs(points[:, 0]), 0.5)
    assert on_x.mean() == pytest.approx(12 / 22, abs=0.01)
    assert points[on_x, 2].std() == pytest.approx(3 / 12**0.5, rel=0.02)


@pytest.mark.parametrize(("bottom", "top", "height"), [(0.5, 0.5, 2), (1, 0, 1), (0.2, 0.8, 0.5), (0, 1, 0)])
def test_frustum_is_uniform_by_area(bottom, top, height):
    area, points = draw(shapes.frustum(bottom, top, height))
    radius = np.hypot(points[:, 0], points[:, 2])
    if bottom == top:
        assert radius == pytest.approx(bottom)
        below = points[:, 1] < height / 2
        expected = 0.5
    else:
        middle = (bottom + top) / 2
        below = radius < middle if top > bottom else radius > middle
        expected = abs(middle**2 - bottom**2) / abs(top**2 - bottom**2)
    assert below.mean() == pytest.approx(expected, abs=0.01)
    assert area == pytest.approx(np.pi * (bottom + top) * np.hypot(height, top - bottom))


def test_ellipsoid_is_uniform_by_area():
    area, points = draw(shapes.ellipsoid(1, 1, 2))
    assert (points / (1, 1, 2) ** np.ones(3)) ** 2 @ np.ones(3) == pytest.approx(1)
    # prolate spheroid: area 2 pi a^2 (1 + c/(a e) asin e); the share of a slab by its own integral
    e = np.sqrt(3) / 2
    assert area == pytest.approx(2 * np.pi * (1 + 2 / e * np.arcsin(e)), rel=0.02)
    z = np.linspace(-1, 1, 20_001)
    density = np.sqrt(1 - e**2 * z**2)
    share = density[np.abs(z) < 0.5].sum() / density.sum()
    assert (np.abs(points[:, 2] / 2) < 0.5).mean() == pytest.approx(share, abs=0.01)


def test_torus_is_uniform_by_area():
    area, points = draw(shapes.torus(2, 0.5, np.pi))
    assert area == pytest.approx(2 * np.pi**2)
    ring = np.hypot(points[:, 0], points[:, 1])
    assert np.hypot(ring - 2, points[:, 2]) == pytest.approx(0.5)
    assert points[:, 0].min() >= -0.5
    # the outer half of the tube has the larger share: 1/2 + r/(pi R)
    assert (ring > 2).mean() == pytest.approx(0.5 + 0.5 / (np.pi * 2), abs=0.01)


def test_placing_turns_leans_and_moves():
    _, points = draw(shapes.at(shapes.frustum(0.1, 0.1, 1), 5, 0, 0, lean=np.pi / 2))
    assert points[:, 0].min() == pytest.approx(4, abs=0.01)  # the tube along +y now runs along -x
    assert points[:, 0].max() == pytest.approx(5, abs=0.01)
    assert np.hypot(points[:, 1], points[:, 2]) == pytest.approx(0.1)

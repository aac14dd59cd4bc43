"""The procedural set: reproducible, on the surface, uniform by area."""

from itertools import islice

import numpy as np
import pytest
import torch

from pointewa import datasets
from pointewa.datasets import surfaces
from pointewa.datasets.layouts import shapes
from pointewa.errors import DataError


def test_the_set_is_what_it_says():
    train, test = (datasets.load("shapes", "", split) for split in ("train", "test"))
    classes = len(shapes.CLASSES)
    assert classes >= 12
    assert train.points.shape == (64 * classes, 1024, 3)
    assert test.labels.bincount().tolist() == [32] * classes
    assert list(train.class_names) == sorted(shapes.CLASSES)


@pytest.mark.parametrize(("name", "root"), [("shapes", "data"), ("images", "gratings")])
def test_a_set_without_variants_refuses_one(name, root):
    with pytest.raises(DataError, match=f"data.variant: {name} has no variants, found 'hardest': leave it out"):
        datasets.load(name, root, "test", variant="hardest")


def test_a_root_that_is_not_read_is_said(tmp_path, capsys):
    datasets.open_source("shapes", "data", "test")
    assert capsys.readouterr().err == ""
    datasets.open_source("shapes", str(tmp_path), "test")
    assert f"note: {tmp_path} is not read: data.name=shapes" in capsys.readouterr().err


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
    area, points = draw(surfaces.box(1, 2, 3))
    assert area == pytest.approx(22)
    on_x = np.isclose(np.abs(points[:, 0]), 0.5)
    assert on_x.mean() == pytest.approx(12 / 22, abs=0.01)
    assert points[on_x, 2].std() == pytest.approx(3 / 12**0.5, rel=0.02)


@pytest.mark.parametrize(("bottom", "top", "height"), [(0.5, 0.5, 2), (1, 0, 1), (0.2, 0.8, 0.5), (0, 1, 0)])
def test_frustum_is_uniform_by_area(bottom, top, height):
    area, points = draw(surfaces.frustum(bottom, top, height))
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
    area, points = draw(surfaces.ellipsoid(1, 1, 2))
    assert (points / (1, 1, 2) ** np.ones(3)) ** 2 @ np.ones(3) == pytest.approx(1)
    # prolate spheroid: area 2 pi a^2 (1 + c/(a e) asin e); the share of a slab by its own integral
    e = np.sqrt(3) / 2
    assert area == pytest.approx(2 * np.pi * (1 + 2 / e * np.arcsin(e)), rel=0.02)
    z = np.linspace(-1, 1, 20_001)
    density = np.sqrt(1 - e**2 * z**2)
    share = density[np.abs(z) < 0.5].sum() / density.sum()
    assert (np.abs(points[:, 2] / 2) < 0.5).mean() == pytest.approx(share, abs=0.01)


def test_torus_is_uniform_by_area():
    area, points = draw(surfaces.torus(2, 0.5, np.pi))
    assert area == pytest.approx(2 * np.pi**2)
    ring = np.hypot(points[:, 0], points[:, 1])
    assert np.hypot(ring - 2, points[:, 2]) == pytest.approx(0.5)
    assert points[:, 0].min() >= -0.5
    # the outer half of the tube has the larger share: 1/2 + r/(pi R)
    assert (ring > 2).mean() == pytest.approx(0.5 + 0.5 / (np.pi * 2), abs=0.01)


def test_placing_turns_leans_and_moves():
    _, points = draw(surfaces.at(surfaces.frustum(0.1, 0.1, 1), 5, 0, 0, lean=np.pi / 2))
    assert points[:, 0].min() == pytest.approx(4, abs=0.01)  # the tube along +y now runs along -x
    assert points[:, 0].max() == pytest.approx(5, abs=0.01)
    assert np.hypot(points[:, 1], points[:, 2]) == pytest.approx(0.1)


@pytest.mark.parametrize("name", shapes.CLASSES)
def test_every_part_of_a_class_occurs(name):
    built = [tuple(shapes.CLASSES[name](np.random.default_rng(seed))) for seed in range(30)]
    assert set().union(*built) == set(shapes.PARTS[name])
    assert (len(set(built)) > 1) == (name in ("bench", "chair", "parasol"))  # those with a part that may be missing


def test_points_of_a_part_lie_on_it():
    points, labels = shapes.labelled_sample("stool", np.random.default_rng(0), 2000, scanned=False)
    seat = labels == shapes.PARTS["stool"].index("seat")
    assert points[seat, 1].min() > points[~seat, 1].max() - 0.01  # it is above the legs
    assert 0.3 < seat.mean() < 0.9
    points, labels = shapes.labelled_sample("parasol", np.random.default_rng(1), 2000, scanned=False)
    radius = np.hypot(points[:, 0], points[:, 2])
    pole, canopy = (labels == shapes.PARTS["parasol"].index(part) for part in ("pole", "canopy"))
    assert radius[pole].max() < 0.05 < 0.5 < radius[canopy].max()  # about the axis, which the drawn points miss a bit
    assert np.corrcoef(radius[canopy], points[canopy, 1])[0, 1] < -0.99  # a cone


def test_scanning_keeps_points_and_parts_together():
    # A scanned barbell is turned and noisy, but the points of its bar still lie along a line.
    points, labels = shapes.labelled_sample("barbell", np.random.default_rng(3), 1000)
    bar = points[labels == 0] - points.mean(0)
    length, *others = np.linalg.svd(bar, compute_uv=False)
    assert length > 5 * max(others)
    assert np.array_equal(points, shapes.sample("barbell", np.random.default_rng(3), 1000))


@pytest.mark.parametrize("stream", [False, True])
def test_parts_come_when_they_are_asked_for(stream):
    plain, labelled = (datasets.load("shapes", "", "test", 64, stream=stream, parts=parts) for parts in (False, True))
    assert plain.parts is None
    assert len(labelled.parts) == sum(map(len, shapes.PARTS.values()))
    index = [torch.arange(40)]
    ((a, nothing),), ((b, parts),) = plain.batches(index, 64), labelled.batches(index, 64)
    assert nothing is None
    assert torch.equal(a, b)
    mask = labelled.parts.mask(len(shapes.CLASSES))
    assert mask[labelled.labels[:40]].gather(1, parts).all()
    chairs = [parts[i] for i in range(40) if labelled.labels[i] == list(shapes.CLASSES).index("chair")]
    first = sum(len(shapes.PARTS[name]) for name in ("airplane", "barbell", "bench", "bottle"))
    assert all(set(chair.tolist()) <= set(range(first, first + 4)) for chair in chairs)
    assert labelled.parts.names[first : first + 4] == shapes.PARTS["chair"]


def test_sets_without_parts_are_refused_where_they_are_needed(tmp_path):
    with pytest.raises(DataError, match="images does not tell the parts of objects"):
        datasets.open_source("images", "gratings", "test", parts=True)


def test_points_are_shuffled_as_their_rows_were():
    rows = np.arange(300).reshape(100, 3)
    expected = np.random.default_rng(0).permutation(rows)
    assert np.array_equal(rows[shapes._permutation(np.random.default_rng(0), 100)], expected)

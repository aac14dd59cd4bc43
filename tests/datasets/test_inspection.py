"""What is found out about a set of clouds: broken ones, duplicates, the up axis."""

import h5py
import numpy as np
import pytest
import torch

from pointewa import datasets
from pointewa.datasets.inspect import inspection
from pointewa.datasets.inspect.inspection import SIDES, dimension, duplicates, repeated_points, up_axis
from pointewa.datasets.layouts import shapes


def test_dimension_tells_places_lines_and_planes_from_solids():
    solid = torch.randn(100, 3)
    place, line, plane = (solid.clone() for _ in range(3))
    place[:] = torch.tensor([1000.1, -3.3, 0.7])  # its mean is not exact in float32
    line[:, 1:] = line[:, :1] * torch.tensor([2.0, -1.0]) + 5
    plane[:, 2] = plane[:, 0] - 3 * plane[:, 1] + 5
    clouds = torch.stack([place, line, plane, solid])
    assert dimension(clouds).tolist() == [0, 1, 2, 3]
    assert dimension(clouds * 1e-3).tolist() == [0, 1, 2, 3]
    assert dimension(plane[None] + 1e-4 * torch.randn(100, 3)).tolist() == [2]  # rounded by storage


def test_repeated_points_counts_all_of_a_place():
    clouds = torch.randn(3, 10, 3)
    clouds[1] = clouds[1, [0, 1, 2, 3, 2, 5, 6, 2, 8, 0]]
    clouds[2, :, :2] = 0  # equal in two coordinates is not repeated
    assert repeated_points(clouds).tolist() == [0, 0.5, 0]
    assert repeated_points(torch.ones(1, 4, 3)).tolist() == [1]


@pytest.fixture(scope="module")
def twice():
    """34 clean objects of all classes, each sampled twice: two disjoint random halves of its points."""
    points = np.stack([
        shapes.sample(name, np.random.default_rng([seed, label]), 2048, scanned=False)
        for seed in (0, 1)
        for label, name in enumerate(shapes.CLASSES)
    ])  # fmt: skip
    points = torch.from_numpy(points.astype(np.float32))
    return points[:, :1024], points[:, 1024:]


def test_the_same_points_are_a_pair_in_any_order_place_and_size(twice):
    clouds = twice[0]
    moved = 3 * clouds.flip(0)[:, torch.randperm(1024)] + 1
    pairs, ratios, _ = duplicates(clouds, moved, threshold=0.05)
    assert sorted(pairs.tolist()) == [[i, 33 - i] for i in range(34)]
    assert (ratios < 0.02).all()


def test_one_object_sampled_twice_is_a_pair_and_others_are_not(twice):
    pairs, ratios, _ = duplicates(*twice)
    same = pairs[:, 0] == pairs[:, 1]
    assert same.sum() >= 30
    assert same.all()
    assert (ratios > 0.9).all()
    assert (ratios.diff() >= 0).all()
    pairs, *_ = duplicates(twice[0], twice[1] * torch.tensor([1, 1.2, 1]))
    assert len(pairs) <= 3


def test_half_of_the_points_shared_halves_the_ratio(twice):
    mixed = torch.cat([twice[0][:, :512], twice[1][:, :512]], 1)
    pairs, ratios, _ = duplicates(twice[0], mixed, threshold=0.7)
    assert (pairs[:, 0] == pairs[:, 1]).all()
    assert len(pairs) >= 32
    assert ratios.median().item() == pytest.approx(0.5, abs=0.05)


def test_pairs_within_a_set_come_once(twice):
    clouds = torch.cat(twice)[[34, 0, 1, 2, 36]]
    pairs, *_ = duplicates(clouds, clouds, threshold=1.1)
    assert sorted(pairs.tolist()) == [[0, 1], [3, 4]]


def test_clouds_may_differ_in_size_and_have_no_pair(twice):
    pairs, *_ = duplicates(twice[0], twice[1][:, :500], threshold=1.15)
    same = pairs[:, 0] == pairs[:, 1]
    assert same.sum() >= 30
    assert (~same).sum() <= 2
    pairs, ratios, _ = duplicates(twice[0][:3], torch.randn(2, 60, 3))
    assert (pairs.shape, ratios.shape) == ((0, 2), (0,))
    pairs, *_ = duplicates(torch.zeros(1, 50, 3), torch.ones(2, 50, 3))  # nothing but a place
    assert pairs.tolist() == [[0, 0], [0, 1]]


def test_the_time_is_bounded_and_the_most_alike_come_first(monkeypatch, capsys):
    """Spheres, all of which look alike: every pair would have to be compared."""
    points = torch.nn.functional.normalize(torch.randn(60, 128, 3, generator=torch.Generator().manual_seed(0)), dim=2)
    a, b = points[:30], torch.cat([points[30:], points[:3, torch.randperm(128)]])
    pairs, *_, left_out = duplicates(a, b)
    assert (left_out, sorted(pairs[:3].tolist()), len(pairs) > 100) == (0, [[0, 30], [1, 31], [2, 32]], True)
    assert capsys.readouterr().err == ""
    clock = iter(range(10**6))
    monkeypatch.setattr(inspection, "monotonic", lambda: next(clock))  # a block takes a second
    few, some, left_out = duplicates(a, b, seconds=3)
    assert left_out == 30 * 33 - (142 + 128)  # a sample of every seventh pair, then one block
    assert len(few) < len(pairs)
    assert sorted(few[:3].tolist()) == [[0, 30], [1, 31], [2, 32]]
    assert (some[:3] < 0.05).all()
    assert set(map(tuple, few.tolist())) < set(map(tuple, pairs.tolist()))
    assert capsys.readouterr().err == ""  # 7 of these seconds in all are not long
    monkeypatch.setattr(inspection, "monotonic", lambda: 60 * next(clock))
    assert duplicates(a, b, seconds=150).left_out == 30 * 33 - 142
    expected = "990 pairs of objects look alike; comparing them takes about 7.0 minutes; it stops after 2.5"
    assert expected in capsys.readouterr().err
    monkeypatch.setattr(inspection, "_MOST", 500)
    assert duplicates(a, b).left_out == 490  # memory is bounded too


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("sign", [1, -1])
def test_up_axis_of_objects_that_stand(axis, sign):
    clouds = datasets.load("shapes", "", "train")
    points = (sign * clouds.points).roll(axis - 1, 2)  # y to the axis
    up = up_axis(points, clouds.labels)
    assert up.direction == ("+" if sign > 0 else "-") + "xyz"[axis]
    assert up.standing.shape == (len(clouds.class_names), 6)
    assert SIDES[up.standing.mean(0).argmax()] == ("-" if sign > 0 else "+") + "xyz"[axis]
    assert up.margin > 2
    assert up.agreement > 0.7


def test_up_axis_is_not_told_without_evidence(twice):
    labels = torch.arange(34) % 17
    assert up_axis(torch.randn(200, 256, 3), torch.arange(200) % 10).direction is None
    assert up_axis(twice[0][labels < 3], labels[labels < 3]).direction is None  # too few classes
    one = up_axis(twice[0][:1], labels[:1])
    assert (one.direction, one.standing.shape) == (None, (1, 6))


@pytest.mark.slow
def test_modelnet40(real_data):
    """On its test split; and against the training objects of classes that are known to share models."""
    points, labels, names = {}, {}, {}
    with h5py.File(real_data / "modelnet40_1024.h5") as h5:
        classes = h5.attrs["shape_names"].tolist()
        for split in ("train", "test"):
            data = h5[split]["data"]
            points[split] = torch.from_numpy(data[:] * np.float32(data.attrs["scale_factor"]))
            labels[split] = torch.from_numpy(h5[split]["label"][:].astype(np.int64))
            names[split] = h5[split]["name"].asstr()[:]
    up = up_axis(points["test"], labels["test"])
    assert up.direction == "+y"
    assert up.margin > 4
    assert up.agreement > 0.6
    assert dimension(points["test"]).min() == 2
    assert repeated_points(points["test"]).max() < 0.01

    chosen = torch.tensor([classes.index(name) for name in ("vase", "flower_pot", "glass_box", "cone")])
    rows = {split: torch.isin(labels[split], chosen).nonzero().squeeze(1) for split in points}
    pairs, ratios, _ = duplicates(points["train"][rows["train"]], points["test"][rows["test"]])
    sure = (ratios < 0.6).sum().item()  # half of the points are shared: the same model, drawn from in the same way
    assert 95 <= sure <= 115
    assert ((ratios > 0.6) & (ratios < 0.75)).sum() < 10  # a gap: what follows is alike, and drawn independently
    found = [(names["train"][rows["train"][i]], names["test"][rows["test"][j]]) for i, j in pairs[:sure].tolist()]
    assert ("flower_pot_0032", "vase_0539") in found  # under two labels
    assert sum(one.split("_0")[0] == other.split("_0")[0] for one, other in found) >= 0.9 * sure
    kind = [labels[split][rows[split]][pairs[:, side]] for side, split in enumerate(points)]
    assert (kind[0] == kind[1]).float().mean() > 0.95

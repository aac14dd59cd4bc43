"""Preparation: farthest-point order, the cache, and what `pointewa.datasets.load` refuses."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.bench_data import shortfall
from pointewa import datasets
from pointewa.datasets import PointClouds, order, prepare
from pointewa.datasets.loader import EvalLoader
from pointewa.datasets.order import fps_order
from pointewa.datasets.source import Cloud, Source, in_parallel
from pointewa.errors import DataError
from pointewa.ops import farthest_point_sample, unit_sphere

CPU = torch.device("cpu")


def source(points, reads=None, files=(), **changes):
    """A source of clouds ``[P, 3]``."""

    def clouds(count):
        if reads is not None:
            reads.append(count)
        yield from map(Cloud, points)

    n = len(points)
    made = Source("list", Path("somewhere"), tuple(files), ("a",), ("x",) * n, np.zeros(n, np.int64), len(points[0]),
                  clouds)  # fmt: skip
    return replace(made, **changes)


def cloud(points, seed=0):
    return np.random.default_rng(seed).normal(size=(points, 3)).astype(np.float32)


@pytest.mark.parametrize("kind", ["fpsample", "operator"])
@pytest.mark.parametrize(("total", "count"), [(40, 40), (700, 700), (5000, 300)])
def test_the_order_is_farthest_point_order(monkeypatch, kind, total, count):
    if kind == "operator":
        monkeypatch.setattr(order, "method", lambda: "torch")
    clouds = [cloud(total, seed) for seed in range(3)]
    picks = fps_order(clouds, count)
    for points, mine, again in zip(clouds, picks, fps_order(clouds, count), strict=True):
        assert len(set(mine.tolist())) == count
        assert shortfall(points, mine) < 1e-6
        assert mine.tolist() == again.tolist()
        assert fps_order([points], count // 2)[0].tolist() == mine[: count // 2].tolist()  # nested


def test_a_wrong_order_would_be_noticed():
    points = cloud(700)
    picks = fps_order([points], 700)[0]
    picks[[300, 600]] = picks[[600, 300]]
    assert shortfall(points, picks) > 0.01


@pytest.mark.parametrize("kind", ["fpsample", "operator"])
def test_coincident_and_too_few_points(monkeypatch, kind):
    if kind == "operator":
        monkeypatch.setattr(order, "method", lambda: "torch")
    few = cloud(100)
    repeated = few[np.random.default_rng(0).integers(0, 100, 2048)]
    different = len(np.unique(repeated, axis=0))
    for points, count in ((repeated, 2048), (np.zeros((70, 3), np.float32), 70), (few, 250)):
        picks = fps_order([points], count)[0]
        distinct = min(count, len(points))
        assert sorted(picks[:distinct]) == list(range(distinct)) if count >= len(points) else True
        assert picks[distinct:].tolist() == [picks[index % distinct] for index in range(distinct, count)]
    head = fps_order([repeated], 2048)[0][:different]
    assert len(np.unique(repeated[head], axis=0)) == different  # every place once before any twice


def test_clouds_come_centred_scaled_and_in_order():
    prepared = prepare.load("set", "train", source([cloud(128, seed) for seed in range(70)]), 128, CPU, False)
    points = prepared.points
    torch.testing.assert_close(points.mean(1), torch.zeros(70, 3), rtol=0, atol=1e-6)
    torch.testing.assert_close(points.norm(dim=-1).amax(1), torch.ones(70))
    assert all(shortfall(one.numpy(), np.arange(128)) < 1e-6 for one in points)
    expected = unit_sphere(torch.from_numpy(np.stack([cloud(128, seed) for seed in range(70)])))
    torch.testing.assert_close(points.sort(1).values, expected.sort(1).values)


def test_clouds_stay_as_they_are_where_the_set_is_not_normalised():
    points = cloud(128) * 5 + 3
    prepared = prepare.load("set", "train", source([points], normalize=False), 128, CPU, False)
    assert torch.equal(prepared.points[0].sort(0).values, torch.from_numpy(points).sort(0).values)


def test_point_labels_stay_with_their_points():
    points = [cloud(128, seed) for seed in range(3)]
    labelled = [Cloud(one, (one[:, 0] > 0) + 2 * (one[:, 1] > 0)) for one in points]
    made = prepare.load(
        "set", "train", source(points, clouds=lambda count: iter(labelled), normalize=False), 100, CPU, False
    )
    assert made.point_labels.shape == (3, 100)
    assert torch.equal(made.point_labels, (made.points[..., 0] > 0) + 2 * (made.points[..., 1] > 0))
    with pytest.raises(DataError, match=r"expected point labels \[3, 100\], found \[3, 99\]"):
        replace(made, point_labels=made.point_labels[:, :99])


def test_mixed_sizes_repeat_points_and_say_so(capsys):
    mixed = source([cloud(300), cloud(40)], num_points=None)
    prepared = prepare.load("mixed", "train", mixed, 100, CPU, False)
    assert prepared.points.shape == (2, 100, 3)
    assert [len(one.unique(dim=0)) for one in prepared.points] == [100, 40]
    assert torch.equal(prepared.points[1, :40], prepared.points[1, 40:80])
    assert "1 of 2 objects has fewer than 100 points, the fewest 40" in capsys.readouterr().err


@pytest.mark.parametrize("stream", [False, True])
def test_a_reserve_that_no_object_has_is_not_made_of_repeated_points(capsys, stream):
    """100 points asked for are drawn from 120 where there are as many, and from 110 where there are no more."""

    def load(*sizes):
        mixed = source([cloud(size, size) for size in sizes], num_points=None)
        return prepare.load(f"sizes{sizes}{stream}", "train", mixed, 120, CPU, stream, 100)

    for sizes in ((110, 110), (110, 100)):
        made = load(*sizes)
        assert made.num_points == 110
        (batch,) = EvalLoader(made, 2, 100, lambda pool: pool)  # is given all of it
        assert [len(one.unique(dim=0)) for one in batch.points] == list(sizes)
        assert batch.points.shape == (2, 110, 3)
    assert load(500, 105).num_points == 120
    assert capsys.readouterr().err == ""  # no point is repeated of the 100
    assert load(90, 80).num_points == 100
    assert "2 of 2 objects have fewer than 100 points, the fewest 80: theirs are repeated" in capsys.readouterr().err


def test_prepared_clouds_are_read_once(tmp_path, cache):
    file, reads, points = tmp_path / "source.bin", [], [cloud(70, seed) for seed in range(9)]
    file.write_text("1")

    def load(split="train", count=70, **changes):
        return prepare.load("set", split, source(points, reads, [file], **changes), count, CPU, False)

    first, second = load(), load()
    assert len(reads) == 1
    assert torch.equal(first.points, second.points)
    assert (second.class_names, second.object_names) == (("a",), ("x",) * 9)
    load("test")
    load(count=50)
    load(normalize=False)
    file.write_text("22")
    load()
    assert reads == [70, 70, 50, 70, 70]  # another split, fewer points, another treatment, a changed source


@pytest.mark.parametrize("damage", ["cut", "bits"])
def test_a_damaged_cache_is_made_again(tmp_path, monkeypatch, capsys, damage):
    monkeypatch.setenv("POINTEWA_CACHE", str(tmp_path / "cache"))
    points = [cloud(200, seed) for seed in range(30)]
    first = prepare.load("set", "train", source(points), 200, CPU, False)
    (file,) = (tmp_path / "cache").iterdir()
    content = bytearray(file.read_bytes())
    if damage == "cut":
        content = content[:100]
    else:  # a coordinate, in the middle of the clouds
        start = content.index(first.points[15].numpy().tobytes())
        content[start + 100] ^= 8
    file.write_bytes(content)
    assert torch.equal(prepare.load("set", "train", source(points), 200, CPU, False).points, first.points)
    assert "preparing it again" in capsys.readouterr().err


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("POINTEWA_CACHE", str(tmp_path / "file"))
    assert len(prepare.load("set", "train", source([cloud(70)]), 70, CPU, False)) == 1
    assert "cannot write" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.zeros((0, 3)), r"somewhere: object 1 \(x\): expected points \[P, 3\] with P > 0, found \[0, 3\]"),
        (np.zeros((5, 2)), r"object 1 \(x\): expected points \[P, 3\]"),
        (np.full((5, 3), np.nan), r"object 1 \(x\) has coordinates that are not finite"),
    ],
)
def test_clouds_that_cannot_be_trained_on(bad, message, cache):
    before = set(cache.iterdir())
    with pytest.raises(DataError, match=message):
        prepare.load("bad", "train", source([cloud(5), bad]), 5, CPU, False)
    assert set(cache.iterdir()) == before


def test_labels_must_fit_the_names():
    with pytest.raises(DataError, match=r"somewhere: object 1 \(x\) has label 3, expected 0 to 0"):
        source([cloud(5)] * 2, labels=np.array([0, 3]))
    with pytest.raises(DataError, match="somewhere: 1 labels, 2 object names"):
        source([cloud(5)] * 2, labels=np.array([0]))


def square(number):
    return number**2


def test_work_in_processes_keeps_its_order():
    assert list(in_parallel(square, range(700))) == [number**2 for number in range(700)]


def test_validation_split_is_stratified_seeded_and_disjoint():
    labels = torch.tensor([0] * 20 + [1] * 10 + [2] * 2)
    data = PointClouds(torch.randn(32, 4, 3), labels, ("a", "b", "c"), tuple(map(str, range(32))), "x")
    rest, held_out = data.split(0.2, seed=1)
    assert held_out.labels.bincount().tolist() == [4, 2, 1]
    assert set(rest.object_names) | set(held_out.object_names) == set(data.object_names)
    assert len(rest) + len(held_out) == 32
    assert data.split(0.2, seed=1)[1].object_names == held_out.object_names
    assert data.split(0.2, seed=2)[1].object_names != held_out.object_names


def test_unknown_names():
    expected = r"data\.name: expected one of folder, images, labeled_psb, .*, found 'modelnet10'"
    with pytest.raises(DataError, match=expected):
        datasets.load("modelnet10", "data", "train")
    with pytest.raises(DataError, match='expected "train" or "test"'):
        datasets.load("shapes", "data", "val")
    with pytest.raises(DataError, match=r"has 1024 points, data\.num_points asks for 2000"):
        datasets.load("shapes", "", "train", 2000)


def test_the_operator_orders_as_the_models_sample(monkeypatch):
    monkeypatch.setattr(order, "method", lambda: "torch")
    points = cloud(200)
    assert fps_order([points], 50)[0].tolist() == farthest_point_sample(torch.from_numpy(points[None]), 50)[0].tolist()

"""ModelNet40 in its layouts, preparation and cache, and data that is damaged."""

from itertools import pairwise

import h5py
import numpy as np
import pytest
import torch

import datasets
from datasets import PointClouds
from datasets.prepare import fps_order, prepared, unit_sphere
from pointewa.errors import DataError
from pointewa.ops import farthest_point_sample

NAMES = ["airplane", "bathtub", "bed"]


def clouds(n, points=64, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, points, 3)).astype(np.float32), np.arange(n) % len(NAMES)


def write_packed(path, train=9, test=6, points=64):
    """The packed layout: a 12-bit grid, labels uint8, names."""
    with h5py.File(path, "w") as h5:
        h5.attrs["shape_names"] = NAMES
        for split, n in (("train", train), ("test", test)):
            data, labels = clouds(n, points, seed=n)
            data = np.asarray(unit_sphere(torch.from_numpy(data)))
            group = h5.create_group(split)
            grid = group.create_dataset("data", data=np.round(data * 2047).astype(np.int16))
            grid.attrs["scale_factor"], grid.attrs["add_offset"] = 1 / 2047, 0.0
            group["label"] = labels.astype(np.uint8)
            group["name"] = [f"{NAMES[label]}_{i:04}" for i, label in enumerate(labels)]


def write_official(folder, train=(5, 4), test=(6,)):
    """The published ``modelnet40_ply_hdf5_2048`` layout."""
    folder.mkdir(parents=True)
    (folder / "shape_names.txt").write_text("\n".join(NAMES) + "\n")
    written = {}
    for split, sizes in (("train", train), ("test", test)):
        data, labels = clouds(sum(sizes), seed=sum(sizes))
        written[split] = data, labels
        for number, (start, end) in enumerate(pairwise(np.cumsum([0, *sizes]))):
            with h5py.File(folder / f"ply_data_{split}{number}.h5", "w") as h5:
                h5["data"], h5["label"] = data[start:end], labels[start:end, None].astype(np.uint8)
    return written


def same_points(a, b, atol):
    """Equal as sets of points: for each there is one within ``atol`` in the other."""
    distance = (a.unsqueeze(2) - b.unsqueeze(1)).norm(dim=-1)
    return max(distance.amin(1).max(), distance.amin(2).max()) < atol


def test_packed_layout(tmp_path):
    write_packed(tmp_path / "modelnet40_64.h5")
    train = datasets.load("modelnet40", str(tmp_path), "train")
    data, labels = clouds(9, seed=9)
    assert train.points.shape == (9, 64, 3)
    assert train.labels.tolist() == labels.tolist()
    assert (train.class_names, train.object_names[4]) == (tuple(NAMES), "bathtub_0004")
    assert same_points(train.points, unit_sphere(torch.from_numpy(data)), 2e-3)
    assert len(datasets.load("modelnet40", str(tmp_path / "modelnet40_64.h5"), "test")) == 6


@pytest.mark.parametrize("place", ["", "ModelNet", "ModelNet40Ply2048"])
def test_official_layout_at_the_places_other_codebases_use(tmp_path, place):
    written = write_official(tmp_path / place / "modelnet40_ply_hdf5_2048")
    for split, size in (("train", 9), ("test", 6)):
        loaded = datasets.load("modelnet40", str(tmp_path), split)
        data, labels = written[split]
        assert len(loaded) == size
        assert loaded.labels.tolist() == labels.tolist()
        assert same_points(loaded.points, unit_sphere(torch.from_numpy(data)), 1e-5)


def test_clouds_come_centred_scaled_and_in_fps_order(tmp_path):
    write_packed(tmp_path / "modelnet40_64.h5")
    points = datasets.load("modelnet40", str(tmp_path), "train").points
    torch.testing.assert_close(points.mean(1), torch.zeros(9, 3), rtol=0, atol=1e-6)
    torch.testing.assert_close(points.norm(dim=-1).amax(1), torch.ones(9))
    assert torch.equal(farthest_point_sample(points, 64), torch.arange(64).expand(9, 64))


def test_real_modelnet40(real_data):
    train = datasets.load("modelnet40", str(real_data), "train", 1024)
    test = datasets.load("modelnet40", str(real_data), "test", 1024)
    assert (train.points.shape, test.points.shape) == ((9843, 1024, 3), (2468, 1024, 3))
    assert (len(train.class_names), train.class_names[0], train.class_names[39]) == (40, "airplane", "xbox")
    assert train.labels.bincount().tolist()[:3] == [626, 106, 515]  # airplane, bathtub, bed of the official split
    assert not set(train.object_names) & set(test.object_names)
    order = farthest_point_sample(test.points[:50], 100)
    assert torch.equal(order, torch.arange(100).expand(50, 100))


def test_real_clouds_with_many_points(real_data, capsys):
    sample = datasets.load("modelnet40", str(real_data / "modelnet40_8192_sample.h5"), "test", 8192)
    assert sample.points.shape == (29, 8192, 3)
    assert "has 29 objects in test; the official split has 2468" in capsys.readouterr().err


def make(points, read_count=None):
    def read():
        if read_count is not None:
            read_count.append(1)
        n = len(points)
        return PointClouds(points, torch.zeros(n, dtype=torch.int64), ("a",), ("x",) * n, "somewhere")

    return read


def test_prepared_clouds_are_read_once(tmp_path, cache):
    source, reads = tmp_path / "source.bin", []
    source.write_text("1")
    read = make(torch.randn(70, 16, 3), reads)
    first = prepared("set", [source], {"split": "train"}, read)
    second = prepared("set", [source], {"split": "train"}, read)
    assert len(reads) == 1
    assert torch.equal(first.points, second.points)
    assert (second.class_names, second.object_names, second.source) == (("a",), ("x",) * 70, "somewhere")
    prepared("set", [source], {"split": "test"}, read)
    source.write_text("22")
    prepared("set", [source], {"split": "train"}, read)
    assert len(reads) == 3  # another setting, and a changed source


def test_a_damaged_cache_is_made_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("POINTEWA_CACHE", str(tmp_path / "cache"))
    read = make(torch.randn(3, 16, 3))
    first = prepared("set", [], {}, read)
    (file,) = (tmp_path / "cache").iterdir()
    file.write_bytes(file.read_bytes()[:100])
    assert torch.equal(prepared("set", [], {}, read).points, first.points)
    assert "preparing it again" in capsys.readouterr().err


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("POINTEWA_CACHE", str(tmp_path / "file"))
    assert len(prepared("set", [], {}, make(torch.randn(3, 16, 3)))) == 3
    assert "could not be cached" in capsys.readouterr().err


def test_fps_order_keeps_every_point():
    points = torch.randn(70, 16, 3)
    ordered = fps_order(points, "test")
    assert torch.equal(ordered.sort(1).values, points.sort(1).values)


def test_validation_split_is_stratified_seeded_and_disjoint():
    labels = torch.tensor([0] * 20 + [1] * 10 + [2] * 2)
    data = PointClouds(torch.randn(32, 4, 3), labels, ("a", "b", "c"), tuple(map(str, range(32))), "x")
    rest, held_out = data.split(0.2, seed=1)
    assert held_out.labels.bincount().tolist() == [4, 2, 1]
    assert set(rest.object_names) | set(held_out.object_names) == set(data.object_names)
    assert len(rest) + len(held_out) == 32
    assert data.split(0.2, seed=1)[1].object_names == held_out.object_names
    assert data.split(0.2, seed=2)[1].object_names != held_out.object_names


# What is refused, with the message that the user sees.


def test_missing_data_says_where_it_looked_and_what_it_accepts(tmp_path):
    with pytest.raises(DataError) as error:
        datasets.load("modelnet40", str(tmp_path / "nowhere"), "train")
    message = str(error.value)
    for part in (
        str(tmp_path / "nowhere"),
        "modelnet40_ply_hdf5_2048/",
        "modelnet40*.h5",
        "DATA_ROOT",
        "DATASET=shapes",
    ):
        assert part in message


@pytest.mark.parametrize("keep", [0, 100, 0.5, 0.95])
def test_truncated_hdf5(tmp_path, keep):
    path = tmp_path / "modelnet40_64.h5"
    write_packed(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(DataError, match=r"modelnet40_64\.h5.*damaged or incomplete"):
        datasets.load("modelnet40", str(tmp_path), "train")


def test_truncated_official_file(tmp_path):
    write_official(tmp_path / "modelnet40_ply_hdf5_2048")
    path = tmp_path / "modelnet40_ply_hdf5_2048" / "ply_data_train1.h5"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(DataError, match=r"ply_data_train1\.h5.*damaged or incomplete"):
        datasets.load("modelnet40", str(tmp_path), "train")


def test_a_split_without_files(tmp_path):
    write_official(tmp_path / "modelnet40_ply_hdf5_2048", test=())
    with pytest.raises(DataError, match="of this split"):
        datasets.load("modelnet40", str(tmp_path), "test")


def edit(path, change):
    with h5py.File(path, "r+") as h5:
        change(h5)


def set_points(h5):
    del h5["train/data"]
    data = np.zeros((9, 64, 3), np.float32)
    data[2, 5, 1] = np.nan
    h5["train/data"] = data


def drop_names(h5):
    del h5.attrs["shape_names"]


def set_label(h5):
    h5["train/label"][4] = 3


def drop_train(h5):
    del h5["train"]


def flat_points(h5):
    del h5["train/data"]
    h5["train/data"] = np.zeros((9, 64), np.float32)


def fewer_labels(h5):
    labels = h5["train/label"][:-2]
    del h5["train/label"]
    h5["train/label"] = labels


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_label, r"object 4 \(bathtub_0004\) has label 3, expected 0 to 2"),
        (set_points, r"object 2 \(bed_0002\) has coordinates that are not finite, as 1 of 9 objects do"),
        (drop_names, "expected the packed layout"),
        (drop_train, "expected the packed layout"),
        (flat_points, r"expected points \[N, P, 3\].*found \[9, 64\]"),
        (fewer_labels, "9 clouds, 7 labels, 9 object names"),
    ],
)
def test_wrong_content(tmp_path, change, message):
    path = tmp_path / "modelnet40_64.h5"
    write_packed(path)
    edit(path, change)
    with pytest.raises(DataError, match=message) as error:
        datasets.load("modelnet40", str(tmp_path), "train")
    assert str(path) in str(error.value)


def test_fewer_points_than_asked(tmp_path):
    write_packed(tmp_path / "modelnet40_64.h5")
    with pytest.raises(DataError, match=r"an object has 64 points, data\.num_points asks for 65"):
        datasets.load("modelnet40", str(tmp_path), "train", 65)


def test_unknown_names():
    with pytest.raises(DataError, match=r"data\.name: expected one of modelnet40, shapes, found 'modelnet10'"):
        datasets.load("modelnet10", "data", "train")
    with pytest.raises(DataError, match='expected "train" or "test"'):
        datasets.load("shapes", "data", "val")

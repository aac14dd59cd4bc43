"""ShapeNet-55 in its documented layout, and what is refused. The files are made here: the set is not at hand."""

import numpy as np
import pytest
import torch

from pointewa import datasets
from pointewa.datasets import packed
from pointewa.datasets.layouts import shapenet55
from pointewa.datasets.prepare import prepare
from pointewa.errors import DataError
from pointewa.ops import unit_sphere

NAMES = {
    "train": ["03001627-a1", "02691156-1a04e3eab45ca15dd86060f189eb133", "03001627-b-2", "09999999-c"],
    "test": ["02747177-d", "03001627-e"],
}
LABELS = {"train": [2, 0, 2, 3], "test": [1, 2]}  # of the synsets of both lists, sorted
CLASSES = ("airplane", "trash_bin", "chair", "09999999")  # one that ShapeNetCore has not keeps its number
PLACES = {  # where the lists may be, and the clouds
    "": ["shapenet_pc", "../shapenet_pc"],
    "ShapeNet-55": ["shapenet_pc"],
    "ShapeNet55-34": ["ShapeNet55-34/shapenet_pc", "shapenet_pc"],
    "ShapeNet55-34/ShapeNet-55": ["ShapeNet55-34/shapenet_pc"],
}


def write(root, lists="ShapeNet55-34/ShapeNet-55", clouds="ShapeNet55-34/shapenet_pc", num_points=64):
    """The files, and of each split the points in the order of the lists."""
    rng, points = np.random.default_rng(0), {}
    (root / lists).mkdir(parents=True, exist_ok=True)
    (root / clouds).mkdir(parents=True, exist_ok=True)
    for split, names in NAMES.items():
        (root / lists / f"{split}.txt").write_text("".join(f"{name}.npy\n" for name in names))
        points[split] = rng.normal(2, 3, (len(names), num_points, 3)).astype(np.float32)
        for name, cloud in zip(names, points[split], strict=True):
            np.save(root / clouds / f"{name}.npy", cloud)
    return points


def as_sets(points):
    return [sorted(cloud) for cloud in points.tolist()]


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(("lists", "clouds"), [(lists, one) for lists, all_ in PLACES.items() for one in all_])
def test_clouds_and_labels_come_back_from_every_place(tmp_path, lists, clouds, split, capsys):
    root = tmp_path / "data"
    points = write(root, lists, clouds)[split]
    loaded = datasets.load("shapenet55", str(root), split)
    assert loaded.labels.tolist() == LABELS[split]
    assert loaded.class_names == CLASSES
    assert list(loaded.object_names) == NAMES[split]
    assert loaded.normalized
    assert loaded.points.shape == (len(points), 64, 3)
    assert as_sets(loaded.points) == as_sets(unit_sphere(torch.from_numpy(points)))
    note = capsys.readouterr().err
    assert f"4 classes, expected 55; {len(points)} objects, expected {shapenet55.SIZES[split]} in {split}" in note


def test_the_lists_may_be_the_root_itself(tmp_path, monkeypatch):
    write(tmp_path)
    monkeypatch.chdir(tmp_path / "ShapeNet55-34" / "ShapeNet-55")
    assert len(datasets.open_source("shapenet55", ".", "train")) == 4


def test_the_classes_are_the_55_sorted_synsets():
    assert len(shapenet55.CLASSES) == len(set(shapenet55.CLASSES.values())) == 55
    assert list(shapenet55.CLASSES) == sorted(shapenet55.CLASSES)
    assert sum(shapenet55.SIZES.values()) == 52_470


def test_a_packed_file_gives_the_same(tmp_path):
    write(tmp_path)
    source = datasets.open_source("shapenet55", str(tmp_path), "train")
    expected = datasets.load("shapenet55", str(tmp_path), "train", 32)
    for count in (16, 64):  # the first by name has too few points
        packed.write(tmp_path / f"shapenet55_{count}.h5", {"train": (source, count, prepare(source, count, ""))})
    for root in (tmp_path, tmp_path / "shapenet55_64.h5"):
        loaded = datasets.load("shapenet55", str(root), "train", 32)
        assert loaded.source.endswith("shapenet55_64.h5")
        assert torch.equal(loaded.points[:, :32], expected.points[:, :32])
        assert loaded.labels.tolist() == LABELS["train"]


# What is refused, with the message that the user sees.


def refused(root, message, split="train", **options):
    with pytest.raises(DataError, match=message) as error:
        datasets.load("shapenet55", str(root), split, **options)
    return str(error.value)


def test_missing_data_says_where_it_looked_and_where_to_ask(tmp_path):
    message = refused(tmp_path / "nowhere", "no train.txt and test.txt there")
    for part in (str(tmp_path / "nowhere"), "ShapeNet55-34/ShapeNet-55", "https://shapenet.org", "PoinTr", "DATA_ROOT"):
        assert part in message
    write(tmp_path)
    (tmp_path / "ShapeNet55-34" / "shapenet_pc").rename(tmp_path / "elsewhere")
    assert "https://shapenet.org" in refused(tmp_path, r"no folder shapenet_pc in .*ShapeNet-55 or beside it")
    (tmp_path / "ShapeNet55-34" / "ShapeNet-55" / "test.txt").unlink()  # the labels need both
    refused(tmp_path, "no train.txt and test.txt there")


def test_files_that_are_missing(tmp_path):
    write(tmp_path)
    for name in NAMES["train"][1:3]:
        (tmp_path / "ShapeNet55-34" / "shapenet_pc" / f"{name}.npy").unlink()
    refused(tmp_path, r"2 of 4 files that .*train\.txt lists are missing, the first is 02691156-1a04e3eab45ca15d")
    assert len(datasets.open_source("shapenet55", str(tmp_path), "test")) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "it is empty"),
        ("airplane_0001\n", "found 'airplane_0001'"),
        ("02691156-a.npy\n../../02691156-a.npy\n", r"found '\.\./\.\./02691156-a\.npy'"),
        ("02691156-a/../b.npy\n", r"found '02691156-a/\.\./b\.npy'"),
        ("02691156-a.pkl\n", r"found '02691156-a\.pkl'"),
        (b"\xff\xfe\x00", "UnicodeDecodeError"),
    ],
)
def test_lists_that_are_none(tmp_path, content, message):
    write(tmp_path)
    file = tmp_path / "ShapeNet55-34" / "ShapeNet-55" / "train.txt"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    for split in ("train", "test"):
        refused(tmp_path, rf"train\.txt: cannot be read as a list of files.*{message}", split)


@pytest.mark.parametrize("number", [0, 2])
@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(64, np.float32), r"expected numbers \[P, 3 or more\], found float32 \[64\]"),
        (np.zeros((64, 2), np.float32), r"found float32 \[64, 2\]"),
        (np.zeros((1, 64, 3), np.float32), r"found float32 \[1, 64, 3\]"),
        (np.array([["a", "b", "c"]]), r"found <U1 \[1, 3\]"),
        (np.full((64, 3), np.nan), "64 of 64 points have coordinates that are not finite"),
        (np.zeros((0, 3)), "expected points, found none"),
        (np.array([None]), "allow_pickle=False"),
        (None, "cannot be read as NPY"),
    ],
)
def test_files_of_wrong_shapes_or_damaged(tmp_path, number, array, message):
    write(tmp_path)
    file = tmp_path / "ShapeNet55-34" / "shapenet_pc" / f"{NAMES['train'][number]}.npy"
    if array is None:
        file.write_bytes(file.read_bytes()[:300])
    else:
        np.save(file, array)
    assert str(file) in refused(tmp_path, message)


def test_other_numbers_of_points(tmp_path):
    write(tmp_path)
    file = tmp_path / "ShapeNet55-34" / "shapenet_pc" / f"{NAMES['train'][2]}.npy"
    np.save(file, np.zeros((63, 3), np.float32))
    refused(tmp_path, r"03001627-b-2\.npy: expected 64 points as in 03001627-a1\.npy, found 63")
    refused(tmp_path, r"has 64 points, data\.num_points asks for 65", num_points=65)
    refused(tmp_path, "shapenet55 has no variants, found 'x'", variant="x")

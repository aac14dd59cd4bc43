"""ShapeNetPart in its published layouts, and what is refused. The files are made here; a sample is of the real ones."""

import json
from collections import Counter
from itertools import chain

import h5py
import numpy as np
import pytest
import torch

from pointewa import datasets
from pointewa.datasets import packed
from pointewa.datasets.layouts import shapenetpart
from pointewa.datasets.prepare import prepare
from pointewa.errors import DataError
from pointewa.ops import unit_sphere

AIRPLANE, MUG, TABLE = "02691156", "03797390", "04379243"
FIRST = {AIRPLANE: 0, MUG: 36, TABLE: 47}  # parts of the categories
COUNT = {AIRPLANE: 4, MUG: 2, TABLE: 3}
LISTS = {
    "train": [(AIRPLANE, "a1"), (MUG, "same"), (TABLE, "same"), (TABLE, "t2")],
    "val": [(MUG, "m2"), (TABLE, "t2")],  # t2 is in both, as nine objects are in the published lists
    "test": [(TABLE, "t3"), (AIRPLANE, "same")],
}
FOLDER = "shapenetcore_partanno_segmentation_benchmark_v0_normal"


def write_lists(root, lists=LISTS):
    (root / "train_test_split").mkdir(parents=True, exist_ok=True)
    for name, pairs in lists.items():
        text = json.dumps([f"shape_data/{synset}/{one}" for synset, one in pairs])
        (root / "train_test_split" / f"shuffled_{name}_file_list.json").write_text(text)


def objects(num_points=70):
    """Points and parts of each object."""
    rng = np.random.default_rng(0)
    return {
        one: (rng.normal(size=(num_points + number, 3)).round(5),
              rng.integers(FIRST[one[0]], FIRST[one[0]] + COUNT[one[0]], num_points + number))
        for number, one in enumerate(dict.fromkeys(chain(*LISTS.values())))
    }  # fmt: skip


def write_text(root):
    """The text layout, and the objects."""
    write_lists(root)
    (root / "synsetoffset2category.txt").write_text("Airplane\t02691156\nMug\t03797390\nTable\t04379243\n")
    made = objects()
    for (synset, name), (points, parts) in made.items():
        (root / synset).mkdir(exist_ok=True)
        normals = np.ones_like(points)
        np.savetxt(root / synset / f"{name}.txt", np.column_stack([points, normals, parts]), "%.6f")
    return made


def write_v0(root):
    """The layout of the archive before that, whose parts are counted from 1 in each category."""
    write_lists(root)
    made = objects()
    for (synset, name), (points, parts) in made.items():
        for folder in ("points", "points_label"):
            (root / synset / folder).mkdir(parents=True, exist_ok=True)
        np.savetxt(root / synset / "points" / f"{name}.pts", points, "%.5f")
        np.savetxt(root / synset / "points_label" / f"{name}.seg", parts - FIRST[synset] + 1, "%d")
    return made


def write_hdf5(root, num_points=64, libver="earliest"):
    """The HDF5 layout, as a rule in the old format of the published files: of each file points, categories, parts."""
    root.mkdir(parents=True, exist_ok=True)
    made, rng = {}, np.random.default_rng(1)
    for name in ("train0", "train1", "train10", "val0", "test0", "test1"):
        label = rng.integers(0, 16, (5, 1)).astype(np.uint8)
        parts = [
            rng.choice(np.flatnonzero(np.array(shapenetpart.PARTS.classes) == one), num_points) for (one,) in label
        ]
        made[name] = rng.normal(size=(5, num_points, 3)).astype(np.float32), label, np.array(parts, np.uint8)
        with h5py.File(root / f"ply_data_{name}.h5", "w", libver=libver) as h5:
            h5["data"], h5["label"], h5["pid"] = made[name]
    return made


def test_the_categories_and_parts_are_the_official_ones():
    # As the publicly used loaders have them: Airplane 0-3, Bag 4-5, Cap 6-7, Car 8-11, Chair 12-15, ...
    sizes = [4, 2, 2, 4, 4, 3, 3, 2, 4, 2, 6, 2, 3, 3, 3, 3]
    assert shapenetpart.PARTS.classes == tuple(np.repeat(range(16), sizes))
    assert list(shapenetpart.CATEGORIES) == sorted(shapenetpart.CATEGORIES)
    assert [one[0] for one in shapenetpart.CATEGORIES.values()] == sorted(
        one[0] for one in shapenetpart.CATEGORIES.values()
    )


def rows(cloud, labels):
    return Counter((*map(tuple, [point]), label) for point, label in zip(cloud.tolist(), labels.tolist(), strict=True))


SPLITS = {
    ("trainval", "train"): [(AIRPLANE, "a1"), (MUG, "same"), (TABLE, "same"), (TABLE, "t2"), (MUG, "m2")],
    ("trainval", "test"): [(TABLE, "t3"), (AIRPLANE, "same")],
    ("official_val", "train"): [(AIRPLANE, "a1"), (MUG, "same"), (TABLE, "same"), (TABLE, "t2")],
    ("official_val", "test"): [(MUG, "m2"), (TABLE, "t2")],
}


@pytest.mark.parametrize(("variant", "split"), SPLITS)
@pytest.mark.parametrize("write", [write_text, write_v0])
@pytest.mark.parametrize("place", ["", FOLDER, f"ShapeNetPart/{FOLDER}"])
def test_clouds_and_their_parts_come_back(tmp_path, write, place, variant, split, capsys):
    made = write(tmp_path / place)
    source = datasets.open_source("shapenetpart", str(tmp_path), split, variant=variant)
    expected = SPLITS[variant, split]
    assert list(source.object_names) == ["/".join(one) for one in expected]
    assert [source.class_names[label] for label in source.labels] == [
        {AIRPLANE: "Airplane", MUG: "Mug", TABLE: "Table"}[synset] for synset, _ in expected
    ]
    assert len(source.class_names) == 16
    for one, cloud in zip(expected, source.clouds(1), strict=True):
        assert np.array_equal(cloud.points, np.float32(made[one][0]))
        assert np.array_equal(cloud.point_labels, made[one][1])
    err = capsys.readouterr().err
    assert f"{len(expected)} objects in {split}, the official split of {variant}" in err
    assert ("1 object to train on, such as 04379243/t2, in the test split too, as 9 of the official" in err) == (
        (variant, split) == ("official_val", "train")
    )


@pytest.mark.parametrize("stream", [False, True])
def test_labels_stay_with_their_points_and_the_whole_cloud_is_normalised(tmp_path, stream):
    made = write_text(tmp_path)
    loaded = datasets.load("shapenetpart", str(tmp_path), "test", 32, stream=stream)
    assert loaded.parts == shapenetpart.PARTS
    ((points, labels),) = loaded.batches([torch.arange(2)], 32)
    for index, one in enumerate(SPLITS["trainval", "test"]):
        whole = rows(unit_sphere(torch.from_numpy(np.float32(made[one][0]))), torch.from_numpy(made[one][1]))
        assert rows(points[index], labels[index]) <= whole
    assert points.shape == (2, 32, 3)


def test_fewer_points_than_asked_are_repeated_with_their_labels(tmp_path, capsys):
    write_text(tmp_path)
    loaded = datasets.load("shapenetpart", str(tmp_path), "test", 128)
    assert "have fewer than 128 points" in capsys.readouterr().err
    size = 70 + 5  # of the sixth object that was written
    assert torch.equal(loaded.points[0, size:], loaded.points[0, : 128 - size])
    assert torch.equal(loaded.point_labels[0, size:], loaded.point_labels[0, : 128 - size])


@pytest.mark.parametrize("place", ["", "hdf5_data", "shapenet_part_seg_hdf5_data"])
def test_hdf5_comes_back(tmp_path, place):
    made = write_hdf5(tmp_path / place)
    for (variant, split), names in {
        ("trainval", "train"): ["train0", "train1", "train10", "val0"],
        ("trainval", "test"): ["test0", "test1"],
        ("official_val", "test"): ["val0"],
    }.items():
        source = datasets.open_source("shapenetpart", str(tmp_path), split, variant=variant)
        clouds = list(source.clouds(1))
        for part, index in (("points", 0), ("point_labels", 2)):
            found = np.stack([getattr(cloud, part) for cloud in clouds])
            assert np.array_equal(found, np.concatenate([made[name][index] for name in names]))
        assert source.labels.tolist() == np.concatenate([made[name][1][:, 0] for name in names]).tolist()
        assert source.num_points == 64
    with pytest.raises(DataError, match=r"an object has 64 points, data.num_points asks for 65: lower it"):
        datasets.open_source("shapenetpart", str(tmp_path), "test", 65)


def test_a_packed_file_keeps_parts(tmp_path):
    write_text(tmp_path / "set")
    source = datasets.open_source("shapenetpart", str(tmp_path / "set"), "test")
    expected = datasets.load("shapenetpart", str(tmp_path / "set"), "test", 32)
    (tmp_path / "other").mkdir()
    for count in (16, 48):  # the first by name has too few points
        file = tmp_path / "other" / f"shapenetpart_trainval_{count}.h5"
        packed.write(file, {"test": (source, count, prepare(source, count, ""))})
    for root in (tmp_path / "other", tmp_path / "other" / "shapenetpart_trainval_48.h5"):
        loaded = datasets.load("shapenetpart", str(root), "test", 32)
        assert loaded.parts == shapenetpart.PARTS
        assert torch.equal(loaded.points[:, :32], expected.points[:, :32])
        assert torch.equal(loaded.point_labels[:, :32], expected.point_labels[:, :32])
    with pytest.raises(DataError, match=r"_48\.h5 was packed of trainval, found official_val: leave it out"):
        datasets.open_source("shapenetpart", str(root), "test", variant="official_val")


def edited(file, line, column, text):
    lines = file.read_text().splitlines()
    fields = lines[line - 1].split()
    fields[column] = text
    lines[line - 1] = " ".join(fields)
    file.write_text("\n".join(lines))


@pytest.mark.parametrize("bad", ["46.000000", "50", "47.5", "nan", "-1"])
def test_a_part_of_another_category_is_refused_by_file_and_line(tmp_path, bad):
    write_text(tmp_path)
    edited(tmp_path / TABLE / "t3.txt", 5, 6, bad)
    found = f"{float(bad):g}"
    with pytest.raises(DataError, match=rf"{TABLE}/t3.txt: line 5: expected a part of Table, 47 to 49, found {found}:"):
        datasets.load("shapenetpart", str(tmp_path), "test", 32)


def test_parts_counted_from_one_are_refused_as_they_are_in_the_file(tmp_path):
    write_v0(tmp_path)
    for bad, found in (("0", "0"), ("4", "4")):
        edited(tmp_path / TABLE / "points_label" / "t3.seg", 2, 0, bad)
        with pytest.raises(DataError, match=rf"t3.seg: line 2: expected a part of Table, 1 to 3, found {found}:"):
            datasets.load("shapenetpart", str(tmp_path), "test", 32)
    (tmp_path / TABLE / "points_label" / "t3.seg").write_text("1\n2\n")
    with pytest.raises(DataError, match=r"t3.seg: expected the parts of the 75 points of t3.pts, found 2"):
        datasets.load("shapenetpart", str(tmp_path), "test", 32)


def test_a_wrong_part_in_hdf5_is_refused_by_object_and_point(tmp_path):
    write_hdf5(tmp_path)
    with h5py.File(tmp_path / "ply_data_test1.h5", "r+") as h5:
        h5["label"][3], h5["pid"][3] = 0, 0
        h5["pid"][3, 7] = 4
    with pytest.raises(DataError, match=r"test1.h5: object 3, point 7: expected a part of Airplane, 0 to 3, found 4:"):
        datasets.load("shapenetpart", str(tmp_path), "test", 32)


def remove_column(root):
    edited(root / TABLE / "t3.txt", 1, 6, "")
    for file in (root / TABLE).glob("t3.txt"):
        file.write_text("\n".join(line.rpartition(" ")[0] for line in file.read_text().splitlines()))


BROKEN = {
    "columns": (remove_column, r"t3.txt: .*rows of 7 numbers.*found"),
    "no text": (lambda root: (root / TABLE / "t3.txt").write_text("hello\n"), "t3.txt"),
    "empty": (lambda root: (root / TABLE / "t3.txt").write_text(""), "t3.txt.*no rows"),
    "list": (lambda root: write_lists(root, LISTS | {"test": [("99999999", "x")]}), "synset 99999999"),
    "names": (lambda root: write_lists(root, LISTS | {"test": [(TABLE, "../../x")]}), "test_file_list.json.*x'"),
    "json": (lambda root: (root / "train_test_split/shuffled_test_file_list.json").write_text("{"), "file_list.json"),
    "no list": (lambda root: (root / "train_test_split/shuffled_test_file_list.json").unlink(), "file_list.json"),
    "all gone": (lambda root: [file.unlink() for file in root.glob("*/*.txt")], "none of 2 objects of test"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_broken_is_refused_by_name(tmp_path, case):
    write_text(tmp_path)
    spoil, message = BROKEN[case]
    spoil(tmp_path)
    with pytest.raises(DataError, match=message):
        datasets.load("shapenetpart", str(tmp_path), "test", 32)


def test_the_raw_annotations_are_refused_by_name(tmp_path):
    write_lists(tmp_path)
    for synset in FIRST:
        (tmp_path / synset / "points_label" / "wing").mkdir(parents=True)
        (tmp_path / synset / "points").mkdir()
    with pytest.raises(DataError, match=r"found wing: it is shapenetcore_partanno_v0, use"):
        datasets.open_source("shapenetpart", str(tmp_path), "test")


def test_missing_objects_are_said_and_left_out(tmp_path, capsys):
    write_text(tmp_path)
    (tmp_path / AIRPLANE / "same.txt").unlink()
    assert len(datasets.open_source("shapenetpart", str(tmp_path), "test")) == 1
    err = capsys.readouterr().err
    assert "of 2 objects of test that the lists name 1 are missing, such as 02691156/same: left out" in err


def test_nothing_found_says_where_it_was_looked_for(tmp_path):
    with pytest.raises(DataError, match="ShapeNetPart was not found"):
        datasets.open_source("shapenetpart", str(tmp_path), "test")
    with pytest.raises(DataError, match="expected one of trainval, official_val for shapenetpart, found 'x'"):
        datasets.open_source("shapenetpart", str(tmp_path), "test", variant="x")


def test_the_official_sizes(tmp_path):
    write_text(tmp_path)
    source = datasets.open_source("shapenetpart", str(tmp_path), "test")
    assert shapenetpart.check_split(source, "test") == ["2 objects, expected 2874"]
    assert shapenetpart.check_split(source, "train") == ["2 objects, expected 13998"]


def test_the_real_files_are_read_as_numpy_reads_them(real_data, capsys):
    root = real_data / "shapenetpart_sample" / "v0_normal"
    found = set()
    for split in ("train", "test"):
        source = datasets.open_source("shapenetpart", str(root), split)
        for name, cloud in zip(source.object_names, source.clouds(1), strict=True):
            table = np.loadtxt(root / f"{name}.txt")
            assert np.array_equal(cloud.points, np.float32(table[:, :3]))
            assert np.array_equal(cloud.point_labels, table[:, 6])
            found |= set(cloud.point_labels.tolist())
    assert found == {45, 47, 48, 49}
    assert "in train, the official split of trainval has 13998" in capsys.readouterr().err


def test_the_official_lists_have_the_official_sizes(real_data):
    lists = {
        name: shapenetpart._names(real_data / "shapenetpart_sample/official_split" / f"shuffled_{name}_file_list.json")
        for name in ("train", "val", "test")
    }
    for variant, splits in shapenetpart.VARIANTS.items():
        names = {split: {one for name in lists_ for one in lists[name]} for split, lists_ in splits.items()}
        assert {split: len(mine) for split, mine in names.items()} == {
            split: sizes[0] for split, sizes in shapenetpart.SIZES[variant].items()
        }
        assert len(names["train"] & names["test"]) == shapenetpart.SHARED[variant]
    assert len(lists["train"]) + len(lists["val"]) == shapenetpart.SIZES["trainval"]["train"][1]

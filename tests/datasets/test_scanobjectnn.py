"""ScanObjectNN in all its variants: what comes back is what was written, in the documented layout."""

import struct
from collections import Counter

import h5py
import numpy as np
import pytest
import torch

from pointewa import datasets
from pointewa.datasets.files.raw_scans import read_raw
from pointewa.datasets.inspect import report
from pointewa.datasets.layouts import scanobjectnn
from pointewa.errors import DataError
from pointewa.ops import placed, unit_sphere
from tests.datasets.conftest import same_clouds
from tests.datasets.test_packed import pack


@pytest.mark.parametrize("variant", ["obj_bg", "obj_only", "pb_t50_rs"])
@pytest.mark.parametrize("root", ["", "ScanObjectNN", "ScanObjectNN/h5_files"])
def test_scanobjectnn(tmp_path, layouts, variant, root, capsys):
    small = layouts.procedural(128)
    layouts.scanobjectnn(tmp_path / root, small, variant)
    for split, part in small.items():
        part.points[:] = part.points * 3 + 1
        layouts.scanobjectnn(tmp_path / root, small, variant)
        loaded = datasets.load("scanobjectnn", str(tmp_path), split, variant=variant)
        assert loaded.labels.tolist() == part.labels.tolist()
        assert (len(loaded.class_names), loaded.class_names[0], loaded.class_names[14]) == (15, "bag", "toilet")
        assert not loaded.normalized
        assert same_clouds(loaded, part.points, 1e-6)  # neither centred nor scaled
        assert loaded.point_labels.dtype == torch.int64
        assert torch.equal(loaded.point_labels, (loaded.points[..., 0] > 0).long())  # in the order of the points
    assert f"the official split of {variant} has" in capsys.readouterr().err


def test_scanobjectnn_without_a_mask_and_its_default(tmp_path, layouts):
    layouts.scanobjectnn(tmp_path, layouts.procedural(64), "pb_t50_rs", mask=False)
    loaded = datasets.load("scanobjectnn", str(tmp_path), "test")
    assert loaded.point_labels is None
    assert "augmentedrot_scale75" in datasets.open_source("scanobjectnn", str(tmp_path), "test").path.name
    with pytest.raises(DataError, match=r"expected one of obj_bg, obj_only, pb_t25, pb_t25_r, .*found 'x'"):
        datasets.load("scanobjectnn", str(tmp_path), "test", variant="x")
    with pytest.raises(DataError, match="hkust-vgd"):  # where to ask for it
        datasets.load("scanobjectnn", str(tmp_path), "test", variant="obj_bg")
    with pytest.raises(DataError, match=r"has 64 points, data\.num_points asks for 65"):
        datasets.load("scanobjectnn", str(tmp_path), "test", 65)


def test_scanobjectnn_without_its_background(tmp_path, layouts, capsys):
    layouts.scanobjectnn(tmp_path, layouts.procedural(128), "pb_t50_rs")
    whole = datasets.load("scanobjectnn", str(tmp_path), "train")
    objects = datasets.load("scanobjectnn", str(tmp_path), "train", 32, background="drop")
    assert objects.point_labels is None
    assert objects.points.shape == (12, 38, 3)
    for kept, cloud, labels in zip(objects.points, whole.points, whole.point_labels, strict=True):
        mine = {tuple(point) for point in kept.tolist()}
        assert mine <= {tuple(point) for point in cloud[labels == 1].tolist()}
        assert len(mine) == min(38, int(labels.sum()))
    again = datasets.load("scanobjectnn", str(tmp_path), "train", background="keep")  # not mixed up in the cache
    assert torch.equal(again.points, whole.points)


@pytest.mark.parametrize("how", ["unit_sphere", "center", "none"])
def test_the_background_is_dropped_of_packed_files_too(tmp_path, layouts, how):
    layouts.scanobjectnn(tmp_path / "s", layouts.procedural(64), "obj_bg")
    wanted = {"variant": "obj_bg", "normalize": how}
    file = pack(tmp_path / "some.h5", tmp_path / "s", "scanobjectnn", **wanted)
    whole = datasets.load("scanobjectnn", str(file), "train", **wanted)
    objects = datasets.load("scanobjectnn", str(file), "train", 40, background="drop", **wanted)
    assert (objects.point_labels, objects.normalize) == (None, how)
    for kept, cloud, labels in zip(objects.points, whole.points, whole.point_labels, strict=True):
        assert 0 < labels.sum() < 64
        placed_again = placed(cloud[labels == 1], how)
        assert torch.cdist(kept, placed_again, compute_mode="donot_use_mm_for_euclid_dist").amin(1).max() < 1e-5
    with pytest.raises(DataError, match=r"data\.background=drop.* has no parts of objects: set it to keep"):
        datasets.open_source("scanobjectnn", str(file), "train", background="drop", parts=True, **wanted)


@pytest.mark.parametrize("how", ["unit_sphere", "center"])
def test_a_packed_file_says_how_its_clouds_are_normalised(tmp_path, layouts, capsys, how):
    layouts.scanobjectnn(tmp_path / "s", layouts.procedural(64), "obj_bg")
    file = pack(tmp_path / "some.h5", tmp_path / "s", "scanobjectnn", variant="obj_bg", normalize=how)
    found, asked = (datasets.load("scanobjectnn", str(file), "train", normalize=one) for one in ("auto", how))
    assert found.normalize == asked.normalize == how  # the set's own is none, which the clouds no longer are
    assert torch.equal(found.points, asked.points)
    done = {"unit_sphere": "centred and scaled to norm 1", "center": "centred"}[how]
    assert capsys.readouterr().err.count(f"note: {file}: its clouds were {done} when it was packed, and are") == 1
    with pytest.raises(DataError, match=r"data\.normalize=none: the clouds of .* which cannot be undone: pack it"):
        datasets.load("scanobjectnn", str(file), "train", normalize="none")


def test_a_packed_file_of_another_variant_is_refused(tmp_path, layouts, capsys):
    layouts.scanobjectnn(tmp_path / "s", layouts.procedural(64), "pb_t50_rs")
    file = pack(tmp_path / "some.h5", tmp_path / "s", "scanobjectnn")
    found = lambda variant: datasets.open_source("scanobjectnn", str(file), "test", variant=variant).variant  # noqa: E731
    assert [found(one) for one in (None, "pb_t50_rs", "pb_t50_rs/main_split")] == ["pb_t50_rs"] * 3
    refused = r"data\.variant: .*64\.h5 was packed of pb_t50_rs, found pb_t50_r: leave it out"
    with pytest.raises(DataError, match=refused.replace("64", "some")):
        found("pb_t50_r")
    with h5py.File(file, "r+") as h5:
        h5.attrs["variant"] = "../x"  # it becomes a part of the names of files
    with pytest.raises(DataError, match=r"some\.h5: attribute variant: expected a name, found '\.\./x'"):
        found(None)
    with h5py.File(file, "r+") as h5:  # as files were that say it by their names only
        del h5.attrs["variant"]
    capsys.readouterr()
    assert (found("pb_t50_r"), found(None)) == ("pb_t50_r", None)
    assert f"note: {file} does not say of which variant it is: taken for pb_t50_r\n" in capsys.readouterr().err
    file = file.rename(tmp_path / "scanobjectnn_center_pb_t50_rs_64.h5")
    assert found(None) == found("pb_t50_rs") == "pb_t50_rs"
    with pytest.raises(DataError, match=refused):
        found("pb_t50_r")


def test_a_background_that_nobody_knows_cannot_be_dropped(tmp_path, layouts):
    layouts.scanobjectnn(tmp_path, layouts.procedural(64), "pb_t50_rs", mask=False)
    with pytest.raises(DataError, match=r"\.h5: data\.background=drop needs a dataset mask, which is not in the file"):
        datasets.load("scanobjectnn", str(tmp_path), "test", background="drop")
    with pytest.raises(DataError, match=r"data\.background=drop: shapes does not tell objects from their background"):
        datasets.load("shapes", "", "test", background="drop")


@pytest.mark.parametrize(
    ("variant", "place", "file"),
    [
        ("pb_t25", "main_split", "objectdataset_augmented25_norot"),
        ("pb_t25_r", "main_split", "objectdataset_augmented25rot"),
        ("pb_t50_r", "main_split", "objectdataset_augmentedrot"),
        ("pb_t50_r/split2", "split2", "objectdataset_augmentedrot"),
        ("pb_t50_rs/split4_nobg", "split4_nobg", "objectdataset_augmentedrot_scale75"),
        ("obj_bg/split1", "split1", "objectdataset"),
        ("obj_only/split3", "split3_nobg", "objectdataset"),
        ("obj_only/split3_nobg", "split3_nobg", "objectdataset"),
        ("pb_t25/main_split_nobg", "main_split_nobg", "objectdataset_augmented25_norot"),
    ],
)
def test_a_perturbed_variant_or_another_split(tmp_path, layouts, capsys, variant, place, file):
    small, others = layouts.procedural(64), layouts.procedural(32)
    for name in scanobjectnn.VARIANTS:
        if name != "raw":  # all of the set is there, and only one file is the right one
            for folder in ("main_split", "split1", "main_split_nobg"):
                layouts.scanobjectnn(tmp_path, others, name, place=folder)
    layouts.scanobjectnn(tmp_path, small, variant.partition("/")[0], place=place)
    for split, part in small.items():
        opened = datasets.open_source("scanobjectnn", str(tmp_path), split, variant=variant)
        prefix = "training" if split == "train" else "test"
        assert str(opened.path.relative_to(tmp_path)) == f"{place}/{prefix}_{file}.h5"
        loaded = datasets.load("scanobjectnn", str(tmp_path), split, variant=variant)
        assert loaded.labels.tolist() == part.labels.tolist()
        assert same_clouds(loaded, part.points, 1e-6)
        assert scanobjectnn.check_split(opened, split) is None  # no size is known
    assert "official" not in capsys.readouterr().err
    good, bad = report.verify("scanobjectnn", {"train": opened})
    assert (bad, "the size of the official split is not known" in good[0]) == ([], True)


@pytest.mark.parametrize(
    "variant", ["pb_t25/split5", "obj_bg/", "obj_bg/split1_nobg", "raw/split1_nobg", "split1", "PB_T25"]
)
def test_a_variant_that_there_is_not_is_refused_with_those_that_there_are(tmp_path, variant):
    with pytest.raises(DataError, match=r"pb_t50_rs, raw for.*split4; .*such as pb_t50_rs/split1, found") as error:
        datasets.open_source("scanobjectnn", str(tmp_path), "test", variant=variant)
    assert repr(variant) in str(error.value)


def test_what_is_there_is_said_where_the_variant_is_not(tmp_path, layouts):
    layouts.scanobjectnn(tmp_path / "h5_files", layouts.procedural(32), "pb_t25_r")
    layouts.scanobjectnn(tmp_path, layouts.procedural(32), "obj_only", place="split3_nobg")
    layouts.raw_scans(tmp_path / "ScanObjectNN", layouts.procedural(32))
    with pytest.raises(DataError, match=r"\(pb_t50_rs\) was not found, but obj_only/split3, pb_t25_r, raw: set data.v"):
        datasets.open_source("scanobjectnn", str(tmp_path), "test")


def test_packed_files_of_variants_with_alike_names_are_told_apart(tmp_path, layouts):
    names = ["pb_t25_r_64", "pb_t25_64", "pb_t50_rs_64", "pb_t50_r-split2_64", "pb_t50_r_64", "obj_only-split1_8"]
    for name in names:
        (tmp_path / f"scanobjectnn_{name}.h5").write_bytes(b"")
    found = {path.stem: variant for path, variant in scanobjectnn._packs(tmp_path).items()}
    assert found == {
        "scanobjectnn_pb_t25_r_64": ("pb_t25_r", "main_split"),
        "scanobjectnn_pb_t25_64": ("pb_t25", "main_split"),
        "scanobjectnn_pb_t50_rs_64": ("pb_t50_rs", "main_split"),
        "scanobjectnn_pb_t50_r-split2_64": ("pb_t50_r", "split2"),
        "scanobjectnn_pb_t50_r_64": ("pb_t50_r", "main_split"),
        "scanobjectnn_obj_only-split1_8": ("obj_only", "split1_nobg"),
    }
    assert scanobjectnn.slug("obj_only/split1") == "obj_only-split1"


def test_background_and_object_are_parts_of_every_class(tmp_path, layouts):
    layouts.scanobjectnn(tmp_path, layouts.procedural(64), "obj_bg")
    layouts.scanobjectnn(tmp_path, layouts.procedural(64), "pb_t25", mask=False)
    loaded = datasets.load("scanobjectnn", str(tmp_path), "test", variant="obj_bg")
    assert (loaded.parts.names, loaded.parts.mask(15).all().item()) == (("background", "object"), True)
    assert datasets.load("scanobjectnn", str(tmp_path), "test", variant="pb_t25").parts is None
    assert datasets.load("scanobjectnn", str(tmp_path), "test", variant="obj_bg", background="drop").parts is None


def object_of(file):
    """The published recipe, point by point: the most frequent semantic label but 0, 1 and 2."""
    data = file.read_bytes()
    numbers = struct.unpack(f"<{len(data) // 4}f", data)
    points = [numbers[1 + 11 * index : 12 + 11 * index] for index in range(int(numbers[0]))]
    label = Counter(point[10] for point in points if point[10] not in (0, 1, 2)).most_common(1)[0][0]
    return np.array([point[:3] for point in points]), [int(point[10] == label) for point in points]


@pytest.mark.parametrize("root", ["", "ScanObjectNN", "h5_files"])
def test_raw_objects(tmp_path, layouts, root, capsys):
    small = layouts.procedural(300)
    for part in small.values():
        part.points += np.float32(4)  # as in the scene
        part.points[:, :, 0] -= np.float32(4)
    folder = layouts.raw_scans(tmp_path / root, small)
    for split, part in small.items():
        opened = datasets.open_source("scanobjectnn", str(tmp_path), split, variant="raw")
        assert opened.labels.tolist() == part.labels.tolist()
        assert (opened.layout, opened.path, len(opened.files)) == ("ScanObjectNN, raw", folder, 1 + len(part.labels))
        for file, cloud, points in zip(opened.files[1:], opened.clouds(0), part.points, strict=True):
            expected = object_of(file)
            assert np.array_equal(cloud.points, points)
            assert np.array_equal(cloud.points, expected[0])
            assert cloud.point_labels.tolist() == expected[1]
            assert 0 < sum(expected[1]) < 300
        loaded = datasets.load("scanobjectnn", str(tmp_path), split, variant="raw")
        assert loaded.normalized
        assert same_clouds(loaded, part.points, 1e-5)
        assert loaded.parts.names == ("background", "object")
        objects = datasets.load("scanobjectnn", str(tmp_path), split, 64, variant="raw", background="drop")
        wholes = [cloud.points[cloud.point_labels == 1] for cloud in opened.clouds(0)]
        for cloud, whole in zip(objects.points, wholes, strict=True):  # centred and scaled without the background
            whole = unit_sphere(torch.from_numpy(whole))
            assert torch.cdist(cloud[:, :64], whole).amin(1).max() < 1e-3
    assert opened.object_names[0] == "bag/scene0000_00_00012"
    assert "left out" not in capsys.readouterr().err


def test_raw_objects_in_the_folder_itself_by_another_list(tmp_path, layouts, capsys):
    folder = layouts.raw_scans(tmp_path, layouts.procedural(64))
    lines = (folder / "split_new.txt").read_text().splitlines()
    (tmp_path / "training_data").mkdir()
    names = [line.split("\t")[0] for line in lines]
    (tmp_path / "training_data" / "split2.txt").write_text(f"{names[0]}\t0\tt\n{names[1]}\t0\n\n{names[2]}\t0\tt\r\n")
    test = datasets.open_source("scanobjectnn", str(folder), "test", variant="raw/split2")
    assert [name.split("/")[1] for name in test.object_names] == [names[0][:-4], names[2][:-4]]
    train = datasets.open_source("scanobjectnn", str(folder), "train", variant="raw/split2")
    assert len(train.left_out["not in split2.txt"]) == 15
    assert "left out: 15 files that split2.txt does not list" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"expected the list split3\.txt of the objects.*found none: copy it there"):
        datasets.open_source("scanobjectnn", str(folder), "train", variant="raw/split3")
    (folder / "split_new.txt").unlink()
    with pytest.raises(DataError, match=r"expected the list split_new\.txt or main_split\.txt"):
        datasets.open_source("scanobjectnn", str(folder), "train", variant="raw")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "it is empty"),
        ("a.bin\t15\n", "found 'a.bin"),
        ("a.bin 0 x\n", "found 'a.bin 0 x'"),
        ("../a.bin\t0\n", r"found '\.\./a.bin"),
        ("a.bin\n", "found 'a.bin'"),
        ("a.bin\t0\na.bin\t0\tt\n", "found a.bin twice"),
        ("a.bin\t0\nb.bin\t1\tt\n", "2 of 2 files that .* lists are missing, the first is bag/a.bin"),
    ],
)
def test_a_list_that_does_not_fit(tmp_path, layouts, content, message):
    folder = layouts.raw_scans(tmp_path, layouts.procedural(32))
    (folder / "split_new.txt").write_text(content)
    with pytest.raises(DataError, match=message) as error:
        datasets.open_source("scanobjectnn", str(tmp_path), "train", variant="raw")
    assert "split_new.txt" in str(error.value)


def test_a_list_without_a_split(tmp_path, layouts):
    folder = layouts.raw_scans(tmp_path, layouts.procedural(32))
    (folder / "split_new.txt").write_text((folder / "split_new.txt").read_text().replace("\tt", ""))
    with pytest.raises(DataError, match="marked with t, for testing, found none of test"):
        datasets.open_source("scanobjectnn", str(tmp_path), "test", variant="raw")


def rows(*semantic, instance=3.0):
    return [[0.5, index, 1.5, *[0.0] * 6, instance, label] for index, label in enumerate(semantic)]


@pytest.mark.parametrize(
    ("count", "values", "message"),
    [
        (3, rows(5, 5), "3 announced and 22 numbers"),
        (1, rows(5, 5), "1 announced and 22 numbers"),
        (2, [*rows(5, 5), [1.0]], "2 announced and 23 numbers"),
        (0, [], "0 announced and 0 numbers"),
        (1e30, rows(5), "1e\\+30 announced and 11 numbers"),
        (-1, rows(5), "-1 announced"),
        (1.5, rows(5), "1.5 announced"),
        (float("nan"), rows(5), "nan announced"),
        (2, rows(5, 5.5), "expected whole numbers"),
        (2, rows(5, float("nan")), "expected whole numbers"),
        (2, rows(5, 5, instance=float("inf")), "expected whole numbers"),
        (3, rows(0, 1, 2), "found the semantic labels 0, 1, 2 only"),
    ],
)
def test_a_damaged_raw_object_is_refused(tmp_path, count, values, message):
    path = tmp_path / "a.bin"
    path.write_bytes(struct.pack(">f" if count is None else "<f", count)
                     + b"".join(struct.pack(f"<{len(row)}f", *row) for row in values))  # fmt: skip
    with pytest.raises(DataError, match=message) as error:
        read_raw(path)
    assert str(error.value).startswith(f"{path}: cannot be read as a raw object")


def test_raw_objects_are_little_endian_and_of_whole_numbers(tmp_path):
    path = tmp_path / "a.bin"
    for order in "<>":
        path.write_bytes(struct.pack(f"{order}12f", 1, *rows(5)[0]))
        if order == "<":
            assert read_raw(path).points.tolist() == [[0.5, 0.0, 1.5]]
    for content in (path.read_bytes(), b"", b"abc", b"\0" * 47, b"version https://git-lfs.github.com/spec/v1"):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"a\.bin: "):
            read_raw(path)


def test_a_raw_object_with_a_coordinate_that_is_not_finite(tmp_path, layouts):
    folder = layouts.raw_scans(tmp_path, layouts.procedural(32))
    file = datasets.open_source("scanobjectnn", str(tmp_path), "train", variant="raw").files[2]
    file.write_bytes(file.read_bytes()[:4] + struct.pack("<f", float("inf")) + file.read_bytes()[8:])
    with pytest.raises(DataError, match=r"object 1 \(bag/.*\) has coordinates that are not finite"):
        datasets.load("scanobjectnn", str(folder), "train", variant="raw")
    found = report.verify(
        "scanobjectnn", {"train": datasets.open_source("scanobjectnn", str(folder), "train", 1, "raw")}
    )
    assert (len(found[1]), "coordinates that are not finite" in found[1][0]) == (1, True)


def test_a_bin_file_in_a_folder_of_ones_own_is_left_out_as_ever(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        for number in range(2):
            np.save(tmp_path / name / f"{number}.npy", np.random.default_rng(number).normal(size=(32, 3)))
        (tmp_path / name / "lidar.bin").write_bytes(np.zeros(40, "<f4").tobytes())
    found = datasets.open_source("folder", str(tmp_path), "train")
    assert (len(found), found.left_out) == (2, {".bin": ["a/lidar.bin", "b/lidar.bin"]})

"""Every layout of ModelNet40: the same clouds, labels and split come back as were written."""

import pickle
from itertools import pairwise

import h5py
import numpy as np
import pytest
import torch

from pointewa import datasets
from pointewa.datasets.layouts import modelnet40
from pointewa.errors import DataError
from pointewa.safe import hdf5
from tests.datasets.conftest import same_clouds

LAYOUTS = ["packed", "ply_hdf5", "text", "dat", "off"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_modelnet40(tmp_path, small, layouts, layout):
    layouts.modelnet40[layout](tmp_path, small)
    for split, part in small.items():
        loaded = datasets.load("modelnet40", str(tmp_path), split, None if layout != "off" else 2000)
        assert loaded.labels.tolist() == part.labels.tolist()
        assert loaded.class_names == layouts.classes
        assert list(loaded.object_names) == part.names
        assert loaded.normalized
        if layout == "off":  # drawn on the surface: near it, and all of it; centre and scale are estimates then
            assert loaded.points.shape == (len(part.labels), 2344, 3)
            assert same_clouds(loaded, part.points, 0.05)
        else:
            assert loaded.points.shape == (len(part.labels), 256, 3)
            assert same_clouds(loaded, part.points, {"packed": 1e-3}.get(layout, 1e-5))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("place", ["", "ModelNet", "ModelNet40Ply2048"])
def test_modelnet40_where_other_codebases_keep_it(tmp_path, layouts, layout, place):
    small = layouts.procedural(64)
    found = layouts.modelnet40[layout](tmp_path / place, small)
    for root in (tmp_path, found):  # a folder above it, and itself
        assert len(datasets.open_source("modelnet40", str(root), "train")) == 12


def test_many_points_train_at_a_prefix(real_data):
    """8192 points: what a training at 1024 needs is the head of the whole order."""
    file = str(real_data / "modelnet40_8192_sample.h5")
    few, all_ = (datasets.load("modelnet40", file, "test", points) for points in (1024, 8192))
    assert (few.points.shape, all_.points.shape) == ((29, 1200, 3), (29, 8192, 3))
    assert torch.equal(few.points, all_.points[:, :1200])


def test_the_layout_with_enough_points_is_taken(tmp_path, layouts):
    layouts.ply_hdf5(tmp_path, layouts.procedural(64))
    layouts.dat(tmp_path, layouts.procedural(128))
    layout = lambda *args: datasets.open_source("modelnet40", str(tmp_path), "train", *args).layout  # noqa: E731
    assert "ply_hdf5" in layout(64)
    assert "8192pts_fps.dat" in layout(65)
    assert "8192pts_fps.dat" in layout(64, "dat")
    with pytest.raises(DataError, match=r"has 128 points, data\.num_points asks for 129"):
        layout(129)
    with pytest.raises(DataError, match=r"data\.variant=off"):
        layout(64, "off")
    file = layouts.packed(tmp_path / "p", layouts.procedural(64))
    assert datasets.open_source("modelnet40", str(file), "train", variant="packed").path == file
    with pytest.raises(DataError, match=r"(?s)not found.*data\.variant=text"):
        datasets.open_source("modelnet40", str(file), "train", variant="text")
    with pytest.raises(DataError, match=r"expected one of packed, ply_hdf5, text, dat, off for modelnet40, found 'x'"):
        layout(64, "x")


def test_names_of_the_published_archive(tmp_path, layouts):
    small = layouts.procedural(64)
    layouts.ply_hdf5(tmp_path / "a", small, id2file=False)
    layouts.dat(tmp_path / "b", small, lists=False)
    assert datasets.open_source("modelnet40", str(tmp_path / "a"), "test").object_names[3] == "ply_data_test1/0"
    assert datasets.open_source("modelnet40", str(tmp_path / "b"), "test").object_names[1].endswith("_fps/1")


def official(split):
    names = modelnet40.official_names(split)
    labels = np.concatenate([np.full(len(members), label) for label, members in enumerate(names.values())])
    return labels, [name for members in names.values() for name in members]


def write_names(path, split, labels, names, classes=tuple(modelnet40.OFFICIAL)):
    with h5py.File(path, "w") as h5:
        h5.attrs["shape_names"] = list(classes)
        h5[f"{split}/data"] = np.zeros((len(labels), 2, 3), np.float32)
        h5[f"{split}/label"], h5[f"{split}/name"] = labels, names


def test_the_official_split_is_checked_by_name(tmp_path, capsys):
    path = tmp_path / "modelnet40.h5"
    labels, names = official("train")
    assert (len(names), len(official("test")[1])) == (9843, 2468)
    write_names(path, "train", labels, names)
    source = datasets.open_source("modelnet40", str(path), "train")
    assert modelnet40.check_split(source, "train") == []
    assert capsys.readouterr().err == ""
    names[0], names[700] = "airplane_0627", names[701]
    write_names(path, "train", labels[:-2], names[:-2])
    source = datasets.open_source("modelnet40", str(path), "train")
    assert modelnet40.check_split(source, "train") == [
        "airplane: 1 missing (airplane_0001)", "airplane: 1 not of this split (airplane_0627)",
        "bathtub: 1 missing (bathtub_0075)", "bathtub: 1 twice (bathtub_0076)",
        "xbox: 2 missing (xbox_0102, xbox_0103)",
    ]  # fmt: skip
    note = capsys.readouterr().err
    assert "has 9841 objects in train, the official split 9843; airplane: 1 missing (airplane_0001), ..." in note
    write_names(path, "test", labels[:100], [str(i) for i in range(100)])
    problems = modelnet40.check_split(datasets.open_source("modelnet40", str(path), "test"), "test")
    assert problems[0] == "bathtub: 0 objects, expected 50"
    assert len(problems) == 39
    write_names(path, "test", [0], ["x"], ("airplane", "boat"))
    problems = modelnet40.check_split(datasets.open_source("modelnet40", str(path), "test"), "test")
    assert "expected the 40 official classes, found 2" in problems[0]
    assert "boat" in problems[0]


def test_real_modelnet40(real_data, capsys):
    train = datasets.load("modelnet40", str(real_data), "train", 1024)
    test = datasets.load("modelnet40", str(real_data), "test", 1024)
    assert (train.points.shape, test.points.shape) == ((9843, 1024, 3), (2468, 1024, 3))
    assert (len(train.class_names), train.class_names[0], train.class_names[39]) == (40, "airplane", "xbox")
    assert train.labels.bincount().tolist()[:3] == [626, 106, 515]  # airplane, bathtub, bed of the official split
    assert not set(train.object_names) & set(test.object_names)
    assert capsys.readouterr().err == ""  # nothing to remark


def test_no_file_is_opened_here_before_the_trial_process_has_read_it(tmp_path, layouts, monkeypatch):
    """Damage can crash the HDF5 library, so not even the number of objects of a layout's files is asked for before."""
    layouts.packed(tmp_path, layouts.procedural(64), "modelnet40_good.h5")
    with h5py.File(bad := tmp_path / "modelnet40_bad.h5", "w") as h5:  # claims more than it can hold: the trial objects
        h5.create_dataset("train/label", (10**12,), np.int64)
    opened, tried, open_, trial = [], [], h5py.File, hdf5._trial
    monkeypatch.setattr(hdf5, "_trial", lambda path, *args: tried.append(path) or trial(path, *args))
    monkeypatch.setattr(h5py, "File", lambda path, *args, **kw: opened.append(path) or open_(path, *args, **kw))
    assert datasets.open_source("modelnet40", str(tmp_path), "train").path.name == "modelnet40_good.h5"
    assert bad in tried
    assert bad not in opened
    assert set(opened) <= set(tried)


# What is refused, with the message that the user sees.


def test_missing_data_says_where_it_looked_and_what_it_accepts(tmp_path):
    with pytest.raises(DataError) as error:
        datasets.load("modelnet40", str(tmp_path / "nowhere"), "train")
    message = str(error.value)
    for part in (str(tmp_path / "nowhere"), "modelnet40_ply_hdf5_2048/", "modelnet40*.h5", "8192pts_fps.dat", ".off",
                 "modelnet40_normal_resampled/", "DATA_ROOT", "make data", "DATASET=shapes"):  # fmt: skip
        assert part in message


@pytest.mark.parametrize("layout", ["ply_hdf5", "text", "dat", "off"])
def test_a_split_without_files(tmp_path, layouts, layout):
    place = layouts.modelnet40[layout](tmp_path, layouts.procedural(64))
    for file in [*place.glob("*test*"), *place.glob("*/test/*")]:
        file.unlink() if file.is_file() else None
    with pytest.raises(DataError, match=rf"{place.name}.*") as error:
        datasets.load("modelnet40", str(tmp_path), "test")
    assert "test" in str(error.value)


def test_text_files_that_are_missing_or_cut_off(tmp_path, layouts):
    place = layouts.text(tmp_path, layouts.procedural(64))
    file = place / "bed" / "bed_0002.txt"
    file.write_text("".join(file.open().readlines()[:-1]))
    with pytest.raises(DataError, match=r"bed_0002\.txt: expected 64 rows as in airplane_0001\.txt, found 63"):
        datasets.load("modelnet40", str(tmp_path), "train")
    file.write_text("0,0,0,1,1,1\n1,oops,0,0,0,0\n")
    with pytest.raises(DataError, match=r"bed_0002\.txt"):
        datasets.load("modelnet40", str(tmp_path), "train")
    file.unlink()
    with pytest.raises(
        DataError, match=r"1 of 12 files that modelnet40_train\.txt lists are missing, the first is bed"
    ):
        datasets.load("modelnet40", str(tmp_path), "train")
    (place / "modelnet40_train.txt").write_text("airplane_0001\nboat_0001\n")
    (place / "boat").mkdir()
    (place / "boat" / "boat_0001.txt").write_text("0,0,0,0,0,0\n")
    with pytest.raises(DataError, match="'boat' is not one of the 3 classes"):
        datasets.load("modelnet40", str(tmp_path), "train")


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("hidden", [False, True])
def test_a_pickle_that_runs_code_is_refused_before_it_does(tmp_path, layouts, hidden):
    place = layouts.dat(tmp_path, layouts.procedural(64))
    bomb = Bomb(tmp_path / "ran")
    content = [[np.zeros((8, 6), np.float32)], [np.array([bomb], object) if hidden else bomb]]
    (place / "modelnet40_train_8192pts_fps.dat").write_bytes(pickle.dumps(content))
    with pytest.raises(DataError, match=r"modelnet40_train_8192pts_fps\.dat.*open.*refused"):
        datasets.load("modelnet40", str(tmp_path), "train")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_of_every_pickle_protocol(tmp_path, protocol):
    from pointewa.safe.pickles import load_arrays

    path = tmp_path / "a.dat"
    content = [[np.arange(6.0).reshape(2, 3)], np.array([1, 2], np.int32), np.float32(3), {"a": (1, "b", None)}]
    path.write_bytes(pickle.dumps(content, protocol))
    loaded = load_arrays(path)
    np.testing.assert_array_equal(loaded[0][0], content[0][0])
    np.testing.assert_array_equal(loaded[1], content[1])
    assert loaded[2:] == content[2:]


def edit(path, change):
    with h5py.File(path, "r+") as h5:
        change(h5)


def set_points(h5):
    del h5["train/data"]
    data = np.random.default_rng(0).normal(size=(12, 64, 3)).astype(np.float32)
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
    h5["train/data"] = np.zeros((12, 64), np.float32)


def points_of_text(h5):
    del h5["train/data"]
    h5["train/data"] = np.full((12, 64, 3), "a", h5py.string_dtype())


def fewer_labels(h5):
    labels = h5["train/label"][:-2]
    del h5["train/label"]
    h5["train/label"] = labels


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_label, r"object 4 \(bathtub_0001\) has label 3, expected 0 to 2"),
        (set_points, r"object 2 \(airplane_0003\) has coordinates that are not finite"),
        (drop_names, "a packed HDF5 file"),
        (drop_train, "a packed HDF5 file"),
        (flat_points, r"expected numbers \[N, P, 3\].*found float32 \[12, 64\]"),
        (points_of_text, r"expected numbers \[N, P, 3\]"),
        (fewer_labels, "12 clouds, 10 labels, 12 object names"),
    ],
)
def test_wrong_content(tmp_path, layouts, change, message):
    path = layouts.packed(tmp_path, layouts.procedural(64))
    edit(path, change)
    with pytest.raises(DataError, match=message) as error:
        datasets.load("modelnet40", str(tmp_path), "train")
    assert str(path) in str(error.value)


@pytest.mark.parametrize("keep", [0, 100, 0.5, 0.95])
def test_truncated_hdf5(tmp_path, layouts, keep):
    path = layouts.packed(tmp_path, layouts.procedural(64))
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(DataError, match=r"modelnet40_256\.h5"):
        datasets.load("modelnet40", str(tmp_path), "train")


def test_nested_order(tmp_path, layouts):
    """The head of a longer order is the shorter order."""
    layouts.ply_hdf5(tmp_path, layouts.procedural(256))
    heads = [datasets.load("modelnet40", str(tmp_path), "train", points).points for points in (16, 64, 200)]
    for short, long in pairwise(heads):
        assert torch.equal(short, long[:, : short.shape[1]])

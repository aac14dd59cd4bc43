"""A folder of clouds without classes, for tasks that need none."""

import json

import numpy as np
import pytest

from pointewa import datasets
from pointewa.datasets.subjects import Subjects
from pointewa.errors import DataError
from pointewa.inference import svm
from pointewa.tasks import task_class
from pointewa.tools import train
from tests.conftest import TINY


@pytest.fixture
def write(tmp_path):
    """A function that writes small clouds, each a number apart, and returns the folder above them."""

    def run(*names):
        for number, name in enumerate(names):
            path = tmp_path / "my_clouds" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            np.savetxt(path, np.random.default_rng(number).normal(size=(64, 3)))
        return str(tmp_path / "my_clouds")

    return run


def both(root, **options):
    return [datasets.open_source("folder", root, split, labelled=False, **options) for split in ("train", "test")]


@pytest.mark.parametrize(
    "names",
    [
        [f"{number}.xyz" for number in range(10)],  # directly in the folder
        [f"{number // 4}/deep/{number}.xyz" for number in range(10)],  # nowhere else
        [f"{'more/' * (number % 3)}{number}.xyz" for number in range(10)],  # in both
        ["a/0.xyz", *(f"b/{number}.xyz" for number in range(1, 10))],  # a class of one file
        [f"train/a/{number}.xyz" for number in range(10)],  # a split of classes that lacks the other half
    ],
)
def test_all_files_are_one_class_of_which_a_fifth_is_for_testing(write, capsys, names):
    root = write(*names, ".git/x.xyz")
    train, test = both(root)
    assert (train.class_names, set(train.labels), set(test.labels)) == (("my_clouds",), {0}, {0})
    assert (len(train), len(test)) == (8, 2)
    assert sorted(train.object_names + test.object_names) == sorted(names)
    assert both(root)[1].object_names == test.object_names
    for source in (train, test):
        for name, cloud in zip(source.object_names, source.clouds(64), strict=True):
            assert np.allclose(cloud.points, np.loadtxt(f"{root}/{name}"))
    assert "no folders of classes: all files are taken for one class, my_clouds; 20% of them" in capsys.readouterr().err


def test_train_and_test_are_kept_apart(write, capsys):
    root = write("train/0.xyz", "train/deep/1.xyz", "train/2.xyz", "test/3.xyz")
    train, test = both(root)
    assert (train.object_names, test.object_names) == (
        ("train/0.xyz", "train/2.xyz", "train/deep/1.xyz"),
        ("test/3.xyz",),
    )
    assert "train and test as they are" in capsys.readouterr().err


def test_train_and_test_may_be_links(write, tmp_path):
    write("train/0.xyz", "train/1.xyz", "test/2.xyz")
    (tmp_path / "links").mkdir()
    for split in ("train", "test"):
        (tmp_path / "links" / split).symlink_to(tmp_path / "my_clouds" / split)
    train, test = both(str(tmp_path / "links"))
    assert (train.object_names, test.object_names) == (("train/0.xyz", "train/1.xyz"), ("test/2.xyz",))


@pytest.mark.parametrize(
    "names",
    [
        ["train/a/0.xyz", "train/a/1.xyz", "train/b/2.xyz", "test/a/3.xyz"],  # a class that test lacks
        ["train/a/0.xyz", "test/a/1.xyz", "test/b/2.xyz"],  # one that train lacks
        ["train/a/deep/0.xyz", "train/a/deep/1.xyz", "train/b/deep/2.xyz", "test/a/deep/3.xyz"],  # in no class
        ["train/0.xyz", "train/1.xyz", "train/2.xyz", "test/3.xyz", "test/4.xyz", "README.md", "more/notes.md"],
        ["a/train/0.xyz", "a/train/1.xyz", "b/train/2.xyz", "a/test/3.xyz"],  # a class without a test folder
    ],
)
def test_what_is_divided_stays_so_whatever_its_classes(write, capsys, names):
    train, test = both(root := write(*names))
    clouds = [name for name in names if name.endswith("xyz")]
    assert sorted(train.object_names) == [name for name in sorted(clouds) if "train" in name.split("/")]
    assert sorted(test.object_names) == [name for name in sorted(clouds) if "test" in name.split("/")]
    assert (train.class_names, test.class_names) == (("my_clouds",), ("my_clouds",))
    err = capsys.readouterr().err
    assert f"note: {root}: no folders of classes: all files are taken for one class" in err
    assert "train and test as they are" in err
    assert "misplaced" not in err


@pytest.mark.parametrize(
    "pattern", ["{name}/{number}.xyz", "{name}/{split}/{number}.xyz", "{split}/{name}/{number}.xyz"]
)
def test_classes_stay_as_they_are(write, pattern, capsys):
    names = [pattern.format(name=name, number=number, split=("train", "test")[number // 4])
             for name in "ab" for number in range(5)]  # fmt: skip
    root = write(*names)
    for split, found in zip(("train", "test"), both(root, variant="z_up"), strict=True):
        expected = datasets.open_source("folder", root, split, variant="z_up")
        assert (found.class_names, found.object_names) == (("a", "b"), expected.object_names)
        assert found.labels.tolist() == expected.labels.tolist()
    assert capsys.readouterr().err == ""


def test_what_is_no_cloud_is_counted_and_links_are_not_followed(write, tmp_path, capsys):
    root = write("0.xyz", "deep/1.xyz", "deep/notes.md", "more/2.xyz", "lidar.bin")
    (tmp_path / "my_clouds" / "deep" / "round").symlink_to(tmp_path / "my_clouds")
    assert sum(map(len, both(root))) == 3
    assert both(root)[0].left_out == {".bin": ["lidar.bin"], ".md": ["deep/notes.md"], "folders": ["deep/round"]}
    assert "left out: 1 .bin, 1 .md, 1 folders" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("names", "message"), [((), "found nothing"), (("0.xyz",), "at least two files"), (("a.md", "b/c.md"), "found 0")]
)
def test_too_few_files_are_refused(write, names, message):
    with pytest.raises(DataError, match=message):
        both(write(*names))


def test_a_class_is_asked_for_where_labels_are_needed(write):
    root = write("0.xyz", "1.xyz", "2.xyz")
    with pytest.raises(DataError, match=r"found no folders, but 3 files: .*or pre-train, which needs no classes"):
        datasets.open_source("folder", root, "train")
    with pytest.raises(DataError, match=r"data\.background=drop: folder does not tell"):
        both(root, background="drop")
    assert task_class("classification").needs_labels
    assert not task_class("masked_autoencoding").needs_labels


def test_a_pre_training_on_them_is_evaluated_on_the_same_objects(write, tmp_path, capsys):
    root = write(*(f"{'more/' * (number % 2)}{number}.xyz" for number in range(20)))
    command = ["--config", "configs/folder.yaml", *TINY, f"data.root={root}", f"run.dir={tmp_path}", "run.name=p"]
    command.append("train.batch_size=8")
    with pytest.raises(DataError, match="expected at least two classes to tell apart, found 1"):
        train.main([*command, "run.report=false"])
    capsys.readouterr()
    train.main([*command, "run.report=false", "train.task=masked_autoencoding", "ewa.enabled=false", "--json"])
    summary = json.loads(capsys.readouterr().out)
    subjects = Subjects(tmp_path / "p")
    assert len(subjects.clouds) == 4
    assert subjects.metrics()["loss"] == pytest.approx(summary["test"]["loss"], rel=1e-5)
    features, labels = subjects.training_features()
    assert (len(features), labels.tolist()) == (16, [0] * 16)
    with pytest.raises(DataError, match="svm: expected objects of at least two classes"):
        svm.fit((features, labels), (features, labels), 1)

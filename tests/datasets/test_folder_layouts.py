"""Folders as people have them: their layouts, their litter, what is left out, and names of all kinds."""

import os

import numpy as np
import pytest

from pointewa import datasets
from pointewa.datasets.inspect import report
from pointewa.errors import DataError
from pointewa.tools import prepare_data


def fill(root, *names, start=0):
    """A cloud at each of these paths."""
    for number, name in enumerate(names, start):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savetxt(path, np.random.default_rng(number).normal(size=(40, 3)))


def objects(root):
    return {split: datasets.open_source("folder", str(root), split).object_names for split in ("train", "test")}


EXPECTED = {"train": ("cup/0.txt", "cup/1.txt", "table/0.txt"), "test": ("cup/2.txt", "table/1.txt")}


@pytest.mark.parametrize("by_split", [False, True])
@pytest.mark.parametrize("litter", [False, True])
def test_divided_folders(tmp_path, capsys, by_split, litter):
    """Class folders with train and test in them, or the other way round, as torchvision's ImageFolder has them."""
    for split, names in EXPECTED.items():
        for name in names:
            label, file = name.split("/")
            fill(tmp_path, f"{split}/{name}" if by_split else f"{label}/{split}/{file}")
            if litter:
                fill(tmp_path, f"__MACOSX/{name}", f"{split if by_split else label}/.hidden/{file}", ".trash/0.txt")
                place = next(tmp_path.rglob(f"{label if by_split else split}"))
                for junk in ("._0.txt", ".DS_Store", "Thumbs.db", "desktop.ini"):
                    (place / junk).write_bytes(b"\0")
    assert objects(tmp_path) == EXPECTED
    assert capsys.readouterr().err == ""


def test_what_is_left_out_is_said_and_listed(tmp_path, capsys):
    fill(tmp_path, *(f"{label}/{number}.txt" for label in ("cup", "table") for number in range(3)), "stray.txt")
    fill(tmp_path, "cup/more/0.txt", "cup/more/1.txt")
    for name in ("cup/a.blend", "cup/b.BLEND", "table/c.fbx", "table/README", "notes.md"):
        (tmp_path / name).write_text("")
    os.symlink("nowhere.ply", tmp_path / "table" / "link.ply")
    sources = {split: datasets.open_source("folder", str(tmp_path), split) for split in ("train", "test")}
    err = capsys.readouterr().err
    kinds = "2 .blend, 1 .fbx, 1 .md, 1 broken links, 1 folders, 1 misplaced .txt, 1 without a suffix"
    assert err.startswith(f"note: {tmp_path}: left out: {kinds} (")
    assert err.count("\n") == 1  # once for both splits
    listed = report.inspect(sources)["splits"]["train"]["files_left_out"]
    assert listed[".blend"] == ["cup/a.blend", "cup/b.BLEND"]
    assert (listed["folders"], listed["misplaced .txt"]) == (["cup/more"], ["stray.txt"])
    prepare_data.main(["inspect", "data.name=folder", f"data.root={tmp_path}"])
    assert "train: left out, .blend: 2, cup/a.blend, cup/b.BLEND\n" in capsys.readouterr().out


def test_what_is_beside_train_and_test(tmp_path, capsys):
    fill(
        tmp_path, *(f"{label}/{split}/0.txt" for label in "ab" for split in ("train", "test")), "a/1.txt", "a/val/0.txt"
    )
    assert objects(tmp_path) == dict.fromkeys(("train", "test"), ("a/0.txt", "b/0.txt"))
    assert "left out: 1 folders, 1 misplaced .txt (" in capsys.readouterr().err
    other = tmp_path / "other"
    fill(other, *(f"{split}/{label}/0.txt" for label in "ab" for split in ("train", "test", "val")))
    assert objects(other) == dict.fromkeys(("train", "test"), ("a/0.txt", "b/0.txt"))
    assert "left out: 1 folders (" in capsys.readouterr().err


def test_a_class_may_be_called_train(tmp_path):
    fill(tmp_path, *(f"{label}/{number}.txt" for label in ("bus", "train") for number in range(3)))
    assert datasets.open_source("folder", str(tmp_path), "train").class_names == ("bus", "train")
    other = tmp_path / "other"
    fill(other, *(f"{label}/{split}/0.txt" for label in ("train", "test") for split in ("train", "test")))
    assert objects(other) == dict.fromkeys(("train", "test"), ("test/0.txt", "train/0.txt"))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train/a/0.txt", "train/b/0.txt"], "expected the folders train and test with .*, found train: add or rename"),
        (["train/a/0.txt", "val/a/0.txt"], "found train, val"),
        (["train/a/0.txt", "train/b/0.txt", "test/a/0.txt"], r"b: expected files of the kinds .*, found 0"),
        (["train/Cup/0.txt", "test/cup/0.txt"], "the classes Cup and cup differ by the case or the encoding"),
        (["Cup/0.txt", "cup/0.txt"], "the classes Cup and cup differ by the case"),
        (["train/T\u00fcr/0.txt", "test/Tu\u0308r/0.txt"], "differ by the case or the encoding of their names only"),
    ],
)
def test_refused(tmp_path, names, message):
    fill(tmp_path, *names)
    with pytest.raises(DataError, match=message):
        objects(tmp_path)


def test_names_of_all_kinds(tmp_path, capsys):
    root = tmp_path / "my folder (2), 50 % #1"
    fill(root, *(f"{label}/{number} of [3]: a=b.TXT" for label in ("a cup", "T\u00fcr") for number in range(3)))
    latin = os.fsdecode(b"caf\xe9")
    fill(root, *(f"{latin}/{os.fsdecode(bytes([0xE9]))}{number}.txt" for number in range(3)))
    (root / latin / os.fsdecode(b"\xe9.foo")).write_text("")
    train = datasets.load("folder", str(root), "train", 32)
    assert train.class_names == ("T\u00fcr", "a cup", "caf\\xe9")
    assert sum(name.startswith("caf\\xe9/\\xe9") for name in train.object_names) == 2
    assert datasets.load("folder", str(root), "train", 32).object_names == train.object_names  # from the cache
    assert f"note: {root}: left out: 1 .foo" in capsys.readouterr().err
    prepare_data.main(["inspect", "data.name=folder", f"data.root={root}"])
    assert ".foo: 1, caf\\xe9/\\xe9.foo" in capsys.readouterr().out


def test_links_that_lead_back(tmp_path, capsys):
    fill(tmp_path, *(f"{label}/{number}.txt" for label in "ab" for number in range(3)))
    os.symlink("..", tmp_path / "a" / "up")
    os.symlink(".", tmp_path / "here")
    os.symlink("loop", tmp_path / "loop")
    assert datasets.open_source("folder", str(tmp_path), "train").class_names == ("a", "b")
    assert "left out: 1 broken links, 2 folders (" in capsys.readouterr().err


def test_points_that_are_not_finite_are_counted_over_the_folder(tmp_path, capsys):
    fill(tmp_path, *(f"{label}/{number}.txt" for label in "ab" for number in range(5)))
    for name, share in (("a/0.txt", 10), ("b/1.txt", 4)):
        points = np.loadtxt(tmp_path / name)
        points[::share] = np.nan
        np.savetxt(tmp_path / name, points)
    sources = {split: datasets.open_source("folder", str(tmp_path), split) for split in ("train", "test")}
    found = report.inspect(sources)["splits"]
    assert sorted(name for split in found.values() for name in split["with_points_left_out"]) == ["a/0.txt", "b/1.txt"]
    for split in sources:
        datasets.load("folder", str(tmp_path), split, 16)
    assert "of 8 objects have points that are not finite, up to 25 %: they are left out" in capsys.readouterr().err

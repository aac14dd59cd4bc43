"""Looking at, verifying, packing and fetching a data set from the command line."""

import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from pointewa.datasets.layouts.modelnet40 import official_names

from pointewa import datasets
from pointewa.datasets import packed
from pointewa.datasets.inspect import download
from pointewa.datasets.inspect.inspection import duplicates
from pointewa.errors import DataError
from pointewa.tools import cli, prepare_data
from tests.datasets.conftest import procedural, write_raw_scans
from tests.datasets.test_labeled_psb import arrays
from tests.datasets.test_labeled_psb import write as write_psb


def call(capsys, *arguments):
    capsys.readouterr()
    prepare_data.main([*map(str, arguments), "--json"])
    return json.loads(capsys.readouterr().out)


def fails(capsys, *arguments):
    with pytest.raises(SystemExit) as exit_:
        cli.run(lambda: prepare_data.main([str(one) for one in arguments]))
    assert exit_.value.code == 2
    return capsys.readouterr().err


def write(path, points=64, change=None):
    """A whole official ModelNet40 by name, with small random clouds."""
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as h5:
        h5.attrs["shape_names"] = list(official_names("train"))
        for split in ("train", "test"):
            members = official_names(split)
            names = [name for names in members.values() for name in names]
            labels = np.repeat(np.arange(40), [len(names) for names in members.values()])
            h5[f"{split}/data"] = rng.normal(size=(len(names), points, 3)).astype(np.float32)
            h5[f"{split}/label"], h5[f"{split}/name"] = labels, names
        if change:
            change(h5)
    return path


def test_verify(tmp_path, capsys):
    path = write(tmp_path / "modelnet40.h5", 8)
    root = ["data.name=modelnet40", f"data.root={tmp_path}"]
    lines = call(capsys, "verify", *root)["ok"]
    assert lines[0].startswith("train: 9843 objects, packed HDF5")
    assert "the official split, all read, all finite" in lines[0]

    def spoil(h5):
        h5["test/data"][5, 3, 1] = np.nan
        h5["train/label"][0] = 1

    write(path, 8, spoil)
    error = fails(capsys, "verify", *root)
    assert "modelnet40: 3 problems" in error
    assert "airplane: 1 missing (airplane_0001)" in error
    assert "bathtub: 1 not of this split (airplane_0001)" in error
    assert "airplane_0632: coordinates that are not finite" in error
    (tmp_path / download.ARCHIVES["modelnet40"].name).write_bytes(b"another file")
    assert "not the published file (md5" in fails(capsys, "verify", *root)


@pytest.fixture
def mine(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        for split, count in (("train", 4), ("test", 2)):
            place = tmp_path / "mine" / name / split
            place.mkdir(parents=True)
            for number in range(count):
                np.save(place / f"{number}.npy", rng.normal(size=(1500, 3)).astype(np.float32))
    return tmp_path / "mine"


def test_inspect_finds_what_is_wrong(mine, capsys):
    np.save(mine / "a/train/0.npy", np.ones((1500, 3), np.float32))
    np.save(mine / "b/test/1.npy", np.random.default_rng(1).permutation(np.load(mine / "b/train/2.npy")))
    report = call(capsys, "inspect", "data.name=folder", f"data.root={mine}")
    assert report["pairs_not_compared"] == 0
    train, test = report["splits"]["train"], report["splits"]["test"]
    assert (train["objects"], test["objects"]) == (8, 4)
    assert train["classes"] == {"a": 4, "b": 4}
    assert (train["fewest_points"], train["most_points"]) == (1500, 1500)
    assert train["degenerate"] == ["a/0.npy"]
    assert test["degenerate"] == test["not_finite"] == []
    twice = report["in_train_and_test"]
    assert sum(kind["pairs"] for kind in twice.values()) >= 1
    assert ["b/2.npy", "b/1.npy"] in [kind["such_as"] for kind in twice.values()]
    assert report["up"]["direction"] is None  # random clouds stand nowhere
    prepare_data.main(["inspect", "data.name=folder", f"data.root={mine}"])
    out = capsys.readouterr().out
    for part in ("folder as it is on disk", "points of an object", "degenerate: a/0.npy", "up: unclear"):
        assert part in out


def test_inspect_says_what_it_left_out(mine, capsys, monkeypatch):
    seen = []

    def limited(a, b, seconds):
        seen.append(seconds)
        return duplicates(a, b)._replace(left_out=7)

    monkeypatch.setattr("pointewa.datasets.inspect.report.duplicates", limited)
    root = ["data.name=folder", f"data.root={mine}"]
    assert call(capsys, "inspect", *root)["pairs_not_compared"] == 7
    prepare_data.main(["inspect", *root, "--seconds", "30"])
    said = "left out within 30 s: 7 pairs that look less alike; --seconds allows more"
    assert said in capsys.readouterr().out
    call(capsys, "inspect", *root, "--seconds", "0")
    assert seen == [120, 30, float("inf")]
    assert "--seconds: expected at least 0, found -1" in fails(capsys, "inspect", *root, "--seconds", "-1")


@pytest.mark.parametrize("options", [[], ["--int16"], ["--points", "700"]])
def test_pack_and_use(mine, tmp_path, capsys, options):
    out = tmp_path / "mine.h5"
    result = call(capsys, "pack", "data.name=folder", f"data.root={mine}", "--out", out, *options)
    points = 700 if "--points" in options else 8192
    assert (result["objects"], result["points"], result["bytes"]) == (12, points, out.stat().st_size)
    loaded = datasets.load("folder", str(out), "train", 512)
    direct = datasets.load("folder", str(mine), "train", 512)
    assert loaded.points.shape == (8, 600, 3)
    assert loaded.object_names == direct.object_names
    assert (loaded.points - direct.points).abs().max() < 1e-6 if not options else True
    assert call(capsys, "verify", "data.name=folder", f"data.root={out}")["ok"][1].startswith("train: sha256")
    error = fails(capsys, "pack", "data.name=folder", f"data.root={mine}", "--out", out)
    assert f"{out} exists" in error


def test_a_packed_file_that_was_changed_is_noticed(mine, tmp_path, capsys):
    out = tmp_path / "mine.h5"
    call(capsys, "pack", "data.name=folder", f"data.root={mine}", "--out", out, "--points", 100)
    with h5py.File(out, "r+") as h5:
        h5["train/label"][0] = 1
    assert "train: sha256 is not that of the file when it was packed" in fails(
        capsys, "verify", "data.name=folder", f"data.root={out}"
    )


def test_the_default_name_is_found_again(tmp_path, capsys):
    write(tmp_path / "set.h5", 16)
    call(capsys, "pack", "data.name=modelnet40", f"data.root={tmp_path / 'set.h5'}")
    source = datasets.open_source("modelnet40", str(tmp_path), "test")
    assert source.path == tmp_path / "modelnet40_16.h5"
    assert source.ordered
    assert torch.equal(
        datasets.load("modelnet40", str(tmp_path), "test").points,
        datasets.load("modelnet40", str(tmp_path / "set.h5"), "test").points,
    )
    assert packed.open_split(source.path, "train").shape == (9843, 16, 3)


@pytest.mark.parametrize("variant", [None, "obj_bg", "pb_t25/split1_nobg"])
def test_a_packed_variant_is_found_again(tmp_path, capsys, variant):
    file = {
        None: "main_split/{}_objectdataset_augmentedrot_scale75.h5",
        "obj_bg": "main_split/{}_objectdataset.h5",
        "pb_t25/split1_nobg": "split1_nobg/{}_objectdataset_augmented25_norot.h5",
    }[variant]
    (tmp_path / file).parent.mkdir()
    for split, count in (("training", 4), ("test", 2)):
        with h5py.File(tmp_path / file.format(split), "w") as h5:
            h5["data"] = np.random.default_rng(0).normal(size=(count, 100, 3)).astype(np.float32)
            h5["label"] = np.arange(count)
    options = ["data.name=scanobjectnn", f"data.root={tmp_path}", *([f"data.variant={variant}"] if variant else [])]
    out = call(capsys, "pack", *options)["out"]
    source = datasets.open_source("scanobjectnn", str(tmp_path), "train", variant=variant)
    assert (str(source.path), source.ordered, len(source)) == (out, True, 4)
    fewer = call(capsys, "pack", "data.name=scanobjectnn", f"data.root={out}", "--points", 50)["out"]
    assert fewer == out.replace("_100.h5", "_50.h5")  # of the variant that the file says, not of the default


def test_raw_scans_are_inspected_verified_and_packed(tmp_path, capsys):
    small = procedural(100)
    write_raw_scans(tmp_path / "set", small)
    options = ["data.name=scanobjectnn", f"data.root={tmp_path / 'set'}", "data.variant=raw"]
    found = call(capsys, "inspect", *options)["splits"]["train"]
    assert (found["layout"], found["objects"], found["most_points"]) == ("ScanObjectNN, raw", 12, 100)
    assert "the size of the official split is not known" in call(capsys, "verify", *options)["ok"][0]
    out = call(capsys, "pack", *options, "--points", "50")["out"]
    assert out == str(tmp_path / "set" / "scanobjectnn_raw_50.h5")
    source = datasets.open_source("scanobjectnn", str(tmp_path / "set"), "train", variant="raw")
    assert (str(source.path), source.ordered, source.normalize) == (out, True, True)
    assert source.parts.names == ("background", "object")
    lines = call(capsys, "verify", *options)["ok"]
    assert "the size of the official split is not known" in lines[0]
    assert lines[1].startswith("train: sha256")
    packed_clouds = datasets.load("scanobjectnn", out, "train", variant="raw")
    Path(out).unlink()
    loaded = datasets.load("scanobjectnn", str(tmp_path / "set"), "train", 50, variant="raw")
    assert torch.equal(packed_clouds.points, loaded.points[:, :50])
    assert torch.equal(packed_clouds.point_labels, loaded.point_labels[:, :50])


def test_what_is_refused(tmp_path, mine, capsys):
    assert "--points: expected at least 1" in fails(capsys, "pack", "data.name=folder", "--points", "0")
    write(tmp_path / "modelnet40.h5", 8)
    more = fails(capsys, "pack", "data.name=modelnet40", f"data.root={tmp_path}", "--points", "9")
    assert "an object has 8, found 9" in more
    assert "hkust-vgd" in fails(capsys, "download", "data.name=scanobjectnn", f"data.root={tmp_path}")
    assert "shapes" in fails(capsys, "download", f"data.root={tmp_path}")


@pytest.fixture
def psb(tmp_path):
    write_psb(tmp_path)
    return ["data.name=labeled_psb", f"data.root={tmp_path}"]


def test_inspect_shows_the_parts(psb, capsys):
    splits = call(capsys, "inspect", *psb)["splits"]
    for split, rows in (("train", np.arange(20) % 5 != 0), ("test", np.arange(20) % 5 == 0)):
        parts = arrays()["part"][rows][:, :]
        ants = np.bincount(parts[parts < 3])
        expected = dict(zip(("head", "leg", "torso"), (ants / ants.sum()).round(4).tolist(), strict=True))
        assert splits[split]["parts"] == {"Ant": pytest.approx(expected), "Cup": {"body": 1.0}}
    prepare_data.main(["inspect", *psb, "data.variant=fold1"])
    out = capsys.readouterr().out
    assert "Cup: body 100 %" in out
    assert "Labeled PSB, fold1" in out


def test_verify_says_that_a_sample_is_not_all(psb, capsys):
    error = fails(capsys, "verify", *psb)
    assert "16 objects, expected 304" in error
    assert "2 categories, expected 19" in error
    assert "4 parts, expected 94" in error


def test_pack_keeps_parts_under_a_name_that_is_found(psb, capsys, tmp_path):
    fold = "data.variant=fold2"
    expected = datasets.load("labeled_psb", str(tmp_path), "train", 32, variant="fold2")
    out = call(capsys, "pack", *psb, fold)["out"]
    assert out.endswith("labeled_psb_fold2_40.h5")
    for root in (tmp_path, out):
        loaded = datasets.load("labeled_psb", str(root), "train", 32, variant="fold2", parts=True)
        assert loaded.source == out
        assert loaded.parts == expected.parts
        assert loaded.point_labels.equal(expected.point_labels)
    with h5py.File(out, "r+") as h5:
        h5["train/point_labels"][3, 5] = 3
    loaded = datasets.load("labeled_psb", out, "train", 32, variant="fold2", stream=True)
    with pytest.raises(
        DataError, match=r"object 0 \(Ant/85\): point 5 has label 3, expected a part of Ant \(0, 1, 2\)"
    ):
        list(loaded.batches([torch.tensor([3])], 32))
    assert "Ant/85: 1 point of parts that its class has not" in fails(capsys, "verify", *psb, f"data.root={out}", fold)


def test_images_are_inspected_and_no_more(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for name in ("train/a/0", "train/b/0", "test/a/0", "test/b/0"):
        (tmp_path / name).parent.mkdir(parents=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    shutil.copy(tmp_path / "train/a/0.png", tmp_path / "test/b/1.png")
    keys = ("data.name=images", f"data.root={tmp_path}")
    found = call(capsys, "inspect", *keys)
    assert found["splits"]["test"]["classes"] == {"a": 1, "b": 2}
    assert found["same_pixels"]["train and test"]["of_two_classes"] == 1
    prepare_data.main(["inspect", *keys])
    assert "1 image of test with the pixels of one of train: 1 under another class, such as a/0.png and b/1.png" in (
        capsys.readouterr().out
    )
    assert "--seconds: only clouds" in fails(capsys, "inspect", *keys, "--seconds", 3)
    assert "choose a set of clouds, or WHAT=inspect" in fails(capsys, "verify", *keys)
    assert "choose a set of clouds, or WHAT=inspect" in fails(capsys, "pack", *keys)

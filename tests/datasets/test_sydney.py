"""Sydney Urban Objects: generated files in both layouts, damaged ones, and the real set where it is at hand."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import pointewa
from pointewa import datasets
from pointewa.datasets.inspect import report
from pointewa.datasets.layouts import sydney
from pointewa.datasets.source import say_once
from pointewa.datasets.subjects import Subjects
from pointewa.errors import DataError
from pointewa.ops import canonical_order, group
from pointewa.tools import evaluate, predict, prepare_data, train

FEWEST = 5  # points of an object: fewer than a patch has


def objects():
    """Two objects of each class in each fold, and one of a class in no fold: names, classes, folds, float32 clouds.

    They are 10 m away from the sensor, of 5 to 60 points, and their z, which points down, is largest at the ground.
    """
    rng, found = np.random.default_rng(0), []
    for fold in range(4):
        for name in sydney.CLASSES:
            for number in (2 * fold, 2 * fold + 1):
                size = FEWEST if number == 0 else int(rng.integers(FEWEST, 60))
                points = rng.uniform([10, 5, 0], [11, 7, 2], (size, 3)).astype(np.float32)
                found.append((f"{name}.{number}.{rng.integers(9999)}", name, fold, points))
    return [*found, ("bench.0.1", "bench", -1, rng.random((9, 3)).astype(np.float32))]


def write_npz(root, **changed):
    made, classes = objects(), ("bench", *sydney.CLASSES)
    arrays = {
        "xyz": np.concatenate([points for *_, points in made]),
        "intensity": np.zeros(sum(len(points) for *_, points in made), np.uint8),
        "offset": np.cumsum([0, *(len(points) for *_, points in made)]),
        "label": np.array([classes.index(name) for _, name, _, _ in made], np.int16),
        "fold": np.array([fold for _, _, fold, _ in made], np.int8),
        "classes": np.array(classes),
        "name": np.array([name for name, *_ in made]),
    }
    root.mkdir(parents=True, exist_ok=True)
    arrays = {key: value for key, value in (arrays | changed).items() if value is not None}
    np.savez(root / "sydney_urban_objects.npz", **arrays)
    return root / "sydney_urban_objects.npz"


def write_published(root, suffix=".csv"):
    folder = root / "sydney-urban-objects-dataset"
    for name in ("objects", "folds"):
        (folder / name).mkdir(parents=True)
    lists = {fold: [] for fold in range(4)}
    for name, _, fold, points in objects():
        if fold >= 0:
            lists[fold].append(f"{name}.csv\n")
        if suffix == ".csv":
            rows = ["20110830T011244.2,7,3," + ",".join(map(repr, map(float, row))) + ",1.5,12.25,99" for row in points]
            (folder / "objects" / f"{name}.csv").write_text("\n".join(rows) + "\n")
        else:
            records = np.zeros(len(points), sydney.RECORD)
            for axis, values in zip("xyz", points.T, strict=True):
                records[axis] = values
            records["range"], records["pid"] = 12.25, 99
            (folder / "objects" / f"{name}.bin").write_bytes(records.tobytes())
    for fold, lines in lists.items():
        (folder / "folds" / f"fold{fold}.txt").write_text("".join(lines))
    return folder


WRITERS = {"npz": write_npz, "csv": write_published, "bin": lambda root: write_published(root, ".bin")}


@pytest.mark.parametrize("layout", WRITERS)
@pytest.mark.parametrize("fold", [0, 3])
def test_each_fold_is_the_test_set_once(tmp_path, layout, fold, capsys):
    WRITERS[layout](tmp_path)
    made = objects()[:-1]
    for split in ("train", "test"):
        source = datasets.open_source("sydney", str(tmp_path), split, variant=f"fold{fold}")
        expected = [one for one in made if (one[2] == fold) == (split == "test")]
        assert source.object_names == tuple(one[0] for one in expected)
        assert [source.class_names[label] for label in source.labels] == [one[1] for one in expected]
        assert source.up == "-z"
        for cloud, (*_, points) in zip(source.clouds(1), expected, strict=True):  # (x, y, z) -> (x, -z, y)
            assert np.array_equal(cloud.points, np.stack([points[:, 0], -points[:, 2], points[:, 1]], 1))
        assert source.left_out == {"in no fold": ["bench.0.1"]}
    assert f"is not the official fold{fold}: 4wd: " in capsys.readouterr().err


def test_without_a_fold_it_is_the_first_with_a_note(tmp_path, capsys):
    write_npz(tmp_path)
    say_once.cache_clear()
    found = [datasets.open_source("sydney", str(tmp_path), split) for split in ("train", "test")]
    assert [len(one) for one in found] == [84, 28]
    note = "note: data.variant does not say which fold is the test set: fold0 of fold0, fold1, fold2, fold3\n"
    assert capsys.readouterr().err.count(note) == 1
    with pytest.raises(DataError, match=r"data\.variant: expected one of fold0, fold1, fold2, fold3 for sydney, found"):
        datasets.open_source("sydney", str(tmp_path), "test", variant="fold4")
    with pytest.raises(DataError, match=r"(?s)Sydney Urban Objects was not found.*objects/<class>.*acfr\.usyd"):
        datasets.open_source("sydney", str(tmp_path / "nowhere"), "test")


def test_metres_are_kept_where_they_are_asked_for(tmp_path):
    write_npz(tmp_path)
    unit, metres, raw = (
        datasets.load("sydney", str(tmp_path), "test", 16, variant="fold1", normalize=how)
        for how in ("unit_sphere", "center", "none")
    )
    assert [one.normalize for one in (unit, metres, raw)] == ["unit_sphere", "center", "none"]
    points = next(one[3] for one in objects() if one[2] == 1)
    turned = torch.from_numpy(np.stack([points[:, 0], -points[:, 2], points[:, 1]], 1))
    count = min(len(points), 16)
    index = [(turned == one).all(1).nonzero().item() for one in raw.points[0, :count]]
    centre = turned.double().mean(0)
    torch.testing.assert_close(metres.points[0, :count], (turned[index].double() - centre).float(), rtol=0, atol=1e-6)
    assert unit.points[0].norm(dim=-1).max() <= 1 + 1e-6
    assert raw.points[0].norm(dim=-1).min() > 10
    scale = (turned.double() - centre).norm(dim=-1).max()
    torch.testing.assert_close(unit.points[0], (metres.points[0].double() / scale).float(), rtol=0, atol=1e-6)


def test_objects_with_few_points_repeat_theirs(tmp_path, capsys):
    write_npz(tmp_path)
    clouds = datasets.load("sydney", str(tmp_path), "test", 64, variant="fold0")
    assert len(clouds.points[0].unique(dim=0)) == FEWEST
    assert torch.equal(clouds.points[0, FEWEST : 2 * FEWEST], clouds.points[0, :FEWEST])
    assert "28 of 28 objects have fewer than 64 points, the fewest 5: theirs are repeated" in capsys.readouterr().err


def test_a_packed_fold_is_found_again(tmp_path, capsys):
    write_npz(tmp_path)
    keys = ["data.name=sydney", f"data.root={tmp_path}", "data.variant=fold2"]
    prepare_data.main(["pack", *keys, "--points", "32", "data.normalize=center"])
    prepare_data.main(["pack", *keys, "--points", "16"])
    prepare_data.main(["pack", *keys, f"data.root={tmp_path / 'sydney_urban_objects.npz'}", "--points", "32"])
    for count, wanted in ((16, 16), (17, 32)):
        assert datasets.open_source("sydney", str(tmp_path), "test", count, "fold2").num_points == wanted
    with pytest.raises(DataError, match=r"sydney_fold2_32.h5: an object has 32 points, data.num_points asks for 33"):
        datasets.open_source("sydney", str(tmp_path), "test", 33, "fold2")
    for fold in ("fold2", "fold1"):
        loaded = datasets.load("sydney", str(tmp_path), "test", 32, variant=fold)
        assert set(loaded.object_names) == {one[0] for one in objects() if one[2] == int(fold[-1])}
        assert loaded.up == "-z"
    file = tmp_path / "sydney_fold2_32.h5"
    with pytest.raises(DataError, match=r"data.variant=fold1: .*sydney_fold2_32.h5 has the folds as they were divided"):
        datasets.load("sydney", str(file), "test", 32, variant="fold1")
    for how in ("none", "center"):
        with pytest.raises(DataError, match=rf"data.normalize={how}: .* centred and scaled to norm 1 when it was"):
            datasets.load("sydney", str(file), "test", 32, normalize=how)
    with pytest.raises(DataError, match=r"sydney_fold2_32.h5: an object has 32 points, data.num_points asks for 33"):
        datasets.load("sydney", str(file), "test", 33)  # as of every set, whether packed or not
    metres = str(tmp_path / "sydney_center_fold2_32.h5")
    centred = datasets.open_source("sydney", metres, "test", normalize="center")
    assert (centred.ordered, centred.normalization) == (True, "center")
    assert datasets.load("sydney", metres, "test", 32, normalize="center").normalize == "center"
    scaled = datasets.load("sydney", metres, "test", 32, normalize="unit_sphere")
    assert scaled.normalize == "unit_sphere"
    assert scaled.points.norm(dim=-1).amax(1) == pytest.approx(torch.ones(28), abs=1e-6)
    with pytest.raises(DataError, match=r"data.normalize=none: .* were centred when it was packed"):
        datasets.load("sydney", metres, "test", 32, normalize="none")


SMALL = ["model.width=24", "model.depth=2", "model.heads=2", "model.num_groups=8", "model.group_size=16",
         "data.num_points=32", "train.device=cpu", "run.report=false", "train.epochs=3", "train.lr=3e-3",
         "train.precision=float32", "data.augment=[]"]  # fmt: skip


@pytest.mark.parametrize("how", ["unit_sphere", "center"])
def test_a_training_a_prediction_and_an_evaluation(tmp_path, monkeypatch, capsys, how):
    """Of objects with fewer points than a patch has: a prediction on a file gives what the evaluation gave, and a
    centred model tells sizes apart, wherever the object is."""
    monkeypatch.setattr("pointewa.datasets.order.method", lambda: "torch")
    folder = write_published(tmp_path)
    run = tmp_path / "run"
    data = ["data.name=sydney", f"data.root={tmp_path}", "data.variant=fold1", f"data.normalize={how}"]
    train.main([*SMALL, *data, f"run.dir={tmp_path}", "run.name=run", "--json"])
    summary = json.loads(capsys.readouterr().out)
    assert summary["reported"] == ["f1"]
    subjects = Subjects(run)
    assert (subjects.loaded.up, subjects.loaded.normalize) == ("-z", how)
    expected = subjects.evaluator.plain()
    assert expected.weighted_f1 == pytest.approx(summary["test"]["f1"], abs=1e-3)
    model = pointewa.load(run, "cpu")
    for number, (name, *_, points) in enumerate(one for one in objects() if one[2] == 1):
        points = group(torch.from_numpy(points)[None], canonical_order(torch.from_numpy(points)[None]))[0]
        # The evaluation samples from the first point of the file, a prediction from the farthest: of clouds with no
        # more points than the model takes both are all points.
        logits = model.logits(points)
        assert logits.isfinite().all()
        moved = model.logits(points.double() + 1000)
        torch.testing.assert_close(moved, logits, rtol=0, atol=1e-4)
        if number < 3:
            file = folder / "objects" / f"{name}.csv"
            xyz = np.array([row.split(",")[3:6] for row in file.read_text().split()], float)
            np.savetxt(tmp_path / "one.xyz", xyz)
            predict.main([str(run), str(tmp_path / "one.xyz"), "--json"])
            (answer,) = json.loads(capsys.readouterr().out)["predictions"]
            found = torch.tensor(list(answer["probabilities"].values()))
            torch.testing.assert_close(found, logits.softmax(-1).sort(descending=True).values, rtol=0, atol=1e-5)
    few = torch.rand(FEWEST, 3)
    bigger = model.logits(2 * few) - model.logits(few)
    assert (bigger.abs().max() > 1e-4) == (how == "center")
    evaluate.main([str(run)])
    out = capsys.readouterr().out
    assert "weighted F1" in out
    assert f"{summary['test']['f1']:.2f} %" in out


def test_an_archive_with_names_as_bytes_is_the_same(tmp_path):
    names = {"classes": np.array(["bench", *sydney.CLASSES]), "name": np.array([one[0] for one in objects()])}
    text, data = tmp_path / "text", tmp_path / "bytes"
    write_npz(text)
    write_npz(data, **{key: value.astype("S") for key, value in names.items()})
    found, expected = (datasets.open_source("sydney", str(one), "test", variant="fold1") for one in (data, text))
    assert (found.object_names, found.left_out) == (expected.object_names, expected.left_out)
    assert found.labels.tolist() == expected.labels.tolist()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"fold": None}, "fold is missing"),
        ({"xyz": np.zeros((9, 2))}, r"xyz: expected real numbers \[sum, 3\]"),
        ({"xyz": np.zeros((9, 3))}, "offset: expected rising numbers from 0 to 9"),
        ({"offset": np.zeros(114, int)}, "offset: expected rising numbers"),
        ({"label": np.full(113, 99)}, "label: expected 0 to 14"),
        ({"label": np.zeros(113)}, "label: expected whole numbers"),
        ({"fold": np.zeros(7, int)}, r"fold: expected whole numbers \[113\], found int64 \[7\]"),
        ({"classes": np.arange(15)}, "classes, name: expected lists of text"),
        ({"name": np.array([{}] * 113, object)}, "Object arrays cannot be loaded"),
        ({"name": np.array("x")}, "offset: expected whole numbers"),
    ],
)
def test_archives_that_are_refused(tmp_path, changed, message):
    file = write_npz(tmp_path, **changed)
    with pytest.raises(DataError, match=message) as error:
        datasets.open_source("sydney", str(tmp_path), "test", variant="fold0")
    assert str(file) in str(error.value)


def test_an_archive_that_unpacks_to_too_much(tmp_path, monkeypatch):
    file = write_npz(tmp_path)
    monkeypatch.setattr(sydney, "_MAX_BYTES", 1000)
    with pytest.raises(DataError, match=rf"{file}: .*expected at most 1000 bytes when unpacked"):
        datasets.open_source("sydney", str(tmp_path), "test", variant="fold0")


def test_published_files_that_are_refused(tmp_path):
    folder = write_published(tmp_path)
    listed, clouds = folder / "folds/fold1.txt", sorted(folder.glob("objects/*.csv"))
    whole = listed.read_text()

    def refused(message):
        with pytest.raises(DataError, match=message):
            list(datasets.open_source("sydney", str(tmp_path), "train", variant="fold0").clouds(1))

    for line in ("../../etc/passwd.0.1.csv", "car.1.csv", "bench.0.1.csv", "car.0.1.csv.csv", "/car.0.1"):
        listed.write_text(whole + line + "\n")
        refused(r"fold1.txt: .*expected names such as car.0.2299.csv")
    listed.write_text(whole + "car.0.123456.csv\n")
    refused("1 of 113 files that folds/ lists are missing, the first is car.0.123456.csv")
    listed.write_text(whole + whole.splitlines()[0] + "\n")
    refused(f"{whole.splitlines()[0][:-4]} is twice in the lists")
    listed.write_text(whole)
    victim = next(path for path in clouds if path.stem == whole.splitlines()[0][:-4])
    for text in ("", "1,2,3\n", "a,1,2,x,y,z,3,4,5\n", "a,1,2,nan,0,0,3,4,5\n"):
        victim.write_text(text)
        if "nan" not in text:
            refused(f"{victim}: cannot be read as records of t, intensity, id, x, y, z, azimuth, range, pid")
    with pytest.raises(DataError, match=r"has coordinates that are not finite|in one place"):
        datasets.load("sydney", str(tmp_path), "train", variant="fold0")
    victim.unlink()
    victim.with_suffix(".bin").write_bytes(bytes(35))
    refused("expected records of 34 bytes, found 35 bytes")


def test_the_official_set(tmp_path, monkeypatch):
    folder = Path(os.environ.get("POINTEWA_TEST_DATA", ""), "sydney_urban_objects.npz")
    if "POINTEWA_TEST_DATA" not in os.environ or not folder.is_file():
        pytest.skip("POINTEWA_TEST_DATA does not name a folder with sydney_urban_objects.npz")
    names = []
    for fold, size in zip(sydney.FOLDS, (146, 155, 132, 155), strict=True):
        sources = {
            split: datasets.open_source("sydney", str(folder), split, variant=fold) for split in ("train", "test")
        }
        assert [len(one) for one in sources.values()] == [588 - size, size]
        assert not set(sources["train"].object_names) & set(sources["test"].object_names)
        names += sources["test"].object_names
        _, bad = report.verify("sydney", sources)
        assert bad == []
    assert len(set(names)) == 588
    assert len(sources["test"].left_out["in no fold"]) == 631 - 588
    # z is down: once turned, trees are wider above than below.
    wider = []
    for cloud, label in zip(sources["train"].clouds(1), sources["train"].labels, strict=True):
        if sources["train"].class_names[label] == "tree":
            height = cloud.points[:, 1]
            low, high = np.quantile(height, [0.25, 0.75])
            above, below = (
                np.ptp(cloud.points[some][:, [0, 2]], axis=0).max() for some in (height > high, height < low)
            )
            wider.append(above > below)
    assert np.mean(wider) > 0.7

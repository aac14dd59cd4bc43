"""Damaged files of every layout: each loads, or gives one error that names it; nothing runs, nothing else is written.

With the single files of test_files_damaged.py these are more than 2,000 a run. POINTEWA_FUZZ=20 makes twenty times as
many, from other seeds.
"""

import os
import pickle
import shutil
import zipfile
from functools import partial

import h5py
import numpy as np
import pytest
import torch

from pointewa import datasets
from pointewa.datasets import prepare
from pointewa.datasets.few_shot import Fold
from pointewa.datasets.packed import write
from pointewa.errors import DataError
from pointewa.safe import hdf5
from pointewa.safe.archives import extract
from tests.datasets.test_folder_parts import FORMS
from tests.datasets.test_labeled_psb import arrays
from tests.datasets.test_labeled_psb import write as write_psb
from tests.datasets.test_shapenetpart import write_hdf5, write_text, write_v0
from tests.datasets.test_sydney import WRITERS

ROUNDS = int(os.environ.get("POINTEWA_FUZZ", "1"))


def mutated(content, rng):
    """A damaged copy of a file's bytes."""
    content = bytearray(content)
    size, kind = len(content), rng.integers(8)
    start = int(rng.integers(size))
    end = min(size, start + int(rng.integers(1, 64)))
    match kind:
        case 0:
            return bytes(content[:start])
        case 1 | 2:  # flipped bits, few or many
            for place in rng.integers(0, size, 1 if kind == 1 else 40):
                content[place] ^= 1 << int(rng.integers(8))
        case 3:
            content[start:end] = bytes(end - start)
        case 4:
            content[start:end] = rng.bytes(end - start)
        case 5:
            content[start:start] = rng.bytes(end - start)
        case 6:
            del content[start:end]
        case 7:  # a size or an offset that is huge
            content[start : start + 8] = b"\xff" * 8
    return bytes(content)


def rewrite_hdf5(path, rng):
    """A valid HDF5 file with a dataset of another type or shape, under another key, or missing."""
    with h5py.File(path, "r+", libver=("v110", "v110")) as h5:
        names = []
        h5.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
        name = names[rng.integers(len(names))]
        values = h5[name][()]
        del h5[name]
        match rng.integers(9):
            case 0:
                pass
            case 1:
                h5[name + "s"] = values
            case 2:
                h5[name] = np.array(["text"] * len(values), h5py.string_dtype())
            case 3:
                h5[name] = values[: len(values) // 2]
            case 4:
                h5[name] = values[..., None] if values.ndim == 1 else values[..., :2]
            case 5:
                h5[name] = np.zeros((0, *values.shape[1:]), values.dtype)
            case 6:
                h5[name] = 3.5
            case 7:
                h5.create_group(name)
            case 8:
                kinds = (np.complex64, np.int64, np.float64, np.uint8)
                h5[name] = np.ones(values.shape, kinds[rng.integers(len(kinds))]) * 200


def rewrite_pickle(path, rng):
    """A pickle of other things than clouds and labels."""
    points, labels = pickle.loads(path.read_bytes())
    choices = (
        [points], [points, labels[:-1]], [labels, points], {"points": points}, None, [[], []], [points, None],
        [[cloud[:, :2] for cloud in points], labels], [[cloud.astype(str) for cloud in points], labels],
        [[*points[:-1], points[-1][:5]], labels], [points, [np.array([9])] * len(labels)],
        [points, ["a"] * len(labels)], [[cloud.astype(object) for cloud in points], labels], [np.stack(points), labels],
        [[np.full_like(cloud, np.nan) for cloud in points], labels], 7, [points, [[1, 2]] * len(labels)],
        [[cloud * 1j for cloud in points], labels], [[cloud * 1e30 for cloud in points], labels],
    )  # fmt: skip
    path.write_bytes(pickle.dumps(choices[rng.integers(len(choices))]))


def rewrite_fold(path, rng):
    """A pickle of other things than a few-shot fold."""
    content = pickle.loads(path.read_bytes())
    (points, label, number), *rest = content["train"]
    firsts = (
        (points, label), None, (points[:, :2], label, number), (points.astype(str), label, number), (points, "a", 7),
        (points, -1, number), (points, label, 99), (points, [1, 2], number), (points * 1e30, label, number),
        (points * 1j, label, number), (points.astype(object), label, number), (np.full_like(points, np.nan), 0, number),
        (points[:7], label, number), (None, label, number), (points, 2**70, number), (np.zeros((0, 6)), label, number),
    )  # fmt: skip
    wholes = (7, None, [], {"train": content["train"]}, content | {"test": []}, content | {"train": rest},
              content | {"train": None}, {"train": {}, "test": {}})  # fmt: skip
    kind = rng.integers(len(firsts) + len(wholes))
    changed = wholes[kind - len(firsts)] if kind >= len(firsts) else content | {"train": [firsts[kind], *rest]}
    path.write_bytes(pickle.dumps(changed))


def listing(folder):
    return {(path, path.stat().st_size if path.is_file() else 0) for path in folder.rglob("*")}


@pytest.fixture
def play(tmp_path, monkeypatch, capfd):
    """A function that loads each of many damaged copies of a set's file, and returns how many loaded."""
    monkeypatch.setenv("POINTEWA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hdf5, "_PATIENCE", 1.0)

    def run(name, root, victims, count, rewrite=None, **options):
        loaded = 0
        for number in range(count * ROUNDS):
            rng = np.random.default_rng([number, ROUNDS])
            victim = victims[number % len(victims)]
            original = victim.read_bytes()
            kind = number % 40
            if kind == 0:
                victim.write_bytes(b"")
            elif kind == 1:
                victim.unlink()
                victim.mkdir()
            elif rewrite and kind % 3 == 0:
                rewrite(victim, rng)
            else:
                victim.write_bytes(mutated(original, rng))
            before = listing(root)
            try:
                clouds = datasets.load(name, str(root), "train", 48, **options)
            except DataError as error:
                names = (str(victim), str(victim.parent), f"{victim.parent.name}/{victim.stem}")  # or the object's
                assert any(name in str(error) for name in names), f"{number}: {error}"
                assert len(str(error)) < 3000
            else:
                loaded += 1
                assert clouds.points.dtype == torch.float32
                assert clouds.points.isfinite().all()
                assert clouds.points.shape[2] == 3
                assert len(clouds.points) == len(clouds.labels) == len(clouds.object_names) > 0
                if clouds.parts is not None:
                    mine = clouds.parts.mask(len(clouds.class_names))[clouds.labels]
                    assert mine.gather(1, clouds.point_labels).all()
            assert listing(root) == before
            if victim.is_dir():
                victim.rmdir()
            victim.write_bytes(original)
            for file in (tmp_path / "cache").glob("*"):
                assert file.suffix in (".h5", ".json")  # nothing half-written
                file.unlink()
        assert {path.name for path in tmp_path.iterdir()} <= {"cache", "set"}
        captured = capfd.readouterr()
        assert captured.out == ""
        assert [line for line in captured.err.splitlines() if not line.startswith("note: ")] == []
        return loaded

    return run


@pytest.mark.hostile
@pytest.mark.parametrize(
    ("layout", "count"), [("packed", 80), ("ply_hdf5", 80), ("text", 120), ("dat", 200), ("off", 120)]
)
def test_modelnet40(tmp_path, layouts, play, layout, count):
    root = tmp_path / "set"
    place = layouts.modelnet40[layout](root, layouts.procedural(64))
    victims = {
        "packed": lambda: [place],
        "ply_hdf5": lambda: [place / "ply_data_train1.h5", place / "shape_names.txt"],
        "text": lambda: [place / "bed" / "bed_0002.txt", place / "modelnet40_train.txt"],
        "dat": lambda: [place / "modelnet40_train_8192pts_fps.dat"],
        "off": lambda: [place / "bathtub" / "train" / "bathtub_0002.off"],
    }[layout]()
    rewrite = {"dat": rewrite_pickle, "packed": rewrite_hdf5}.get(layout)
    loaded = play("modelnet40", root, victims, count, rewrite, variant=layout)
    assert 0 < loaded < count * ROUNDS


def test_scanobjectnn(tmp_path, layouts, play):
    root = tmp_path / "set"
    place = layouts.scanobjectnn(root, layouts.procedural(64), "obj_bg")
    victims = [place / "training_objectdataset.h5"]
    loaded = play("scanobjectnn", root, victims, 80, rewrite_hdf5, variant="obj_bg")
    assert 0 < loaded < 80 * ROUNDS


def rewrite_npz(path, rng):
    """An archive in which an array is of another type or shape, or missing."""
    arrays = dict(np.load(path))
    key = sorted(arrays)[rng.integers(len(arrays))]
    values = arrays.pop(key)
    match rng.integers(8):
        case 1:
            arrays[key] = values[: len(values) // 2]
        case 2:
            arrays[key] = values[..., None]
        case 3:
            arrays[key] = np.array(["text"] * len(values))
        case 4:
            arrays[key] = np.full(values.shape, 200, np.uint8)
        case 5:
            arrays[key] = -np.ones(values.shape)
        case 6:
            arrays[key] = values.astype(object)
        case 7:
            arrays[key] = np.array(3)
    np.savez(path, **arrays)


@pytest.mark.hostile
@pytest.mark.parametrize("layout", WRITERS)
def test_sydney(tmp_path, play, layout):
    root = tmp_path / "set"
    place = WRITERS[layout](root)
    if layout == "npz":
        victims, rewrite = [place], rewrite_npz
    else:
        first = (place / "folds/fold1.txt").read_text().split()[0][:-4]
        victims, rewrite = [place / "folds/fold1.txt", place / "objects" / f"{first}.{layout}"], None
    loaded = play("sydney", root, victims, 60, rewrite, variant="fold0")
    assert 0 < loaded < 60 * ROUNDS


def test_raw_objects_of_scanobjectnn(tmp_path, layouts, play):
    root = tmp_path / "set"
    place = layouts.raw_scans(root, layouts.procedural(64))
    victims = [next(place.glob("bag/*00.bin")), place / "split_new.txt"]
    loaded = play("scanobjectnn", root, victims, 120, variant="raw")
    assert 0 < loaded < 120 * ROUNDS


def test_a_packed_file_of_ours(tmp_path, layouts, play):
    """With checksums: whatever loads has the right points."""
    root = tmp_path / "set"
    source = datasets.open_source("modelnet40", str(layouts.packed(root, layouts.procedural(64))), "train")
    write(root / "ours.h5", {"train": (source, 64, prepare.prepare(source, 64, ""))})
    (root / "modelnet40_256.h5").unlink()
    (root / "ours.h5").rename(root / "modelnet40_ours.h5")
    loaded = play("modelnet40", root, [root / "modelnet40_ours.h5"], 80, rewrite_hdf5)
    assert 0 < loaded < 80 * ROUNDS


@pytest.mark.hostile
@pytest.mark.parametrize(("layout", "count"), [("text", 120), ("v0", 120), ("hdf5", 80)])
def test_shapenetpart(tmp_path, play, layout, count):
    root = tmp_path / "set"
    root.mkdir()
    {"text": write_text, "v0": write_v0, "hdf5": partial(write_hdf5, libver=("v110", "v110"))}[layout](root)
    victims = {
        "text": [root / "04379243" / "t2.txt", root / "train_test_split" / "shuffled_train_file_list.json"],
        "v0": [root / "04379243" / place for place in ("points/t2.pts", "points_label/t2.seg")],
        "hdf5": [root / "ply_data_train1.h5"],
    }[layout]
    loaded = play("shapenetpart", root, victims, count, rewrite_hdf5 if layout == "hdf5" else None, parts=True)
    assert 0 < loaded < count * ROUNDS


def test_labeled_psb(tmp_path, play):
    root = tmp_path / "set"
    root.mkdir()
    write_psb(root, **{name: np.tile(arrays()[name], (1, 2, *([1] * (name == "xyz")))) for name in ("xyz", "part")})
    loaded = play("labeled_psb", root, [root / "labeled_psb_40.npz"], 120, rewrite_npz, parts=True)
    assert 0 < loaded < 120 * ROUNDS


@pytest.mark.hostile
@pytest.mark.parametrize("name", ["last.txt", "named.csv", "ascii.ply", "binary.ply", "a.pcd", "records.npy", "a.npz"])
def test_labelled_clouds_of_ones_own(tmp_path, play, name):
    root = tmp_path / "set"
    for label in ("chair", "mug"):
        for split in ("train", "test"):
            (root / label / split).mkdir(parents=True)
            (root / label / split / name).write_bytes(FORMS[name][0])
    loaded = play("folder", root, [root / "mug" / "train" / name], 80, parts=True)
    assert 0 < loaded < 80 * ROUNDS


@pytest.mark.hostile
def test_hdf5_of_the_old_format(tmp_path, layouts, play):
    """It has no checksums: read in this process, some of these would end it."""
    root = tmp_path / "set"
    file = layouts.packed(tmp_path / "new", layouts.procedural(64))
    root.mkdir()
    with h5py.File(file) as new, h5py.File(root / "modelnet40.h5", "w", libver=("earliest", "v108")) as old:
        old.attrs["shape_names"] = new.attrs["shape_names"]
        new.copy("train", old)
    shutil.rmtree(tmp_path / "new")
    loaded = play("modelnet40", root, [root / "modelnet40.h5"], 60)
    assert 0 < loaded < 60 * ROUNDS


def test_archives(tmp_path):
    source, target = tmp_path / "a.zip", tmp_path / "in" / "set"
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(source, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(3):
            archive.writestr(f"set/{number}.bin", rng.integers(0, 9, 500, np.uint8).tobytes())
    content = source.read_bytes()
    (tmp_path / "in").mkdir()
    for number in range(300 * ROUNDS):
        source.write_bytes(mutated(content, np.random.default_rng([number, ROUNDS])))
        try:
            extract(source, target)
        except DataError as error:
            assert str(source) in str(error)
            assert not target.exists()
        else:
            assert target.is_dir()
            shutil.rmtree(target)
        assert {path.name for path in tmp_path.iterdir()} == {"a.zip", "in"}
        assert not list((tmp_path / "in").iterdir())


@pytest.mark.hostile
def test_damaged_few_shot_folds(play, tmp_path):
    path, rng = tmp_path / "set/ModelNetFewshot/2way_3shot/0.pkl", np.random.default_rng(0)
    path.parent.mkdir(parents=True)
    counts = {"train": 3, "test": 20}
    content = {
        split: [
            (rng.normal(size=(48, 6)).astype(np.float32), label, 7 + label) for label in (0, 1) for _ in range(count)
        ]
        for split, count in counts.items()
    }
    path.write_bytes(pickle.dumps(content))
    loaded = play("modelnet40", tmp_path / "set", [path], 200, rewrite_fold, fold=Fold(2, 3, 0))
    assert 0 < loaded < 120 * ROUNDS

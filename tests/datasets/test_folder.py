"""The user's own files: a folder a class."""

import numpy as np
import pytest

from pointewa import datasets
from pointewa.datasets.layouts import shapes
from pointewa.errors import DataError

trimesh = pytest.importorskip("trimesh")


def write(path, points, layouts):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in (".off", ".obj", ".stl", ".glb", ".ply"):
        trimesh.Trimesh(*layouts.mesh(points, 0.01), process=False).export(path)
    elif path.suffix == ".npy":
        np.save(path, points)
    elif path.suffix == ".npz":
        np.savez(path, points=points)
    else:
        np.savetxt(path, points)


@pytest.fixture
def folder(tmp_path, layouts):
    """Two classes of ten files each, of all kinds and sizes, not divided."""
    rng = np.random.default_rng(0)
    kinds = [".ply", ".xyz", ".txt", ".npy", ".npz", ".off", ".obj", ".stl", ".glb", ".NPY"]
    for name in ("cup", "table"):
        for number, kind in enumerate(kinds):
            points = shapes.sample(name, rng, 80 + 20 * number).astype(np.float32)
            path = tmp_path / "mine" / name / f"{number}{kind.lower()}"
            write(path, points, layouts)
            path.rename(path.with_suffix(kind))
        (tmp_path / "mine" / name / "notes.md").write_text("not a cloud")
        (tmp_path / "mine" / name / ".hidden.npy").write_bytes(b"")
    (tmp_path / "mine" / ".git").mkdir()
    return tmp_path / "mine"


def test_an_undivided_folder_is_split_by_a_fixed_seed(folder, capsys):
    train, test = (datasets.load("folder", str(folder), split, 128) for split in ("train", "test"))
    assert train.class_names == test.class_names == ("cup", "table")
    assert (train.labels.bincount().tolist(), test.labels.bincount().tolist()) == ([8, 8], [2, 2])
    names = train.object_names + test.object_names
    assert len(set(names)) == 20
    assert {name.split(".")[-1] for name in names} >= {"ply", "xyz", "txt", "npy", "npz", "off", "obj", "stl", "glb"}
    assert train.points.shape == (16, 150, 3)
    largest = train.points.norm(dim=-1).amax(1)
    assert ((largest > 0.97) & (largest < 1 + 1e-5)).all()  # of the points kept; that of all is 1
    assert datasets.load("folder", str(folder), "test", 128).object_names == test.object_names
    assert "fewer than 128 points, the fewest" in capsys.readouterr().err


def test_a_divided_folder(tmp_path, layouts):
    rng = np.random.default_rng(0)
    for split, count in (("train", 3), ("test", 1)):
        for name in ("b", "a"):
            for number in range(count):
                write(tmp_path / name / split / f"{number}.npy", rng.normal(size=(64, 3)), layouts)
    train, test = (datasets.open_source("folder", str(tmp_path), split) for split in ("train", "test"))
    assert train.object_names == ("a/0.npy", "a/1.npy", "a/2.npy", "b/0.npy", "b/1.npy", "b/2.npy")
    assert test.labels.tolist() == [0, 1]


def test_clouds_with_z_up_are_turned(tmp_path, layouts):
    points = np.random.default_rng(0).normal(size=(100, 3)).astype(np.float32)
    points[:, 2] = abs(points[:, 2]) * 3  # tall along z, standing on 0
    for number in range(2):
        write(tmp_path / "a" / f"{number}.npy", points, layouts)
    (turned,) = datasets.open_source("folder", str(tmp_path), "test", variant="z_up").clouds(10)
    assert np.array_equal(turned.points[:, 1], points[:, 2])
    matrix = np.linalg.lstsq(points, turned.points, rcond=None)[0]
    assert np.linalg.det(matrix) == pytest.approx(1, abs=1e-4)  # a rotation, no mirror image
    with pytest.raises(
        DataError, match="expected one of x_up, y_up, z_up, x_down, y_down, z_down for folder, found 'x'"
    ):
        datasets.open_source("folder", str(tmp_path), "test", variant="x")


def test_what_is_refused(tmp_path, folder):
    load = lambda root: datasets.load("folder", str(root), "train", 64)  # noqa: E731
    with pytest.raises(DataError, match=r"expected a folder for each class.*found nothing"):
        load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="found no folders"):
        load(tmp_path / "empty")
    (folder / "lonely").mkdir()
    with pytest.raises(DataError, match=r"lonely: expected at least two files.*found 0"):
        load(folder)
    (folder / "lonely").rmdir()
    (folder / "cup" / "train").mkdir()
    with pytest.raises(DataError, match=r"cup/train: expected files.*found 0"):
        load(folder)
    (folder / "cup" / "train").rmdir()
    for file in folder.glob("*/*.npz"):
        file.write_bytes(b"rubbish")
    with pytest.raises(DataError, match=r"4\.npz"):
        [datasets.load("folder", str(folder), split, 64) for split in ("train", "test")]

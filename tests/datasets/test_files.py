"""Points of single files: each format, meshes sampled by area, nothing else opened."""

import os
import pickle
import sys

import numpy as np
import pypcd4
import pytest
from file_samples import CLOUDS, FACES, MESHES, POINTS, VERTICES, glb, npy, npz, obj, off, pcd, ply_mesh, write

from pointewa.datasets.files import SUFFIXES, read_points
from pointewa.errors import DataError


@pytest.mark.parametrize("name", CLOUDS)
def test_clouds_come_as_they_are(tmp_path, name):
    points = read_points(write(tmp_path, name, CLOUDS[name]), samples=7)
    assert (points.dtype, points.flags.c_contiguous) == (np.float64, True)
    np.testing.assert_array_equal(points.astype(np.float32), POINTS)


@pytest.mark.parametrize(("old", "new"), [(b"", b""), (b" ", b"  "), (b"\n", b" \n"), (b"\n", b"\r\n")])
def test_ascii_pcd(tmp_path, old, new):
    header, body = pcd(POINTS, pypcd4.Encoding.ASCII).split(b"DATA ascii\n")
    path = write(tmp_path, "a.pcd", header + b"DATA ascii\n" + (body.replace(old, new) if old else body))
    np.testing.assert_allclose(read_points(path, samples=7), POINTS, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", MESHES)
def test_meshes_are_sampled_uniformly_by_area(tmp_path, name):
    path, n = write(tmp_path, name, MESHES[name]), 4000
    points = read_points(path, n)
    assert (points.shape, points.dtype) == ((n, 3), np.float64)
    x, y, z = points.T
    height = np.where(z == 0, 1, 3)
    np.testing.assert_allclose(z, z.round(), rtol=0, atol=1e-12)
    z = z.round()
    assert np.isin(z, [0, 1]).all()
    assert min(x.min(), y.min()) >= -1e-12
    assert (x / 2 + y / height).max() <= 1 + 1e-6
    assert abs((z == 0).sum() - n / 4) < 4 * (n * 3 / 16) ** 0.5
    # Uniform within a triangle: the half of it next to a corner that is as large as a quarter has a quarter.
    assert abs((x > 1).sum() - n / 4) < 4 * (n * 3 / 16) ** 0.5
    np.testing.assert_array_equal(read_points(path, n), points)
    assert not np.array_equal(read_points(path, n, seed=1), points)


@pytest.mark.parametrize("name", ["a.ply", "a.off", "a.obj"])
def test_polygons(tmp_path, name):
    vertices, faces = [[0, 0, 0], [1, 0, 0], [2, 1, 0], [1, 2, 0], [0, 1, 0], [0, -1, 0]], [[0, 1, 2, 3, 4], [0, 5, 1]]
    make = {"a.ply": ply_mesh, "a.off": off, "a.obj": obj}[name]
    x, y, _ = read_points(write(tmp_path, name, make(np.array(vertices), faces)), 4000).T
    below, square = y < 0, (x < 1) & (y > 0) & (y < 1)  # areas 0.5 and 1 of 3
    assert abs(below.sum() - 4000 / 6) < 4 * (4000 * 5 / 36) ** 0.5
    assert abs(square.sum() - 4000 / 3) < 4 * (4000 * 2 / 9) ** 0.5


def test_a_glb_scene_is_sampled_as_a_whole(tmp_path):
    camera = {"type": "perspective", "perspective": {"yfov": 1, "znear": 1}}
    content = glb(lambda tree: (tree.update(cameras=[camera]), tree["nodes"].append({"camera": 0})))
    points = read_points(write(tmp_path, "a.glb", content), 4000)
    moved = points[:, 0] >= 5  # the second is twice as large, at x + 10
    assert abs(moved.sum() - 4000 * 4 / 5) < 4 * (4000 * 4 / 25) ** 0.5
    back = np.where(moved[:, None], (points - [10, 0, 0]) / 2, points)
    assert np.abs(back[:, 2] - back[:, 2].round()).max() < 1e-6
    assert (back[:, 0].min(), back[:, 0].max()) >= (-1e-6, 1.9)
    assert back[:, 0].max() <= 2 + 1e-6


# Nothing else is opened, run or written.

OPENED = []
sys.addaudithook(lambda event, args: OPENED.append(str(args[0])) if event == "open" else None)


def opened(folder):
    return {os.path.basename(name) for name in OPENED if name.startswith(str(folder))}


def with_image(tree):
    tree["images"], tree["textures"] = [{"uri": "secret.png"}], [{"source": 0}]
    tree["materials"] = [{"pbrMetallicRoughness": {"baseColorTexture": {"index": 0}}}]
    for mesh in tree["meshes"]:
        mesh["primitives"][0]["material"] = 0


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.obj", "mtllib secret.mtl\nusemtl m\n" + obj(VERTICES, FACES)),
        (
            "a.ply",
            ply_mesh(VERTICES, FACES).replace(b"element vertex", b"comment TextureFile secret.png\nelement vertex"),
        ),
        ("a.glb", glb(with_image)),
    ],
)
def test_files_referred_to_are_not_opened(tmp_path, name, content, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "secret.mtl", "newmtl m\nmap_Kd secret.png\n")
    write(tmp_path, "secret.png", b"\x89PNG")
    OPENED.clear()
    assert len(read_points(write(tmp_path, name, content), 10)) == 10
    assert not [file for file in OPENED if "secret" in file]
    assert opened(tmp_path) == {name}
    assert sorted(os.listdir(tmp_path)) == sorted([name, "secret.mtl", "secret.png"])


@pytest.mark.parametrize("uri", ["secret.bin", "file:secret.bin", "../secret.bin"])
def test_a_glb_with_its_data_elsewhere(tmp_path, uri, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "secret.bin", bytes(1000))
    path = write(tmp_path, "a.glb", glb(lambda tree: tree["buffers"][0].update(uri=uri)))
    OPENED.clear()
    with pytest.raises(DataError, match="refers to other files, which are not read"):
        read_points(path, 10)
    assert not [file for file in OPENED if "secret" in file]


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_no_code_is_run(tmp_path, suffix, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    array = np.array([Bomb()], dtype=object)
    for content in (pickle.dumps(Bomb()), npy(array), npz(points=array)):
        with pytest.raises(DataError):
            read_points(write(tmp_path / "data", f"a{suffix}", content), 10)
    assert os.listdir(tmp_path) == ["data"]

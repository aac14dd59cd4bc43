"""Clouds in the coordinates of a map: they are centred before float32 could take their shape."""

from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch
from conftest import FORMAT
from file_forms import glb, las, npy, npz, pcd, ply_cloud
from file_samples import ply, write

from pointewa import datasets
from pointewa.datasets import prepare
from pointewa.datasets.files import read_points
from pointewa.datasets.inspect import report
from pointewa.datasets.layouts import shapes
from pointewa.datasets.source import Cloud
from pointewa.errors import DataError
from pointewa.ops import flaw, unit_sphere

UTM = np.array([500_000, 5_400_000, 300.0])
POINTS = np.round(np.random.default_rng(0).uniform(-1, 1, (60, 3)), 4)
XYZ = "".join(f"property double {name}\n" for name in "xyz")


def text(points, separator=" "):
    return "".join(separator.join(f"{value:.4f}" for value in row) + "\n" for row in points)


def triangles(points):
    """A mesh of small triangles, for formats that hold nothing else."""
    corners = (points[:, None] + np.eye(3) * 1e-3).reshape(-1, 3)
    return corners, np.arange(len(corners)).reshape(-1, 3)


def glb_at(points):
    """The offset is in the node, since vertices are float32."""
    place = {"mesh": 0, "translation": (points.mean(0).round()).tolist()}
    return glb({"mode": 0}, vertices=points - points.mean(0).round(), nodes=[place])


WRITERS = {
    "a.txt": text,
    "a.csv": lambda points: "x,y,z\n" + text(points, ","),
    "a.pts": lambda points: f"{len(points)}\n{text(points)}",
    "ascii.pcd": lambda points: pcd(body=text(points).encode()),
    "a.pcd": lambda points: pcd(body=points.astype("<f8").tobytes(), kind="binary", SIZE="8 8 8"),
    "ascii.ply": lambda points: ply_cloud(text(points)),
    "a.ply": lambda points: ply_cloud(points.astype("<f8").tobytes(), "binary_little_endian", XYZ),
    "a.npy": npy,
    "a.npz": lambda points: npz(points=points),
    "a.obj": lambda points: "".join(f"v {row}\n" for row in text(points).splitlines()),
    "a.off": lambda points: f"OFF\n60 0 0\n{text(points)}",
    "a.las": las,
    "a.laz": lambda points: las(points, compressed=True),
    "a.glb": glb_at,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_keeps_the_digits(tmp_path, name):
    far, near = (read_points(write(tmp_path, name, WRITERS[name](POINTS + offset)), 1) for offset in (UTM, 0 * UTM))
    np.testing.assert_allclose(far - UTM, near, rtol=0, atol=1e-4 + 1e-9)  # las has steps of 1e-4
    prepared = [prepare.normalized(one) for one in (far, near)]
    assert prepared[0].dtype == np.float32
    np.testing.assert_allclose(*prepared, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["a.ply", "a.off", "a.obj", "a.stl", "a.npz"])
def test_meshes_are_sampled_about_their_centre(tmp_path, name):
    corners, faces = triangles(POINTS)
    found = []
    for offset in (UTM, 0 * UTM):
        lines = [" ".join(f"{value:.9f}" for value in row) for row in corners + offset]
        content = {
            "a.ply": lambda lines=lines: ply(
                f"element vertex {len(corners)}\n{XYZ}element face {len(faces)}\n"
                "property list uchar int vertex_indices\n",
                "\n".join([*lines, *("3 {} {} {}".format(*f) for f in faces)])),
            "a.off": lambda lines=lines: "\n".join(
                ["OFF", f"{len(corners)} {len(faces)} 0", *lines, *("3 {} {} {}".format(*f) for f in faces)]),
            "a.obj": lambda lines=lines: "\n".join(
                [*(f"v {one}" for one in lines), *("f {} {} {}".format(*f) for f in faces + 1)]),
            "a.stl": lambda lines=lines: "\n".join(
                ["solid a", *("facet\n" + "".join(f"vertex {lines[i]}\n" for i in f) + "endfacet" for f in faces),
                 "endsolid a"]),
            "a.npz": lambda offset=offset: npz(vertices=corners + offset, faces=faces),
        }  # fmt: skip
        found.append(read_points(write(tmp_path, name, content[name]()), 500) - offset)
    np.testing.assert_allclose(*found, rtol=0, atol=1e-7)


def folder_of(tmp_path, offset):
    for name in ("cup", "table"):
        for number in range(3):
            points = shapes.sample(name, np.random.default_rng(number), 300)
            path = tmp_path / f"at{offset[0]:.0f}" / name / f"{number}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.savetxt(path, points + offset)
    return tmp_path / f"at{offset[0]:.0f}"


def test_a_folder_and_what_is_packed_of_it(tmp_path, capsys):
    far, near = (folder_of(tmp_path, offset) for offset in (UTM, 0 * UTM))
    loaded = [datasets.load("folder", str(root), "train", 128).points for root in (far, near)]
    assert len(loaded[0][0, :, 2].unique()) > 100
    torch.testing.assert_close(loaded[0].sort(1).values, loaded[1].sort(1).values, rtol=0, atol=1e-5)
    for stream in (False, True):
        packed = tmp_path / f"packed{stream}.h5"
        source = datasets.open_source("folder", str(far), "train")
        prepare.packed.write(packed, {"train": (source, 128, prepare.prepare(source, 128, ""))})
        again = datasets.load("folder", str(packed), "train", 128, stream=stream)
        ((points, _),) = again.batches([torch.arange(4)], 128)
        torch.testing.assert_close(points, loaded[0][:, :128], rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["float64", "int16", "int32"])
def test_packed_files_of_others(tmp_path, kind):
    """Their digits are in float64, or in integers with an offset."""
    with h5py.File(tmp_path / "a.h5", "w", libver=FORMAT) as h5:
        h5.attrs["shape_names"] = ["a"]
        group = h5.create_group("train")
        if kind == "float64":
            group["data"] = POINTS[None] + UTM[1]
        elif kind == "int16":
            group["data"] = np.rint(POINTS[None] * 1e4).astype(np.int16)
            group["data"].attrs["scale_factor"], group["data"].attrs["add_offset"] = 1e-4, UTM[1]
        else:
            group["data"] = np.rint((POINTS[None] + 54_000) * 1e4).astype(np.int32)
            group["data"].attrs["scale_factor"], group["data"].attrs["add_offset"] = 1e-4, 0.0
        group["label"], group["name"] = [0], ["b"]
    points = datasets.load("folder", str(tmp_path / "a.h5"), "train", 60).points[0]
    expected = unit_sphere(torch.from_numpy(POINTS)).float()
    torch.testing.assert_close(points.sort(0).values, expected.sort(0).values, rtol=0, atol=1e-4)


def test_float32_about_the_origin_is_normalised_as_ever():
    """The bits of the field's data sets do not change."""
    points = np.random.default_rng(0).normal(size=(500, 3)).astype(np.float32) + np.float32(0.3)
    expected = unit_sphere(torch.from_numpy(points)).numpy()
    assert np.array_equal(prepare.normalized(points), expected)
    assert np.array_equal(prepare.normalized(points.astype(np.float64)), expected)
    far = points + np.float32(1000)
    exact = unit_sphere(torch.from_numpy(far.astype(np.float64))).float().numpy()
    assert np.array_equal(prepare.normalized(far), exact)


# What float32 has already taken


def test_clouds_that_were_rounded_far_from_the_origin():
    rounded = torch.from_numpy((POINTS + UTM).astype(np.float32))
    found = flaw(rounded)
    assert found == flaw(rounded.double()) == flaw(rounded[torch.randperm(60)])
    assert "its y has 5 distinct values for 60 points: it was rounded to float32 at 5400001, in steps of 0.5" in found
    assert flaw(torch.from_numpy(POINTS + UTM)) == ""
    assert flaw(torch.from_numpy((POINTS * 100 + UTM).astype(np.float32))) == ""  # 400 steps: the shape is there
    grid = torch.arange(27).view(-1, 1) // torch.tensor([1, 3, 9]) % 3  # voxels, which are as coarse anywhere
    assert flaw(grid.double() + torch.tensor([5e6, 5e6, 0])) == ""
    assert flaw(torch.from_numpy(POINTS).half()) == ""


@pytest.mark.parametrize("points", [np.zeros((5, 3)), np.full((9, 3), 5.4e6), np.ones((1, 3), np.float32)])
def test_clouds_without_extent(points):
    expected = f"all of its {len(points)} points are in one place: remove or repair it"
    assert flaw(torch.from_numpy(points)) == expected
    source = datasets.open_source("shapes", "", "test")
    with pytest.raises(DataError, match=rf"object 0 \({source.object_names[0]}\): {expected}"):
        list(prepare.prepare(replace(source, clouds=lambda count: iter([Cloud(points)])), 5, ""))


def test_what_inspect_says(tmp_path):
    root = folder_of(tmp_path, UTM)
    np.save(root / "cup" / "x.npy", (shapes.sample("cup", np.random.default_rng(9), 300) + UTM).astype(np.float32))
    found = report.inspect({split: datasets.open_source("folder", str(root), split) for split in ("train", "test")})
    splits = found["splits"].values()
    for split in splits:
        np.testing.assert_allclose(split["largest_offset"]["mean"], UTM, atol=1)
        assert split["largest_norm"] == pytest.approx(np.linalg.norm(UTM), abs=2)
        assert split["degenerate"] == []
    refused = {name: problem for split in splits for name, problem in split["refused"].items()}
    assert list(refused) == ["cup/x.npy"]
    assert "rounded to float32" in refused["cup/x.npy"]


def test_a_source_that_is_not_normalised_must_fit_float32():
    source = replace(datasets.open_source("shapes", "", "test"), normalize=False)
    with pytest.raises(DataError, match="its y has 5 distinct values for 60 points"):
        list(prepare.prepare(replace(source, clouds=lambda count: iter([Cloud(POINTS + UTM)])), 5, ""))

"""Files that are refused, with the message that the user sees."""

import io
import os
import re
import struct
import sys
import zipfile

import numpy as np
import pypcd4
import pytest
import trimesh
from file_samples import (
    CLOUDS,
    FACES,
    PLY_XYZ,
    POINTS,
    VERTICES,
    coloured,
    glb,
    npy,
    npz,
    obj,
    off,
    pcd,
    ply,
    ply_mesh,
    stl,
    text,
    with_json,
    write,
)

from pointewa.datasets.files import MAX_BYTES, SUFFIXES, read_points
from pointewa.errors import ConfigError, DataError
from pointewa.safe.files import reading


def bad(index, value, points=POINTS):
    points = points.astype(np.float64)
    points[index] = value
    return points


def sized(shape):
    """The header of an array of any size, with little data."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return file.getvalue() + bytes(120)


def packed_zeros():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("points.npy", sized((10, 3)))
    # The sizes that the directory of the archive gives for it, as for a file of 3 GiB.
    return file.getvalue().replace(struct.pack("<I", len(sized((10, 3)))), struct.pack("<I", 3 * 2**30))


def nested(depth):
    def change(tree):
        tree["nodes"] = [{"children": [i + 1]} for i in range(depth)] + [{"mesh": 0}]
        tree["scenes"] = [{"nodes": [0]}]

    return change


def cycle(tree):
    tree["nodes"] = [{"children": [1]}, {"mesh": 0, "children": [0]}]
    tree["scenes"] = [{"nodes": [0]}]


def copies(tree):
    """One mesh in many places."""
    tree["accessors"][0]["count"] -= tree["accessors"][0]["count"] % 3
    tree["nodes"] = [{"mesh": 0}] * 20_000
    tree["scenes"] = [{"nodes": list(range(20_000))}]


MISFIT = "cannot be read as (PLY|PCD|LAS|LAZ|XYZ|TXT|PTS|ASC|CSV|NPY|NPZ|OFF|STL|GLB) |expected points, found none"
CUT = slice(None, -40)
HUGE = 10**12
REFUSED = {
    # Content that does not fit the suffix
    "zeros": [(f"a{suffix}", bytes(100), MISFIT) for suffix in SUFFIXES],
    "noise": [(f"a{suffix}", np.random.default_rng(1).bytes(3000), MISFIT) for suffix in SUFFIXES],
    "prose": [(f"a{suffix}", "Dear all,\nsee the attached files.\n" * 9, MISFIT) for suffix in SUFFIXES],
    # No points
    "none": [
        ("a.xyz", "# x y z\n", "expected points, found none"),
        ("a.txt", "x,y,z\n", "expected points, found none"),
        ("a.npy", npy(np.zeros((0, 3))), "expected points, found none"),
        ("a.npz", npz(), r"found none\)"),
        ("a.ply", ply(f"element vertex 0\n{PLY_XYZ}", ""), "expected points, found none"),
        ("a.pcd", pcd(POINTS[:0], pypcd4.Encoding.BINARY), "expected points, found none"),
        ("a.obj", "o nothing\n", "expected points, found none"),
        ("a.off", "OFF\n0 0 0\n", "expected points, found none"),
        ("a.stl", "solid a\nendsolid a\n", "expected points, found none"),
        ("a.stl", bytes(84), "expected points, found none"),
        ("a.glb", glb(lambda tree: tree.update(scenes=[{"nodes": []}])), "expected points, found none"),
    ],
    # Too few columns, or none that are numbers
    "columns": [
        ("a.xyz", text(POINTS[:, :2]), r"XYZ \(ValueError: invalid column index 2 at row 1 with 2 columns"),
        ("a.txt", text(POINTS)[:-1].rsplit(" ", 1)[0], "at row 50 with 2 columns"),
        ("a.txt", text(POINTS).replace(".", ","), "could not convert string"),  # decimal commas
        ("a.npy", npy(POINTS[:, :2]), r"expected numbers \[P, 3 or more\], found float32 \[50, 2\]"),
        ("a.npy", npy(POINTS[0]), r"found float32 \[3\]"),
        ("a.npy", npy(POINTS[None]), r"found float32 \[1, 50, 3\]"),
        ("a.npy", npy(np.array([["0", "1", "2"]])), r"found <U1 \[1, 3\]"),
        ("a.npy", npy(POINTS * 1j), "found complex64"),
        ("a.npz", npz(a=POINTS, b=POINTS), "expected points, xyz, .*, vertices or a single array, found a, b"),
        ("a.obj", obj(POINTS[:, :2], []), r"found an array \[50, 2\]"),
        (
            "a.ply",
            ply("element vertex 1\nproperty float x\nproperty float y\n", "0 1\n"),
            "expected columns named x, y and z, once each, found x, y",
        ),
        (
            "a.pcd",
            pcd(POINTS, pypcd4.Encoding.BINARY).replace(b" z ", b" w "),
            "named x, y and z, once each, found intensity, x, y, w, label",
        ),
    ],
    "values": [
        (
            "a.xyz",
            text(bad(slice(46), np.nan)),
            "46 of 50 points have coordinates that are not finite, expected at most",
        ),
        ("a.npy", npy(bad(slice(50), np.inf)), "50 of 50 points"),
        ("a.npy", npy(bad((0, 0), -1e39)), r"expected coordinates up to 3\.4e\+38, found 1e\+39"),
        ("a.ply", ply_mesh(bad((4, 1), 1e39, VERTICES), FACES), r"found 1e\+39"),
        ("a.obj", obj(bad((4, 1), np.nan, VERTICES), FACES), "1 of 6 vertices have coordinates that are not finite"),
        ("a.off", off(bad((4, 1), 1e39, VERTICES), FACES), r"found 1e\+39"),
        ("a.stl", stl().replace(struct.pack("<f", 3), struct.pack("<f", np.inf)), "1 of 6 vertices"),
        ("a.glb", glb(lambda tree: tree["nodes"][1].update(matrix=[1e39] * 15 + [1])), r"found \d\S*e\+(39|40)"),
    ],
    "faces": [
        ("a.ply", ply_mesh(VERTICES, [[0, 1, 6]]), "faces refer to vertices 0 to 6 of 6"),
        ("a.ply", ply_mesh(VERTICES, [[0, 1, -1]]), "faces refer to vertices -1 to 1 of 6"),
        ("a.ply", ply_mesh(VERTICES, [[0, 1, 2**32 + 2]]), "faces refer to vertices 0 to 4294967298 of 6"),
        ("a.off", off(VERTICES, [[0, 1, 6]]), "faces refer to vertices 0 to 6 of 6"),
        ("a.obj", obj(VERTICES, [[0, 1, 6]]), "faces refer to vertices 0 to 6 of 6"),
        ("a.obj", obj(VERTICES, [[-1, 1, 2]]), "faces refer to vertices -1 to 2 of 6"),  # index 0 in the file
        ("a.obj", obj(VERTICES, []) + "f -7 1 2\n", "faces refer to vertices -1 to 1 of 6"),
        ("a.ply", ply_mesh(VERTICES, [[0, 1, 1]]), "found faces of area 0 only"),
        ("a.off", off(VERTICES * 0, FACES), "found faces of area 0 only"),
        ("a.obj", obj(VERTICES, [[0, 0, 0]]), "found faces of area 0 only"),
        (
            "a.stl",
            stl().replace(VERTICES[:3].tobytes(), bytes(36)).replace(VERTICES[3:].tobytes(), bytes(36)),
            "area 0",
        ),
        ("a.glb", glb(lambda tree: tree["accessors"][0].update(componentType=5126)), "area 0 only"),
    ],
    # Cut short, in the middle and where a line ends
    "cut": [
        ("a.ply", ply_mesh(VERTICES, FACES)[:-8], "8 rows announced, fewer found"),
        ("a.ply", ply_mesh(VERTICES, FACES).replace(b"vertex_indices", b"unknown"), "cannot be read as PLY"),
        ("a.ply", ply_mesh(VERTICES, FACES)[:-3], "a row is cut short"),
        ("a.ply", coloured(POINTS, "binary_little_endian")[CUT], "expected the length announced"),
        ("a.pcd", pcd(POINTS, pypcd4.Encoding.ASCII)[:-30], "requires 5 columns but 2 were found at row 50"),
        ("a.pcd", pcd(POINTS, pypcd4.Encoding.BINARY)[:-17], "50 points announced, 49 found"),
        ("a.pcd", pcd(POINTS, pypcd4.Encoding.BINARY_COMPRESSED)[CUT], "error in compressed data"),
        ("a.npy", npy(POINTS)[CUT], "expected 600 bytes got 560"),
        ("a.npz", npz(points=POINTS)[CUT], "BadZipFile"),
        ("a.off", off(VERTICES, FACES)[:-8], "6 vertices and 2 faces announced, fewer found"),
        ("a.off", off(VERTICES, FACES)[:-3], "6 vertices and 2 faces announced, fewer found"),
        ("a.stl", stl()[CUT], "expected binary data of the length announced, or text"),
        ("a.stl", stl(ascii=True) + stl(ascii=True)[CUT], "solid and endsolid"),
        ("a.glb", glb()[CUT], "chunk was not expected length"),
    ],
    # Sizes that would need absurd memory or time
    "sizes": [
        (
            "a.ply",
            ply(f"element vertex {HUGE}\n{PLY_XYZ}", bytes(120), "binary_little_endian"),
            f"{HUGE} rows announced",
        ),
        ("a.ply", ply(f"element vertex {HUGE}\n{PLY_XYZ}", text(POINTS)), f"{HUGE} rows announced"),
        (
            "a.stl",
            stl()[:80] + struct.pack("<I", 2**32 - 1) + stl()[84:],
            "expected binary data of the length announced, or text",
        ),
        *(
            (
                "a.pcd",
                re.sub(rb"(?m)^(WIDTH|POINTS) 50", rb"\1 %d" % HUGE, pcd(POINTS, encoding)),
                "more announced",
            )
            for encoding in pypcd4.Encoding
        ),
        ("a.pcd", pcd(POINTS, pypcd4.Encoding.BINARY).replace(b"COUNT 1", b"COUNT %d" % HUGE), "more announced"),
        ("a.npy", sized((HUGE, 3)), "MemoryError|EOF"),
        ("a.npy", sized((2**40, 2**40)), "cannot reshape"),
        ("a.npz", packed_zeros(), f"at most {MAX_BYTES} bytes when unpacked"),
        ("a.off", off(VERTICES, FACES).replace("6 2 0", f"{HUGE} 2 0"), "announced, fewer found"),
        ("a.glb", glb(lambda tree: tree["accessors"][0].update(count=HUGE)), "cannot reshape"),
        ("a.glb", glb(lambda tree: tree["accessors"][0].pop("bufferView")), "neither compressed nor sparse"),
        (
            "a.glb",
            glb(lambda tree: tree.update(extensionsRequired=["KHR_mesh_quantization"])),
            "expected no required extensions, found KHR_mesh_quantization",
        ),
        ("a.glb", glb(nested(2000)), "RecursionError"),
        ("a.glb", glb(cycle), "RecursionError|ValueError"),
        ("a.glb", glb(copies, geometry=trimesh.creation.icosphere(5)), "vertices and faces, found more"),
        ("a.glb", with_json("[" * 100_000), "RecursionError"),
    ],
}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        pytest.param(*case, id=f"{kind}-{case[0][2:]}-{i}")
        for kind, cases in REFUSED.items()
        for i, case in enumerate(cases)
    ],
)
def test_refused(tmp_path, name, content, message, capfd):
    path = write(tmp_path, name, content)
    with pytest.raises(DataError, match=message) as error:
        read_points(path, 10)
    line = str(error.value)
    assert line.startswith(f"{path}: ")
    assert len(line.splitlines()) == 1
    assert "repair" in line
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["a", "a.pt", "a.tar.gz", "ply.gz", ".ply"])
def test_unknown_suffixes(tmp_path, name):
    with pytest.raises(
        DataError, match=r"expected a file ending in \.ply, \.pcd, .* found (no suffix|\.pt|\.tar\.gz|\.gz)$"
    ):
        read_points(write(tmp_path, name, CLOUDS["ascii.ply"]), 10)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_is_no_readable_file(tmp_path, suffix, monkeypatch):
    path = tmp_path / f"a{suffix}"
    with pytest.raises(DataError, match=r"FileNotFoundError: No such file or directory\): check the path"):
        read_points(path, 10)
    path.touch()
    with pytest.raises(DataError, match=f"expected 1 to {MAX_BYTES} bytes, found 0: remove the file or get it again"):
        read_points(path, 10)
    os.truncate(path, MAX_BYTES + 1)
    with pytest.raises(DataError, match=f"expected 1 to {MAX_BYTES} bytes, found {MAX_BYTES + 1}"):
        read_points(path, 10)
    path.unlink()
    path.mkdir()
    with pytest.raises(DataError, match="expected a file, found a folder or a device"):
        read_points(path, 10)
    path.rmdir()
    os.mkfifo(path)  # would never end
    with pytest.raises(DataError, match="expected a file, found a folder or a device"):
        read_points(path, 10)
    path.unlink()
    write(tmp_path, path.name, bytes(9))

    def denied(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr("pathlib.Path.read_bytes", denied)
    with pytest.raises(DataError, match=r"\(PermissionError: Permission denied\): check the path and its permissions"):
        read_points(path, 10)


def test_too_many_points(tmp_path, monkeypatch):
    monkeypatch.setattr("pointewa.datasets.files.MAX_POINTS", 49)
    for name in ("spaces.xyz", "single.npy", "cloud.obj", "ascii.ply"):
        with pytest.raises(DataError, match=r"at most 49 points, found an array \[50, 3\]"):
            read_points(write(tmp_path, name, CLOUDS[name]), 10)


@pytest.mark.parametrize(("name", "package"), [("a.stl", "trimesh"), ("a.obj", "trimesh"), ("a.pcd", "pypcd4")])
def test_a_package_that_is_not_installed(tmp_path, name, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    content = {"a.stl": stl(), "a.obj": obj(VERTICES, FACES), "a.pcd": CLOUDS["binary.pcd"]}[name]
    with pytest.raises(DataError, match=rf"{name}: .*{package}.*: pip install {package}$"):
        read_points(write(tmp_path, name, content), 10)


def test_parsers_stay_quiet(tmp_path, caplog, recwarn):
    path = write(tmp_path, "a.stl", re.sub("normal .*", "normal - - -", stl(ascii=True)))  # trimesh logs a warning
    assert len(read_points(path, 10)) == 10
    with pytest.raises(DataError):
        read_points(write(tmp_path, "a.xyz", "# no points: numpy warns\n"), 10)
    assert (caplog.records, list(recwarn)) == ([], [])


def test_reading_names_the_file_and_what_it_was_read_as():
    message = r"^a\.h5: cannot be read as HDF5 \(KeyError: 'x'\): it may be damaged or incomplete"
    with pytest.raises(DataError, match=message), reading("a.h5", "HDF5"):
        {}["x"]
    with pytest.raises(DataError, match=r"\(ValueError: one\[31m\): ") as error, reading("a.h5", "HDF5"):
        raise ValueError("one\x1b[31m\ntwo")
    assert error.value.__suppress_context__
    for problem in (MemoryError(), RecursionError("deep"), AssertionError(), OSError("no number")):
        with pytest.raises(DataError, match=type(problem).__name__), reading("a.h5", "HDF5"):
            raise problem
    with pytest.raises(ConfigError, match=r"^mine$"), reading("a.h5", "HDF5"):
        raise ConfigError("mine")
    with pytest.raises(KeyboardInterrupt), reading("a.h5", "HDF5"):
        raise KeyboardInterrupt

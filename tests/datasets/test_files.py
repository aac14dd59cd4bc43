"""Points of single files: each format, meshes sampled by area, damaged files."""

import io
import json
import os
import pickle
import re
import struct
import sys
import zipfile

import numpy as np
import pypcd4
import pytest
import trimesh

from datasets.files import MAX_BYTES, SUFFIXES, read_points, reading
from pointewa.errors import ConfigError, DataError

POINTS = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
# Two triangles with areas 1 (z = 0) and 3 (z = 1).
VERTICES = np.array([[0, 0, 0], [2, 0, 0], [0, 1, 0], [0, 0, 1], [2, 0, 1], [0, 3, 1]], np.float32)
FACES = np.array([[0, 1, 2], [3, 4, 5]])
MESH = trimesh.Trimesh(VERTICES, FACES, process=False)

PLY_XYZ = "property float x\nproperty float y\nproperty float z\n"


def text(points, separator=" "):
    return "".join(separator.join(f"{value:.9g}" for value in row) + "\n" for row in points)


def ply(elements, body, form="ascii"):
    header = f"ply\nformat {form} 1.0\n{elements}end_header\n".encode()
    return header + (body.encode() if isinstance(body, str) else body)


def ply_mesh(vertices, faces):
    elements = f"element vertex {len(vertices)}\n{PLY_XYZ}element face {len(faces)}\n"
    rows = "".join(f"{len(face)} {' '.join(map(str, face))}\n" for face in faces)
    return ply(f"{elements}property list uchar int vertex_indices\n", text(vertices) + rows)


def coloured(points, form):
    """A cloud with normals, colours and a comment that is not UTF-8."""
    kinds = [("x", "f4"), ("y", "f4"), ("z", "f4"), ("nx", "f4"), ("ny", "f4"), ("nz", "f4"), ("red", "u1")]
    kinds += [("green", "u1"), ("blue", "u1")]
    order = ">" if "big" in form else "<"
    table = np.zeros(len(points), [(name, order + kind) for name, kind in kinds])
    table["x"], table["y"], table["z"] = points.T
    table["nz"], table["red"] = 1, 200
    body = text(np.array(table.tolist())) if form == "ascii" else table.tobytes()
    properties = "".join(f"property {'float' if kind == 'f4' else 'uchar'} {name}\n" for name, kind in kinds)
    return ply(f"comment by M?ller\nelement vertex {len(points)}\n{properties}", body, form).replace(b"M?", b"M\xfc")


def pcd(points, encoding, extra=True):
    fields, types, columns = ["x", "y", "z"], [np.float32] * 3, list(points.T)
    if extra:
        fields, types = ["intensity", *fields, "label"], [np.float32, *types, np.uint8]
        columns = [np.ones(len(points), np.float32), *columns, np.arange(len(points), dtype=np.uint8)]
    file = io.BytesIO()
    pypcd4.PointCloud.from_points(columns, fields, types).save(file, encoding)
    return file.getvalue()


def obj(vertices, faces):
    return "".join(f"v {row}\n" for row in text(vertices).splitlines()) + "".join(
        f"f {' '.join(str(i + 1) for i in face)}\n" for face in faces
    )


def off(vertices, faces, header="OFF\n"):
    rows = "".join(f"{len(face)} {' '.join(map(str, face))}\n" for face in faces)
    return f"{header}{len(vertices)} {len(faces)} 0\n{text(vertices)}{rows}"


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def npz(compressed=False, **arrays):
    file = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(file, **arrays)
    return file.getvalue()


def glb(tree_change=lambda tree: None, geometry=None):
    """The mesh in two places, or ``geometry``; its JSON edited."""
    if geometry is None:
        geometry = trimesh.Scene()
        geometry.add_geometry(MESH)
        geometry.add_geometry(MESH, transform=np.diag([2, 2, 2, 1]) + np.eye(4, k=3) * 10)
    data = trimesh.Scene(geometry).export(file_type="glb")
    end = 20 + int.from_bytes(data[12:16], "little")
    tree = json.loads(data[20:end])
    tree_change(tree)
    return with_json(json.dumps(tree), data[end:])


def with_json(content, chunks=b""):
    content = content.encode() + b" " * (-len(content) % 4)
    sizes = 2, 20 + len(content) + len(chunks), len(content), 0x4E4F534A
    return struct.pack("<4s4I", b"glTF", *sizes) + content + chunks


def stl(mesh=MESH, ascii=False):
    return mesh.export(file_type="stl_ascii" if ascii else "stl")


def write(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


COLUMNS = np.concatenate([POINTS, np.ones((50, 3), np.float32)], axis=1)
CLOUDS = {
    "ascii.ply": coloured(POINTS, "ascii"),
    "little.ply": coloured(POINTS, "binary_little_endian"),
    "big.ply": coloured(POINTS, "binary_big_endian"),
    "double.ply": ply(
        f"element vertex 50\n{PLY_XYZ.replace('float', 'double')}",
        POINTS.astype("<f8").tobytes(),
        "binary_little_endian",
    ),
    "binary.pcd": pcd(POINTS, pypcd4.Encoding.BINARY),
    "compressed.pcd": pcd(POINTS, pypcd4.Encoding.BINARY_COMPRESSED),
    "plain.pcd": pcd(POINTS, pypcd4.Encoding.BINARY, extra=False),
    "spaces.xyz": text(POINTS),
    "tabs.txt": text(POINTS, "\t").replace("\n", "\r\n"),
    "commas.txt": text(COLUMNS, ","),
    "comments.XYZ": f"# x, y, z\n\n{text(COLUMNS, '  ')} # the end\n",
    "header.txt": f"\ufeffPoints_0, Points_1, Points_2\n{text(POINTS, ', ')}",
    "cloudcompare.txt": f"//X Y Z Nx Ny Nz\n{text(COLUMNS)}",
    "single.npy": npy(POINTS),
    "double.npy": npy(COLUMNS.astype(np.float64)),
    "fortran.npy": npy(np.asfortranarray(COLUMNS)),
    **{f"{key}.npz": npz(**{key: COLUMNS, "label": np.arange(3)}) for key in ("points", "xyz", "pos", "data", "arr_0")},
    "other.npz": npz(compressed=True, cloud=POINTS),
    "remarks.xyz": text(POINTS).replace("\n", " # a, b\n"),
    "cloud.off": off(POINTS, []),
    "cloud.obj": "o x\n" + obj(COLUMNS, []) + "vn 0 0 1\n",
    "cloud.glb": glb(geometry=trimesh.PointCloud(POINTS)),
}

MESHES = {
    "ascii.ply": ply_mesh(VERTICES, FACES),
    "edges.ply": ply_mesh(VERTICES, FACES).replace(
        b"end_header", b"element edge 1\nproperty int vertex1\nproperty int vertex2\nend_header"
    )
    + b"0 4\n",
    "binary.PLY": MESH.export(file_type="ply"),
    "plain.off": off(VERTICES, FACES),
    "glued.off": off(VERTICES, FACES, "OFF"),
    "colours.off": "# made by hand\n" + off(np.hstack([VERTICES, VERTICES]), FACES, "COFF\n"),
    "plain.obj": obj(VERTICES, FACES),
    "slashes.obj": "# \n"
    + obj(VERTICES, [])
    + "vn 0 0 1\nvt 0 0\ng a\nf 1/1/1 2/1/1 3/1/1\ng b\nf 4//1 5//1 \\\n6//1\n",
    "tabs.obj": obj(VERTICES, FACES).replace(" ", "\t"),
    "relative.obj": obj(VERTICES[:3], []) + "f -3 -2 -1\n" + obj(VERTICES[3:], []) + "f -3 -2 -1\n",
    "binary.stl": stl(),
    "ascii.stl": stl(ascii=True),
    "latin.stl": stl(ascii=True).encode().replace(b"solid ", b"solid M\xfcller", 1),
    "two.stl": "".join(stl(trimesh.Trimesh(VERTICES[i : i + 3], [[0, 1, 2]]), ascii=True) for i in (0, 3)),
    "mesh.glb": glb(geometry=MESH),
}


@pytest.mark.parametrize("name", CLOUDS)
def test_clouds_come_as_they_are(tmp_path, name):
    points = read_points(write(tmp_path, name, CLOUDS[name]), samples=7)
    assert (points.dtype, points.flags.c_contiguous) == (np.float32, True)
    np.testing.assert_array_equal(points, POINTS)


@pytest.mark.parametrize(("old", "new"), [(b"", b""), (b" ", b"  "), (b"\n", b" \n"), (b"\n", b"\r\n")])
def test_ascii_pcd(tmp_path, old, new):
    header, body = pcd(POINTS, pypcd4.Encoding.ASCII).split(b"DATA ascii\n")
    path = write(tmp_path, "a.pcd", header + b"DATA ascii\n" + (body.replace(old, new) if old else body))
    np.testing.assert_allclose(read_points(path, samples=7), POINTS, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", MESHES)
def test_meshes_are_sampled_uniformly_by_area(tmp_path, name):
    path, n = write(tmp_path, name, MESHES[name]), 4000
    points = read_points(path, n)
    assert (points.shape, points.dtype) == ((n, 3), np.float32)
    x, y, z = points.T
    height = np.where(z == 0, 1, 3)
    assert np.isin(z, [0, 1]).all()
    assert (x.min(), y.min()) >= (0, 0)
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


# What is refused, with the message that the user sees.


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


MISFIT = "cannot be read as (PLY|PCD|XYZ|TXT|NPY|NPZ|OFF|STL|GLB) |expected points, found none"
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
        ("a.npz", npz(a=POINTS, b=POINTS), "expected points, xyz, pos, data, arr_0 or a single array, found a, b"),
        ("a.obj", obj(POINTS[:, :2], []), r"found an array \[50, 2\]"),
        ("a.ply", ply("element vertex 1\nproperty float x\nproperty float y\n", "0 1\n"), r"KeyError: 'z'"),
        ("a.pcd", pcd(POINTS, pypcd4.Encoding.BINARY).replace(b" z ", b" w "), "no field of name z"),
    ],
    "values": [
        ("a.xyz", text(bad((4, 1), np.nan)), "1 of 50 points have coordinates that are not finite: remove or repair"),
        ("a.txt", "nan nan nan\n" + text(POINTS), "1 of 51 points"),
        ("a.npy", npy(bad(slice(2), np.inf)), "2 of 50 points"),
        ("a.npy", npy(bad((0, 0), -1e39)), r"expected coordinates up to 3\.4e\+38, found 1e\+39"),
        ("a.npz", npz(points=bad((4, 1), np.nan)), "1 of 50 points"),
        ("a.ply", coloured(bad((4, 1), np.nan), "binary_little_endian"), "1 of 50 points"),
        ("a.ply", ply_mesh(bad((4, 1), 1e39, VERTICES), FACES), "overflow encountered in cast"),
        ("a.pcd", pcd(bad((4, 1), np.nan).astype(np.float32), pypcd4.Encoding.BINARY_COMPRESSED), "1 of 50 points"),
        ("a.obj", obj(bad((4, 1), np.nan, VERTICES), FACES), "1 of 6 points"),
        ("a.off", off(bad((4, 1), 1e39, VERTICES), FACES), r"found 1e\+39"),
        ("a.stl", stl().replace(struct.pack("<f", 3), struct.pack("<f", np.inf)), "invalid value encountered"),
        ("a.glb", glb(lambda tree: tree["nodes"][1].update(matrix=[1e39] * 15 + [1])), r"found \d\S*e\+(39|40)"),
    ],
    "faces": [
        ("a.ply", ply_mesh(VERTICES, [[0, 1, 6]]), "faces refer to vertices 0 to 6 of 6"),
        ("a.ply", ply_mesh(VERTICES, [[0, 1, -1]]), "faces refer to vertices -1 to 1 of 6"),
        ("a.ply", ply_mesh(VERTICES, [[0, 1, 2**32 + 2]]), "FloatingPointError"),
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
        ("a.ply", ply_mesh(VERTICES, FACES)[:-3], "2 faces announced, 1 found"),
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


@pytest.mark.parametrize("name", ["a", "a.pt", "a.ply.gz"])
def test_unknown_suffixes(tmp_path, name):
    with pytest.raises(DataError, match=r"expected a file ending in \.ply, \.pcd, .* found (no suffix|\.pt|\.gz)"):
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
    monkeypatch.setattr("datasets.files.MAX_POINTS", 49)
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


# Damage at random.

SEEDS = {suffix: [] for suffix in SUFFIXES}
for _name, _content in [
    *CLOUDS.items(),
    *MESHES.items(),
    ("ascii.pcd", pcd(POINTS, pypcd4.Encoding.ASCII)),
    ("scene.glb", glb()),
]:
    SEEDS["." + _name.split(".")[1].lower()].append(_content.encode() if isinstance(_content, str) else _content)

NUMBERS = [b"-1", b"0", b"1e39", b"-1e400", b"nan", b"inf", b"99999999999999999999", b"4294967295", b"x", b"1 2", b""]


def damaged(content, rng):
    """One to three kinds of damage."""
    for _ in range(rng.integers(1, 4)):
        start = int(rng.integers(len(content) + 1))
        if rng.random() < 0.5:  # headers are short and matter
            start = min(start, int(rng.integers(400)))
        end = start + int(rng.integers(1, 40))
        match rng.integers(7):
            case 0:
                content = content[:start]
            case 1:
                content = (
                    content[:start] + bytes(255 - byte for byte in content[start : start + 1]) + content[start + 1 :]
                )
            case 2:
                content = content[:start] + rng.bytes(end - start) + content[start:]
            case 3:
                content = content[:start] + bytes(end - start) + content[end:]
            case 4:
                content = content[:start] + rng.bytes(end - start) + content[end:]
            case 5:
                content = content[:start] + content[end:]
            case 6:
                numbers = list(re.finditer(rb"-?\d+(\.\d+)?", content))
                if numbers:
                    number = numbers[rng.integers(len(numbers) if rng.random() < 0.5 else min(len(numbers), 20))]
                    value = NUMBERS[rng.integers(len(NUMBERS))]
                    content = content[: number.start()] + value + content[number.end() :]
    return content


def damaged_file(suffix, rng):
    content = SEEDS[suffix][rng.integers(len(SEEDS[suffix]))]
    if suffix == ".glb" and rng.random() < 0.8:  # within its JSON, which would seldom parse otherwise
        end = 20 + int.from_bytes(content[12:16], "little")
        numbers = list(re.finditer(rb"(?<![\w.])-?\d+(\.\d+)?", content[20:end]))
        number = numbers[rng.integers(len(numbers))]
        value = [b"-1", b"0", b"1", b"2", b"7", b"1e39", b"1e400", b"99999999999", b"0.5", b"null", b"[]", b"5120"]
        tree = content[20:end][: number.start()] + value[rng.integers(12)] + content[20:end][number.end() :]
        return with_json(tree.decode(), content[end:])
    return damaged(content, rng)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_damage_gives_points_or_one_error(tmp_path, suffix, capfd):
    rng, path = np.random.default_rng(SUFFIXES.index(suffix)), tmp_path / f"a{suffix}"
    refused = []
    for _ in range(150):
        path.write_bytes(damaged_file(suffix, rng))
        try:
            points = read_points(path, 16)
        except DataError as error:
            refused.append(str(error))
        else:
            assert points.dtype == np.float32
            assert points.shape == (len(points), 3)
            assert len(points) > 0
            assert np.isfinite(points).all()
    assert 30 <= len(refused) < 150
    assert all(line.startswith(f"{path}: ") and len(line.splitlines()) == 1 for line in refused)
    assert capfd.readouterr() == ("", "")

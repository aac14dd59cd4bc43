"""Files of every format that `pointewa.datasets.files` reads, as bytes."""

import io
import json
import struct
import zipfile

import numpy as np
import pypcd4
import trimesh

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


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def zipped(*members, **settings):
    """The bytes of a zip archive; members are (name or ZipInfo, content)."""
    with zipfile.ZipFile(buffer := io.BytesIO(), "w", **settings) as file:
        for name, content in members:
            file.writestr(name, content)
    return buffer.getvalue()

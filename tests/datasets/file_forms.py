"""The forms in which clouds and meshes come from other programs, as bytes: what is read, and what is refused."""

import gzip
import io
import itertools
import json
import struct

import laspy
import numpy as np
from file_samples import ply, with_json

CLOUD = np.round(np.random.default_rng(1).uniform(-1, 1, (60, 3)), 4)
CUBE = np.array([[x, y, z] for z in (0, 1) for x, y in ((0, 0), (1, 0), (1, 1), (0, 1))], np.float64)
QUADS = [[0, 3, 2, 1], [4, 5, 6, 7], [0, 1, 5, 4], [2, 3, 7, 6], [1, 2, 6, 5], [0, 4, 7, 3]]
TRIANGLES = [[a, b, c] for a, *rest in QUADS for b, c in itertools.pairwise(rest)]
MIXED = [*QUADS[:3], *TRIANGLES[6:]]
XYZ = "property float x\nproperty float y\nproperty float z\n"


def rows(points=CLOUD, separator=" ", end="\n"):
    return "".join(separator.join(f"{value:.4f}" for value in row) + end for row in points)


def columns(*named, separator=",", header=True, points=CLOUD):
    """A table whose columns are x, y, z or 9, in any order."""
    made = {"x": points[:, 0], "y": points[:, 1], "z": points[:, 2]}
    table = np.stack([made.get(name.lower().strip('"'), np.full(len(points), 9.0)) for name in named], 1)
    return (separator.join(named) + "\n" if header else "") + rows(table, separator)


def pcd(fields="x y z", body=None, kind="ascii", **header):
    """A PCD file whose header has other values; None leaves a line out."""
    count = len(fields.split())
    lines = {
        "VERSION": "0.7", "FIELDS": fields, "SIZE": " ".join("4" * count), "TYPE": " ".join("F" * count),
        "COUNT": " ".join("1" * count), "WIDTH": "60", "HEIGHT": "1", "VIEWPOINT": "0 0 0 1 0 0 0", "POINTS": "60",
    } | header  # fmt: skip
    head = "".join(f"{key} {value}\n" for key, value in lines.items() if value is not None) + f"DATA {kind}\n"
    return head.encode() + (rows().encode() if body is None else body)


def binary(points=CLOUD, kind="<f4"):
    return points.astype(kind).tobytes()


def polygons(faces, order="<", length="B", kind="I"):
    return b"".join(struct.pack(f"{order}{length}{len(face)}{kind}", len(face), *face) for face in faces)


def ply_faces(faces, form="binary_little_endian", vertices=CUBE, extra=""):
    order = ">" if "big" in form else "<"
    elements = f"element vertex {len(vertices)}\n{XYZ}element face {len(faces)}\n"
    body = vertices.astype(f"{order}f4").tobytes() + polygons(faces, order)
    return ply(f"{elements}property list uchar uint vertex_indices\n{extra}", body, form)


def ply_cloud(body=None, form="ascii", properties=XYZ, after=""):
    return ply(f"element vertex 60\n{properties}{after}", rows() if body is None else body, form)


def off(header="OFF", faces=QUADS, extra="", end="\n"):
    lines = [header, f"{len(CUBE)} {len(faces)} 0"] if header else [f"{len(CUBE)} {len(faces)} 0"]
    lines += [f"{x:g} {y:g} {z:g}{extra}" for x, y, z in CUBE]
    lines += [" ".join(map(str, [len(face), *face])) for face in faces]
    return end.join(lines) + end


def stl_text(end="\n", close="endsolid a"):
    lines = ["solid a"]
    for face in TRIANGLES:
        lines += ["facet normal 0 0 0", "outer loop"]
        lines += ["\tvertex {:g} {:g} {:g}".format(*CUBE[corner]) for corner in face]
        lines += ["endloop", "endfacet"]
    return end.join([*lines, close]) + end


def stl_binary(head=b"solid by a program", rest=b"", count=12):
    facets = b"".join(bytes(12) + CUBE[face].astype("<f4").tobytes() + bytes(2) for face in TRIANGLES)
    return head.ljust(80) + struct.pack("<I", count) + facets + rest


def obj(faces=QUADS):
    return "".join("v {:g} {:g} {:g}\n".format(*row) for row in CUBE) + "".join(
        f"f {' '.join(str(corner + 1) for corner in face)}\n" for face in faces
    )


def glb(primitive, indices=None, vertices=CUBE, **tree):
    content = vertices.astype("<f4").tobytes()
    views = [{"buffer": 0, "byteOffset": 0, "byteLength": len(content)}]
    accessors = [{"bufferView": 0, "componentType": 5126, "count": len(vertices), "type": "VEC3"}]
    if indices is not None:
        part = np.array(indices, "<u2").tobytes()
        views.append({"buffer": 0, "byteOffset": len(content), "byteLength": len(part)})
        accessors.append({"bufferView": 1, "componentType": 5123, "count": len(indices), "type": "SCALAR"})
        primitive, content = primitive | {"indices": 1}, content + part + bytes(-len(part) % 4)
    made = {
        "asset": {"version": "2.0"}, "scene": 0, "scenes": [{"nodes": [0]}], "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": [{"attributes": {"POSITION": 0}} | primitive]}], "accessors": accessors,
        "bufferViews": views, "buffers": [{"byteLength": len(content)}],
    } | tree  # fmt: skip
    return with_json(json.dumps(made), struct.pack("<2I", len(content), 0x004E4942) + content)


def six_fans(faces):
    """What makes a fan of each face of a mesh."""
    index = {"bufferView": 1, "componentType": 5123, "count": 4, "type": "SCALAR"}
    points = {"bufferView": 0, "componentType": 5126, "count": 8, "type": "VEC3"}
    primitives = [{"attributes": {"POSITION": 0}, "mode": 6, "indices": 1 + i} for i in range(len(faces))]
    accessors = [points, *(index | {"byteOffset": 8 * i} for i in range(len(faces)))]
    return {"meshes": [{"primitives": primitives}], "accessors": accessors}


def npy(array):
    np.save(file := io.BytesIO(), array)
    return file.getvalue()


def npz(**arrays):
    np.savez(file := io.BytesIO(), **arrays)
    return file.getvalue()


def table(points=CLOUD, kind="f4"):
    made = np.zeros(len(points), [("red", "u1"), ("z", kind), ("x", kind), ("y", kind)])
    made["x"], made["y"], made["z"] = points.T
    return made


def las(points=CLOUD, compressed=False):
    file = laspy.create(point_format=3, file_version="1.2")
    file.header.offsets, file.header.scales = points.mean(0).round(), [1e-4] * 3
    file.x, file.y, file.z = points.T
    file.write(buffer := io.BytesIO(), do_compress=compressed)
    return buffer.getvalue()


NAN = np.where(np.arange(60)[:, None] % 7 == 3, np.nan, CLOUD)  # as of a depth camera
FLAT = np.array([[0, 0], [4, 0], [4, 3], [2, 1], [0, 3]], np.float64)  # concave: its area is 8, that of a fan more
SEMI, CR = rows(separator=";"), "\r"

# All of them are CLOUD.
CLOUDS = {
    "version_5.pcd": pcd(VERSION=".5"),
    "version_6.pcd": pcd(VERSION=".6", VIEWPOINT=None),
    "lower_type.pcd": pcd(TYPE="f f f"),
    "no_count.pcd": pcd(COUNT=None),
    "count_0.pcd": pcd("x y z ring", COUNT="1 1 1 0"),
    "count_0_binary.pcd": pcd("x y ring z", binary(), "binary", COUNT="1 1 0 1"),
    "no_points.pcd": pcd(POINTS=None, WIDTH="6", HEIGHT="10"),
    "no_points_binary.pcd": pcd(body=binary() + bytes(99), kind="binary", POINTS=None),
    "upper_fields.pcd": pcd("X Y Z"),
    "brackets.pcd": pcd("x[m] y[m] z[m]"),
    "bracketed.pcd": pcd("[x] [y] [z]"),
    "bracket.pcd": pcd("[x y z]"),
    "repeated.pcd": pcd("i x y z i", columns("i", "x", "y", "z", "i", separator=" ", header=False).encode()),
    "padding.pcd": pcd("x _ y z _", columns("x", "_", "y", "z", "_", separator=" ", header=False).encode()),
    "lower_keys.pcd": pcd().replace(b"FIELDS", b"fields").replace(b"DATA ascii", b"data ASCII"),
    "crlf.pcd": pcd().replace(b"\n", b"\r\n"),
    "double.pcd": pcd(body=binary(kind="<f8"), kind="binary", SIZE="8 8 8"),
    "blank_lines.ply": ply_cloud(rows(end="\n\n")),
    "cr.ply": ply_cloud().replace(b"\n", b"\r"),
    "cr_binary.ply": ply_cloud(b"", "binary_little_endian").replace(b"\n", b"\r") + binary(),
    "crlf_binary.ply": ply_cloud(b"", "binary_big_endian").replace(b"\n", b"\r\n") + binary(kind=">f4"),
    "long.ply": ply_cloud(rows(np.c_[CLOUD, np.arange(60)]), properties=f"{XYZ}property long id\n"),
    "int64.ply": ply_cloud(
        b"".join(struct.pack("<q3d", 2**40, *row) for row in CLOUD), "binary_little_endian",
        f"property int64 id\n{XYZ.replace('float', 'double')}"
    ),
    "upper.ply": ply_cloud(properties="".join(f"PROPERTY FLOAT {name}\n" for name in "XYZ")).replace(b"ply", b"PLY"),
    "list.ply": ply_cloud(
        b"".join(struct.pack("<B", 3) + polygons([[1, 2, 3]]) + row.astype("<f4").tobytes() for row in CLOUD),
        "binary_little_endian", f"property uchar a\nproperty list uchar uint view\n{XYZ}"),
    "lists_varied.ply": ply_cloud(
        b"".join(row.astype("<f4").tobytes() + polygons([[7] * (i % 3)]) for i, row in enumerate(CLOUD)),
        "binary_little_endian", f"{XYZ}property list uchar uint view\n"),
    "lists_text.ply": ply_cloud(
        "".join(f"{i % 3} {'7 ' * (i % 3)}{row}\n" for i, row in enumerate(rows().splitlines())),
        properties=f"property list uchar int view\n{XYZ}"),
    "after.ply": ply_cloud(binary() + b"\n", "binary_little_endian"),
    "elements_after.ply": ply_cloud(
        binary() + bytes(40), "binary_little_endian", after="element camera 1\n" + "property float a\n" * 10),
    "elements_before.ply": ply(
        f"element camera 1\nproperty double a\nelement vertex 60\n{XYZ}", bytes(8) + binary(), "binary_little_endian"),
    "no_elements.ply": ply_cloud(after="element face 0\nproperty list uchar int vertex_indices\n"),
    "semicolons.txt": "//X;Y;Z;R;G;B\n" + columns("x", "y", "z", "r", "g", "b", separator=";", header=False),
    "count.txt": f"//X;Y;Z\n60\n{SEMI}",
    "count.pts": "60\n" + columns("x", "y", "z", "i", "r", "g", "b", separator=" ", header=False),
    "plain.asc": rows(),
    "tabs.csv": columns("x", "y", "z", separator="\t"),
    "by_name.csv": columns("Red", "Green", "X", "Y", "Blue", "Z"),
    "quoted.csv": "".join(",".join(f'"{f}"' for f in line.split(",")) + "\n" for line in
                          columns("r", "x", "y", "z").splitlines()),
    "units.csv": columns("t", "x", "y", "z").replace("x,y,z", "x [m],y [m],z [m]"),
    "bracketed.csv": columns("t", "x", "y", "z").replace("x,y,z", "[X], (Y) , [Z]"),
    "pos.csv": columns("t", "x", "y", "z").replace("x,y,z", "pos_x,pos_y,pos_z"),
    "utm.csv": columns("t", "x", "y", "z").replace("x,y,z", "Easting,Northing,Height"),
    "normals.csv": columns("nx", "ny", "nz", "x", "y", "z"),
    "comment.txt": columns("b", "x", "y", "z", header=False, separator=" ").join(["//B X Y Z\n", ""]),
    "hash.txt": columns("b", "z", "y", "x", header=False, separator=" ").join(["# columns: b z y x\n", ""]),
    "pandas.csv": ",x,y,z\n" + "".join(f"{i},{row}\n" for i, row in enumerate(rows(separator=",").splitlines())),
    "r.txt": "x y z\n" + "".join(f"{i + 1} {row}\n" for i, row in enumerate(rows().splitlines())),
    "utf16.txt": rows().encode("utf-16"),
    "utf16le.txt": rows().encode("utf-16-le"),
    "packed.xyz.gz": gzip.compress(rows().encode()),
    "packed.ply.gz": gzip.compress(ply_cloud()),
    "made_by_me.TXT.GZ": gzip.compress(rows().encode()),
    "named.npy": npy(table()),
    "named.npz": npz(points=table(kind="f8"), label=np.int64(3)),
    "nested.npy": npy(np.array([(row, 3) for row in CLOUD], [("xyz", "f8", 3), ("i", "u1")])),
    "transposed.npy": npy(CLOUD.T),
    "transposed_6.npy": npy(np.r_[CLOUD.T, np.ones((3, 60))]),
    "transposed_fortran.npy": npy(np.asfortranarray(CLOUD.T)),
    "long_double.npy": npy(CLOUD.astype(np.longdouble)),
    "wide.npy": npy(np.c_[CLOUD, np.ones((60, 40))]),
    "cloud.las": las(),
    "cloud.laz": las(compressed=True),
}  # fmt: skip

# All of them are the surface of the unit cube.
CUBES = {
    "mixed.ply": ply_faces(MIXED),
    "mixed_big.ply": ply_faces(MIXED, "binary_big_endian"),
    "quads.ply": ply_faces(QUADS),
    "texture.ply": ply(
        f"element vertex 8\n{XYZ}element face 6\nproperty list uchar uint vertex_index\n"
        "property list uchar float texcoord\nproperty uchar red\n",
        binary(CUBE) + b"".join(polygons([face]) + polygons([[0.5] * 8], kind="f") + b"\0" for face in QUADS),
        "binary_little_endian"),
    "flags_first.ply": ply(
        f"element vertex 8\n{XYZ}element face 6\nproperty uchar flags\nproperty list uchar int vertex_indices\n",
        rows(CUBE) + "".join(f"7 4 {' '.join(map(str, face))}\n" for face in QUADS)),
    "strips.ply": ply(
        f"element vertex 8\n{XYZ}element tristrips 1\nproperty list int int vertex_indices\n",
        rows(CUBE) + "29 " + " -1 ".join(f"{a} {b} {d} {c}" for a, b, c, d in QUADS) + "\n"),
    "unused_nan.ply": ply_faces(QUADS, vertices=np.r_[CUBE, [[np.nan] * 3]]),
    "ncoff.off": off("NCOFF", extra=" 1 0 0 0.5 0.5 0.5 1"),
    "stcnoff.off": off("STCNOFF", extra=" 0 0 1"),
    "lower.off": off("off"),
    "no_key.off": off(""),
    "cr.off": off(end="\r"),
    "words.off": off().replace("4 0 3 2 1", "4 0 3\n2\n1"),
    "words_normals.off": off("NOFF", extra=" 1\n0 0"),
    "counts.off": off().replace("8 6 0", "8\n6\n0"),
    "utf16.obj": obj().encode("utf-16"),
    "cr.obj": obj().replace("\n", "\r"),
    "continued.obj": obj().replace("f 1 4", "f 1 \\\r\n4"),
    "upper_end.stl": stl_text(close="ENDSOLID a"),
    "upper.stl": stl_text().upper(),
    "cr.stl": stl_text(end="\r"),
    "byte_after.stl": stl_binary(rest=b"\n"),
    "zeros_after.stl": stl_binary(rest=bytes(512)),
    "fan.glb": glb({"mode": 6}, np.ravel(QUADS), **six_fans(QUADS)),
    "lights.glb": glb({}, np.ravel(TRIANGLES), extensionsRequired=["KHR_lights_punctual"]),
    "mirrored.glb": glb({}, np.ravel(TRIANGLES), nodes=[{"mesh": 0, "scale": [1, 1, -1], "translation": [0, 0, 1]}]),
    "mesh.npz": npz(vertices=CUBE, faces=np.array(QUADS)),
    "points.npz": npz(points=CUBE.astype("f2"), faces=np.array(TRIANGLES, np.uint8)),
    "packed.obj.gz": gzip.compress(obj().encode()),
}  # fmt: skip

# Refused, with what the message says.
REFUSED = {
    "order.csv": (columns("lat", "lon", "alt"), "expected columns named x, y and z, once each, found lat, lon, alt"),
    "twice.csv": (columns("x", "y", "z", "x"), "once each, found x, y, z, x"),
    "normals_only.csv": (columns("nx", "ny", "nz"), "found nx, ny, nz"),
    "fewer_names.csv": (columns("x", "y", "z").replace("x,y,z", "x,y"), "names 2 columns, x, y, its rows have 3"),
    "numbers.csv": (columns("0", "1", "2"), "its first line numbers the columns"),
    "index.txt": ("".join(f"{i} {row}\n" for i, row in enumerate(rows().splitlines())), "counts the rows"),
    "index_1.csv": ("".join(f"{i + 1},{row}\n" for i, row in enumerate(rows(separator=",").splitlines())), "counts"),
    "fewer.pts": ("61\n" + rows(), "61 points announced, 60 found"),
    "title.txt": ("Scan of a chair\nby me\n" + rows(), "expected rows of numbers, found 'by me'"),
    "molecule.xyz": ("3\nwater\nO 0 0 0\nH 0 0 1\nH 0 1 0\n", "3 points announced, 4 found"),
    "comma.txt": (SEMI.replace(".", ","), "decimal commas as in"),
    "comma_comma.csv": ("0,25,0,05,1,75\n1,25,2,50,3,00\n", "decimal commas"),
    "square.npy": (npy(np.eye(3)), r"float64 \[3, 3\], which may be \[3, P\]"),
    "six.npy": (npy(np.ones((6, 3))), r"\[6, 3\], which may be \[3, P\] or \[6, P\] as well"),
    "six_six.npy": (npy(np.eye(6)), r"\[6, 6\]"),
    "five.npy": (npy(np.ones((5, 60))), r"found float64 \[5, 60\]"),
    "batch.npy": (npy(np.ones((2, 60, 3))), r"found float64 \[2, 60, 3\]"),
    "bool.npy": (npy(CLOUD > 0), "found bool"),
    "object.npy": (npy(CLOUD.astype(object)), "Object arrays cannot be loaded"),
    "other_names.npy": (npy(np.zeros(9, [("a", "f4"), ("b", "f4"), ("c", "f4")])), "found a, b, c"),
    "faces.npz": (npz(points=CUBE, faces=np.array(QUADS) * 0.5), "faces: expected whole numbers"),
    "sizes.pcd": (pcd(SIZE="4 4"), "3 fields, 2 sizes, 3 types, 3 counts"),
    "count_3.pcd": (pcd("x y z", COUNT="3 1 1"), "expected one value of a point"),
    "twice.pcd": (pcd("x y z x"), "once each, found x, y, z, x"),
    "no_list.ply": (ply(f"element vertex 8\n{XYZ}element face 6\nproperty uchar red\n", rows(CUBE) + "1\n" * 6),
                    "face: expected a list vertex_indices"),
    "cut.ply": (ply_faces(MIXED)[:-3], "expected the length announced"),
    "type.ply": (ply_cloud(properties=XYZ.replace("float x", "complex x")), "its header has 'property complex x'"),
    "4.off": (off("4OFF", extra=" 1"), "three dimensions, found 4OFF"),
    "n.off": (off("nOFF"), "three dimensions, found nOFF"),
    "binary.off": ("OFF BINARY\n" + off(""), "expected OFF and the numbers"),
    "cut.off": (off()[:-6], "8 vertices and 6 faces announced, fewer found"),
    "colours.off": (off("COFF", extra=" 1 1\n1"), "8 vertices and 6 faces announced, fewer found"),
    "surface.obj": (obj([]) + "surf 0 1 0 1 1 2 3 4\n", "free-form surfaces"),
    "count.stl": (stl_binary(count=11), "binary data of the length announced"),
    "open.stl": (stl_text(close=""), "solid and endsolid"),
    "facet.stl": (stl_text().replace("\tvertex 0 0 0\n", "", 1), "solid and endsolid"),
    "old.glb": (b"glTF\1\0\0\0" + bytes(40), r"expected glTF 2\.0, found glTF 1\.0: export it as 2\.0"),
    "draco.glb": (glb({}, np.ravel(TRIANGLES), extensionsRequired=["KHR_draco_mesh_compression"]), "KHR_draco"),
    "instances.glb": (glb({}, np.ravel(TRIANGLES), nodes=[{"mesh": 0, "extensions": {"EXT_mesh_gpu_instancing": {}}}]),
                      "found EXT_mesh_gpu_instancing"),
    "cut.las": (las()[:-40], "cannot be read as LAS"),
    "cut.laz": (las(compressed=True)[:-40], "cannot be read as LAZ"),
    "cut.txt.gz": (gzip.compress(rows().encode())[:-20], "cannot be read as TXT"),
    "plain.txt.gz": (rows(), "Not a gzipped file"),
    "pointer.obj": ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS pointer"),
    "page.ply": ("<!DOCTYPE html><html></html>", "it is a web page in place of the file"),
}  # fmt: skip

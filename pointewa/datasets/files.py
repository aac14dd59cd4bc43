"""Points of one file as users have it: a cloud as it is, or points drawn on a mesh."""

import json
import logging
import re
import warnings
from collections.abc import Callable, Iterable
from functools import cache
from io import BytesIO
from itertools import pairwise
from pathlib import Path

import numpy as np

from pointewa.errors import DataError
from pointewa.safe.files import reading

# A file beyond these is refused before memory is asked for, so that a damaged size in a header does no harm.
MAX_POINTS, MAX_BYTES = 50_000_000, 2**31
_KEYS = ("points", "xyz", "pos", "data", "arr_0")
_NO_FACES = np.empty((0, 3), np.int64)

_Shape = tuple[np.ndarray, np.ndarray]  # vertices float64 [V, 3], and triangles int64 [F, 3], none of them for a cloud


def read_points(path: Path, samples: int, seed: int = 0) -> np.ndarray:
    """Points float32 ``[P, 3]`` of a file: the points of a cloud as they are, or points drawn on a mesh.

    Nothing else is opened, whatever the file refers to. Normals, colours and further columns are ignored.

    Args:
        path: a file with one of `SUFFIXES`, in any case. PLY, OFF, OBJ and GLB hold a mesh if they have faces, else a
            cloud; STL is a mesh, the others are clouds. NPY is an array [P, >= 3]; NPZ has one as "points", "xyz",
            "pos", "data" or "arr_0", or as its only array. Text has x, y, z in its first columns.
        samples: P for a mesh, whose points are uniform by area over all its parts.
        seed: of the points drawn on a mesh.

    Raises:
        DataError: an unknown suffix; a file that is missing, empty, damaged or too large; no points, coordinates that
            are not finite or beyond float32, a mesh without area.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(f"{path}: expected a file ending in {', '.join(SUFFIXES)}, found {suffix or 'no suffix'}")
    # A number that does not fit its type is an error too, where numpy would warn and go on with another number.
    quiet = warnings.catch_warnings(action="ignore")
    with reading(path, suffix[1:].upper()), quiet, np.errstate(over="raise", invalid="raise"):
        size = path.stat().st_size
        if not path.is_file():
            raise DataError(f"{path}: expected a file, found a folder or a device: remove or rename it")
        if not 0 < size <= MAX_BYTES:
            raise DataError(f"{path}: expected 1 to {MAX_BYTES} bytes, found {size}: remove the file or get it again")
        points, faces = _READERS[suffix](path.read_bytes())
        _check(path, points)
        if len(faces):
            import trimesh

            mesh = trimesh.Trimesh(points, faces, process=False)
            if not mesh.area > 0:
                raise DataError(f"{path}: expected a surface, found faces of area 0 only: remove or repair the file")
            points = trimesh.sample.sample_surface(mesh, samples, seed=seed)[0]
        return np.ascontiguousarray(points, np.float32)


def _check(path: Path, points: np.ndarray) -> None:
    largest = np.finfo(np.float32).max
    if not points.size:
        problem = "expected points, found none"
    elif points.shape[1:] != (3,) or len(points) > MAX_POINTS:
        problem = f"expected x, y, z of at most {MAX_POINTS} points, found an array {list(points.shape)}"
    elif not (finite := np.isfinite(points).all(1)).all():
        problem = f"{(~finite).sum()} of {len(points)} points have coordinates that are not finite"
    elif (found := np.abs(points).max()) > largest:
        problem = f"expected coordinates up to {largest:.2g}, found {found:.2g}"
    else:
        return
    raise DataError(f"{path}: {problem}: remove or repair the file")


def _read_text(data: bytes) -> _Shape:
    rows = [line for line in data.decode("utf-8-sig", "replace").splitlines() if line.partition("#")[0].strip()]
    if rows and not re.search(r"(?i)(?:^|[\s,])[-+.]*(?:\d|nan\b|inf)", rows[0]):  # names of columns
        del rows[0]
    delimiter = "," if rows and "," in rows[0].partition("#")[0] else None
    return np.loadtxt(rows, delimiter=delimiter, usecols=(0, 1, 2), ndmin=2), _NO_FACES


def _read_numpy(data: bytes) -> _Shape:
    if not data.startswith((b"\x93NUMPY", b"PK")):  # NumPy would suggest unpickling it
        raise ValueError("expected an array or archive of NumPy")
    array = np.load(BytesIO(data), allow_pickle=False)
    if isinstance(array, np.lib.npyio.NpzFile):
        keys = [key for key in _KEYS if key in array] or array.files
        if not keys or (len(keys) > 1 and keys[0] not in _KEYS):
            raise ValueError(f"expected {', '.join(_KEYS)} or a single array, found {', '.join(keys) or 'none'}")
        if sum(member.file_size for member in array.zip.infolist()) > MAX_BYTES:  # millions of zeros compress well
            raise ValueError(f"expected at most {MAX_BYTES} bytes when unpacked")
        array = np.asarray(array[keys[0]])
    if array.ndim != 2 or array.shape[1] < 3 or array.dtype.kind not in "fiu":
        raise ValueError(f"expected numbers [P, 3 or more], found {array.dtype} {list(array.shape)}")
    return array[:, :3].astype(np.float64), _NO_FACES


def _read_pcd(data: bytes) -> _Shape:
    import pypcd4

    found = re.search(rb"^DATA.*\n", data, re.MULTILINE)
    if found is None:
        raise ValueError("expected a header that ends with a line DATA")
    header, body = data[: found.end()], data[found.end() :]
    sizes = dict(re.findall(rb"^(POINTS|COUNT)([ \d]+)", header, re.MULTILINE))
    count = int(sizes[b"POINTS"])
    if count > MAX_POINTS or sum(map(int, sizes.get(b"COUNT", b"").split())) > 10_000:
        raise ValueError(f"expected at most {MAX_POINTS} points of 10000 values, found more announced")
    if b"ascii" in found[0]:  # pypcd4 takes single spaces only
        body = b"\n".join(b" ".join(line.split()) for line in body.splitlines())
    cloud = pypcd4.PointCloud.from_fileobj(BytesIO(header + body))
    if cloud.pc_data.size != count:
        raise ValueError(f"{count} points announced, {cloud.pc_data.size} found")
    return cloud.numpy(("x", "y", "z")).astype(np.float64), _NO_FACES


# OFF and OBJ are read here: trimesh takes an OFF file that is cut short as complete, and in OBJ files it gets relative
# indices wrong and drops lines with tabs.


def _read_off(data: bytes) -> _Shape:
    text = re.sub(r"#.*", "", data.decode("utf-8-sig", "replace"))
    header = re.match(r"\s*(?:ST)?C?N?OFF\s*(\d+)\s+(\d+).*\n", text)  # many files have "OFF490 518 0"
    if header is None:
        raise ValueError("expected OFF and the numbers of vertices and faces")
    vertices, faces = map(int, header.groups())
    rows = [line.split() for line in text[header.end() :].splitlines() if line.strip()]
    sizes = [int(row[0]) for row in rows[vertices : vertices + faces]]
    polygons = [list(map(int, row[1 : size + 1])) for row, size in zip(rows[vertices:], sizes, strict=False)]
    if len(rows) < vertices + faces or sizes != list(map(len, polygons)):
        raise ValueError(f"{vertices} vertices and {faces} faces announced, fewer found")
    return _triangles([row[:3] for row in rows[:vertices]], polygons)


def _read_obj(data: bytes) -> _Shape:
    vertices, polygons = [], []
    for line in re.sub(r"\\\r?\n", " ", data.decode("utf-8-sig", "replace")).splitlines():
        key, *values = line.partition("#")[0].split() or [""]
        if key == "v":
            vertices.append(values[:3])
        elif key == "f":
            corners = [int(value.partition("/")[0]) for value in values]
            # 1 is the first vertex, -1 the last one so far; 0 is none.
            polygons.append([i - 1 if i > 0 else i + len(vertices) if i < 0 else -1 for i in corners])
    return _triangles(vertices, polygons)


def _triangles(vertices: list[list[str]], polygons: Iterable[list[int]]) -> _Shape:
    fans = [(polygon[0], *edge) for polygon in polygons for edge in pairwise(polygon[1:])]
    faces = np.array(fans, np.int64).reshape(-1, 3)
    return np.array(vertices, np.float64), _in_range(faces, len(vertices))


def _in_range(faces: np.ndarray, vertices: int) -> np.ndarray:
    if len(faces) and not 0 <= faces.min() <= faces.max() < vertices:
        raise ValueError(f"faces refer to vertices {faces.min()} to {faces.max()} of {vertices}")
    return faces


def _read_ply(data: bytes) -> _Shape:
    header, end, body = data.partition(b"end_header")
    header = re.sub(rb"[\x80-\xff]", b"?", header)  # comments may be in any encoding
    header = re.sub(rb"^element edge ", b"element ignored ", header, flags=re.MULTILINE)  # trimesh needs scipy for it
    counts = {name: int(count) for name, count in re.findall(rb"^element\s+(\w+)\s+(\d+)", header, re.MULTILINE)}
    rows = sum(map(bool, map(bytes.strip, body.splitlines()))) if b"format ascii" in header else len(body)
    if sum(counts.values()) > rows:  # trimesh takes a truncated ASCII file as complete
        raise ValueError(f"{sum(counts.values())} rows announced, fewer found")
    try:
        points, faces = _read_scene(header + end + body, "ply")
    except ValueError as error:
        if "unexpected length" not in str(error):
            raise
        raise ValueError("expected the length announced, and polygons with equally many corners") from error
    if len(faces) < counts.get(b"face", 0):
        raise ValueError(f"{counts[b'face']} faces announced, {len(faces)} found")
    return points, faces


def _read_stl(data: bytes) -> _Shape:
    if len(data) != 84 + 50 * int.from_bytes(data[80:84], "little"):  # not binary
        data = data.decode("utf-8-sig", "replace").encode()
        ends = re.findall(rb"^\s*(end)?solid\b", data, re.MULTILINE | re.IGNORECASE)
        if not ends or 2 * ends.count(b"end") != len(ends):  # trimesh leaves out a truncated solid
            raise ValueError("expected binary data of the length announced, or text with solid and endsolid")
    return _read_scene(data, "stl")


def _read_glb(data: bytes) -> _Shape:
    tree = json.loads(data[20 : 20 + int.from_bytes(data[12:16], "little")])
    if any(not buffer.get("uri", "data:").startswith("data:") for buffer in tree.get("buffers", ())):
        raise ValueError("it refers to other files, which are not read")
    # trimesh makes up zeros for these, of any size.
    if any("sparse" in accessor or "bufferView" not in accessor for accessor in tree.get("accessors", ())):
        raise ValueError("expected geometry that is neither compressed nor sparse")
    if any(not re.search("material|texture", name) for name in tree.get("extensionsRequired", ())):
        raise ValueError(f"expected no required extensions, found {', '.join(tree['extensionsRequired'])}")
    return _read_scene(data, "glb")


def _read_scene(data: bytes, kind: str) -> _Shape:
    """All meshes, or else all clouds, moved to where the scene has them. No resolver: trimesh can open nothing else."""
    import trimesh

    logging.getLogger("trimesh").setLevel(logging.CRITICAL + 1)
    scene = trimesh.load_scene(BytesIO(data), file_type=kind, resolver={}, process=False, skip_materials=True)
    edges = {child: (parent, attributes) for parent, child, attributes in scene.graph.to_edgelist()}

    @cache
    def world(node: str) -> np.ndarray:  # the time that scene.graph.get takes is cubic in the depth
        parent, attributes = edges.get(node, (None, None))
        return np.eye(4) if parent is None else world(parent) @ attributes["matrix"]

    placed = [(node, attributes.get("geometry")) for node, (_, attributes) in edges.items()]
    parts = [(world(node), scene.geometry[name]) for node, name in placed if name is not None]
    parts = [part for part in parts if len(getattr(part[1], "faces", ()))] or parts
    if sum(len(geometry.vertices) + len(getattr(geometry, "faces", ())) for _, geometry in parts) > 3 * MAX_POINTS:
        raise ValueError(f"expected at most {3 * MAX_POINTS} vertices and faces, found more")
    vertices = [trimesh.transform_points(geometry.vertices, transform) for transform, geometry in parts]
    faces = [_in_range(getattr(geometry, "faces", _NO_FACES), len(geometry.vertices)) for _, geometry in parts]
    return trimesh.util.append_faces(vertices, faces)


_READERS: dict[str, Callable[[bytes], _Shape]] = {
    ".ply": _read_ply,
    ".pcd": _read_pcd,
    ".xyz": _read_text,
    ".txt": _read_text,
    ".npy": _read_numpy,
    ".npz": _read_numpy,
    ".off": _read_off,
    ".obj": _read_obj,
    ".stl": _read_stl,
    ".glb": _read_glb,
}
SUFFIXES = tuple(_READERS)

"""Meshes: OFF, OBJ, STL.

They are read here: trimesh takes an OFF file that is cut short as complete, in OBJ files it gets relative indices wrong
and drops lines with tabs, and in STL files it does not know CR as the end of a line nor bytes after the last triangle.
meshio reads OFF files of triangles in one spelling only.
"""

import re

import numpy as np

from pointewa.datasets.files.polygons import triangulate
from pointewa.datasets.files.shape import Shape, decode

_OFF = re.compile(
    r"\s*(?P<key>[A-Z0-9]*OFF)?\s*(?P<vertices>\d+)\s+(?P<faces>\d+)(?:[ \t]+\d+|[ \t]*\n\s*\d+[ \t]*(?=\n))?",
    re.IGNORECASE,
)


def read_off(data: bytes) -> Shape:
    """Vertices and polygons; behind the coordinates there may be normals and colours.

    Raises:
        ValueError: a header that is none; vertices of other than three dimensions; fewer rows than announced.
    """
    text = re.sub(r"#.*", "", re.sub(r"\r\n?", "\n", decode(data)))
    header = _OFF.match(text)
    if header is None:
        raise ValueError("expected OFF and the numbers of vertices and faces")
    key = header["key"] or "OFF"
    if not re.fullmatch("(ST|C|N)*OFF", key.upper()) or key.startswith("n"):
        raise ValueError(f"expected OFF with vertices of three dimensions, found {key}")
    vertices, faces = int(header["vertices"]), int(header["faces"])
    rows = [line.split() for line in text[header.end() :].splitlines() if line.strip()]
    sizes = [int(row[0]) for row in rows[vertices : vertices + faces]]
    polygons = [list(map(int, row[1 : size + 1])) for row, size in zip(rows[vertices:], sizes, strict=False)]
    points = [row[:3] for row in rows[:vertices]]
    whole = len(rows) >= vertices + faces and all(len(row) == 3 for row in points) and sizes == list(map(len, polygons))
    if not whole:  # a row may go over lines
        points, polygons = _off_words(text[header.end() :].split(), key.upper(), vertices, faces)
    points = np.array(points, np.float64).reshape(-1, len(points[0]) if points else 3)
    return Shape(points, triangulate(points, polygons))


def _off_words(words: list[str], key: str, vertices: int, faces: int) -> tuple[list[list[str]], list[list[int]]]:
    """The same where the ends of lines mean nothing: without colours, which may be of any length."""
    width, polygons = 6 if "N" in key else 3, []
    place = vertices * width
    while len(polygons) < faces and place < len(words):
        size = int(words[place])
        polygons.append(list(map(int, words[place + 1 : place + 1 + size])))
        place += 1 + max(size, 0)
    if "C" in key or "ST" in key or place != len(words) or len(polygons) != faces:
        raise ValueError(f"{vertices} vertices and {faces} faces announced, fewer found")
    return [words[start : start + 3] for start in range(0, vertices * width, width)], polygons


def read_obj(data: bytes) -> Shape:
    """Vertices and polygons.

    Raises:
        ValueError: free-form surfaces.
    """
    vertices, polygons = [], []
    for line in re.sub(r"\\(?:\r\n|\r|\n)", " ", decode(data)).splitlines():
        key, *values = line.partition("#")[0].split() or [""]
        if key == "v":
            vertices.append(values[:3])
        elif key == "f":
            corners = [int(value.partition("/")[0]) for value in values]
            # 1 is the first vertex, -1 the last one so far; 0 is none.
            polygons.append([i - 1 if i > 0 else i + len(vertices) if i < 0 else -1 for i in corners])
        elif key in ("surf", "curv"):
            raise ValueError("expected vertices and faces, found free-form surfaces: export it as a mesh")
    points = np.array(vertices, np.float64)
    return Shape(points, triangulate(points, polygons))


def read_stl(data: bytes) -> Shape:
    """Triangles, binary or as text; which it is does not depend on how it begins.

    Raises:
        ValueError: neither of the length announced, nor text with as many solids as ends of solids.
    """
    count = int.from_bytes(data[80:84], "little")
    rest = data[84 + 50 * count :]  # after the last triangle
    if len(data) >= 84 + 50 * count >= 84 and (not rest or (count and (len(rest) < 50 or not rest.strip(b"\0 \r\n")))):
        facets = np.frombuffer(data, [("normal", "<f4", 3), ("corners", "<f4", 9), ("attribute", "<u2")], count, 84)
        corners = facets["corners"].astype(np.float64)
    else:
        words = [line.split() for line in decode(data).lower().splitlines() if line.strip()]
        keys = [line[0] for line in words]
        if not keys.count("solid") == keys.count("endsolid") > 0 or keys.count("vertex") != 3 * keys.count("facet"):
            raise ValueError("expected binary data of the length announced, or text with solid and endsolid")
        corners = np.array([line[1:4] for line in words if line[0] == "vertex"], np.float64)
    corners = corners.reshape(-1, 3)
    return Shape(corners, np.arange(len(corners)).reshape(-1, 3))

"""Stanford's polygon files.

They are read here: trimesh refuses binary files whose polygons differ in size, as Blender writes them, and takes ASCII
files that are cut short as complete; meshio knows vertices and faces only; plyfile reads them right, but number by
number, which takes seconds for a scan.
"""

import re
from typing import NamedTuple

import numpy as np

from pointewa.datasets.files.columns import label, xyz
from pointewa.datasets.files.polygons import triangulate
from pointewa.datasets.files.shape import NO_FACES, Shape, in_range

_TYPES = {"char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4", "float": "f4",
          "double": "f8", "int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2", "int32": "i4", "uint32": "u4",
          "int64": "i8", "uint64": "u8", "long": "i8", "ulong": "u8", "longlong": "i8", "ulonglong": "u8",
          "float16": "f2", "half": "f2", "float32": "f4", "float64": "f8"}  # fmt: skip
_CORNERS = re.compile(r"vertex_?(?:index|indices|indexes)|vertices|indices")


class _Property(NamedTuple):
    name: str
    kind: str  # of numpy, of a list's items
    length: str = ""  # of numpy, of a list's length


class _Element(NamedTuple):
    name: str
    count: int
    properties: list[_Property]
    labels: bool = False  # of vertices, are read too


def read_ply(data: bytes, labels: bool = False) -> Shape:
    """Vertices, and the triangles of faces or strips; with the labels of vertices if they are asked for.

    Raises:
        ValueError: a damaged header; fewer rows than announced; no x, y and z; faces without a list of vertices.
    """
    start = re.match(rb"\s*ply[ \t]*(\r\n|\n|\r)", data, re.IGNORECASE)
    end = start and re.compile(rb"(?<=[\r\n])[ \t]*end_header[ \t]*(?:%b|$)" % start[1], re.I).search(data)
    if not end:
        raise ValueError("expected a header from ply to end_header")
    order, elements = _header(data[start.end() : end.start()].decode("latin-1"))
    names = [element.name for element in elements]
    if "vertex" not in names:
        raise ValueError(f"expected the element vertex, found {', '.join(names) or 'none'}")
    wanted = [names.index(name) for name in ("vertex", "face", "tristrips") if name in names]
    labels = labels and not any(elements[number].count for number in wanted[1:])  # those of a mesh are of no use
    needed = [one._replace(labels=labels) for one in elements[: max(wanted) + 1]]  # whatever comes after is not read
    body = data[end.end() :]
    rows = [row for row in body.splitlines() if row.strip()] if not order else body
    if sum(element.count for element in elements if element.properties) > len(rows):
        raise ValueError(f"{sum(element.count for element in elements)} rows announced, fewer found")
    read, place, found = _read_text if not order else _read_binary, 0, {}
    for element in needed:
        found[element.name], place = read(rows, place, element, order)
    vertices = found["vertex"][:, :3]
    faces = triangulate(vertices, found["face"]) if len(found.get("face", ())) else NO_FACES
    strips = [_strip(np.asarray(strip, np.int64)) for strip in found.get("tristrips", ())]
    faces = in_range(np.concatenate([faces, *strips]), len(vertices))
    if not labels:
        return Shape(vertices, faces)
    by = elements[names.index("vertex")].properties[label(_plain(elements[names.index("vertex")]))].name
    return Shape(vertices, labels=found["vertex"][:, 3] if len(vertices) else None, labelled_by=by)


def _header(text: str) -> tuple[str, list[_Element]]:
    """The order of bytes, "<" or ">" (none for ASCII), and the elements."""
    order, elements = None, []
    for line in text.lower().splitlines():
        match line.split():
            case ["format", form, *_]:
                order = {"ascii": "", "binary_little_endian": "<", "binary_big_endian": ">"}.get(form)
            case ["element", name, count] if count.isdecimal():
                elements.append(_Element(name, int(count), []))
            case ["property", "list", length, kind, name] if elements and {length, kind} <= _TYPES.keys():
                elements[-1].properties.append(_Property(name, _TYPES[kind], _TYPES[length]))
            case ["property", kind, name] if elements and kind in _TYPES:
                elements[-1].properties.append(_Property(name, _TYPES[kind]))
            case [] | ["comment" | "obj_info", *_]:
                pass
            case _:
                raise ValueError(f"its header has {line[:60]!r}")
    if order is None:
        raise ValueError("expected format ascii, binary_little_endian or binary_big_endian")
    return order, elements


def _wanted(element: _Element) -> list[int]:
    """The numbers of the properties that are read: x, y and z of vertices, the list of corners of faces."""
    properties = element.properties
    if element.name == "vertex":
        plain = _plain(element)
        return [*xyz(plain), *([label(plain)] if element.labels else [])]
    if element.name not in ("face", "tristrips") or not element.count:
        return []
    found = [number for number, one in enumerate(properties) if one.length and _CORNERS.fullmatch(one.name)]
    if len(found) != 1:
        raise ValueError(f"{element.name}: expected a list vertex_indices, found {[one.name for one in properties]}")
    return found


def _plain(element: _Element) -> list[str]:
    """Names of the properties, none for lists."""
    return [one.name if not one.length else "" for one in element.properties]


def _read_text(rows: list[bytes], place: int, element: _Element, order: str) -> tuple[np.ndarray | list, int]:
    """Vertices ``[V, 3]`` or lists of corners, and the row after the element."""
    end = place + (element.count if element.properties else 0)
    wanted, mine = _wanted(element), rows[place:end]
    if not wanted or not mine:
        return np.empty((0, 3)), end
    first = next((number for number, one in enumerate(element.properties) if one.length), len(element.properties))
    if max(wanted) < first:  # before any list
        return np.loadtxt(mine, usecols=wanted, ndmin=2, comments=None), end
    found = []
    for row in mine:
        fields, cells = iter(row.split()), []
        for one in element.properties[: max(wanted) + 1]:
            length = int(next(fields, -1)) if one.length else 1
            cells.append([field for _, field in zip(range(length), fields, strict=False)])
            if len(cells[-1]) != length:
                raise ValueError(f"{element.name}: a row is cut short: {row[:60]!r}")
        found.append([cells[i][0] for i in wanted] if element.name == "vertex" else list(map(int, cells[wanted[0]])))
    return np.array(found, np.float64) if element.name == "vertex" else found, end


def _read_binary(body: bytes, place: int, element: _Element, order: str) -> tuple[np.ndarray | list, int]:
    """Vertices ``[V, 3]`` or lists of corners, and the byte after the element."""
    wanted, properties = _wanted(element), element.properties
    if not element.count or not properties:
        return np.empty((0, 3)), place
    table = _table(body, place, element, order)
    if table is not None:
        columns = [table[f"items{number}"] for number in wanted]
        end = place + table.nbytes
        if element.name == "vertex":
            return np.stack(columns, 1).astype(np.float64), end
        return (columns[0] if columns else []), end
    lengths = [one.length and np.dtype(order + one.length) for one in properties]
    kinds, found = [np.dtype(order + one.kind) for one in properties], []
    for _ in range(element.count):
        cells = []
        for length, kind in zip(lengths, kinds, strict=True):
            count = int(_take(body, place, length, 1)[0]) if length else 1
            place += length.itemsize if length else 0
            cells.append(_take(body, place, kind, count))
            place += cells[-1].nbytes
        found.append([cells[i][0] for i in wanted] if element.name == "vertex" else cells[wanted[0]] if wanted else ())
    return np.array(found, np.float64) if element.name == "vertex" else found, place


def _take(body: bytes, place: int, kind: np.dtype, count: int) -> np.ndarray:
    if not 0 <= count <= (len(body) - place) // kind.itemsize:
        raise ValueError("expected the length announced, found less")
    return np.frombuffer(body, kind, count, place)


def _table(body: bytes, place: int, element: _Element, order: str) -> np.ndarray | None:
    """All rows at once, if the lists are as long in all of them as in the first."""
    fields, end = [], place
    for number, one in enumerate(element.properties):
        kind, shape = np.dtype(order + one.kind), ()
        if one.length:
            length = np.dtype(order + one.length)
            fields.append((f"length{number}", length))
            shape = (int(_take(body, end, length, 1)[0]),)
            end += length.itemsize
        end += _take(body, end, kind, *shape or (1,)).nbytes
        fields.append((f"items{number}", kind, shape))
    row = np.dtype(fields)
    if any(one.length for one in element.properties) and element.count > (len(body) - place) // row.itemsize:
        return None
    table = _take(body, place, row, element.count)
    lists = [(name, shape) for name, kind, shape in (field for field in fields if len(field) == 3) if shape]
    same = all((table[name.replace("items", "length")] == shape[0]).all() for name, shape in lists)
    return table if same else None


def _strip(corners: np.ndarray) -> np.ndarray:
    """Triangles of strips, which -1 separates."""
    ends = len(corners) - 2
    triples = np.stack([corners[:ends], corners[1 : ends + 1], corners[2:]], 1) if ends > 0 else NO_FACES
    return triples[(triples != -1).all(1)]

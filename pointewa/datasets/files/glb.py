"""Scenes of glTF in one file, read by trimesh."""

import json
import logging
import re
import struct
from functools import cache
from io import BytesIO
from typing import Any

import numpy as np

from pointewa.datasets.files.shape import MAX_POINTS, NO_FACES, Shape, in_range

_FAN, _TRIANGLES = 6, 4
_INDICES = {5121: "u1", 5123: "<u2", 5125: "<u4"}
_HARMLESS = re.compile("material|texture|lights|xmp|animation|audio")  # extensions that leave the geometry as it is


def read_glb(data: bytes) -> Shape:
    """All meshes of a scene, or else all its clouds, moved to where the scene has them.

    Raises:
        ValueError: glTF 1.0; geometry that is elsewhere, compressed, sparse, instanced, or changed by an extension.
    """
    if data[:4] == b"glTF" and data[4:8] != b"\2\0\0\0":
        raise ValueError(f"expected glTF 2.0, found glTF {int.from_bytes(data[4:8], 'little')}.0: export it as 2.0")
    end = 20 + int.from_bytes(data[12:16], "little")
    tree = json.loads(data[20:end])
    try:
        _refuse_unread(tree)
        fans = [one for mesh in tree.get("meshes", ()) for one in mesh["primitives"] if one.get("mode") == _FAN]
        data = _without_fans(tree, data[end:], fans) if fans else data
    except (AttributeError, TypeError) as error:  # other kinds of values than glTF has there
        raise ValueError(f"its JSON is damaged: {error}") from error
    return _read_scene(data)


def _refuse_unread(tree: dict[str, Any]) -> None:
    if any(not buffer.get("uri", "data:").startswith("data:") for buffer in tree.get("buffers", ())):
        raise ValueError("it refers to other files, which are not read")
    # trimesh makes up zeros for these, of any size.
    if any("sparse" in accessor or "bufferView" not in accessor for accessor in tree.get("accessors", ())):
        raise ValueError("expected geometry that is neither compressed nor sparse")
    changing = [name for name in tree.get("extensionsRequired", ()) if not _HARMLESS.search(name)]
    if changing:
        raise ValueError(f"expected no required extensions, found {', '.join(changing)}")
    if any("EXT_mesh_gpu_instancing" in node.get("extensions", ()) for node in tree.get("nodes", ())):
        raise ValueError("expected meshes that are placed by nodes, found EXT_mesh_gpu_instancing")


def _without_fans(tree: dict[str, Any], chunks: bytes, fans: list[dict[str, Any]]) -> bytes:
    """The file with triangles in place of fans, which trimesh leaves out."""
    binary = chunks[8 : 8 + int.from_bytes(chunks[:4], "little")]
    for fan in fans:
        if "indices" in fan:
            accessor = tree["accessors"][fan["indices"]]
            view = tree["bufferViews"][accessor["bufferView"]]
            if view["buffer"] or "uri" in tree["buffers"][0] or "byteStride" in view:
                raise ValueError("expected the corners of fans in the file's own data, without gaps")
            place = view.get("byteOffset", 0) + accessor.get("byteOffset", 0)
            corners = np.frombuffer(binary, _INDICES[accessor["componentType"]], accessor["count"], place)
        else:
            corners = np.arange(min(tree["accessors"][fan["attributes"]["POSITION"]]["count"], MAX_POINTS + 1))
        first = np.full(max(len(corners) - 2, 0), corners[0])
        content = np.stack([first, corners[1:-1], corners[2:]], 1).astype("<u4").tobytes()
        binary += bytes(-len(binary) % 4)
        view = {"buffer": 0, "byteOffset": len(binary), "byteLength": len(content)}
        accessor = {"bufferView": len(tree["bufferViews"]), "componentType": 5125, "count": 3 * len(first)}
        tree["bufferViews"].append(view)
        tree["accessors"].append(accessor | {"type": "SCALAR"})
        fan.update(mode=_TRIANGLES, indices=len(tree["accessors"]) - 1)
        binary += content
        tree["buffers"][0]["byteLength"] = len(binary)
    content = json.dumps(tree).encode()
    content += b" " * (-len(content) % 4)
    head = struct.pack("<4s4I", b"glTF", 2, 28 + len(content) + len(binary), len(content), 0x4E4F534A)
    return head + content + struct.pack("<2I", len(binary), 0x004E4942) + binary


def _read_scene(data: bytes) -> Shape:
    """The scene, without a resolver: trimesh can open nothing else."""
    import trimesh

    logging.getLogger("trimesh").setLevel(logging.CRITICAL + 1)
    scene = trimesh.load_scene(BytesIO(data), file_type="glb", resolver={}, process=False, skip_materials=True)
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
    faces = [in_range(getattr(geometry, "faces", NO_FACES), len(geometry.vertices)) for _, geometry in parts]
    return Shape(*trimesh.util.append_faces(vertices, faces))

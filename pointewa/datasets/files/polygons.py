"""Triangles of polygons, concave ones too."""

from collections.abc import Sequence

import numpy as np

from pointewa.datasets.files.shape import NO_FACES, in_range


def triangulate(vertices: np.ndarray, polygons: np.ndarray | Sequence[Sequence[int]]) -> np.ndarray:
    """Triangles int64 ``[F, 3]`` that cover the polygons: fans of those that are convex, ear clipping of the others.

    Args:
        vertices: float64 ``[V, 3]``.
        polygons: the vertices of each, of any number. Those of fewer than three corners have no triangles.

    Raises:
        ValueError: a polygon refers to a vertex that does not exist.
    """
    if isinstance(polygons, np.ndarray):
        groups = [polygons.astype(np.int64)]
    else:
        sizes = np.array([len(polygon) for polygon in polygons])
        groups = [np.array([polygons[i] for i in np.flatnonzero(sizes == size)], np.int64) for size in np.unique(sizes)]
    return np.concatenate([NO_FACES, *(_of_one_size(vertices, in_range(group, len(vertices))) for group in groups)])


def _of_one_size(vertices: np.ndarray, polygons: np.ndarray) -> np.ndarray:
    """Triangles of polygons ``[K, S]``."""
    count, size = polygons.shape
    if size < 4:
        return polygons if size == 3 else NO_FACES
    corners = vertices[polygons] - vertices[polygons[:, :1]]  # (K, S, 3); the differences are exact far from the origin
    edges = np.roll(corners, -1, 1) - corners
    normals = np.cross(corners, np.roll(corners, -1, 1)).sum(1)  # (K, 3), twice the area (Newell)
    with np.errstate(over="ignore", invalid="ignore"):  # of vertices that are not finite, which are refused later
        turns = (np.cross(edges, np.roll(edges, -1, 1)) * normals[:, None]).sum(2)
        concave = (turns < -1e-9 * (normals**2).sum(1)[:, None]).any(1)
    fans = np.stack([np.broadcast_to(polygons[:, :1], (count, size - 2)), polygons[:, 1:-1], polygons[:, 2:]], 2)
    clipped = [_clipped(corners[i], normals[i], polygons[i]) for i in np.flatnonzero(concave)]
    return np.concatenate([fans[~concave].reshape(-1, 3), *clipped])


def _clipped(corners: np.ndarray, normal: np.ndarray, polygon: np.ndarray) -> np.ndarray:
    import mapbox_earcut

    axis = np.abs(normal).argmax()  # what is left of the coordinates shows the polygon least foreshortened
    flat = np.ascontiguousarray(np.delete(corners, axis, 1))
    return polygon[mapbox_earcut.triangulate_float64(flat, np.array([len(flat)], np.uint32)).reshape(-1, 3)]

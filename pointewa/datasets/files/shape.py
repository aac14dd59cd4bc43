"""What a file holds, and how much of it is read."""

import codecs
from typing import NamedTuple

import numpy as np

# A file beyond these is refused before memory is asked for, so that a damaged size in a header does no harm.
MAX_POINTS, MAX_BYTES = 50_000_000, 2**31
NO_FACES = np.empty((0, 3), np.int64)


class Shape(NamedTuple):
    """Vertices float64 ``[V, 3]``, and triangles int64 ``[F, 3]``, none of them for a cloud.

    If they are asked for, also the numbers that label the vertices ``[V]``, and the name of their column, none for the
    last one of columns without names.
    """

    vertices: np.ndarray
    faces: np.ndarray = NO_FACES
    labels: np.ndarray | None = None
    labelled_by: str = ""


class NoLabelsError(ValueError):
    """A file does not say clearly which labels its points have."""


def decode(data: bytes) -> str:
    """Text in UTF-8 or UTF-16, with or without its mark; what is in neither becomes U+FFFD."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16", "replace")
    if data[:2].count(0) == 1:  # of an ASCII character
        return data.decode("utf-16-le" if data[0] else "utf-16-be", "replace")
    return data.decode("utf-8-sig", "replace")


def in_range(faces: np.ndarray, vertices: int) -> np.ndarray:
    """The faces, if they refer to vertices that exist.

    Raises:
        ValueError: they do not.
    """
    if faces.size and not 0 <= faces.min() <= faces.max() < vertices:
        raise ValueError(f"faces refer to vertices {faces.min()} to {faces.max()} of {vertices}")
    return faces

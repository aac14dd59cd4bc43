"""Laser scans."""

from io import BytesIO

import numpy as np

from pointewa.datasets.files.shape import MAX_BYTES, MAX_POINTS, Shape


def read_las(data: bytes) -> Shape:
    """Points of a LAS or LAZ file, scaled and with their offset.

    Raises:
        ValueError: other numbers of points than announced, or more than are read.
    """
    import laspy

    with laspy.open(BytesIO(data), read_evlrs=False) as file:
        count, size = file.header.point_count, file.header.point_format.size
        if count > MAX_POINTS or count * size > MAX_BYTES:
            raise ValueError(f"expected at most {MAX_POINTS} points in {MAX_BYTES} bytes, found {count} announced")
        points = np.asarray(file.read().xyz, np.float64)
    if len(points) != count:
        raise ValueError(f"{count} points announced, {len(points)} found")
    return Shape(points)

"""Clouds with the parts of their points as PLY files."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pointewa.safe.files import atomic_write
from pointewa.viz.panels import rgb


def write_labelled(
    path: Path, points: np.ndarray, labels: np.ndarray, names: Sequence[str], colours: Sequence[str]
) -> None:
    """Write a binary PLY with x, y, z (double), red, green, blue (uchar) and label (int) of each point.

    Its comments say which labels there are: ``comment label 12 back``.

    Args:
        path: the file.
        points: ``[P, 3]``.
        labels: ``[P]``, indices into ``names``.
        names: of all labels.
        colours: of all labels, "#rrggbb".

    Raises:
        OSError: it cannot be written.
    """
    table = np.array([rgb(colour) for colour in colours])
    kinds = {"x": "f8", "y": "f8", "z": "f8", "red": "u1", "green": "u1", "blue": "u1", "label": "i4"}
    rows = np.empty(len(points), [(name, f"<{kind}") for name, kind in kinds.items()])
    columns = [*np.asarray(points, np.float64).T, *table[labels].T, labels]
    for name, column in zip(kinds, columns, strict=True):
        rows[name] = column
    spelt = {"f8": "double", "u1": "uchar", "i4": "int"}
    lines = ["ply", "format binary_little_endian 1.0"]
    lines += [f"comment label {label} {' '.join(names[label].split())}" for label in np.unique(labels)]
    lines += [f"element vertex {len(points)}", *(f"property {spelt[kind]} {name}" for name, kind in kinds.items())]
    header = "\n".join([*lines, "end_header", ""]).encode("ascii", "replace")
    with atomic_write(path) as temporary:
        temporary.write_bytes(header + rows.tobytes())

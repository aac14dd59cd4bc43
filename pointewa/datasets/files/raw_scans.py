"""The raw objects of ScanObjectNN, and the lists that come with them."""

import re
from pathlib import Path

import numpy as np

from pointewa.datasets.files import content
from pointewa.datasets.source import Cloud
from pointewa.safe.files import reading

BACKGROUND, OBJECT = 0, 1  # point labels
_COLUMNS = 11  # of a point: x y z, normal, colour, instance, semantic label
_SCENE = (0, 1, 2)  # semantic labels that are of no object: none, wall, floor (NYU40)


def read_list(file: Path, classes: int) -> dict[str, tuple[int, bool]]:
    """Of each object of a list its class, and whether it is for testing.

    Args:
        file: lines of ``<name>.bin``, the number of the class and, for testing, ``t``.
        classes: how many there are.

    Raises:
        DataError: something else, or nothing; an object twice in two roles.
    """
    with reading(file, "a list of objects: <name>.bin, the class's number, and t for testing"):
        found: dict[str, tuple[int, bool]] = {}
        for line in filter(str.strip, file.read_text().splitlines()):
            match = re.fullmatch(r"\s*([\w-]+\.bin)\s+(\d{1,2})(\s+t)?\s*", line, re.ASCII)
            if not match or int(match[2]) >= classes:
                raise ValueError(f"found {line[:80]!r}")
            one = int(match[2]), bool(match[3])
            if found.setdefault(match[1], one) != one:
                raise ValueError(f"found {match[1]} twice, with two classes or for training and testing")
        if not found:
            raise ValueError("it is empty")
        return found


def read_raw(path: Path) -> Cloud:
    """A raw object: little-endian float32, first how many points, then of each x y z nx ny nz r g b instance semantic.

    The points of the object are those of the most frequent semantic label but 0, 1 and 2, as the authors' own
    ``load_pc_file`` has it (https://github.com/hkust-vgd/scanobjectnn, data_utils.py); the others are its background.

    Returns:
        Points float32 ``[P, 3]`` in the coordinates of the scene, and their labels, `BACKGROUND` or `OBJECT`.

    Raises:
        DataError: damaged, or no point is of an object.
    """
    with reading(path, "a raw object of ScanObjectNN"):
        values = np.frombuffer(content(path), "<f4")
        count, rest = divmod(len(values) - 1, _COLUMNS)
        if rest or not count or values[0] != count:
            raise ValueError(
                f"expected {_COLUMNS} numbers for each of the points that it announces, found {values[0]:g} announced "
                f"and {len(values) - 1} numbers"
            )
        rows = values[1:].reshape(count, _COLUMNS)
        labels = rows[:, -2:]
        if not np.isfinite(labels).all() or (labels != np.rint(labels)).any():
            raise ValueError("instance and semantic labels: expected whole numbers, found others")
        own, counts = np.unique(labels[~np.isin(labels[:, 1], _SCENE), 1], return_counts=True)
        if not len(own):
            raise ValueError(
                f"expected points of an object, found the semantic labels {', '.join(map(str, _SCENE))} only"
            )
        of_object = labels[:, 1] == own[counts.argmax()]
        return Cloud(rows[:, :3].astype(np.float32), np.where(of_object, OBJECT, BACKGROUND).astype(np.int64))

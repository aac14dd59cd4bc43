"""Which columns hold the coordinates, by their names."""

import re
from collections.abc import Sequence

import numpy as np

from pointewa.datasets.files.shape import NoLabelsError

# What may stand about x, y and z: "pos_x", "Points:0", "X [m]", "x1". Normals and velocities are not taken for them.
_BEFORE = {"", "p", "pt", "point", "points", "pos", "position", "coord", "coords", "coordinate", "loc", "location",
           "utm", "world", "global", "local"}  # fmt: skip
_AFTER = {"", "m", "mm", "cm", "km", "ft", "meter", "meters", "metre", "metres", "pos", "position", "coord", "coords",
          "coordinate", "utm", "world", "global", "local", "1"}  # fmt: skip
_NUMBERED = {"p", "point", "points", "pos", "position", "coord", "coords", "coordinates"}
_SURVEYED = [{"easting", "east", "e"}, {"northing", "north", "n"}, {"elevation", "altitude", "height", "h", "z"}]
# What a column of labels is called, such as "label", "scalar_Label", "part_id", "Classification".
_LABEL = re.compile(r"(?:scalar|point|vertex|semantic|sem)?(?:label|part|class|classification|segment|segmentation|seg)"
                    r"(?:s|es|id|ids|label|labels|index)?")  # fmt: skip
LABELS = "label, part, class or segment"


def xyz(names: Sequence[str]) -> tuple[int, int, int]:
    """The numbers of the columns that are named x, y and z, in upper or lower case, with units or the like.

    Raises:
        ValueError: none are, or more than one triple is; with the names.
    """
    bare = [re.sub(r"(?<=\w)\W*[\[(].*?[\])]", "", name.lower()) for name in names]  # of units
    plain = [re.sub(r"[\W_]", "", name) for name in bare]
    triples = [tuple(one + letter + other for letter in "xyz") for one in _BEFORE for other in _AFTER]
    triples += [tuple(f"{one}{number}" for number in range(3)) for one in _NUMBERED]
    found = [tuple(map(plain.index, triple)) for triple in triples if set(triple) <= set(plain)]
    exact = [one for one in found if [plain[column] for column in one] == ["x", "y", "z"]]
    surveyed = [[column for column, name in enumerate(plain) if name in some] for some in _SURVEYED]
    if not found and all(len(columns) == 1 for columns in surveyed):
        found = [tuple(columns[0] for columns in surveyed)]
    chosen = exact or found
    if len(chosen) != 1 or any(plain.count(plain[column]) > 1 for column in chosen[0]):
        raise ValueError(f"expected columns named x, y and z, once each, found {', '.join(names)[:100] or 'none'}")
    return chosen[0]


def is_label(name: str) -> bool:
    """Whether a column of this name holds the labels of the points."""
    return _LABEL.fullmatch(re.sub(r"[\W_]", "", name.lower())) is not None


def label(names: Sequence[str]) -> int:
    """The number of the column that holds the labels of the points, by its name.

    Raises:
        NoLabelsError: none does, or more than one; with the names.
    """
    found = [column for column, name in enumerate(names) if is_label(name)]
    if len(found) != 1:
        several = "one column" if found else "a column"
        raise NoLabelsError(f"expected {several} of labels, named {LABELS}, found {', '.join(names)[:100] or 'none'}")
    return found[0]


def last(values: np.ndarray) -> np.ndarray:
    """The last of columns ``[P, C]`` without names, which is taken for the labels of the points if it may be.

    Raises:
        NoLabelsError: it may not.
    """
    columns = values.shape[1]
    whole = (values == np.round(values)).all(0)
    if columns < 4 or not whole[-1]:
        found = f"{columns} columns" if columns < 4 else "other numbers there"
        raise NoLabelsError(f"expected whole numbers, the labels of the points, in the last column, found {found}")
    if columns == 6 and whole[3:].all():
        raise NoLabelsError(f"its last columns may be colours or labels: name the columns, one of them {LABELS}")
    return values[:, -1]

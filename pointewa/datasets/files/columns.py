"""Which columns hold the coordinates, by their names."""

import re
from collections.abc import Sequence

# What may stand about x, y and z: "pos_x", "Points:0", "X [m]", "x1". Normals and velocities are not taken for them.
_BEFORE = {"", "p", "pt", "point", "points", "pos", "position", "coord", "coords", "coordinate", "loc", "location",
           "utm", "world", "global", "local"}  # fmt: skip
_AFTER = {"", "m", "mm", "cm", "km", "ft", "meter", "meters", "metre", "metres", "pos", "position", "coord", "coords",
          "coordinate", "utm", "world", "global", "local", "1"}  # fmt: skip
_NUMBERED = {"p", "point", "points", "pos", "position", "coord", "coords", "coordinates"}
_SURVEYED = [{"easting", "east", "e"}, {"northing", "north", "n"}, {"elevation", "altitude", "height", "h", "z"}]


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

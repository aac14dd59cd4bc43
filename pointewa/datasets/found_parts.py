"""The parts of one's own objects, from the labels that their files have."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pointewa.datasets.files import read_labelled
from pointewa.datasets.prepare import cache_dir
from pointewa.datasets.source import in_parallel
from pointewa.errors import DataError, counted
from pointewa.models.parts import Parts
from pointewa.safe.files import atomic_write, reading

NAMES = "parts.json"  # beside the folders of the classes
_MOST = 100  # parts of a class
_WHAT = 'an object such as {"chair": ["seat", "leg"], "mug": {"0": "body", "7": "handle"}}'


class FoundParts(NamedTuple):
    """The parts, and for each class the number of each label of its files."""

    parts: Parts
    numbers: tuple[Mapping[int, int], ...]


def find_parts(
    folder: Path, class_names: Sequence[str], files: Sequence[Path], labels: Sequence[int], say: Callable[[str], None]
) -> FoundParts:
    """The parts that `NAMES` lists, else those that occur, in rising order of their labels.

    Args:
        folder: with the folders of the classes.
        class_names: C names.
        files: of all splits.
        labels: of each file its class.
        say: is told which labels were found, and in which column.

    Raises:
        DataError: a list that does not fit the classes, more parts of a class than `_MOST`, a file that cannot be read.
    """
    if (folder / NAMES).is_file():
        listed = _listed(folder / NAMES, class_names)
    else:
        values, columns = _scan(files)
        found: list[set[int]] = [set() for _ in class_names]
        for label, mine in zip(labels, values, strict=True):
            found[label] |= set(mine)
        for name, mine in zip(class_names, found, strict=True):
            if len(mine) > _MOST:
                raise DataError(
                    f"{folder}: expected at most {_MOST} parts of {name}, found {len(mine)} labels from {min(mine)} to "
                    f"{max(mine)}: name the column of the labels, or list the parts in {NAMES}"
                )
        listed = [{value: f"part {value}" for value in sorted(mine)} for mine in found]
        where = ", ".join(column or "the last column" for column in columns)
        shown = [f"{name} {_ranges(list(mine))}" for name, mine in zip(class_names, listed, strict=True)]
        more = f", and of {counted(len(shown) - 10, 'class', 'es')} more" if len(shown) > 10 else ""
        say(f"note: {folder}: parts by the labels in {where}: {'; '.join(shown[:10])}{more}; {NAMES} may name them")
    numbers, names, classes = [], [], []
    for label, mine in enumerate(listed):
        numbers.append({value: len(names) + index for index, value in enumerate(mine)})
        names += mine.values()
        classes += [label] * len(mine)
    return FoundParts(Parts(tuple(names), tuple(classes)), tuple(numbers))


def _ranges(values: list[int]) -> str:
    """Rising numbers in brief: 0 to 3, 7."""
    breaks = [0, *(i for i in range(1, len(values)) if values[i] != values[i - 1] + 1), len(values)]
    runs = [(values[start], values[end - 1]) for start, end in pairwise(breaks)]
    return ", ".join(str(first) if first == last else f"{first} to {last}" for first, last in runs)


def _listed(file: Path, class_names: Sequence[str]) -> list[dict[int, str]]:
    """Of each class the names of its parts by their labels."""
    with reading(file, _WHAT):
        found: Any = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"found {type(found).__name__}")
        if set(found) != set(class_names):
            raise ValueError(f"expected the parts of {', '.join(class_names)}, found those of {', '.join(found)}")
        result = []
        for name in class_names:
            mine = found[name]
            if isinstance(mine, list):
                mine = dict(enumerate(mine))
            if not isinstance(mine, dict) or not 0 < len(mine) <= _MOST:
                raise ValueError(f"{name}: expected 1 to {_MOST} parts")
            if not all(isinstance(part, str) and part.isprintable() and part for part in mine.values()):
                raise ValueError(f"{name}: expected names of parts")
            if not all(str(label).isdecimal() and len(str(label)) < 10 for label in mine):
                raise ValueError(f"{name}: expected labels, whole numbers from 0 up, found {', '.join(map(str, mine))}")
            if len(set(map(int, mine))) < len(mine):
                raise ValueError(f"{name}: expected each label once, found {', '.join(mine)}")
            result.append({int(label): part for label, part in mine.items()})
        return result


def _scan(files: Sequence[Path]) -> tuple[list[list[int]], list[str]]:
    """Of each file the labels that occur in it, and the names of the columns; kept in the cache."""
    stats = [(str(file.resolve()), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]
    path = cache_dir() / f"labels-{hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:16]}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):  # whatever is wrong with it, it can be made again
        kept = json.loads(path.read_text())
        if len(kept["values"]) == len(files) and all(isinstance(one, int) for mine in kept["values"] for one in mine):
            return kept["values"], [str(column) for column in kept["columns"]]
    found = list(in_parallel(_values, files))
    values, columns = [mine for mine, _ in found], sorted({column for _, column in found})
    with suppress(OSError), atomic_write(path) as temporary:
        temporary.write_text(json.dumps({"values": values, "columns": columns}))
    return values, columns


def _values(file: Path) -> tuple[list[int], str]:
    cloud, column = read_labelled(file)
    values = np.unique(cloud.point_labels)
    if len(values) > _MOST:
        raise DataError(
            f"{file}: {column or 'last column'}: expected at most {_MOST} parts, found {len(values)} labels from "
            f"{values[0]} to {values[-1]}: name the column of the labels, or list the parts in {NAMES}"
        )
    return values.tolist(), column

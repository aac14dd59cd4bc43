"""Few-shot folds: a few objects of a few classes to train on, and queries of the same classes to test on.

Folds are drawn by ranks that SHA-256 gives to the names of classes and objects: they depend on neither the version of a
library, nor the order or layout of the files, nor the seed of a training. Published folds are used where they are: see
`pointewa.datasets.layouts.modelnet40`.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pointewa.datasets.source import Cloud, Source
from pointewa.errors import ConfigError, DataError, counted
from pointewa.safe.files import reading
from pointewa.safe.pickles import load_arrays

QUERIES = 20  # of each class, from the test split, as in the published folds
WHAT = "a few-shot fold: a pickle of {'train': [...], 'test': [...]}, of (points [P, 3 or more], label, class)"
_SPLITS = ("train", "test")


class Fold(NamedTuple):
    """Which fold: ``way`` classes, ``shot`` objects of each to train on, and its number from 0."""

    way: int
    shot: int
    number: int

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.way}-way {self.shot}-shot, fold {self.number}"

    def objects(self, split: str) -> int:
        """How many objects of each class are drawn from a split, "train" or "test"."""
        return self.shot if split == "train" else QUERIES


class Chosen(NamedTuple):
    """What a fold has of a split.

    Args:
        rows: which of its objects.
        labels: of these, 0 to ``way`` - 1.
        class_names: the classes by these labels.
    """

    rows: list[int]
    labels: list[int]
    class_names: tuple[str, ...]


def drawn(source: Source, split: str, fold: Fold) -> Chosen:
    """The part of a drawn fold that is of a split: its support set ("train") or its queries ("test").

    Args:
        source: the split.
        split: "train" or "test".
        fold: which one.

    Raises:
        ConfigError: the set has fewer classes than ``fold.way``.
        DataError: a class of the set, drawn or not, has too few objects.
    """
    names, needed = source.class_names, fold.objects(split)
    if fold.way > len(names):
        raise ConfigError(f"data.way: expected at most {len(names)}, the classes of {source.path}, found {fold.way}")
    counts = np.bincount(source.labels, minlength=len(names)).tolist()
    if few := [f"{name} has {count}" for name, count in zip(names, counts, strict=True) if count < needed]:
        purpose = f"{fold.shot} shots" if split == "train" else f"{QUERIES} queries"
        shown = ", ".join(few[:5]) + f" and {len(few) - 5} more" * (len(few) > 5)
        remedy = "lower data.shot, or leave such classes out" if split == "train" else "leave such classes out"
        raise DataError(f"{source.path}: expected at least {needed} objects of every class in the {split} split, for "
                        f"{purpose}, found fewer of {counted(len(few), 'class', 'es')}: {shown}: {remedy}")  # fmt: skip
    key, rows = [*fold], []
    classes = sorted(range(len(names)), key=lambda label: _rank(*key, names[label]))[: fold.way]
    for label in classes:
        members = np.flatnonzero(source.labels == label).tolist()
        members.sort(key=lambda row: _rank(*key, split, source.object_names[row]))
        rows += members[:needed]
    return Chosen(rows, [label for label in range(fold.way) for _ in range(needed)], tuple(names[i] for i in classes))


def _rank(*key: Any) -> bytes:
    return hashlib.sha256(json.dumps(key).encode()).digest()


def fold_file(folders: Iterable[Path], fold: Fold) -> Path | None:
    """The published file of a fold in the first of the folders that exists; None if there is no such folder, or none of
    this way and shot in it.

    Raises:
        DataError: the setting is there, without this fold.
    """
    place = next((folder for folder in folders if folder.is_dir()), None)
    settings = () if place is None else (place / f"{fold.way}way{between}{fold.shot}shot" for between in ("_", ""))
    folder = next((one for one in settings if one.is_dir()), None)
    if folder is None:
        return None
    file = folder / f"{fold.number}.pkl"
    if not file.is_file():
        raise DataError(f"{file}: no such file, though {folder} has published folds: get the archive again, set "
                        "data.fold to one of its files, or move it away for folds that this library draws")  # fmt: skip
    return file


def open_fold(path: Path, split: str, fold: Fold, num_points: int, class_names: Sequence[str]) -> Source:
    """The support set ("train") or the queries ("test") of a published fold.

    Args:
        path: the pickle.
        split: "train" or "test".
        fold: which one.
        num_points: how many points an object must have.
        class_names: of the data set, which the file numbers.

    Raises:
        DataError: damaged, other than a fold, not of so many classes and objects, or with too few points.
    """
    content = load_arrays(path)
    with reading(path, WHAT):
        if not isinstance(content, dict) or not all(isinstance(content.get(one), list | tuple) for one in _SPLITS):
            raise ValueError(f"expected the lists train and test, found {type(content).__name__}")
        numbers: dict[int, int] = {}  # of the classes, by their labels in the fold
        for one in _SPLITS:
            _check(content[one], one, fold, len(class_names), numbers)
        if len(set(numbers.values())) < fold.way:
            raise ValueError("two labels are of the same class")
        shapes = sorted({np.shape(item[0]) for one in _SPLITS for item in content[one]})
        if len(shapes) > 1:
            raise ValueError(f"clouds of the shapes {', '.join(map(str, shapes[:3]))}")
        clouds = [np.asarray(item[0]) for item in content[split]]
    size = shapes[0][0]
    if size < num_points:
        raise DataError(f"{path}: an object has {size} points, data.num_points asks for {num_points}: lower it")

    def read(count: int) -> Iterator[Cloud]:
        for cloud in clouds:
            yield Cloud(np.ascontiguousarray(cloud[:, :3], np.float32))

    names = tuple(class_names[numbers[label]] for label in range(fold.way))
    labels = np.array([int(np.asarray(item[1]).item()) for item in content[split]], np.int64)
    objects = tuple(f"{path.parent.name}/{path.stem}/{split}/{index}" for index in range(len(labels)))
    return Source("published few-shot fold", path, (path,), names, objects, labels, size, read)


def _check(items: Sequence[Any], split: str, fold: Fold, classes: int, numbers: dict[int, int]) -> None:
    """Check the items of a split, and add the numbers of their classes by their labels.

    Raises:
        ValueError: saying what is wrong.
    """
    expected = fold.way * fold.objects(split)
    if len(items) != expected:
        raise ValueError(f"{split}: expected {expected} objects for {fold.name}, found {len(items)}")
    counts = [0] * fold.way
    for index, item in enumerate(items):
        where = f"{split}, object {index}"
        if not isinstance(item, list | tuple) or len(item) != 3:
            raise ValueError(f"{where}: expected points, label and class, found {type(item).__name__}")
        points, label, number = (np.asarray(one) for one in item)
        if points.ndim != 2 or points.shape[1] < 3 or points.dtype.kind not in "iuf":
            raise ValueError(f"{where}: expected real points [P, 3 or more], found {points.dtype} {list(points.shape)}")
        if not all(one.size == 1 and one.dtype.kind in "iu" for one in (label, number)):
            raise ValueError(f"{where}: its label or class is no whole number")
        label, number = int(label.item()), int(number.item())
        if not 0 <= label < fold.way or not 0 <= number < classes:
            raise ValueError(f"{where}: expected a label below {fold.way} and a class below {classes}, found {label} "
                             f"and {number}")  # fmt: skip
        if numbers.setdefault(label, number) != number:
            raise ValueError(f"{where}: label {label} is of class {numbers[label]}, and here of class {number}")
        counts[label] += 1
    if len(set(counts)) > 1:
        raise ValueError(f"{split}: expected as many objects of every class, found {counts}")

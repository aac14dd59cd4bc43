"""The Labeled Princeton Segmentation Benchmark: 380 meshes of 19 categories, whose faces people labelled by 94 parts.

The meshes are those of Chen et al. (SIGGRAPH 2009), the labels those of Kalogerakis et al. (SIGGRAPH 2010). What is
read is one NumPy archive of points drawn on them: ``xyz`` ``[n, P, 3]``, ``part`` ``[n, P]``, ``label`` ``[n]``,
``name`` ``[n]`` (``<category>/<number of the mesh>``), ``classes`` ``[C]``, ``part_name`` and ``part_class`` ``[M]``.
Most meshes stand with y up, but not all; they are taken as they are.
"""

import re
import sys
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from pointewa.datasets import packed
from pointewa.datasets.inspect.download import BY_REQUEST
from pointewa.datasets.source import Cloud, Source
from pointewa.errors import DataError
from pointewa.models.parts import Parts
from pointewa.safe.files import reading

FOLDS = 5
DEFAULT = "fold0"
OBJECTS, CATEGORIES, PARTS = 380, 19, 94
CHECKED = "the whole benchmark"  # by `check_split`: it has no official split
_LARGEST = 2**31  # bytes when unpacked
_ARRAYS = ("xyz", "part", "label", "name", "classes", "part_name", "part_class")
_WHAT = f"a NumPy archive with {', '.join(_ARRAYS)}"


def check_split(source: Source, split: str) -> list[str]:
    """What is missing from a split, or too much in it, compared with all of the benchmark."""
    expected = {"train": OBJECTS - OBJECTS // FOLDS, "test": OBJECTS // FOLDS}[split]
    parts = len(source.parts) if source.parts else 0
    found = {
        "objects": (len(source), expected),
        "categories": (len(source.class_names), CATEGORIES),
        "parts": (parts, PARTS),
    }
    return [f"{have} {what}, expected {want}" for what, (have, want) in found.items() if have != want]


def source(root: str, split: str, num_points: int, variant: str | None = None) -> Source:
    """A split of the benchmark, which comes without one: the objects whose number leaves a certain rest when it is
    divided by five are tested on. Numbers of a category follow each other, so each fold has 4 of its 20 objects.

    Args:
        root: the folder that holds ``labeled_psb*.npz``, or this file, or a packed file.
        split: "train" or "test".
        num_points: how many points an object must have.
        variant: "fold0" (the default, which a note says) to "fold4": the objects of each category that are tested on,
            in the order of their numbers every fifth, from the first, the second, ... on.

    Raises:
        DataError: an unknown variant, nothing found, a damaged file, a point whose part is not one of its category.
    """
    folds = [f"fold{number}" for number in range(FOLDS)]
    if variant not in (None, *folds):
        raise DataError(f"data.variant: expected one of {', '.join(folds)} for labeled_psb, found {variant!r}")
    where, fold = Path(root), folds.index(variant or DEFAULT)
    files = [where] if where.is_file() else sorted(where.glob("labeled_psb*.npz"))
    packs = [] if where.is_file() else sorted(where.glob(f"labeled_psb_{folds[fold]}*.h5"))
    if packs or (where.is_file() and not zipfile.is_zipfile(where)):
        found = packed.source(packed.with_points(packs, split, num_points) if packs else where, split)
        with reading(found.path, "objects named <category>/<number>"):
            same = len(_rows(found.object_names, fold, split)) == len(found)
        if not same:
            raise DataError(f"data.variant: expected the fold that {found.path} was packed of, found {folds[fold]}: "
                            "set that one, or data.root to the archive that it was packed from")  # fmt: skip
    elif files:
        found = _open(files[0], split, fold)
    else:
        raise DataError(f"The Labeled Princeton Segmentation Benchmark was not found.\nLooked for labeled_psb*.npz in "
                        f"{where.resolve()}.\n{BY_REQUEST['labeled_psb']}")  # fmt: skip
    if variant is None and split == "test":
        print(f"note: {found.path}: tested on is {DEFAULT}, every fifth object: data.variant says otherwise",
              file=sys.stderr)  # fmt: skip
    return replace(found, variant=folds[fold])


def _open(file: Path, split: str, fold: int) -> Source:
    with reading(file, _WHAT), np.load(file, allow_pickle=False) as archive:
        if (size := sum(member.file_size for member in archive.zip.infolist())) > _LARGEST:
            raise ValueError(f"expected at most {_LARGEST} bytes when unpacked, found {size}")
        if missing := [name for name in _ARRAYS if name not in archive]:
            raise ValueError(f"{missing[0]} is missing")
        xyz, part, label, names, classes, part_names, part_classes = (archive[name] for name in _ARRAYS)
        _check(xyz, part, label, names, classes, part_names, part_classes)
        chosen = _rows(names.tolist(), fold, split)
        if not len(chosen):
            raise ValueError(f"it has no objects of {split} in fold{fold}")
        index = {name: number for number, name in enumerate(classes.tolist())}
        parts = Parts(tuple(part_names.tolist()), tuple(index[name] for name in part_classes.tolist()))
    label, part = label.astype(np.int64), part.astype(np.int64)
    inside = (part >= 0) & (part < len(parts))
    wrong = ~(inside & (np.array(parts.classes)[np.where(inside, part, 0)] == label[:, None]))
    if wrong.any():
        one, point = np.argwhere(wrong)[0]
        raise DataError(f"{file}: {names[one]}: point {point} has part {part[one, point]}, which is none of its "
                        "category's: get the file again, it is damaged")  # fmt: skip

    def clouds(count: int) -> Iterator[Cloud]:
        return (Cloud(xyz[one].astype(np.float32), part[one]) for one in chosen)

    return Source(f"Labeled PSB, fold{fold}", file, (file,), tuple(classes.tolist()), tuple(names[chosen].tolist()),
                  label[chosen], xyz.shape[1], clouds, point_labels=True, parts=parts)  # fmt: skip


def _rows(names: Sequence[str], fold: int, split: str) -> np.ndarray:
    """Which objects a split has."""
    numbers = [re.fullmatch(r".*?/(\d{1,9})", name) for name in names]
    if None in numbers:
        raise ValueError(f"name: expected <category>/<number>, found {names[numbers.index(None)][:60]!r}")
    tested = np.array([(int(number[1]) - 1) % FOLDS == fold for number in numbers])
    return np.flatnonzero(tested if split == "test" else ~tested)


def _check(
    xyz: np.ndarray,
    part: np.ndarray,
    label: np.ndarray,
    names: np.ndarray,
    classes: np.ndarray,
    part_names: np.ndarray,
    part_classes: np.ndarray,
) -> None:
    """Refuse arrays that do not fit together."""
    texts = (names, classes, part_names, part_classes)
    shapes = [list(one.shape) for one in (xyz, part, label, *texts)]
    n, m = label.shape, part_names.shape
    if xyz.ndim != 3 or xyz.shape[2] != 3 or 0 in xyz.shape or {len(n), len(m), classes.ndim} != {1} or shapes != [
        [*n, xyz.shape[1], 3], [*n, xyz.shape[1]], [*n], [*n], [len(classes)], [*m], [*m],
    ]:  # fmt: skip
        raise ValueError(f"expected {', '.join(_ARRAYS)} to fit together, found {', '.join(map(str, shapes))}")
    if xyz.dtype.kind not in "fiu" or part.dtype.kind not in "iu" or label.dtype.kind not in "iu":
        raise ValueError(f"xyz, part, label: expected numbers, found {xyz.dtype}, {part.dtype}, {label.dtype}")
    if any(one.dtype.kind != "U" for one in texts):
        raise ValueError(f"expected names as text, found {', '.join(str(one.dtype) for one in texts)}")
    if len(set(classes.tolist())) < len(classes) or (strange := set(part_classes.tolist()) - set(classes.tolist())):
        raise ValueError("classes: expected each once" if len(set(classes.tolist())) < len(classes)
                         else f"part_class: expected one of classes, found {min(strange)!r}")  # fmt: skip

"""Sydney Urban Objects (De Deuge et al., ACRA 2013): objects of streets as a LiDAR on a vehicle sees them.

588 objects of 14 classes in four folds, each of which is the test set once while the others are trained on; the field
reports the weighted F1, averaged over the folds. 43 objects of 12 more classes are in no fold, and are not read.

z points down in the files, which are in metres about the sensor; an object has 13 to 13,704 points, from one side.
"""

import re
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from pointewa.datasets import packed
from pointewa.datasets.inspect.download import BY_REQUEST
from pointewa.datasets.source import Cloud, Source, say_once
from pointewa.errors import DataError
from pointewa.ops import turn_up
from pointewa.safe.files import printable, reading

# Objects of each class in folds 0 to 3.
OFFICIAL = {
    "4wd": (5, 6, 4, 6), "building": (5, 5, 5, 5), "bus": (5, 3, 3, 5), "car": (23, 20, 21, 24),
    "pedestrian": (37, 36, 34, 45), "pillar": (6, 5, 4, 5), "pole": (6, 5, 4, 6), "traffic_lights": (10, 18, 8, 11),
    "traffic_sign": (11, 18, 11, 11), "tree": (8, 8, 8, 10), "truck": (3, 3, 3, 3), "trunk": (14, 13, 15, 13),
    "ute": (4, 4, 4, 4), "van": (9, 11, 8, 7),
}  # fmt: skip
CLASSES = tuple(OFFICIAL)
FOLDS = ("fold0", "fold1", "fold2", "fold3")
METRICS = ("f1",)  # that the field reports
UP = "-z"
# The records of .bin files, without gaps.
RECORD = np.dtype([("t", "<i8"), ("intensity", "u1"), ("id", "u1"), ("x", "<f4"), ("y", "<f4"), ("z", "<f4"),
                   ("azimuth", "<f4"), ("range", "<f4"), ("pid", "<i4")])  # fmt: skip
_FOLDERS = ("", "sydney-urban-objects-dataset")
_NPZ = "sydney_urban_objects.npz"
_KEYS = ("xyz", "offset", "label", "fold", "classes", "name")
_NAME = re.compile(r"([\w-]{1,60})\.\d{1,9}\.\d{1,9}", re.ASCII)
_MAX_BYTES = 1 << 30  # of an archive when unpacked

ACCEPTED = f"""\
  {_FOLDERS[1]}/: objects/<class>.<number>.<scan>.csv (or .bin), folds/fold{{0,1,2,3}}.txt, as published
  {_NPZ}: {", ".join(_KEYS)}
  sydney_<fold>*.h5: made by make data WHAT=pack"""


class _Found(NamedTuple):
    """All objects of the folds: names, classes, folds, and how their points are read; and what is left out."""

    files: Sequence[Path]
    names: Sequence[str]
    classes: Sequence[str]
    folds: Sequence[int]
    read: Callable[[int], np.ndarray]
    left_out: Mapping[str, Sequence[str]]


def check_split(source: Source, split: str) -> list[str]:
    """What is missing from a split, or too much in it, compared with the official folds."""
    found = tuple(np.bincount(source.labels, minlength=len(source.class_names)).tolist())
    named = [fold for fold, name in enumerate(FOLDS) if source.layout.endswith(name)] or range(len(FOLDS))
    counts = [tuple(mine[fold] if split == "test" else sum(mine) - mine[fold] for mine in OFFICIAL.values())
              for fold in named]  # fmt: skip
    if source.class_names != CLASSES:
        return [f"expected the classes {', '.join(CLASSES)}, found {', '.join(source.class_names)}"]
    if found in counts:
        return []
    if len(counts) > 1:
        return [f"{sum(found)} objects, expected those of one of the folds: {', '.join(str(sum(c)) for c in counts)}"]
    return [f"{name}: {mine} objects, expected {wanted}"
            for name, mine, wanted in zip(CLASSES, found, counts[0], strict=True) if mine != wanted]  # fmt: skip


def source(root: str, split: str, num_points: int, variant: str | None = None) -> Source:
    """A split of Sydney Urban Objects, turned so that y is up.

    Args:
        root: a folder that holds one of `ACCEPTED`, or one of these itself.
        split: "train" for three folds, "test" for the other one.
        num_points: how many points an object must have in packed files; other clouds with fewer repeat theirs.
        variant: the fold to test on, one of `FOLDS`; None for the first, with a note.

    Raises:
        DataError: an unknown fold, nothing found, damaged files.
    """
    if variant not in (None, *FOLDS):
        raise DataError(f"data.variant: expected one of {', '.join(FOLDS)} for sydney, found {variant!r}")
    path = Path(root)
    packs = [path] if path.suffix == ".h5" else sorted(path.glob(f"sydney_{variant or FOLDS[0]}*.h5"))
    if packs:
        return _packed(packed.with_points(packs, split, num_points), split, variant)
    if variant is None:
        say_once(f"note: data.variant does not say which fold is the test set: {FOLDS[0]} of {', '.join(FOLDS)}")
    variant = variant or FOLDS[0]
    layout, place, found = _find(path)
    testing = FOLDS.index(variant)
    chosen = [index for index, fold in enumerate(found.folds) if (fold == testing) == (split == "test")]
    if not chosen:
        raise DataError(f"{place}: no objects of the {split} split of {variant}: get the data again, it is incomplete")

    def clouds(count: int) -> Iterator[Cloud]:
        for index in chosen:
            yield Cloud(turn_up(torch.from_numpy(found.read(index)), UP).numpy())

    made = Source(
        f"{layout}, {variant}", place, tuple(found.files), CLASSES, tuple(found.names[index] for index in chosen),
        np.array([CLASSES.index(found.classes[index]) for index in chosen]), None, clouds, up=UP,
        left_out=found.left_out, variant=variant,
    )  # fmt: skip
    if problems := check_split(made, split):
        more = ", ..." * (len(problems) > 1)
        print(f"note: {place}: {split} is not the official {variant}: {problems[0]}{more}", file=sys.stderr)
    return made


def _packed(file: Path, split: str, variant: str | None) -> Source:
    found = packed.source(file, split, variants=FOLDS)
    if variant and found.variant != variant:
        raise DataError(
            f"data.variant={variant}: {file} has the folds as they were divided when it was packed, and does not say "
            f"that it is of {variant}: leave the key out, or point DATA_ROOT at the data set"
        )
    return found


def _find(root: Path) -> tuple[str, Path, _Found]:
    """The name of the layout that is there, where it is, and all that is in it."""
    archives = [root] if root.suffix == ".npz" else [root / folder / _NPZ for folder in _FOLDERS]
    for file in archives:
        if file.is_file():
            return _NPZ, file, _open_npz(file)
    for folder in (root / name for name in _FOLDERS):
        if (folder / "folds").is_dir() and (folder / "objects").is_dir():
            return _FOLDERS[1], folder / "objects", _open_published(folder)  # which messages about clouds name
    raise DataError(
        f"Sydney Urban Objects was not found.\nLooked in {root.resolve()} and its folder {_FOLDERS[1]} for one of\n"
        f"{ACCEPTED}\n{BY_REQUEST['sydney']}"
    )


def _open_published(folder: Path) -> _Found:
    files, names, folds, lists = [], [], [], []
    missing: list[str] = []
    for fold, name in enumerate(FOLDS):
        lists.append(listed := folder / "folds" / f"{name}.txt")
        with reading(listed, "a list of the objects of a fold, one a line"):
            lines = [line.strip() for line in listed.read_text(encoding="utf-8").splitlines() if line.strip()]
            for line in lines:
                stem = line.removesuffix(".csv").removesuffix(".bin")
                if not _NAME.fullmatch(stem) or stem.partition(".")[0] not in CLASSES:
                    raise ValueError(f"expected names such as car.0.2299.csv of the 14 classes, found {line[:80]!r}")
                there = [
                    path for suffix in (".csv", ".bin") if (path := folder / "objects" / f"{stem}{suffix}").is_file()
                ]
                missing += [] if there else [line]
                files.append(there[0] if there else folder)
                names.append(stem)
                folds.append(fold)
    if missing:
        raise DataError(
            f"{folder / 'objects'}: {len(missing)} of {len(names)} files that folds/ lists are missing, the first is "
            f"{missing[0]}: get the archive again, it is incomplete"
        )
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{folder / 'folds'}: {twice} is twice in the lists: get the archive again, it is damaged")
    others = sorted({path.stem for path in (folder / "objects").iterdir() if path.suffix in (".csv", ".bin")}
                    - set(names))  # fmt: skip
    left_out = {"in no fold": [printable(name) for name in others]} if others else {}
    classes = [name.partition(".")[0] for name in names]
    return _Found([*lists, *files], names, classes, folds, lambda index: _read(files[index]), left_out)


def _read(file: Path) -> np.ndarray:
    """float32 ``[P, 3]`` of a .csv (columns t, intensity, id, x, y, z, azimuth, range, pid) or .bin file."""
    with reading(file, f"records of {', '.join(RECORD.names)}"):
        if file.suffix == ".bin":
            data = file.read_bytes()
            if not data or len(data) % RECORD.itemsize:
                raise ValueError(f"expected records of {RECORD.itemsize} bytes, found {len(data)} bytes")
            records = np.frombuffer(data, RECORD)
            return np.stack([records[axis] for axis in "xyz"], 1)
        rows = [line.split(",") for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not rows or any(len(row) != len(RECORD.names) for row in rows):
            raise ValueError(f"expected rows of {len(RECORD.names)} columns, found {len(rows)} rows")
        return np.array([row[3:6] for row in rows], np.float32)


def _open_npz(file: Path) -> _Found:
    with reading(file, f"an archive of NumPy with {', '.join(_KEYS)}"):
        with zipfile.ZipFile(file) as archive:
            if sum(member.file_size for member in archive.infolist()) > _MAX_BYTES:
                raise ValueError(f"expected at most {_MAX_BYTES} bytes when unpacked")
        with np.load(file, allow_pickle=False) as arrays:
            if missing := [key for key in _KEYS if key not in arrays]:
                raise ValueError(f"{missing[0]} is missing")
            xyz, offset, label, fold, classes, names = (arrays[key] for key in _KEYS)
        count = len(names) if names.ndim == 1 else -1
        if xyz.dtype.kind != "f" or xyz.ndim != 2 or xyz.shape[1] != 3:
            raise ValueError(f"xyz: expected real numbers [sum, 3], found {xyz.dtype} {list(xyz.shape)}")
        for key, values, size in (("offset", offset, count + 1), ("label", label, count), ("fold", fold, count)):
            if values.dtype.kind not in "iu" or values.shape != (size,):
                raise ValueError(f"{key}: expected whole numbers [{size}], found {values.dtype} {list(values.shape)}")
        offset = offset.astype(np.int64)
        if offset[0] or offset[-1] != len(xyz) or (np.diff(offset) < 1).any():
            raise ValueError(f"offset: expected rising numbers from 0 to {len(xyz)}")
        if classes.ndim != 1 or not {classes.dtype.kind, names.dtype.kind} <= {"U", "S"}:
            raise ValueError("classes, name: expected lists of text")
        classes, names = classes.astype("U"), names.astype("U")
        if not count or label.min() < 0 or label.max() >= len(classes):
            raise ValueError(f"label: expected 0 to {len(classes) - 1}")
        of = [printable(str(classes[one])) for one in label.tolist()]
        texts = [printable(str(name)) for name in names.tolist()]
    used = [index for index in range(count) if of[index] in CLASSES and 0 <= fold[index] < len(FOLDS)]
    others = [texts[index] for index in sorted(set(range(count)) - set(used))]
    places = [(int(offset[index]), int(offset[index + 1])) for index in used]
    return _Found(
        [file], [texts[index] for index in used], [of[index] for index in used], [int(fold[index]) for index in used],
        lambda index: np.ascontiguousarray(xyz[slice(*places[index])]), {"in no fold": others} if others else {},
    )  # fmt: skip

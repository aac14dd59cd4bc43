"""ShapeNetPart (Yi et al., SIGGRAPH Asia 2016): objects of 16 categories whose points are labelled by 50 parts."""

import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pointewa.datasets import packed
from pointewa.datasets.inspect.download import BY_REQUEST
from pointewa.datasets.source import Cloud, Source, in_parallel
from pointewa.errors import DataError, counted
from pointewa.models.parts import Parts
from pointewa.safe.files import reading
from pointewa.safe.hdf5 import dataset, open_hdf5, read_labels

# Categories and parts in the order of the published labels. The files number the parts only; these names are those in
# use among public codebases, shortened. They do not agree on those of lamps.
CATEGORIES = {
    "02691156": ("Airplane", "body", "wing", "tail", "engine"),
    "02773838": ("Bag", "handle", "body"),
    "02954340": ("Cap", "crown", "peak"),
    "02958343": ("Car", "roof", "hood", "wheel", "body"),
    "03001627": ("Chair", "back", "seat", "leg", "arm"),
    "03261776": ("Earphone", "earcup", "headband", "wire"),
    "03467517": ("Guitar", "head", "neck", "body"),
    "03624134": ("Knife", "blade", "handle"),
    "03636649": ("Lamp", "part 0", "part 1", "part 2", "part 3"),
    "03642806": ("Laptop", "keyboard", "screen"),
    "03790512": ("Motorbike", "gas tank", "seat", "wheel", "handlebars", "light", "frame"),
    "03797390": ("Mug", "handle", "cup"),
    "03948459": ("Pistol", "barrel", "handle", "trigger"),
    "04099429": ("Rocket", "body", "fin", "nose"),
    "04225987": ("Skateboard", "wheel", "deck", "belt"),
    "04379243": ("Table", "top", "leg", "drawer"),
}
_PARTS = [(part, number) for number, (_, *mine) in enumerate(CATEGORIES.values()) for part in mine]
PARTS = Parts(*zip(*_PARTS, strict=True))
_FIRST = [PARTS.classes.index(number) for number in range(len(CATEGORIES))]  # part of each category
# Of each variant the published lists, or HDF5 files, that make up a split; and how many objects those have, the latter
# with nine of both train and val twice.
VARIANTS = {
    "trainval": {"train": ("train", "val"), "test": ("test",)},
    "official_val": {"train": ("train",), "test": ("val",)},
}
DEFAULT = "trainval"
SIZES = {
    "trainval": {"train": (13998, 14007), "test": (2874,)},
    "official_val": {"train": (12137,), "test": (1870,)},
}
SHARED = {"trainval": 26, "official_val": 9}  # objects that the official lists have in both splits
_NAME = "shapenetcore_partanno_segmentation_benchmark_v0"
_HDF5 = ("hdf5_data", "shapenet_part_seg_hdf5_data")
_FOLDERS = ("", f"{_NAME}_normal", _NAME, *_HDF5)
_WHAT = "HDF5 with the datasets data [n, P, 3], label [n, 1] and pid [n, P]"


def check_split(source: Source, split: str) -> list[str]:
    """What is missing from a split, or too much in it, compared with the official sizes."""
    sizes = [size for one in SIZES.values() for size in one[split]]
    problems = [] if source.parts == PARTS else [f"other parts than the {len(PARTS)} official ones"]
    if len(source) not in sizes:
        problems.append(f"{len(source)} objects, expected {sizes[0]}")
    return problems


def source(root: str, split: str, num_points: int, variant: str | None = None) -> Source:
    """A split of ShapeNetPart, y up, from the text files with the published lists, else from the HDF5 files.

    Notes on stderr say what differs from the official split: other numbers of objects, objects that the lists name and
    that are not there, and objects that are in both splits, as 26 of the official one are.

    Args:
        root: the folder of the text or the HDF5 files, or one or two levels above it, or a packed file.
        split: "train" or "test".
        num_points: how many points an object must have in the HDF5 files, whose objects have 2048; those of the text
            files differ, and where one has fewer its points are repeated.
        variant: "trainval" (the default): the published train and val are trained on, as is usual, and test is tested
            on; "official_val": train is trained on, and val is tested on.

    Raises:
        DataError: an unknown variant, nothing found, damaged lists or files, a point whose part is not one of its
            category.
    """
    asked, variant = variant, variant or DEFAULT
    if variant not in VARIANTS:
        raise DataError(f"data.variant: expected one of {', '.join(VARIANTS)} for shapenetpart, found {variant!r}")
    places = [Path(root, top, folder) for top in ("", "ShapeNetPart", "shapenetpart") for folder in _FOLDERS]
    packs = [path for place in places for path in sorted(place.glob(f"shapenetpart_{variant}*.h5"))]
    texts = [place for place in places if (place / "train_test_split").is_dir()]
    files = [place for place in places if any(place.glob("ply_data_train*.h5"))]
    if Path(root).is_file() or packs:
        file = Path(root) if Path(root).is_file() else packed.with_points(packs, split, num_points)
        found = packed.source(file, split, variant=asked, variants=VARIANTS)
    elif texts:
        found = _open_text(texts[0], split, variant)
    elif files:
        found = _open_hdf5(files[0], split, variant)
    else:
        raise DataError(
            f"ShapeNetPart was not found.\nLooked for train_test_split/shuffled_train_file_list.json and "
            f"ply_data_train0.h5 in {Path(root).resolve()}, its folders {', '.join(_FOLDERS[1:])}, and the same in "
            f"ShapeNetPart.\n{BY_REQUEST['shapenetpart']}"
        )
    if len(found) not in (expected := SIZES[variant][split]):
        note = f"{counted(len(found), 'object')} in {split}, the official split of {variant} has {expected[0]}"
        print(f"note: {found.path}: {note}", file=sys.stderr)
    return found


class _Object(NamedTuple):
    synset: str
    name: str
    files: tuple[Path, ...]  # the points with their parts, or the points and their parts

    @property
    def category(self) -> int:
        return list(CATEGORIES).index(self.synset)


def _open_text(folder: Path, split: str, variant: str) -> Source:
    lists = {name: folder / "train_test_split" / f"shuffled_{name}_file_list.json" for name in ("train", "val", "test")}
    wanted = {one: [_names(lists[name]) for name in names] for one, names in VARIANTS[variant].items()}
    names = {one: list(dict.fromkeys(name for mine in found for name in mine)) for one, found in wanted.items()}
    both = sorted(set(names["train"]) & set(names["test"]))
    if both and split == "train":
        note = f"{counted(len(both), 'object')} to train on, such as {'/'.join(both[0])}, in the test split too"
        print(f"note: {folder}: {note}, as {SHARED[variant]} of the official {variant} are: kept", file=sys.stderr)
    present = {synset: _present(folder / synset) for synset in dict(names[split])}
    mine = [_Object(synset, name, files) for synset, name in names[split] if (files := present[synset].get(name))]
    missing = [name for name in names[split] if name[1] not in present[name[0]]]
    if not mine:
        raise DataError(
            f"{folder}: none of {counted(len(missing), 'object')} of {split} that its train_test_split names is there, "
            f"such as {'/'.join(missing[0])}.txt: get the archive again, it is incomplete"
        )
    if missing:
        note = f"of {counted(len(names[split]), 'object')} of {split} that the lists name {len(missing)} are missing"
        print(f"note: {folder}: {note}, such as {'/'.join(missing[0])}: left out", file=sys.stderr)

    def clouds(count: int) -> Iterator[Cloud]:
        yield from in_parallel(_read, mine)

    where = tuple(file for one in mine for file in one.files)
    labels = np.array([one.category for one in mine], np.int64)
    return Source(f"ShapeNetPart, {variant}", folder, where, tuple(names[0] for names in CATEGORIES.values()),
                  tuple(f"{one.synset}/{one.name}" for one in mine), labels, None, clouds, point_labels=True,
                  parts=PARTS, variant=variant)  # fmt: skip


def _names(file: Path) -> list[tuple[str, str]]:
    """Synset and name of each object of a list."""
    with reading(file, "a list of shape_data/<synset>/<name>"):
        found: Any = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, list) or not found:
            raise ValueError(f"found {type(found).__name__} of no objects")
        names = [re.fullmatch(r"shape_data/(\d{8})/([\w-]+)", str(one), re.ASCII) for one in found]
        if None in names:
            raise ValueError(f"found {str(found[names.index(None)])[:60]!r}")
        pairs = [(name[1], name[2]) for name in names]
        if strange := [synset for synset, _ in pairs if synset not in CATEGORIES]:
            raise ValueError(f"found the synset {strange[0]}, which is none of the {len(CATEGORIES)} categories")
        return pairs


def _present(folder: Path) -> dict[str, tuple[Path, ...]]:
    """The files of each object of a category by its name: text files as published with normals, or those before."""
    points, parts = folder / "points", folder / "points_label"
    if not points.is_dir():
        return {name.removesuffix(".txt"): (folder / name,) for name in _entries(folder) if name.endswith(".txt")}
    names, labels = _entries(points), _entries(parts)
    if labels and not any(name.endswith(".seg") for name in labels):
        raise DataError(
            f"{parts}: expected <object>.seg with the part of each point, found {min(labels)}: it is "
            f"shapenetcore_partanno_v0, use {_NAME} or {_NAME}_normal"
        )
    return {
        name: (points / f"{name}.pts", parts / f"{name}.seg")
        for name in (one.removesuffix(".pts") for one in names)
        if f"{name}.seg" in labels
    }


def _entries(folder: Path) -> set[str]:
    """Names of what is in a folder, in one call for thousands of files; nothing if it is not there."""
    return {entry.name for entry in os.scandir(folder)} if folder.is_dir() else set()


def _read(one: _Object) -> Cloud:
    if len(one.files) == 1:
        lines, values = _rows(one.files[0], 7)
        return Cloud(np.float32(values[:, :3]), _parts(values[:, 6], one.category, one.files[0], lines))
    _, points = _rows(one.files[0], 3)
    lines, values = _rows(one.files[1], 1)
    if len(points) != len(values):
        raise DataError(f"{one.files[1]}: expected the parts of the {len(points)} points of {one.files[0].name}, found "
                        f"{len(values)}: get the files again, they are damaged or incomplete")  # fmt: skip
    # Counted from 1 in each category.
    labels = values[:, 0] + (_FIRST[one.category] - 1)
    return Cloud(np.float32(points), _parts(labels, one.category, one.files[1], lines, counted=values[:, 0]))


def _rows(file: Path, columns: int) -> tuple[list[int], np.ndarray]:
    """Numbers of the lines, and their values float64 ``[P, columns]``."""
    with reading(file, f"rows of {columns} numbers"):
        lines = [(number, line) for number, line in enumerate(file.read_text().splitlines(), 1) if line.strip()]
        if not lines:
            raise ValueError("it has no rows")
        values = np.loadtxt([line for _, line in lines], ndmin=2, comments=None)
        if values.shape[1] != columns:
            raise ValueError(f"found {values.shape[1]} in a row")
        return [number for number, _ in lines], values


def _parts(
    labels: np.ndarray, category: int, file: Path, lines: Sequence[int] | str, counted: np.ndarray | None = None
) -> np.ndarray:
    """int64 ``[P]`` of labels as they are in a file, whole numbers in the range of the category.

    Args:
        labels: ``[P]``, over all categories.
        category: number of the object's category.
        file: for the error.
        lines: of each label its line; or the object.
        counted: the labels as the file has them, if it counts them otherwise.
    """
    size = PARTS.classes.count(category)
    first = _FIRST[category]
    wrong = ~((labels == np.round(labels)) & (labels >= first) & (labels < first + size))
    if wrong.any():
        point, shift = int(wrong.argmax()), 0 if counted is None else first - 1
        where = f"{lines}, point {point}" if isinstance(lines, str) else f"line {lines[point]}"
        raise DataError(
            f"{file}: {where}: expected a part of {list(CATEGORIES.values())[category][0]}, {first - shift} to "
            f"{first + size - 1 - shift}, found {labels[point] - shift:g}: get the file again, it is damaged"
        )
    return labels.astype(np.int64)


def _open_hdf5(folder: Path, split: str, variant: str) -> Source:
    files = [file for name in VARIANTS[variant][split] for file in sorted(folder.glob(f"ply_data_{name}*.h5"))]
    for name in VARIANTS[variant][split]:
        if not any(file.name.startswith(f"ply_data_{name}") for file in files):
            raise DataError(f"{folder}: no ply_data_{name}*.h5: get the archive again, it is incomplete")
    categories, objects, sizes = [], [], set()
    for file in files:
        with open_hdf5(file, _WHAT) as h5:
            data, parts = dataset(h5, "data"), dataset(h5, "pid")
            if data.dtype.kind not in "fiu" or parts.dtype.kind not in "fiu":
                raise ValueError(f"data, pid: expected numbers, found {data.dtype}, {parts.dtype}")
            shape, mine = data.shape, read_labels(dataset(h5, "label"))
            if len(shape) != 3 or shape[2] != 3 or 0 in shape or len(mine) != shape[0] or parts.shape != shape[:2]:
                raise ValueError(f"found {list(shape)}, [{len(mine)}] and {list(parts.shape)}")
            if not 0 <= mine.min() <= mine.max() < len(CATEGORIES):
                raise ValueError(f"label: expected 0 to {len(CATEGORIES) - 1}, found {mine.min()} to {mine.max()}")
        categories.append(mine)
        objects += [f"{file.stem}/{index}" for index in range(shape[0])]
        sizes.add(shape[1])

    def clouds(count: int) -> Iterator[Cloud]:
        for file, mine in zip(files, categories, strict=True):
            with open_hdf5(file, _WHAT) as h5:
                for start in range(0, len(mine), 256):
                    rows = slice(start, start + 256)
                    batch = zip(h5["data"][rows].astype(np.float32), h5["pid"][rows], mine[rows], strict=True)
                    for index, (points, labels, category) in enumerate(batch, start):
                        yield Cloud(points, _parts(labels, category, file, f"object {index}"))

    return Source(f"ShapeNetPart HDF5, {variant}", folder, tuple(files), tuple(one[0] for one in CATEGORIES.values()),
                  tuple(objects), np.concatenate(categories), min(sizes), clouds, point_labels=True,
                  parts=PARTS, variant=variant)  # fmt: skip

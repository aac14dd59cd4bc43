"""ScanObjectNN (Uy et al., ICCV 2019): 15 classes of objects as scanners see them, cut out of scenes.

The published HDF5 files have a dataset ``mask`` ``[n, 2048]``: -1 where a point belongs to the background, and a number
from 0 up where it belongs to the object. Here that becomes point labels, 0 and 1, of the `PARTS`. The raw
objects have a semantic label for each point, see `pointewa.datasets.files.raw_scans.read_raw`.
"""

import os
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from pointewa.datasets import packed
from pointewa.datasets.files.raw_scans import OBJECT, read_list, read_raw
from pointewa.datasets.inspect.download import BY_REQUEST
from pointewa.datasets.source import Cloud, Source
from pointewa.errors import DataError, counted
from pointewa.models.parts import EVERY, Parts
from pointewa.safe.files import reading
from pointewa.safe.hdf5 import dataset, open_hdf5, read_labels

CLASSES = (
    "bag", "bin", "box", "cabinet", "chair", "desk", "display", "door", "shelf", "table", "bed", "pillow", "sink",
    "sofa", "toilet",
)  # fmt: skip
# Of each variant how its files are called after training_ and test_.
VARIANTS = {
    "obj_bg": "objectdataset",
    "obj_only": "objectdataset",
    "pb_t25": "objectdataset_augmented25_norot",
    "pb_t25_r": "objectdataset_augmented25rot",
    "pb_t50_r": "objectdataset_augmentedrot",
    "pb_t50_rs": "objectdataset_augmentedrot_scale75",
    "raw": "",
}
DEFAULT, RAW, _NO_BACKGROUND = "pb_t50_rs", "raw", "_nobg"
# The paper's split, the four of its supplement, and the lists that they are given by for the raw objects.
SPLITS = {
    "main_split": ("split_new.txt", "main_split.txt"),
    **{f"split{number}": (f"split{number}.txt",) for number in range(1, 5)},
}
SIZES = {  # of the official splits, where they are known
    "obj_bg": {"train": 2309, "test": 581},
    "obj_only": {"train": 2309, "test": 581},
    "pb_t50_rs": {"train": 11416, "test": 2882},
}
PARTS = Parts(("background", "object"), (EVERY, EVERY))
_FOLDERS = ("", "h5_files", "ScanObjectNN", "ScanObjectNN/h5_files")
_WHAT = "HDF5 with the datasets data [n, 2048, 3] and label [n]"
_DROPPED = ", without background"


def slug(variant: str | None) -> str:
    """A variant as a part of a file's name, such as "obj_bg" or "pb_t50_r-split2".

    Raises:
        DataError: an unknown variant.
    """
    return _title(*_parse(variant or DEFAULT)).replace("/", "-")


def _parse(variant: str) -> tuple[str, str]:
    """The name of a variant, and the folder that its files are in; or would be, for raw objects."""
    name, slash, folder = variant.partition("/")
    folder = folder if slash else "main_split"
    split = folder.removesuffix(_NO_BACKGROUND)
    if name not in VARIANTS or split not in SPLITS or (folder != split and name in ("obj_bg", RAW)):
        raise DataError(
            f"data.variant: expected one of {', '.join(VARIANTS)} for scanobjectnn, or one of them and a split "
            f"({', '.join(SPLITS)}; of pb_* also with {_NO_BACKGROUND}) such as {DEFAULT}/split1, found {variant!r}"
        )
    return name, split + _NO_BACKGROUND if name == "obj_only" else folder


def _title(name: str, folder: str) -> str:
    """The shortest variant that `_parse` makes this of."""
    folder = folder.removesuffix(_NO_BACKGROUND) if name == "obj_only" else folder
    return name if folder == "main_split" else f"{name}/{folder}"


_KNOWN = {  # all variants: their slugs, the longest first
    _title(*pair).replace("/", "-"): pair
    for pair in sorted(
        {_parse(f"{name}/{split}{end}") for name in VARIANTS for split in SPLITS
         for end in ("", *([_NO_BACKGROUND] if name.startswith("pb_") else []))},
        key=lambda pair: (-len(_title(*pair)), pair),
    )
}  # fmt: skip


def check_split(source: Source, split: str) -> list[str] | None:
    """What is missing from a split, or too much in it, compared with the official size; None if that is not known."""
    _, _, variant = source.layout.removesuffix(_DROPPED).partition(", ")
    if variant and variant not in SIZES:
        return None
    expected = {sizes[split] for name, sizes in SIZES.items() if variant in ("", name)}
    if len(source) in expected:
        return []
    return [f"{len(source)} objects, expected {' or '.join(map(str, sorted(expected)))}"]


def source(root: str, split: str, num_points: int, variant: str | None = None) -> Source:
    """A split of ScanObjectNN, y up, neither centred nor scaled, as the field uses it; raw objects are in the
    coordinates of their scene, and are both.

    Args:
        root: the folder that holds ``main_split`` and the others like it, or ``object_dataset``, or one or two levels
            above it (``ScanObjectNN``, ``h5_files``), or a packed file.
        split: "train" or "test".
        num_points: how many points an object must have; raw objects with fewer repeat theirs.
        variant: one of `VARIANTS`, or with one of `SPLITS` as in "pb_t50_r/split2", of the perturbed ones also without
            background as in "pb_t50_r/split2_nobg"; None for the hardest, "pb_t50_rs", which the field reports most.

    Raises:
        DataError: an unknown variant, nothing found, damaged files.
    """
    name, folder = _parse(variant or DEFAULT)
    title, places = _title(name, folder), [Path(root, place) for place in _FOLDERS]
    if Path(root).is_file():
        found = packed.source(Path(root), split, name == RAW, None, variant and slug(variant), _KNOWN)
        if variant:
            found = replace(found, layout=f"{found.layout}, {title}")
    elif packs := [path for place in places for path in _packs(place) if _packs(place)[path] == (name, folder)]:
        found = packed.source(
            packed.with_points(packs, split, num_points), split, name == RAW, None, slug(variant), _KNOWN
        )
        found = replace(found, layout=f"{found.layout}, {title}")
    elif name == RAW and (objects := _raw_folders(places)):
        found = _open_raw(objects[0], split, title, SPLITS[folder])
    elif files := [
        place / _file(name, folder, split) for place in places if (place / _file(name, folder, split)).exists()
    ]:
        found = _open(files[0], title)
    else:
        others = variants_at(root)
        there = f", but {', '.join(others)}: set data.variant" if others else "."
        wanted = "object_dataset/<class>/*.bin" if name == RAW else _file(name, folder, split)
        raise DataError(
            f"ScanObjectNN ({title}) was not found{there}\nLooked for {wanted} in {Path(root).resolve()} and its "
            f"folders {', '.join(_FOLDERS[1:])}.\n{BY_REQUEST['scanobjectnn']}"
        )
    if found.point_labels:
        found = replace(found, parts=found.parts or PARTS)
    if title in SIZES and len(found) != SIZES[title][split]:
        print(
            f"note: {found.path} has {len(found)} objects in {split}; the official split of {title} has "
            f"{SIZES[title][split]}",
            file=sys.stderr,
        )
    return found


def variants_at(root: str) -> list[str]:
    """The variants that are there."""
    places = [Path(root, place) for place in _FOLDERS]
    packs = {pair for place in places for pair in _packs(place).values()}
    return sorted(
        _title(*pair)
        for pair in _KNOWN.values()
        if pair in packs
        or (pair == (RAW, "main_split") and _raw_folders(places))
        or (pair[0] != RAW and any((place / _file(*pair, "train")).exists() for place in places))
    )


def _file(name: str, folder: str, split: str) -> str:
    return f"{folder}/{ {'train': 'training', 'test': 'test'}[split] }_{VARIANTS[name]}.h5"


def _packs(place: Path) -> dict[Path, tuple[str, str]]:
    """The packed files in a folder that say by their names which variant they are."""
    found = {path: path.name.removeprefix("scanobjectnn_") for path in sorted(place.glob("scanobjectnn_*.h5"))}
    known = {
        path: next((one for one in _KNOWN if re.match(rf"{one}(?![a-z])", name)), None) for path, name in found.items()
    }
    return {path: _KNOWN[one] for path, one in known.items() if one}


def _raw_folders(places: list[Path]) -> list[Path]:
    """The folders that hold a folder for each class."""
    tops = [top for place in places for top in (place / "object_dataset", place)]
    return [top for top in tops if any((top / name).is_dir() for name in CLASSES)]


def _open_raw(folder: Path, split: str, title: str, lists: tuple[str, ...]) -> Source:
    tops = (folder, folder / "training_data", folder.parent, folder.parent / "training_data")
    where = next((top / name for top in tops for name in lists if (top / name).is_file()), None)
    if where is None:
        raise DataError(
            f"{folder}: expected the list {' or '.join(lists)} of the objects and of those for testing, in it or "
            "training_data, or one level above, found none: copy it there from where the set came from (split1.txt to "
            "split4.txt: training_data of https://github.com/hkust-vgd/scanobjectnn)"
        )
    listed = read_list(where, len(CLASSES))
    with reading(folder, "a folder"):
        present = {name: set(os.listdir(folder / name)) for name in CLASSES if (folder / name).is_dir()}
    missing = [name for name, (label, _) in listed.items() if name not in present.get(CLASSES[label], ())]
    if missing:
        raise DataError(
            f"{folder}: {len(missing)} of {len(listed)} files that {where} lists are missing, the first is "
            f"{CLASSES[listed[missing[0]][0]]}/{missing[0]}: get the objects again, they are incomplete"
        )
    mine = [(name, label) for name, (label, test) in listed.items() if test == (split == "test")]
    if not mine:
        raise DataError(
            f"{where}: expected objects for training and, marked with t, for testing, found none of {split}"
        )
    files = [folder / CLASSES[label] / name for name, label in mine]
    others = sorted(f"{top}/{one}" for top, names in present.items() for one in names - listed.keys() if one[0] != ".")
    if others and split == "train":
        unlisted = f"{counted(len(others), 'file')} that {where.name} does not list"
        print(f"note: {folder}: left out: {unlisted} (make data WHAT=inspect lists them)", file=sys.stderr)
    return Source(
        f"ScanObjectNN, {title}",
        folder,
        (where, *files),
        CLASSES,
        tuple(f"{CLASSES[label]}/{name.removesuffix('.bin')}" for name, label in mine),
        np.array([label for _, label in mine], np.int64),
        None,
        lambda count: map(read_raw, files),
        point_labels=True,
        left_out={f"not in {where.name}": others} if others else {},
        variant=title.replace("/", "-"),
    )


def _open(file: Path, variant: str) -> Source:
    with open_hdf5(file, _WHAT) as h5:
        data = dataset(h5, "data")
        if data.dtype.kind not in "fiu":
            raise ValueError(f"data: expected numbers, found {data.dtype}")
        shape, labels = data.shape, read_labels(dataset(h5, "label"))
        mask = dataset(h5, "mask").shape if "mask" in h5 else None
    if len(shape) != 3 or shape[2] != 3 or 0 in shape or len(labels) != shape[0] or mask not in (None, shape[:2]):
        raise DataError(
            f"{file}: expected data [n, P, 3], label [n] and perhaps mask [n, P], found {list(shape)}, "
            f"[{len(labels)}]{f' and {list(mask)}' if mask else ''}"
        )

    def clouds(count: int) -> Iterator[Cloud]:
        with open_hdf5(file, _WHAT) as h5:
            for start in range(0, shape[0], 256):
                rows = slice(start, start + 256)
                points = h5["data"][rows].astype(np.float32)
                point_labels = (h5["mask"][rows] != -1).astype(np.int64) if mask else [None] * len(points)
                yield from map(Cloud, points, point_labels)

    objects = tuple(f"{file.stem}/{index}" for index in range(len(labels)))
    return Source(
        f"ScanObjectNN, {variant}", file, (file,), CLASSES, objects, labels, shape[1], clouds, False,
        point_labels=bool(mask), variant=variant.replace("/", "-"),
    )  # fmt: skip


def without_background(source: Source) -> Source:
    """The source with the points of each object's background left out; objects then differ in their number of points.

    Raises:
        DataError: the file does not mark the background. When the clouds are read: an object has no other points.
    """
    if not source.point_labels:
        raise DataError(
            f"{source.path}: data.background=drop needs a dataset mask, which is not in the file: set it to keep"
        )

    def clouds(count: int) -> Iterator[Cloud]:
        for cloud in source.clouds(count):
            yield Cloud(cloud.points[cloud.point_labels == OBJECT])

    return replace(
        source,
        layout=source.layout + _DROPPED,
        num_points=None,
        clouds=clouds,
        ordered=False,
        point_labels=False,
        parts=None,
    )

"""ScanObjectNN (Uy et al., ICCV 2019): 15 classes of objects as scanners see them, cut out of scenes.

The published files have a dataset ``mask`` ``[n, 2048]``: -1 where a point belongs to the background, and a number
from 0 up where it belongs to the object. Here that becomes point labels, 0 (`BACKGROUND`) and 1 (`OBJECT`).
"""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from pointewa.datasets import packed
from pointewa.datasets.inspect.download import BY_REQUEST
from pointewa.datasets.source import Cloud, Source
from pointewa.errors import DataError
from pointewa.safe.hdf5 import dataset, open_hdf5, read_labels

CLASSES = (
    "bag", "bin", "box", "cabinet", "chair", "desk", "display", "door", "shelf", "table", "bed", "pillow", "sink",
    "sofa", "toilet",
)  # fmt: skip
# Of each variant the folder, the rest of the file's name, and the sizes of the official split.
VARIANTS = {
    "obj_bg": ("main_split", "objectdataset", {"train": 2309, "test": 581}),
    "obj_only": ("main_split_nobg", "objectdataset", {"train": 2309, "test": 581}),
    "pb_t50_rs": ("main_split", "objectdataset_augmentedrot_scale75", {"train": 11416, "test": 2882}),
}
DEFAULT = "pb_t50_rs"
BACKGROUND, OBJECT = 0, 1  # point labels
_FOLDERS = ("", "h5_files", "ScanObjectNN", "ScanObjectNN/h5_files")
_WHAT = "HDF5 with the datasets data [n, 2048, 3] and label [n]"


def check_split(source: Source, split: str) -> list[str]:
    """What is missing from a split, or too much in it, compared with the official sizes."""
    expected = {sizes[split] for _, _, sizes in VARIANTS.values()}
    if len(source) in expected:
        return []
    return [f"{len(source)} objects, expected {' or '.join(map(str, sorted(expected)))}"]


def source(root: str, split: str, num_points: int, variant: str | None = None) -> Source:
    """A split of ScanObjectNN, y up, neither centred nor scaled, as the field uses it.

    Args:
        root: the folder that holds ``main_split`` and ``main_split_nobg``, or one or two levels above it
            (``ScanObjectNN``, ``h5_files``), or a packed file.
        split: "train" or "test".
        num_points: how many points an object must have.
        variant: one of `VARIANTS`; None for the hardest, "pb_t50_rs", which the field reports most.

    Raises:
        DataError: an unknown variant, nothing found, too few points, damaged files.
    """
    variant = variant or DEFAULT
    if variant not in VARIANTS:
        raise DataError(f"data.variant: expected one of {', '.join(VARIANTS)} for scanobjectnn, found {variant!r}")
    folder, name, sizes = VARIANTS[variant]
    file = f"{folder}/{ {'train': 'training', 'test': 'test'}[split] }_{name}.h5"
    if Path(root).is_file():
        found = packed.source(Path(root), split, normalize=False)
    else:
        places = [Path(root, place) for place in _FOLDERS]
        files = [place / file for place in places if (place / file).exists()]
        packs = [path for place in places for path in sorted(place.glob(f"scanobjectnn_{variant}*.h5"))]
        if packs:
            found = packed.source(packs[0], split, normalize=False)
        elif files:
            found = _open(files[0], variant)
        else:
            raise DataError(
                f"ScanObjectNN ({variant}) was not found.\nLooked for {file} in {Path(root).resolve()} and its folders "
                f"{', '.join(_FOLDERS[1:])}.\n{BY_REQUEST['scanobjectnn']}"
            )
    if found.num_points < num_points:
        raise DataError(
            f"{found.path}: an object has {found.num_points} points, data.num_points asks for {num_points}: lower it"
        )
    if len(found) != sizes[split]:
        print(
            f"note: {found.path} has {len(found)} objects in {split}; the official split of {variant} has "
            f"{sizes[split]}",
            file=sys.stderr,
        )
    return found


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
        point_labels=bool(mask),
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
        layout=f"{source.layout}, without background",
        num_points=None,
        clouds=clouds,
        ordered=False,
        point_labels=False,
    )

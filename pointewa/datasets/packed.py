"""The packed layout: one HDF5 file a data set, also what prepared clouds are cached in.

Groups ``train`` and ``test``, each with ``data`` ``[n, P, 3]`` (float32, or int16 with ``scale_factor`` and
``add_offset``), ``label`` ``[n]``, ``name`` ``[n]``, and in sets that have them ``point_labels`` ``[n, P]``.
Attributes of the file: ``shape_names``, and in files that `write` made ``order`` ("fps": farthest-point order),
``normalized`` or ``centered``, and ``up``, the axis that points up in the files that they were made of (in the clouds
it is y); where the set has variants, ``variant``; where the point labels count parts, also ``part_names`` and
``part_classes`` (`pointewa.models.parts.Parts`); of a group ``sha256`` of its contents and ``distinct``, the most
points that an object has before they start over.

Files written before there were point labels have a bool ``mask`` ``[n, P]`` in their place: it is read as the labels
1 (the object) and 0 (its background).
"""

import hashlib
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from pointewa.datasets.base import PointClouds
from pointewa.datasets.source import Cloud, Source, chunks, say_once
from pointewa.errors import DataError
from pointewa.models.parts import Parts
from pointewa.ops import UP_AXES, distinct, up_word
from pointewa.safe.files import atomic_write
from pointewa.safe.hdf5 import dataset, open_hdf5, read_labels

WHAT = "a packed HDF5 file (groups train and test with data, label, name; attribute shape_names)"
_GRID = 32767  # int16 steps from the centre of a cloud to the farthest coordinate


def write(path: Path, splits: dict[str, tuple[Source, int, Iterable[Cloud]]], int16: bool = False) -> None:
    """Write prepared clouds, one after the other.

    Args:
        path: file to write; it appears when it is complete.
        splits: of each split the source, the points kept of an object, and its prepared clouds.
        int16: coordinates on a grid of 1/32767 (of the unit sphere's radius), in half the space.

    Raises:
        OSError: the file cannot be written.
        DataError: from reading the clouds.
    """
    with atomic_write(path) as temporary, h5py.File(temporary, "w", libver=("v110", "v110")) as h5:
        for split, (source, count, clouds) in splits.items():
            h5.attrs["shape_names"], h5.attrs["normalized"] = _bytes(source.class_names), source.normalize
            h5.attrs["up"] = source.up
            if source.variant is not None:
                h5.attrs["variant"] = source.variant
            if source.parts is not None:
                h5.attrs["part_names"], h5.attrs["part_classes"] = _bytes(source.parts.names), source.parts.classes
            if source.centered:
                h5.attrs["centered"] = True
            h5.attrs["order"], h5.attrs["source"] = "fps", f"{source.path} ({source.layout})"
            group, n = h5.create_group(split), len(source)
            # Each cloud is a chunk of its own, so that it can be read alone; checksums make damage noticeable.
            kind = {"dtype": np.int16, "compression": "gzip", "shuffle": True} if int16 else {"dtype": np.float32}
            data = group.create_dataset("data", (n, count, 3), chunks=(1, count, 3), fletcher32=True, **kind)
            if int16:
                data.attrs["scale_factor"], data.attrs["add_offset"] = 1 / _GRID, 0.0
            index = most = 0
            for chunk in chunks(clouds, 64):
                points = np.stack([cloud.points for cloud in chunk])
                data[index : index + len(chunk)] = np.rint(points * _GRID) if int16 else points
                if chunk[0].point_labels is not None:
                    kind = {"dtype": np.int32, "chunks": (1, count), "compression": "gzip", "shuffle": True}
                    labels = group.require_dataset("point_labels", (n, count), fletcher32=True, **kind)
                    labels[index : index + len(chunk)] = np.stack([cloud.point_labels for cloud in chunk])
                index += len(chunk)
                most = max(most, *(cloud.distinct or count for cloud in chunk))
            group.attrs["distinct"] = most
            group["label"] = source.labels
            group["name"] = _bytes(source.object_names)
            group.attrs["sha256"] = digest(group)


def _bytes(names: Sequence[str]) -> np.ndarray:
    """Names of fixed length: those of variable length are stored where HDF5 has no checksums."""
    return np.array([name.encode() for name in names], "S")


def _texts(values: np.ndarray) -> tuple[str, ...]:
    return tuple(value.decode() if isinstance(value, bytes) else str(value) for value in values)


def on_grid(points: np.ndarray) -> np.ndarray:
    """Coordinates in [-1, 1] as they come back from a file written with ``int16``."""
    return np.rint(points * _GRID).astype(np.float32) * np.float32(1 / _GRID) + np.float32(0)


def digest(group: h5py.Group) -> str:
    """SHA-256 of a split's contents, however they are compressed."""
    result = hashlib.sha256()
    for name in sorted(group):
        values = group[name]
        result.update(f"{name} {values.shape}".encode())
        for start in range(0, len(values), 256):
            part = values[start : start + 256]
            result.update("\n".join(_texts(part)).encode() if name == "name" else np.ascontiguousarray(part).tobytes())
    return result.hexdigest()


@dataclass(frozen=True)
class Split:
    """What a packed file says of a split, without its points."""

    path: Path
    split: str
    shape: tuple[int, ...]
    labels: np.ndarray
    class_names: tuple[str, ...]
    object_names: tuple[str, ...]
    ordered: bool
    normalized: bool
    point_labels: str | None  # the dataset that holds them
    distinct: int  # most points of an object before they start over
    trusted: bool
    up: str | None  # the axis that points up in the files that it was made of; None if it does not say
    parts: Parts | None
    centered: bool = False
    variant: str | None = None  # of the data set, where the file says it

    @property
    def packed_as(self) -> str | None:
        """How the clouds that `write` wrote were normalised; None of other files."""
        return ("unit_sphere" if self.normalized else "center" if self.centered else "none") if self.ordered else None

    def read(self, rows: slice | Sequence[int], count: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Points ``[B, count, 3]`` of some objects, and their labels int64 ``[B, count]`` if there are any.

        They are float32, or float64 where float32 does not hold what the file has: float64, large integers, an offset.

        Raises:
            DataError: damaged.
        """
        with open_hdf5(self.path, WHAT, self.trusted) as h5:
            return self.read_from(h5, rows, count)

    def read_from(self, h5: h5py.File, rows: slice | Sequence[int], count: int) -> tuple[np.ndarray, np.ndarray | None]:
        """`read`, from the opened file."""
        data = h5[self.split]["data"]
        scale, offset = data.attrs.get("scale_factor", 1.0), data.attrs.get("add_offset", 0.0)
        kind = np.float64 if offset or not np.can_cast(data.dtype, np.float32) else np.float32
        points = _rows(data, rows, count).astype(kind)
        if "scale_factor" in data.attrs or "add_offset" in data.attrs:
            points = points * kind(scale) + kind(offset)
        labels = self.point_labels and _rows(h5[self.split][self.point_labels], rows, count).astype(np.int64)
        return points, labels


def _rows(values: h5py.Dataset, rows: slice | Sequence[int], count: int) -> np.ndarray:
    if isinstance(rows, slice):
        return values[rows, :count]
    # HDF5 reads a list of rows slowly and only in rising order.
    return np.stack([values[row, :count] for row in rows])


def open_split(path: Path, split: str, trusted: bool = False) -> Split:
    """What a packed file says of a split. A trusted file was written by `write`.

    Raises:
        DataError: it is not one, or has no such split, or its parts do not fit together.
    """
    with open_hdf5(path, WHAT, trusted) as h5:
        group, names = h5[split], h5.attrs["shape_names"]
        if not isinstance(group, h5py.Group):
            raise ValueError(f"{split}: expected a group, found a dataset")
        data = dataset(group, "data")
        shape, kind = data.shape, data.dtype.kind
        if len(shape) != 3 or shape[2] != 3 or 0 in shape or kind not in "fiu":
            raise DataError(
                f"{path}: {split}/data: expected numbers [N, P, 3] with N, P > 0, found {data.dtype} {list(shape)}"
            )
        point_labels = next((name for name in ("point_labels", "mask") if name in group), None)
        labelled = dataset(group, point_labels).shape if point_labels else shape[:2]
        labels, objects = read_labels(dataset(group, "label")), _texts(dataset(group, "name")[:])
        if not shape[0] == len(labels) == len(objects) or labelled != shape[:2]:
            raise DataError(
                f"{path}: {split}: {shape[0]} clouds, {len(labels)} labels, {len(objects)} object names"
                + (f", {point_labels} {list(labelled)}" if point_labels else "")
            )
        if point_labels and group[point_labels].dtype.kind not in "iub":
            raise DataError(
                f"{path}: {split}/{point_labels}: expected whole numbers, found {group[point_labels].dtype}"
            )
        return Split(
            path,
            split,
            shape,
            labels,
            _texts(names),
            objects,
            h5.attrs.get("order") == "fps",
            bool(h5.attrs.get("normalized", False)),
            point_labels,
            int(group.attrs.get("distinct", shape[1])),
            trusted,
            _up(path, h5.attrs.get("up")),
            _parts(path, h5.attrs, len(names)),
            bool(h5.attrs.get("centered", False)),
            _variant(path, h5.attrs.get("variant")),
        )


def _up(path: Path, found: Any) -> str | None:
    if found is not None and str(found) not in UP_AXES:
        raise DataError(f"{path}: attribute up: expected one of {', '.join(UP_AXES)}, found {reprlib.repr(found)}")
    return found and str(found)


def _variant(path: Path, found: Any) -> str | None:
    if found is not None and not re.fullmatch(r"[\w-]{1,99}", str(found)):  # a part of the names of files
        raise DataError(f"{path}: attribute variant: expected a name, found {reprlib.repr(found)}")
    return found and str(found)


def _parts(path: Path, attributes: Mapping[str, Any], num_classes: int) -> Parts | None:
    names, classes = attributes.get("part_names"), attributes.get("part_classes")
    if names is None and classes is None:
        return None
    try:
        parts = Parts(_texts(names), tuple(np.asarray(classes, np.int64).tolist()))
        parts.mask(num_classes)
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{path}: attributes part_names, part_classes: expected a name and a category for each part "
                        f"({error})") from error  # fmt: skip
    return parts


def source(
    path: Path,
    split: str,
    normalize: bool = True,
    up: str | None = None,
    variant: str | None = None,
    variants: Iterable[str] = (),
) -> Source:
    """A split of a packed file as a source.

    Args:
        path: the file.
        split: "train" or "test".
        normalize: clouds are to be centred and scaled.
        up: the axis that is said to point up in the files that it was made of; None for what it says, else y.
        variant: the variant that it is said to be of; None for what it says. A note says that it says none.
        variants: all of the set, the longer ones first: files that were packed before the variant was kept in them say
            it by their names.

    Raises:
        DataError: as `open_split`, or the file says another axis or variant.
    """
    packed = open_split(path, split)
    if up and packed.up not in (None, up):
        raise DataError(f"data.variant: {path} was packed as {up_word(packed.up)}, found {up_word(up)}: leave it out")
    named = (one for one in variants if re.search(rf"(^|_){one}(?![a-z])", path.name))
    of = next(named, None) if packed.variant is None else packed.variant
    if variant and of is None:
        say_once(f"note: {path} does not say of which variant it is: taken for {variant}")
    elif variant not in (None, of):
        raise DataError(f"data.variant: {path} was packed of {of}, found {variant}: leave it out, or point DATA_ROOT "
                        "at the data set")  # fmt: skip

    def clouds(count: int) -> Iterator[Cloud]:
        for start in range(0, packed.shape[0], 64):
            points, labels = packed.read(slice(start, start + 64), packed.shape[1])
            for index, one in enumerate(points):
                # Where an object has fewer points than the others, `prepare` has repeated them.
                own = distinct(torch.from_numpy(one)) if packed.packed_as else len(one)
                yield Cloud(one[:own], None if labels is None else labels[index, :own])

    return Source(
        "packed HDF5",
        path,
        (path,),
        packed.class_names,
        packed.object_names,
        packed.labels,
        packed.shape[1],
        clouds,
        normalize,
        ordered=packed.packed_as == ("unit_sphere" if normalize else "none"),
        point_labels=packed.point_labels is not None,
        parts=packed.parts,
        up=packed.up or up or "y",
        packed_as=packed.packed_as,
        variant=of or variant,
    )


def with_points(paths: Iterable[Path], split: str, num_points: int) -> Path:
    """The first of some packed files whose objects have ``num_points`` points, else that with the most.

    Raises:
        DataError: as `open_split`.
    """
    sizes = {}
    for path in paths:
        sizes[path] = open_split(path, split).shape[1]
        if sizes[path] >= num_points:
            return path
    return max(sizes, key=sizes.get)


def resident(packed: Split, count: int, rows: Sequence[int] | None = None) -> PointClouds:
    """The first ``count`` points of every cloud of a prepared split, or of those in ``rows`` only, in memory."""
    points, point_labels = packed.read(slice(None) if rows is None else rows, count)
    return PointClouds(
        torch.from_numpy(points).float(),
        torch.from_numpy(packed.labels if rows is None else packed.labels[rows]),
        packed.class_names,
        packed.object_names if rows is None else tuple(packed.object_names[row] for row in rows),
        str(packed.path),
        packed.normalized,
        None if point_labels is None else torch.from_numpy(point_labels),
        packed.up or "y",
        packed.parts,
        packed.centered,
    )

"""Clouds of a source made ready for training, and cached on disk."""

import atexit
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pointewa.datasets import packed
from pointewa.datasets.base import Clouds
from pointewa.datasets.order import fps_order, method
from pointewa.datasets.source import Cloud, Source, chunks, progress
from pointewa.datasets.streamed import StreamedClouds
from pointewa.errors import DataError, counted
from pointewa.ops import flaw, placed

_LARGEST = 1e18  # the square of a distance must fit float32
_VERSION = 3  # raise it when prepared clouds change


def cache_dir() -> Path:
    """``$POINTEWA_CACHE``, else ``$XDG_CACHE_HOME/pointewa``, else ``~/.cache/pointewa``."""
    if "POINTEWA_CACHE" in os.environ:
        return Path(os.environ["POINTEWA_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pointewa"


def prepare(source: Source, count: int, title: str, int16: bool = False, asked: int | None = None) -> Iterator[Cloud]:
    """The clouds of a source, normalised if it says so, each in farthest-point order, of which ``count`` are kept.

    Args:
        source: the split.
        count: points to keep; where an object has fewer, its points start over.
        title: shown with the progress.
        int16: round to the grid of `pointewa.datasets.packed` first, so that the order holds for what is stored.
        asked: points that are asked for, the rest of ``count`` being a reserve to draw from; None for all.
            A note on stderr says how many objects have fewer.

    Raises:
        DataError: see `check`.
    """
    sizes, left_out = [], []
    for chunk in chunks(progress(source.clouds(count), title, len(source)), 64):
        for cloud in chunk:
            check(cloud, source, len(sizes))
            sizes.append(len(cloud.points))
            left_out.append(cloud.left_out / (len(cloud.points) + cloud.left_out))
        points = [normalized(cloud.points, source.normalization) for cloud in chunk]
        points = [np.ascontiguousarray(cloud) for cloud in points]
        if int16:
            points = [packed.on_grid(cloud) for cloud in points]
        for cloud, mine, order in zip(chunk, points, fps_order(points, count), strict=True):
            labels = None if cloud.point_labels is None else cloud.point_labels[order]
            yield Cloud(mine[order], labels, min(len(mine), count))
    asked = count if asked is None else asked
    if few := sum(size < asked for size in sizes):
        have = f"{few} of {counted(len(sizes), 'object')} {'has' if few == 1 else 'have'}"
        note = f"{have} fewer than {counted(asked, 'point')}, the fewest {min(sizes)}"
        print(f"note: {source.path}: {note}: theirs are repeated", file=sys.stderr)
    if some := sum(share > 0 for share in left_out):
        note = f"{some} of {len(sizes)} objects have points that are not finite, up to {100 * max(left_out):.0f} %"
        print(f"note: {source.path}: {note}: they are left out", file=sys.stderr)


def originals(source: Source, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """All points ``[P, 3]`` of each object, scaled as `prepare` does and in the order of its file, and their labels.

    Args:
        source: with point labels.
        count: points to draw of an object whose source can give any number.
    """
    for index, cloud in enumerate(source.clouds(count)):
        check(cloud, source, index)
        points = cloud.points if source.ordered else normalized(cloud.points, source.normalization)
        yield torch.from_numpy(np.array(points, np.float32)), torch.from_numpy(np.array(cloud.point_labels, np.int64))


def normalized(points: np.ndarray, how: str = "unit_sphere") -> np.ndarray:
    """Points ``[P, 3]`` normalised as `pointewa.ops.placed` does, float32.

    It is done in float64, in which a cloud far from the origin keeps its shape; but in float32 where that holds all the
    digits of the points and they lie about the origin, as in the field's data sets, whose bits stay as they were.
    """
    cloud = torch.from_numpy(points)
    if (cloud.float() == cloud).all() and np.abs(points.mean(0, dtype=np.float64)).max() <= np.ptp(points, 0).max():
        return placed(cloud.float(), how).numpy()
    return placed(cloud.double(), how).float().numpy()


def check(cloud: Cloud, source: Source, index: int) -> None:
    """Refuse a cloud that cannot be trained on.

    Raises:
        DataError: naming the file and the object.
    """
    shape, name = cloud.points.shape, f"{source.path}: object {index} ({source.object_names[index]})"
    if len(shape) != 2 or shape[1] != 3 or not shape[0]:
        raise DataError(f"{name}: expected points [P, 3] with P > 0, found {list(shape)}: remove or repair it")
    if not np.isfinite(cloud.points).all():
        raise DataError(f"{name} has coordinates that are not finite: remove or repair it")
    if np.abs(cloud.points).max() > _LARGEST:
        raise DataError(f"{name} has coordinates beyond {_LARGEST:.0e}: remove or repair it")
    as_it_comes = source.normalization == "none"
    points = np.float32(cloud.points) if as_it_comes else cloud.points  # in which it is going to be kept
    if problem := flaw(torch.from_numpy(points)):
        raise DataError(f"{name}: {problem}")


def prepared(name: str, split: str, source: Source, count: int, asked: int) -> packed.Split:
    """The split of a packed file that holds ``source`` prepared: made the first time, and kept in the cache.

    It is keyed by the source files (path, size, time of change) and what is done to them. A cache that cannot be read
    is made again; if none can be written, a temporary file takes its place.

    Args:
        name: of the data set.
        split: "train" or "test".
        source: the split.
        count: points to keep of an object.
        asked: points of an object that are asked for, see `prepare`.
    """
    files = [(str(file.resolve()), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in source.files]
    key = [_VERSION, files, source.layout, split, count, source.normalize, method()]
    key += ["centered"] if source.centered else []
    same = source.num_points and not source.packed_as  # all objects have as many points, of which none is repeated
    key = json.dumps(key if same else [*key, "distinct"])  # caches written before did not hold it
    path = cache_dir() / f"{name}-{split}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.h5"
    if path.is_file():
        try:
            return packed.open_split(path, split, trusted=True)
        except DataError as error:  # whatever is wrong with it, it can be made again
            print(f"note: {error}; preparing it again", file=sys.stderr)

    def write(path: Path) -> packed.Split:
        clouds = prepare(source, count, f"preparing {name} ({split}), once", asked=asked)
        packed.write(path, {split: (source, count, clouds)})
        return packed.open_split(path, split, trusted=True)

    try:
        return write(path)
    except OSError as error:
        print(f"note: cannot write to {path.parent} ({error}); prepared for this run only; set POINTEWA_CACHE",
              file=sys.stderr)  # fmt: skip
        folder = tempfile.mkdtemp(prefix="pointewa-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        return write(Path(folder) / path.name)


def load(
    name: str,
    split: str,
    source: Source,
    count: int,
    device: torch.device,
    stream: bool | None,
    asked: int | None = None,
    rows: Sequence[int] | None = None,
) -> Clouds:
    """The first ``count`` points of each object of a source, prepared, in memory or streamed.

    If no object has ``count`` points, fewer are kept, but at least ``asked``: the rest would be repeated points.

    Args:
        name: of the data set.
        split: "train" or "test".
        source: the split.
        count: points wanted of an object, at most as many as the source has.
        device: of the training.
        stream: keep the points on disk; None: if they would take more than half of the device's free memory.
        asked: points of an object that are asked for, at most ``count``; None for ``count``.
        rows: which of the source's objects, the only ones that are read once it is prepared; None for all.
    """
    asked = asked or count
    if stream is None:
        size = 12 * len(source if rows is None else rows) * count
        stream = size > free_memory(device) / 2
        if stream:
            print(f"note: {source.path}: {size / 2**30:.1f} GiB of points are streamed from disk", file=sys.stderr)
    if source.ordered:
        made = packed.open_split(source.path, split)
    else:
        made = prepared(name, split, source, count, asked)
    # What a cache of an older version does not say; the parts may be named otherwise without a change of the files.
    told = {"up": source.up, "parts": source.parts}
    made = replace(made, **told)
    if made.distinct < made.shape[1]:
        made = replace(made, shape=(len(source), max(asked, min(made.distinct, count)), 3))
    if stream:
        streamed = StreamedClouds.of(made)
        return (streamed if rows is None else streamed.take(rows)).to(device)
    kept = min(count, made.shape[1])
    try:
        return packed.resident(made, kept, rows).to(device)
    except DataError as error:
        if source.ordered:
            raise
        print(f"note: {error}; preparing it again", file=sys.stderr)
        made.path.unlink()
        made = replace(prepared(name, split, source, count, asked), **told)
        return packed.resident(made, kept, rows).to(device)


def free_memory(device: torch.device) -> float:
    """Bytes of a device's memory that are free; infinite where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # this system does not say
        return float("inf")

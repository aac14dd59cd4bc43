"""A report on a data set as it is on disk: what is there, and whether it is the official one."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pointewa.datasets import packed
from pointewa.datasets.inspect.download import ARCHIVES, mismatch
from pointewa.datasets.inspect.inspection import Duplicates, dimension, duplicates, repeated_points, up_axis
from pointewa.datasets.registry import NAMES
from pointewa.datasets.source import Source, progress
from pointewa.errors import counted
from pointewa.models.parts import EVERY
from pointewa.ops import flaw, unit_sphere
from pointewa.safe.hdf5 import open_hdf5

_LOOK = 1024  # points of an object that are looked at


class _Look(NamedTuple):
    """Of each of N objects `_LOOK` random points, float32 ``[N, _LOOK, 3]`` about their mean; how many points it has;
    their mean, float64 ``[N, 3]``; the names of the non-finite objects, and of those some of whose points are left out;
    what is wrong with others by their names (`pointewa.ops.flaw`); the largest norm; and the points of each of M parts,
    int64 ``[M]``, if there are any.

    In place of a non-finite object there is noise, which resembles no other object.
    """

    points: Tensor
    sizes: list[int]
    offsets: np.ndarray
    broken: list[str]
    partial: list[str]
    flaws: dict[str, str]
    largest: float
    parts: np.ndarray | None


def _read(source: Source, split: str) -> _Look:
    rng, points, offsets = np.random.default_rng(0), torch.zeros(len(source), _LOOK, 3), np.zeros((len(source), 3))
    parts, mask = source.parts, source.parts and source.parts.mask(len(source.class_names)).numpy()
    counts = None if parts is None else np.zeros(len(parts), np.int64)
    sizes, broken, partial, flaws, largest = [], [], [], {}, 0.0
    for index, cloud in enumerate(progress(source.clouds(_LOOK), f"reading {split}", len(source))):
        size = len(cloud.points)
        sizes.append(size)
        if counts is not None and cloud.point_labels is not None:
            found = np.bincount(np.clip(cloud.point_labels, -1, len(parts)) + 1, minlength=len(parts) + 2)
            counts += found[1:-1]
            if wrong := found.sum() - found[1:-1][mask[source.labels[index]]].sum():
                flaws[source.object_names[index]] = f"{counted(int(wrong), 'point')} of parts that its class has not"
        if cloud.left_out:
            partial.append(source.object_names[index])
        if not size or not np.isfinite(cloud.points).all():
            broken.append(source.object_names[index])
            points[index] = torch.from_numpy(rng.uniform(-0.5, 0.5, (_LOOK, 3)))
        else:
            some = cloud.points[rng.permutation(size)[np.arange(_LOOK) % size]].astype(np.float64)
            largest, offsets[index] = max(largest, np.linalg.norm(some, axis=1).max()), some.mean(0)
            points[index] = torch.from_numpy(some - offsets[index])
            if problem := flaw(torch.from_numpy(cloud.points)):
                flaws[source.object_names[index]] = problem
    return _Look(points, sizes, offsets, broken, partial, flaws, float(largest), counts)


def inspect(sources: Mapping[str, Source], seconds: float = math.inf) -> dict[str, Any]:
    """What is there, as plain values: of each split where and in which layout, its classes, points and broken clouds;
    objects that occur twice; which way is up.

    Args:
        sources: the splits by name.
        seconds: time for finding the objects that occur twice, see `pointewa.datasets.inspect.inspection.duplicates`.

    Raises:
        DataError: a file that cannot be read.
    """
    report: dict[str, Any] = {"splits": {}}
    unit: dict[str, Tensor] = {}
    for split, source in sources.items():
        look = _read(source, split)
        sizes, unit[split] = look.sizes, unit_sphere(look.points)
        farthest = int(np.linalg.norm(look.offsets, axis=1).argmax())
        flat = [source.object_names[index] for index in (dimension(unit[split]) < 2).nonzero().flatten().tolist()]
        counts = np.bincount(source.labels, minlength=len(source.class_names)).tolist()
        report["splits"][split] = {
            "path": str(source.path),
            "layout": source.layout,
            "objects": len(source),
            "fewest_points": min(sizes),
            "most_points": max(sizes),
            "largest_norm": look.largest,
            "largest_offset": {"object": source.object_names[farthest], "mean": look.offsets[farthest].tolist()},
            "not_finite": look.broken,
            "with_points_left_out": look.partial,
            "files_left_out": dict(sorted(source.left_out.items())),
            "degenerate": flat,
            "refused": look.flaws,
            "with_repeated_points": int((repeated_points(unit[split]) > 0).sum()) if min(sizes) >= _LOOK else None,
            "classes": dict(zip(source.class_names, counts, strict=True)),
            "parts": _shares(source, look.parts),
        }
    found = duplicates(unit["train"], unit["test"], seconds=seconds)
    report["in_train_and_test"] = _twice(found, sources["train"], sources["test"])
    report["pairs_not_compared"] = found.left_out
    axis = up_axis(unit["train"], torch.from_numpy(sources["train"].labels))
    report["up"] = {"direction": axis.direction, "margin": axis.margin, "agreement": axis.agreement}
    return report


def _shares(source: Source, counts: np.ndarray | None) -> dict[str, dict[str, float]] | None:
    """Of each class the share of its points that each of its parts has."""
    if counts is None:
        return None
    result: dict[str, dict[str, float]] = {}
    for name, label in zip(source.class_names, range(len(source.class_names)), strict=True):
        mine = [part for part, of in enumerate(source.parts.classes) if of in (label, EVERY)]
        total = max(1, int(counts[mine].sum()))
        result[name] = {source.parts.names[part]: round(float(counts[part] / total), 4) for part in mine}
    return result


def _twice(found: Duplicates, a: Source, b: Source) -> dict[str, Any]:
    """Pairs of an object of ``a`` and one of ``b`` that show the same: how many, of how many objects of ``b``, and how
    many under two classes.

    Below a ratio of 0.05 they are the same points; below 0.6 about half are, which no two objects have by chance;
    above, they differ by less than `_LOOK` points can show. See `pointewa.datasets.inspect.inspection.duplicates`.
    """
    pairs, ratios, _ = found
    result = {}
    for kind, low, high in (("same_points", -1, 0.05), ("shared_points", 0.05, 0.6), ("indistinguishable", 0.6, 2)):
        chosen = pairs[(ratios >= low) & (ratios < high)].tolist()
        result[kind] = {
            "pairs": len(chosen),
            "objects_of_test": len({j for _, j in chosen}),
            "of_two_classes": sum(a.class_names[a.labels[i]] != b.class_names[b.labels[j]] for i, j in chosen),
            "such_as": [a.object_names[chosen[0][0]], b.object_names[chosen[0][1]]] if chosen else [],
        }
    return result


def verify(name: str, sources: Mapping[str, Source]) -> tuple[list[str], list[str]]:
    """Check a set against its official split and known checksums, and read all of it.

    Args:
        name: of the data set.
        sources: the splits by name.

    Returns:
        What is right, and what is wrong, one line each.

    Raises:
        DataError: a file that cannot be read.
    """
    good, bad = [], []
    official = getattr(NAMES[name], "check_split", None)
    for split, source in sources.items():
        label = f"{split}: {counted(len(source), 'object')}, {source.layout}, {source.path}"
        problems = official(source, split) if official else []
        known, problems = problems is not None, problems or []
        sizes = (look := _read(source, split)).sizes
        problems += [f"{one}: coordinates that are not finite, or no points" for one in look.broken]
        problems += [f"{one}: {problem}" for one, problem in look.flaws.items()]
        if source.num_points and not source.packed_as and set(sizes) != {source.num_points}:
            problems.append(f"objects with {min(sizes)} to {max(sizes)} points, expected {source.num_points} each")
        bad += [f"{label}: {problem}" for problem in problems]
        if not problems:
            official_size = getattr(NAMES[name], "CHECKED", "the official split")
            size = f"{official_size}, " if known else "the size of the official split is not known, "
            good.append(f"{label}: {size if official else ''}all read, all finite")
        if source.path.is_file() and source.layout.startswith("packed HDF5"):
            with open_hdf5(source.path, "packed HDF5") as h5:
                expected = h5[split].attrs.get("sha256")
                if expected is None:
                    good.append(f"{split}: no checksum in the file to compare with")
                elif packed.digest(h5[split]) == expected:
                    good.append(f"{split}: sha256 {expected[:16]}... as when it was packed")
                else:
                    bad.append(f"{split}: sha256 is not that of the file when it was packed: pack it again")
    if name in ARCHIVES:
        for folder in {one.path for one in sources.values()}:
            archive = Path(folder).parent / ARCHIVES[name].name
            if archive.is_file():
                problem = mismatch(archive, ARCHIVES[name])
                (bad if problem else good).append(f"{archive}: {problem or f'{ARCHIVES[name].checksum}, as published'}")
    return good, bad

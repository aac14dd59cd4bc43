"""A split as its files have it, before it is prepared: what every layout of every data set is turned into."""

import functools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from pointewa.datasets.base import check_labels
from pointewa.errors import DataError
from pointewa.models.parts import Parts
from pointewa.safe.files import printable

Item, Result = TypeVar("Item"), TypeVar("Result")


class Cloud(NamedTuple):
    """One object: points ``[P, 3]``, float64 where they may be far from the origin, since they are centred later; where
    the set has them their labels, int64 ``[P]``; how many points there are before they start over, None for all P; and
    how many of its file were left out, since they are not finite."""

    points: np.ndarray
    point_labels: np.ndarray | None = None
    distinct: int | None = None
    left_out: int = 0


@dataclass(frozen=True)
class Source:
    """A split in some layout on disk, read object by object, so that memory stays flat.

    Args:
        layout: what was found, as the user is told.
        path: file or folder, for messages.
        files: all that is read; a cache made of them is stale when one changes.
        class_names: C names.
        object_names: N names.
        labels: int64 ``[N]``.
        num_points: points that every object has, in a packed file with those that repeat others; None if they differ,
            or are sampled in any number (meshes).
        clouds: returns a fresh iterator over all objects in order. Its argument is how many points will be kept, for
            sources that sample.
        normalize: clouds are to be centred and scaled to largest norm 1.
        centered: without ``normalize``: they are to be centred, and keep their units.
        ordered: clouds are already prepared: normalised if they should be, in farthest-point order.
        point_labels: clouds come with the labels of their points.
        parts: what these labels count, for segmentation.
        images: the objects are images uint8 ``[H, W, 3]`` of any size, in place of clouds; see
            `pointewa.datasets.images`.
        up: the axis that points up in the files; in the clouds it is y.
        left_out: what is there and is not read: names of files and folders by their kind.
        variant: which of the set's variants it is, as packed files are called; None if there are none, or it is not
            known.
        packed_as: the `normalization` of clouds that `pointewa.datasets.packed.write` wrote; None of any others.

    Raises:
        DataError: labels that do not fit the names.
    """

    layout: str
    path: Path
    files: tuple[Path, ...]
    class_names: tuple[str, ...]
    object_names: tuple[str, ...]
    labels: np.ndarray
    num_points: int | None
    clouds: Callable[[int], Iterator[Cloud]]
    normalize: bool = True
    ordered: bool = False
    point_labels: bool = False
    parts: Parts | None = None
    images: bool = False
    up: str = "y"
    left_out: Mapping[str, Sequence[str]] = field(default_factory=dict)
    centered: bool = False
    packed_as: str | None = None
    variant: str | None = None

    def __post_init__(self) -> None:
        check_labels(torch.from_numpy(self.labels), self.class_names, self.object_names, self.path)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def normalization(self) -> str:
        """What is to be done to the clouds, as in `pointewa.runs.description.LoadedModel`."""
        return "unit_sphere" if self.normalize else "center" if self.centered else "none"

    def normalized_as(self, normalization: str) -> "Source":
        """The source with another `normalization`, "unit_sphere", "center" or "none"; "auto": as it is, or
        as a packed file has it, whose clouds have lost that.

        Raises:
            DataError: images, or a packed file whose clouds have lost what is asked for.
        """
        lost = {"unit_sphere": ("center", "none"), "center": ("none",)}.get(self.packed_as or "", ())
        done = "centred and scaled to norm 1" if self.packed_as == "unit_sphere" else "centred"
        if normalization == "auto":
            if self.normalization not in lost:
                return self
            say_once(f"note: {self.path}: its clouds were {done} when it was packed, and are used so")
            normalization = self.packed_as
        if self.images:
            raise DataError(f"data.normalize: {self.path} has images: leave it out")
        if normalization in lost:
            raise DataError(
                f"data.normalize={normalization}: the clouds of {self.path} were {done} when it was packed, which "
                f"cannot be undone: pack it again with data.normalize={normalization}, or leave the key out"
            )
        if normalization == self.normalization:
            return self
        unit, centered = normalization == "unit_sphere", normalization == "center"
        return replace(self, normalize=unit, centered=centered, ordered=self.packed_as == normalization)


def refuse_variant(name: str, variant: str | None) -> None:
    """For data sets that have none.

    Raises:
        DataError: ``variant`` is one.
    """
    if variant is not None:
        raise DataError(f"data.variant: {name} has no variants, found {variant!r}: leave it out")


@functools.cache  # the same for both splits
def say_once(note: str) -> None:
    """A note on stderr."""
    print(printable(note), file=sys.stderr)


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_parallel(function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """``map`` over processes, in order, at most a few hundred items ahead. For few items no processes are started.

    A script that calls this needs the usual ``if __name__ == "__main__"``.
    """
    if len(items) < 200 or cores() == 1:
        yield from map(function, items)
        return
    # Not forked: a process with torch's threads in it cannot be forked safely.
    with ProcessPoolExecutor(cores(), get_context("spawn")) as pool:
        for block in chunks(items, 512):
            yield from pool.map(function, block, chunksize=16)


def progress(items: Iterable[Item], title: str, total: int | None = None) -> Iterable[Item]:
    """The items, with a bar and the time left on a terminal's stderr, and nothing elsewhere."""
    console = Console(stderr=True)
    return track(items, title, total, console=console, transient=True, disable=not console.is_terminal)


def chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of ``size`` items, the last one shorter."""
    items = iter(items)
    while chunk := list(islice(items, size)):
        yield chunk

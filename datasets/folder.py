"""The user's own clouds and meshes: one folder per class."""

import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from pointewa.datasets import packed
from pointewa.datasets.base import hold_out
from pointewa.datasets.files import SUFFIXES, read_points
from pointewa.datasets.source import Cloud, Source, in_parallel
from pointewa.errors import DataError
from pointewa.ops import turn_up

TEST_FRACTION = 0.2  # of each class, if the folders do not say which files are for testing
_UP = {"y_up": "y", "z_up": "z"}


def source(root: str, split: str, num_points: int, variant: str | None = None) -> Source:
    """A split of ``<class>/{train,test}/*``, or of ``<class>/*`` with a fixed, seeded fifth of each class for testing.

    Args:
        root: the folder with a folder for each class, or a packed file.
        split: "train" or "test".
        num_points: ignored, since clouds with fewer points repeat theirs, and meshes are sampled by area.
        variant: "y_up" (the default), or "z_up" for clouds to be turned so that y is up, as in the field's data sets;
            the clouds of a packed file are turned already.

    Raises:
        DataError: no classes, a class without files, a file that cannot be read.
    """
    folder = Path(root)
    if variant not in (None, *_UP):
        raise DataError(f"data.variant: expected y_up or z_up for folder, found {variant!r}")
    if folder.is_file():
        return packed.source(folder, split, up=_UP.get(variant))
    variant = variant or "y_up"
    classes = sorted(path for path in folder.glob("[!.]*/") if path.is_dir())
    if not classes:
        raise DataError(
            f"{folder.resolve()}: expected a folder for each class with its files ({' '.join(SUFFIXES)}), or with the "
            f"folders train and test, found {'no folders' if folder.is_dir() else 'nothing'}: point DATA_ROOT at it"
        )
    divided = any((path / name).is_dir() for path in classes for name in ("train", "test"))
    files, labels = [], []
    for label, path in enumerate(classes):
        place = path / split if divided else path
        mine = sorted(file for file in place.glob("[!.]*") if file.suffix.lower() in SUFFIXES and file.is_file())
        if len(mine) < (1 if divided else 2):
            raise DataError(
                f"{place}: expected {'files' if divided else 'at least two files'} of the kinds {' '.join(SUFFIXES)}, "
                f"found {len(mine)}: every class needs some for training and for testing"
            )
        files += mine
        labels += [label] * len(mine)
    if not divided:
        test = hold_out(torch.tensor(labels), TEST_FRACTION, seed=0).tolist()
        chosen = sorted(test if split == "test" else set(range(len(files))) - set(test))
        files, labels = [files[index] for index in chosen], [labels[index] for index in chosen]

    def clouds(count: int) -> Iterator[Cloud]:
        read = functools.partial(_read, samples=max(10_000, 2 * count), up=_UP[variant])
        yield from map(Cloud, in_parallel(read, files))

    objects = tuple(f"{classes[label].name}/{file.name}" for label, file in zip(labels, files, strict=True))
    names = tuple(path.name for path in classes)
    return Source(f"folder, {variant}", folder, tuple(files), names, objects, np.array(labels), None, clouds,
                  up=_UP[variant])  # fmt: skip


def _read(file: Path, samples: int, up: str) -> np.ndarray:
    return turn_up(torch.from_numpy(read_points(file, samples)), up).numpy()

"""Images, a folder for each class, on disk or in a zip file; or gratings that are made on the spot."""

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

from pointewa.datasets.images import read_image
from pointewa.datasets.source import Cloud, Source, refuse_variant
from pointewa.errors import DataError, counted
from pointewa.safe.archives import contents, members
from pointewa.safe.files import reading

PROCEDURAL = "gratings"  # as data.root
ORIENTATIONS = 8  # the classes of the gratings
COUNT = {"train": 4000, "test": 1000}  # gratings
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's


def source(root: str, split: str, num_points: int, variant: str | None = None) -> Source:
    """A split of ``train/<class>/*`` and ``test/<class>/*``, as torchvision's ImageFolder reads one of these folders.

    Args:
        root: "gratings" for the procedural set; the folder with train and test; a zip file that has them, on top or
            inside other folders; or a folder with one such zip file.
        split: "train" or "test".
        num_points: ignored.
        variant: there are none, so None.

    Raises:
        DataError: a variant, no such folders, a class without images in one of them, other classes for testing than for
            training.
    """
    refuse_variant("images", variant)
    if root == PROCEDURAL:
        return _gratings(split)
    path, names = _find(Path(root))
    classes, files, others = _classes(path, names, split)
    labels = np.array([number for number, one in enumerate(classes) for _ in files[one]])
    chosen = [name for one in classes for name in files[one]]

    def images(count: int) -> Iterator[Cloud]:
        changed: Counter[str] = Counter()
        for name, data in zip(chosen, _contents(path, chosen), strict=True):
            yield Cloud(read_image(path / name, data, changed))
        for what, number in sorted(changed.items()):
            print(f"note: {path}: {number} of {len(chosen)} images {what}", file=sys.stderr)
        if others:
            found = ", ".join(f"{number} {suffix}" for suffix, number in sorted(others.items()))
            note = f"left out {counted(others.total(), 'file')} of {split} not named as an image ({found})"
            print(f"note: {path}: {note}", file=sys.stderr)

    read = (path,) if path.is_file() else tuple(path / name for name in chosen)
    objects = tuple("/".join(PurePosixPath(name).parts[-2:]) for name in chosen)
    layout = f"images in {'a zip file' if path.is_file() else 'folders'}"
    return Source(layout, path, read, tuple(classes), objects, labels, None, images, normalize=False, images=True)


def _contents(path: Path, names: Sequence[str]) -> Iterator[bytes]:
    if path.is_file():
        yield from contents(path, names)
        return
    for name in names:
        with reading(path / name, "an image"):
            data = (path / name).read_bytes()
        yield data


def _find(root: Path) -> tuple[Path, list[str]]:
    """The folder or zip file, and the names of all that is in its folders train and test, folders with a "/" at their
    end; of a zip file with whatever folders they are in before them."""
    if all((root / split).is_dir() for split in ("train", "test")):
        walked = [one for split in ("train", "test") for one in os.walk(root / split, followlinks=True)]
        found = [Path(place, name).relative_to(root).as_posix() + end
                 for place, folders, files in walked for names, end in ((folders, "/"), (files, ""))
                 for name in names]  # fmt: skip
        return root, found
    zips = [root] if root.is_file() else sorted(root.glob("[!.]*.zip"))
    good = [path for path in zips if len(zips) == 1 or _is_set(path)]
    if len(good) != 1:
        found = f"{len(good)} such zip files ({', '.join(path.name for path in good[:3])})" if good else "neither"
        raise DataError(
            f"{root.resolve()}: expected the folders train and test with a folder of images for each class, or one zip "
            f"file of them, found {found}: point DATA_ROOT at one; data.root={PROCEDURAL} needs no files"
        )
    return good[0], members(good[0])


def _is_set(path: Path) -> bool:
    try:
        names = members(path)
    except DataError:  # whatever else lies there
        return False
    return all(any(split in PurePosixPath(name).parts[:-2] for name in names) for split in ("train", "test"))


def _classes(path: Path, names: Sequence[str], split: str) -> tuple[list[str], dict[str, list[str]], Counter[str]]:
    """The classes in ImageFolder's order, for each its images of a split, in its order too, and how many other files
    there are, by suffix."""
    others: Counter[str] = Counter()
    found: dict[str, dict[str, list[str]]] = {"train": {}, "test": {}}
    top: dict[str, tuple[str, ...]] = {}
    for name in names:
        parts = PurePosixPath(name).parts
        if any(part.startswith(".") or part == "__MACOSX" for part in parts):
            continue
        depth = next((number for number, part in enumerate(parts) if part in found), len(parts))
        folders = parts if name.endswith("/") else parts[:-1]
        if len(folders) < depth + 2:  # beside the classes
            continue
        one = parts[depth]
        if top.setdefault(one, parts[:depth]) != parts[:depth]:
            places = " and ".join("/".join((*above, one)) for above in (top[one], parts[:depth]))
            raise DataError(f"{path}: expected one folder {one}, found {places}: keep one of them")
        files = found[one].setdefault(parts[depth + 1], [])
        suffix = PurePosixPath(name).suffix.lower()
        if suffix in SUFFIXES and not name.endswith("/"):
            files.append(name)
        elif one == split and not name.endswith("/"):
            others[suffix or "without a suffix"] += 1
    for one, classes in found.items():
        if not classes:
            raise DataError(f"{path}: expected {one}/<class>/<images>, found no classes there")
        if empty := sorted(name for name, files in classes.items() if not files):
            raise DataError(
                f"{path}: {one}/{empty[0]}: expected images ({' '.join(SUFFIXES)}), found none: remove the folder or "
                "fill it"
            )
    train, test = found["train"], found["test"]
    if differ := sorted(train.keys() ^ test.keys()):
        where = "train" if differ[0] in train else "test"
        raise DataError(
            f"{path}: expected the same classes for training and for testing, found {len(differ)} in one only, such as "
            f"{where}/{differ[0]}"
        )
    order: Callable[[str], tuple[str, str]] = lambda name: (str(PurePosixPath(name).parent), name)  # noqa: E731
    return sorted(train), {name: sorted(files, key=order) for name, files in found[split].items()}, others


def gratings(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noisy gratings float32 ``[count, 3, 32, 32]`` and the number of their orientation, int64 ``[count]``."""
    labels = torch.randint(ORIENTATIONS, (count,), generator=generator)
    angle = (labels + 0.6 * torch.rand(count, generator=generator) - 0.3) * torch.pi / ORIENTATIONS
    frequency = 0.4 + 0.6 * torch.rand(count, generator=generator)
    phase = 2 * torch.pi * torch.rand(count, generator=generator)
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    along = x * angle.cos().view(-1, 1, 1) + y * angle.sin().view(-1, 1, 1)
    grating = (frequency.view(-1, 1, 1) * along + phase.view(-1, 1, 1)).sin()
    colour = torch.rand(count, 3, 1, 1, generator=generator)
    return grating.unsqueeze(1) * colour + 0.7 * torch.randn(count, 3, 32, 32, generator=generator), labels


def _gratings(split: str) -> Source:
    count = COUNT[split]
    drawn, labels = gratings(count, torch.Generator().manual_seed(list(COUNT).index(split)))
    pixels = (255 * (drawn / 6 + 0.5)).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    classes = tuple(f"{180 * number / ORIENTATIONS:g} degrees" for number in range(ORIENTATIONS))
    objects = tuple(f"{split}_{number:04}" for number in range(count))
    return Source(f"procedural, {count} gratings", Path(PROCEDURAL), (Path(__file__),), classes, objects,
                  labels.numpy(), None, lambda size: map(Cloud, pixels), normalize=False, images=True)  # fmt: skip

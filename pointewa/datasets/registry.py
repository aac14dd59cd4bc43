"""The data sets by name: the modules of `pointewa.datasets.layouts`."""

import importlib
import pkgutil
from pathlib import Path

import torch

from pointewa.datasets import layouts, prepare
from pointewa.datasets.base import Clouds
from pointewa.datasets.few_shot import Fold, drawn
from pointewa.datasets.images import Images
from pointewa.datasets.source import Source
from pointewa.datasets.transforms import pool_size
from pointewa.errors import DataError

NAMES = {
    module.name: importlib.import_module(f"{layouts.__name__}.{module.name}")
    for module in pkgutil.iter_modules(layouts.__path__)
}
_ANY = 1024  # points kept of an object if its source can give any number and none is asked for


def reported(name: str) -> tuple[str, ...]:
    """The metrics that the field reports on a data set, if its module says so; see
    `pointewa.tasks.base.Task.reporting`."""
    return getattr(NAMES.get(name), "METRICS", ())


def open_source(
    name: str,
    root: str,
    split: str,
    num_points: int = 1,
    variant: str | None = None,
    background: str = "keep",
    normalize: str = "auto",
    labelled: bool = True,
    parts: bool = False,
) -> Source:
    """A split of a data set as it is on disk.

    Args:
        name: one of `NAMES`.
        root: folder or file with the data (not used by "shapes").
        split: "train" or "test".
        num_points: how many points an object must have.
        variant: which of a data set's variants, see its module; None for its default.
        background: "drop" to leave out points that are not of the object, in sets that tell them apart; or "keep".
        normalize: "unit_sphere", "center" or "none", see `pointewa.runs.description.LoadedModel`; "auto": as the set is
            used.
        labelled: objects must have classes; else one for all of them will do, where a folder has no others.
        parts: read the parts of the points, as segmentation needs them; some sets come with them anyway.

    Raises:
        DataError: an unknown name, no data found, a layout that is not accepted, damaged files, too few points, a
            background that the files do not mark, a packed file that is normalised otherwise, or no parts where they
            are asked for.
    """
    if name not in NAMES:
        raise DataError(f"data.name: expected one of {', '.join(sorted(NAMES))}, found {name!r}")
    if split not in ("train", "test"):
        raise DataError(f'split: expected "train" or "test", found {split!r}')
    module = NAMES[name]
    hook = "source_with_parts" if parts else "source" if labelled else "unlabelled"
    found = getattr(module, hook, module.source)(root, split, num_points, variant).normalized_as(normalize)
    if found.num_points and found.num_points < num_points:
        raise DataError(
            f"{found.path}: an object has {found.num_points} points, data.num_points asks for {num_points}: lower it"
        )
    has_parts = found.parts is not None
    if background == "drop":  # last: a packed file of what is left is not ready-made, however it was normalised
        if not hasattr(module, "without_background"):
            raise DataError(f"data.background=drop: {name} does not tell objects from their background: set it to keep")
        found = module.without_background(found)
    if parts and found.parts is None:
        if has_parts:
            raise DataError(f"data.background=drop: what is left of {found.path} has no parts of objects: set it to "
                            "keep")  # fmt: skip
        raise DataError(f"data.name: {name} does not tell the parts of objects ({found.path}): set a data set with "
                        "labelled points, such as shapes")  # fmt: skip
    return found


def fold_file(name: str, root: str, fold: Fold, variant: str | None = None, background: str = "keep") -> Path | None:
    """The published file of a fold; None if it is to be drawn: without such files, or from the layout ``variant``.

    Raises:
        DataError: published folds are there, without this one.
    """
    find = getattr(NAMES.get(name), "fold_file", None)
    return find(root, fold) if find and variant is None and background == "keep" else None


def load(
    name: str,
    root: str,
    split: str,
    num_points: int | None = None,
    *,
    variant: str | None = None,
    background: str = "keep",
    normalize: str = "auto",
    labelled: bool = True,
    stream: bool | None = False,
    device: torch.device | str = "cpu",
    img_size: int = 32,
    fold: Fold | None = None,
    parts: bool = False,
) -> Clouds:
    """Load a split of a data set; the first time also prepare and cache it.

    Args:
        name: one of `NAMES`.
        root: folder or file with the data (not used by "shapes").
        split: "train" or "test".
        num_points: how many points an object will be asked for. A few more are kept, for what
            `pointewa.datasets.transforms.random_subset` draws from. None: all that the source has.
        variant: which of a data set's variants, see its module; None for its default.
        background: "drop" to leave out points that are not of the object, see `open_source`.
        normalize: how the clouds are normalised, see `open_source`.
        labelled: objects must have classes, see `open_source`.
        stream: leave the points on disk and read batches in advance; None: only if memory is short.
        device: what batches are put on.
        img_size: side in pixels, of a set of images, which is held in memory.
        fold: only the support set ("train") or the queries ("test") of a fold, labelled 0 to ``fold.way`` - 1; see
            `pointewa.datasets.few_shot`.
        parts: read the parts of the points, see `open_source`.

    Raises:
        DataError: as `open_source`.
    """
    chosen, file = None, fold and fold_file(name, root, fold, variant, background)
    if file:
        source = NAMES[name].open_fold(file, split, fold, num_points or 1).normalized_as(normalize)
    else:
        source = open_source(name, root, split, num_points or 1, variant, background, normalize, labelled, parts)
        chosen = fold and drawn(source, split, fold)
    rows = chosen and chosen.rows
    if source.images:
        if stream:
            raise DataError("data.stream: images are held in memory, found true: set it to auto or false")
        clouds = Images.of(source, img_size, torch.device(device), f"reading {name} ({split})")
        clouds = clouds.take(rows) if rows else clouds
    else:
        wanted = pool_size(num_points) if num_points else source.num_points or _ANY
        count = min(wanted, source.num_points or wanted)
        clouds = prepare.load(name, split, source, count, torch.device(device), stream, num_points, rows)
    return clouds.relabelled(torch.tensor(chosen.labels), chosen.class_names) if chosen else clouds

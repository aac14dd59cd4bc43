"""The user's own clouds and meshes: one folder per class; or, for tasks that need no labels, files in any folders."""

import functools
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from pointewa.datasets import packed
from pointewa.datasets.base import hold_out
from pointewa.datasets.files import SUFFIXES, kind, read_cloud, read_labelled
from pointewa.datasets.found_parts import NAMES, find_parts
from pointewa.datasets.source import Cloud, Source, in_parallel, say_once
from pointewa.errors import DataError, counted
from pointewa.ops import UP_WORDS, turn_up
from pointewa.safe.files import printable

TEST_FRACTION = 0.2  # of each class, if the folders do not say which files are for testing
_LITTER = {"__macosx", "thumbs.db", "desktop.ini", "ehthumbs.db", "$recycle.bin"}  # of operating systems
_SPLITS = ("train", "test")


class _Found(NamedTuple):
    """Names of the classes; of each file of a split its class and the object's name; what is there beside them."""

    names: tuple[str, ...]
    files: Sequence[Path]
    labels: Sequence[int]
    objects: Sequence[str]
    left_out: Mapping[str, Sequence[str]]


def source(root: str, split: str, num_points: int, variant: str | None = None) -> Source:
    """A split of ``<class>/{train,test}/*``, of ``{train,test}/<class>/*``, or of ``<class>/*`` with a fixed, seeded
    fifth of each class for testing.

    A note on stderr says what is there and is not read; hidden files are passed over.

    Args:
        root: the folder with a folder for each class, or a packed file.
        split: "train" or "test".
        num_points: ignored, since clouds with fewer points repeat theirs, and meshes are sampled by area.
        variant: "y_up" (the default); "z_up", "z_down" (z points down) and so on, of `pointewa.ops.UP_WORDS`, for
            clouds to be turned so that y is up, as in the field's data sets; those of a packed file are turned already.

    Raises:
        DataError: no classes, a class without files, classes whose names differ by case only, a file that cannot be
            read.
    """
    folder = _checked(root, variant)
    if folder.is_file():
        return packed.source(folder, split, up=UP_WORDS.get(variant))
    return _source(folder, variant, _labelled(folder, split))


def unlabelled(root: str, split: str, num_points: int, variant: str | None = None) -> Source:
    """A split for tasks that need no labels: that of `source` where the folder has classes in both splits, and nothing
    beside them; else all its files, in folders of any depth, as one class with the folder's name.

    Of these a fixed, seeded fifth is for testing, unless each is below a folder train or test, which are then kept
    apart. A note on stderr says so.

    Args:
        root: the folder, or a packed file.
        split: "train" or "test".
        num_points: ignored, as in `source`.
        variant: as in `source`.

    Raises:
        DataError: fewer than two files; a file that cannot be read.
    """
    folder = _checked(root, variant)
    if folder.is_file():
        return source(root, split, num_points, variant)
    try:  # both splits, of which neither may be taken for classes without the other
        both = {} if _is_flat(folder) else {one: _labelled(folder, one) for one in _SPLITS}
    except DataError:
        if not any(_below(folder, defaultdict(list))):
            raise
        both = {}
    return _source(folder, variant, both.get(split) or _of_one_class(folder, split))


def _is_flat(folder: Path) -> bool:
    """Whether files are directly in it, or in its folders train and test where there are no others."""
    entries = _entries(folder)
    folders = [path for path in entries if path.is_dir()]
    if [path.name for path in folders] == ["test", "train"]:
        entries += [path for one in folders for path in _entries(one)]
    return any(map(_is_cloud, entries))


def _of_one_class(folder: Path, split: str) -> _Found:
    """All files of a split, or chosen from all files where some are in neither train nor test."""
    left_out: dict[str, list[str]] = defaultdict(list)
    files = list(_below(folder, left_out))
    if len(files) < 2:
        raise DataError(f"{folder}: expected at least two files ({' '.join(SUFFIXES)}), found {len(files)}: add others")
    splits = [next((part for part in file.relative_to(folder).parts[:-1] if part in _SPLITS), "") for file in files]
    divided = set(splits) == set(_SPLITS)
    name = printable(folder.resolve().name) or "cloud"
    how = "train and test as they are" if divided else f"{TEST_FRACTION:.0%} of them, by a fixed seed, for testing"
    say_once(f"note: {folder}: no folders of classes: all files are taken for one class, {name}; {how}")
    if divided:
        files = [file for file, one in zip(files, splits, strict=True) if one == split]
    else:
        files = [files[index] for index in _chosen([0] * len(files), split)]
    objects = [printable(str(file.relative_to(folder))) for file in files]
    return _Found((name,), files, [0] * len(files), objects, left_out)


def _checked(root: str, variant: str | None) -> Path:
    if variant not in (None, *UP_WORDS):
        raise DataError(f"data.variant: expected one of {', '.join(UP_WORDS)} for folder, found {variant!r}")
    return Path(root)


def _labelled(folder: Path, split: str) -> _Found:
    """A split of the folders of the classes."""
    left_out: dict[str, list[str]] = defaultdict(list)
    by_split = _by_split(folder)
    places = _classes(folder, left_out, by_split) if by_split else _classes(folder, left_out)
    if not places:
        loose = sum(map(_is_cloud, _entries(folder)))
        found = f"no folders, but {counted(loose, 'file')}" if loose else "no folders"
        raise DataError(
            f"{folder.resolve()}: expected a folder for each class with its files ({' '.join(SUFFIXES)}), or with the "
            f"folders train and test, found {found if folder.is_dir() else 'nothing'}: point DATA_ROOT at it"
            + (", or pre-train, which needs no classes" if loose else "")
        )
    _check_names(folder, places)
    divided = by_split or any((path / name).is_dir() for path in places.values() for name in _SPLITS)
    names, files, labels = tuple(places), [], []
    for label, path in enumerate(places.values()):
        place = folder / split / path.name if by_split else path / split if divided else path
        mine = _files(folder, place, left_out)
        if len(mine) < (1 if divided else 2):
            raise DataError(
                f"{place}: expected {'files' if divided else 'at least two files'} of the kinds {' '.join(SUFFIXES)}, "
                f"found {len(mine)}: every class needs some for training and for testing"
            )
        files += mine
        labels += [label] * len(mine)
        if divided and not by_split:  # what is beside train and test
            _files(folder, path, left_out, passed=_SPLITS)
    if not divided:
        chosen = _chosen(labels, split)
        files, labels = [files[index] for index in chosen], [labels[index] for index in chosen]
    objects = [f"{names[label]}/{printable(file.name)}" for label, file in zip(labels, files, strict=True)]
    return _Found(names, files, labels, objects, left_out)


def _chosen(labels: Sequence[int], split: str) -> list[int]:
    """The objects of a split of a set that is not divided."""
    test = hold_out(torch.tensor(labels), TEST_FRACTION, seed=0).tolist()
    return sorted(test if split == "test" else set(range(len(labels))) - set(test))


def _source(folder: Path, variant: str | None, found: _Found) -> Source:
    variant = variant or "y_up"
    _note(folder, found.left_out)

    def clouds(count: int) -> Iterator[Cloud]:
        read = functools.partial(_read, samples=max(10_000, 2 * count), up=UP_WORDS[variant])
        yield from in_parallel(read, found.files)

    labels, left_out = np.array(found.labels), dict(found.left_out)
    return Source(f"folder, {variant}", folder, tuple(found.files), found.names, tuple(found.objects), labels, None,
                  clouds, up=UP_WORDS[variant], left_out=left_out)  # fmt: skip


def _is_cloud(path: Path) -> bool:
    return bool(kind(path)) and path.is_file()


def _below(folder: Path, left_out: dict[str, list[str]]) -> Iterator[Path]:
    """All files that can be read, in folders of any depth; links to folders are not followed, since they may meet, but
    those that are train and test themselves."""
    tops = [path for path in _entries(folder, folders=True) if path.name in _SPLITS]
    tops = tops if len(tops) == len(_SPLITS) else []
    places = [folder]
    while places:
        entries = _entries(places.pop())
        folders = [path for path in entries if path.is_dir() and (not path.is_symlink() or path in tops)]
        files = [path for path in entries if _is_cloud(path)]
        _leave_out(folder, [path for path in entries if path not in {*folders, *files}], left_out)
        yield from files
        places += reversed(folders)


def source_with_parts(root: str, split: str, num_points: int, variant: str | None = None) -> Source:
    """`source`, with the parts of the points: the labels in the files, by class, numbered through.

    The parts are those that `pointewa.datasets.found_parts.NAMES` lists, else those that occur in either split, which a
    note on stderr says.

    Raises:
        DataError: also a file without labels, a mesh, a label that is not listed.
    """
    if Path(root).is_file():
        return source(root, split, num_points, variant)
    both = [source(root, one, num_points, variant) for one in _SPLITS]
    found = both[_SPLITS.index(split)]
    files = [file for one in both for file in one.files]
    parts, numbers = find_parts(
        found.path, found.class_names, files, np.concatenate([one.labels for one in both]), say_once
    )
    items = [(file, found.class_names[label], numbers[label])
             for file, label in zip(found.files, found.labels, strict=True)]  # fmt: skip

    def clouds(count: int) -> Iterator[Cloud]:
        yield from in_parallel(functools.partial(_read_labelled, up=found.up), items)

    names = found.path / NAMES
    where = (*files, *([names] if names.is_file() else []))  # on which the numbers of the parts depend
    return replace(found, layout=f"{found.layout}, with parts", files=where, clouds=clouds, point_labels=True,
                   parts=parts)  # fmt: skip


def _by_split(folder: Path) -> bool:
    """Whether it is laid out as {train,test}/<class>/*.

    Raises:
        DataError: one of train and test is missing.
    """
    found = [name for name in _SPLITS if _entries(folder / name, folders=True)
             and not any(kind(path) for path in _entries(folder / name))]  # fmt: skip
    within = {path.name for name in found for path in _entries(folder / name, folders=True)}
    if not found or within <= set(_SPLITS):  # a class may be called train
        return False
    if len(found) == 1:
        others = [printable(path.name) for path in _entries(folder, folders=True)]
        raise DataError(
            f"{folder}: expected the folders train and test with a folder for each class, found {', '.join(others)}: "
            f"add or rename the other one, or move the classes out of {found[0]} to have them divided"
        )
    return True


def _entries(folder: Path, folders: bool = False) -> list[Path]:
    """What is in a folder but hidden, sorted: everything, or the folders that are not links to where they are in."""
    if not folder.is_dir():
        return []
    found = sorted(path for path in folder.iterdir() if path.name[0] != "." and path.name.lower() not in _LITTER)
    return [path for path in found if path.is_dir() and not _is_loop(path)] if folders else found


def _is_loop(path: Path) -> bool:
    return path.is_symlink() and path.resolve() in (path.parent.resolve(), *path.parent.resolve().parents)


def _classes(folder: Path, left_out: dict[str, list[str]], by_split: bool = False) -> dict[str, Path]:
    """The folders of the classes by their names, those in train and test if these come first."""
    tops = [folder / name for name in _SPLITS] if by_split else [folder]
    for top in dict.fromkeys((folder, *tops)):
        wanted = set(tops) | set(_entries(top, folders=True) if top in tops else ())
        _leave_out(folder, [path for path in _entries(top) if path not in wanted and path.name != NAMES], left_out)
    found = [path for top in tops for path in _entries(top, folders=True)]
    return {printable(path.name): path for path in sorted(found, key=lambda path: path.name)}


def _check_names(folder: Path, names: Mapping[str, Path]) -> None:
    alike: dict[str, str] = {}
    for name in names:
        other = alike.setdefault(unicodedata.normalize("NFKC", name).casefold(), name)
        if other != name:
            raise DataError(
                f"{folder}: the classes {other} and {name} differ by the case or the encoding of their names only: "
                "rename or merge them"
            )


def _files(folder: Path, place: Path, left_out: dict[str, list[str]], passed: Sequence[str] = ()) -> list[Path]:
    found = [path for path in _entries(place) if path.name not in passed]
    files = [] if passed else [path for path in found if _is_cloud(path)]
    _leave_out(folder, [path for path in found if path not in set(files)], left_out)
    return files


def _leave_out(folder: Path, paths: Sequence[Path], left_out: dict[str, list[str]]) -> None:
    for path in paths:
        name = "folders" if path.is_dir() else path.suffix.lower() or "without a suffix"
        if not path.exists():
            name = "broken links"
        elif _is_cloud(path):
            name = f"misplaced {kind(path)}"
        left_out[printable(name)].append(printable(str(path.relative_to(folder))))


def _note(folder: Path, left_out: Mapping[str, Sequence[str]]) -> None:
    if left_out:
        kinds = ", ".join(f"{len(paths)} {name}" for name, paths in sorted(left_out.items()))
        read = " ".join(SUFFIXES)
        say_once(f"note: {folder}: left out: {kinds} (make data WHAT=inspect lists them); read are {read}")


def _read_labelled(item: tuple[Path, str, Mapping[int, int]], up: str) -> Cloud:
    file, name, numbers = item
    cloud, column = read_labelled(file)
    values, index = np.unique(cloud.point_labels, return_inverse=True)
    if strange := [value for value in values.tolist() if value not in numbers]:
        raise DataError(
            f"{file}: {column or 'last column'}: expected the labels of {name}, {', '.join(map(str, numbers))}, found "
            f"{strange[0]}: list it in {NAMES}, or mend the file"
        )
    labels = np.array([numbers[value] for value in values.tolist()], np.int64)[index]
    return _turned(cloud, up)._replace(point_labels=labels)


def _read(file: Path, samples: int, up: str) -> Cloud:
    return _turned(read_cloud(file, samples), up)


def _turned(cloud: Cloud, up: str) -> Cloud:
    return cloud._replace(points=turn_up(torch.from_numpy(cloud.points), up).numpy())

"""ModelNet40 (Wu et al., CVPR 2015): 40 classes of CAD objects, 9,843 for training and 2,468 for testing."""

import functools
import json
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from pointewa.datasets import few_shot, packed
from pointewa.datasets.files import read_points
from pointewa.datasets.source import Cloud, Source, in_parallel
from pointewa.errors import DataError
from pointewa.ops import turn_up
from pointewa.safe.files import reading
from pointewa.safe.hdf5 import dataset, open_hdf5, read_labels
from pointewa.safe.pickles import load_arrays

# Objects of each class in the official split; a class's training objects are numbered from 1, its test objects follow.
OFFICIAL = {
    "airplane": (626, 100), "bathtub": (106, 50), "bed": (515, 100), "bench": (173, 20), "bookshelf": (572, 100),
    "bottle": (335, 100), "bowl": (64, 20), "car": (197, 100), "chair": (889, 100), "cone": (167, 20),
    "cup": (79, 20), "curtain": (138, 20), "desk": (200, 86), "door": (109, 20), "dresser": (200, 86),
    "flower_pot": (149, 20), "glass_box": (171, 100), "guitar": (155, 100), "keyboard": (145, 20), "lamp": (124, 20),
    "laptop": (149, 20), "mantel": (284, 100), "monitor": (465, 100), "night_stand": (200, 86), "person": (88, 20),
    "piano": (231, 100), "plant": (240, 100), "radio": (104, 20), "range_hood": (115, 100), "sink": (128, 20),
    "sofa": (680, 100), "stairs": (124, 20), "stool": (90, 20), "table": (392, 100), "tent": (163, 20),
    "toilet": (344, 100), "tv_stand": (267, 100), "vase": (475, 100), "wardrobe": (87, 20), "xbox": (103, 20),
}  # fmt: skip
_FOLDERS = ("", "ModelNet", "ModelNet40", "ModelNet40Ply2048", "modelnet40")
_FEW_SHOT = "ModelNetFewshot"  # has 5way_10shot/0.pkl, or 5way10shot/0.pkl
_OFFICIAL, _RESAMPLED = "modelnet40_ply_hdf5_2048", "modelnet40_normal_resampled"

ACCEPTED = f"""\
  packed     modelnet40*.h5: groups train and test with data, label, name; attribute shape_names
  ply_hdf5   {_OFFICIAL}/: ply_data_{{train,test}}*.h5 and shape_names.txt, as published
  text       {_RESAMPLED}/: <class>/<name>.txt, modelnet40_{{shape_names,train,test}}.txt
  dat        modelnet40_{{train,test}}_8192pts_fps.dat, there or elsewhere, with modelnet40_shape_names.txt
  off        <class>/{{train,test}}/<name>.off, the meshes as published"""


@functools.cache
def official_names(split: str) -> dict[str, list[str]]:
    """The objects of each class in the official split."""
    first = {"train": lambda train: 1, "test": lambda train: train + 1}[split]
    return {
        name: [f"{name}_{number:04}" for number in range(first(train), (train, train + test)[split == "test"] + 1)]
        for name, (train, test) in OFFICIAL.items()
    }


def check_split(source: Source, split: str) -> list[str]:
    """What is missing from a split, or too much in it, compared with the official one; by name if there are names."""
    problems, official = [], official_names(split)
    if source.class_names != tuple(OFFICIAL):
        strange = sorted(set(source.class_names) - set(OFFICIAL)) or ["in another order"]
        problems.append(f"expected the 40 official classes, found {len(source.class_names)} ({_some(strange)})")
    found: dict[str, list[str]] = {name: [] for name in official}
    for label, name in zip(source.labels.tolist(), source.object_names, strict=True):
        found.setdefault(source.class_names[label], []).append(name)
    named = set().union(*official.values(), *official_names("test" if split == "train" else "train").values())
    by_name = any(name in named for name in source.object_names)
    for name, expected in official.items():
        if by_name:
            for kind, names in (("missing", set(expected) - set(found[name])),
                                ("not of this split", set(found[name]) - set(expected)),
                                ("twice", {n for n, times in Counter(found[name]).items() if times > 1})):  # fmt: skip
                if names:
                    problems.append(f"{name}: {len(names)} {kind} ({_some(sorted(names))})")
        elif len(found[name]) != len(expected):
            problems.append(f"{name}: {len(found[name])} objects, expected {len(expected)}")
    return problems


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + ", ..." * (len(names) > 3)


def source(root: str, split: str, num_points: int, variant: str | None = None) -> Source:
    """A split of ModelNet40, y up, from the first layout in `ACCEPTED` that has enough points, else that with the most.

    Args:
        root: a folder that holds the data (also one or two levels down, as other codebases have it), or a packed file.
        split: "train" or "test".
        num_points: how many points an object must have.
        variant: a layout of `ACCEPTED`; None for any.

    Raises:
        DataError: nothing found, damaged files.
    """
    if variant not in (None, *_LAYOUTS):
        raise DataError(f"data.variant: expected one of {', '.join(_LAYOUTS)} for modelnet40, found {variant!r}")
    largest = None
    for candidate in _candidates(Path(root), variant):
        found = candidate(split)
        if found.num_points is None or found.num_points >= num_points:
            if problems := check_split(found, split):
                expected = sum(sizes[split == "test"] for sizes in OFFICIAL.values())
                print(
                    f"note: {found.path} has {len(found)} objects in {split}, the official split {expected}; "
                    f"{problems[0]}{', ...' * (len(problems) > 1)}: make data DATASET=modelnet40 WHAT=verify",
                    file=sys.stderr,
                )
            return found
        largest = max(filter(None, (largest, found)), key=lambda one: one.num_points)
    if largest:
        return largest
    raise DataError(
        f"ModelNet40 was not found.\nLooked in {Path(root).resolve()} and its folders {', '.join(_FOLDERS[1:])} for "
        f"{'one of' if variant is None else f'data.variant={variant} of'}\n{ACCEPTED}\n"
        "Point DATA_ROOT (data.root) at the folder or file that you have, or try make data DATASET=modelnet40 "
        "WHAT=download. Without any data: make train DATASET=shapes"
    )


def fold_file(root: str, fold: few_shot.Fold) -> Path | None:
    """The file of a published few-shot fold, ModelNetFewshot/5way_10shot/0.pkl; None without such folders.

    Raises:
        DataError: folds of this way and shot are there, without this one.
    """
    return few_shot.fold_file([Path(root, folder, _FEW_SHOT) for folder in _FOLDERS], fold)


def open_fold(path: Path, split: str, fold: few_shot.Fold, num_points: int) -> Source:
    """A split of a published few-shot fold, see `pointewa.datasets.few_shot.open_fold`."""
    return few_shot.open_fold(path, split, fold, num_points, tuple(OFFICIAL))


def _candidates(root: Path, variant: str | None) -> Iterator[Callable[[str], Source]]:
    """The layouts that are there, the most trusted first: of each a function from the split to its source."""
    if root.is_file() and variant in (None, "packed"):
        yield functools.partial(packed.source, root)
        return
    folders = [root / name for name in _FOLDERS]
    for layout in [variant] if variant else _LAYOUTS:
        find, read = _LAYOUTS[layout]
        seen = set()
        for place in find(folders):
            if place.resolve() not in seen:
                seen.add(place.resolve())
                yield functools.partial(read, place)


def _find_packed(folders: list[Path]) -> list[Path]:
    files = [file for folder in folders for file in sorted(folder.glob("modelnet40*.h5"))]
    return sorted(files, key=_count, reverse=True)  # the most objects first


def _count(file: Path) -> int:
    try:
        with open_hdf5(file, packed.WHAT) as h5:
            return len(h5["train/label"])
    except DataError:
        return 0


def _find_official(folders: list[Path]) -> list[Path]:
    places = [folders[0], *(folder / _OFFICIAL for folder in folders)]
    return [place for place in places if any(place.glob("ply_data_*.h5"))]


def _open_official(folder: Path, split: str) -> Source:
    names = _lines(folder / "shape_names.txt")
    files = sorted(folder.glob(f"ply_data_{split}*.h5"))
    if not files:
        raise DataError(f"{folder}: no ply_data_{split}*.h5 of this split: get the archive again, it is incomplete")
    labels, objects, points = [], [], set()
    for file in files:
        with open_hdf5(file, "HDF5 with the datasets data and label") as h5:
            data = dataset(h5, "data")
            if data.dtype.kind not in "fiu":
                raise ValueError(f"data: expected numbers, found {data.dtype}")
            shape, mine = data.shape, read_labels(dataset(h5, "label"))
        if len(shape) != 3 or shape[2] != 3 or len(mine) != shape[0]:
            raise DataError(f"{file}: expected data [n, P, 3] and label [n], found {list(shape)} and [{len(mine)}]")
        labels.append(mine)
        objects += _official_objects(file, len(mine))
        points.add(shape[1])

    def clouds(count: int) -> Iterator[Cloud]:
        for file in files:
            with open_hdf5(file, "HDF5 with the datasets data and label") as h5:
                data = h5["data"]
                for start in range(0, len(data), 256):
                    yield from map(Cloud, data[start : start + 256].astype(np.float32))

    where = (folder / "shape_names.txt", *files)
    return Source(_OFFICIAL, folder, where, names, tuple(objects), np.concatenate(labels),
                  min(points), clouds)  # fmt: skip


def _official_objects(file: Path, count: int) -> list[str]:
    """Names of the objects, which the archive has in JSON files: ply_data_test_0_id2file.json."""
    listed = file.with_name(f"{file.stem[:-1]}_{file.stem[-1]}_id2file.json")
    try:
        found = json.loads(listed.read_text())
    except (OSError, ValueError):
        found = []
    usable = isinstance(found, list) and all(isinstance(name, str) and name.isprintable() for name in found)
    names = [Path(name).stem for name in found] if usable else []
    return names if len(names) == count else [f"{file.stem}/{index}" for index in range(count)]


def _find_text(folders: list[Path]) -> list[Path]:
    places = [folders[0], *(folder / _RESAMPLED for folder in folders)]
    return [place for place in places if (place / "modelnet40_train.txt").exists() and any(place.glob("*/*.txt"))]


def _open_text(folder: Path, split: str) -> Source:
    names = _lines(folder / "modelnet40_shape_names.txt")
    objects = _lines(folder / f"modelnet40_{split}.txt")
    classes = [name.rpartition("_")[0] for name in objects]
    files = tuple(folder / label / f"{name}.txt" for label, name in zip(classes, objects, strict=True))
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise DataError(
            f"{folder}: {len(missing)} of {len(files)} files that modelnet40_{split}.txt lists are missing, the first "
            f"is {missing[0].relative_to(folder)}: get the archive again, it is incomplete"
        )
    num_points = len(_read_text(files[0]))

    def clouds(count: int) -> Iterator[Cloud]:
        for file, points in zip(files, in_parallel(_read_text, files), strict=True):
            if len(points) != num_points:
                raise DataError(f"{file}: expected {num_points} rows as in {files[0].name}, found {len(points)}: "
                                "get the file again, it is damaged or incomplete")  # fmt: skip
            yield Cloud(points)

    labels = _labels(classes, names, folder / f"modelnet40_{split}.txt")
    return Source(_RESAMPLED, folder, files, names, objects, labels, num_points, clouds)


def _read_text(file: Path) -> np.ndarray:
    with reading(file, "rows of x,y,z,nx,ny,nz"), warnings.catch_warnings(action="ignore"):
        return np.loadtxt(file, np.float32, delimiter=",", usecols=(0, 1, 2), ndmin=2)


def _find_dat(folders: list[Path]) -> list[Path]:
    places = [*folders, *(folder / _RESAMPLED for folder in folders)]
    return [place for place in places if any(place.glob("modelnet40_train_*pts_fps.dat"))]


def _open_dat(folder: Path, split: str) -> Source:
    files = sorted(folder.glob(f"modelnet40_{split}_*pts_fps.dat"), key=lambda file: file.stat().st_size)
    if not files:
        raise DataError(f"{folder}: no modelnet40_{split}_8192pts_fps.dat beside that of the other split")
    file, listed = files[-1], folder / f"modelnet40_{split}.txt"
    if not (folder / "modelnet40_shape_names.txt").is_file():
        raise DataError(f"{file}: expected modelnet40_shape_names.txt beside it, with the names of the classes that "
                        "its labels number: it comes with modelnet40_normal_resampled")  # fmt: skip
    names = _lines(folder / "modelnet40_shape_names.txt")
    content = load_arrays(file)
    with reading(file, "a pickle [points, labels] of as many objects"):
        if not isinstance(content, list | tuple) or len(content) != 2:
            raise ValueError(f"expected two lists, found {type(content).__name__}")
        points, labels = content
        if not all(isinstance(one, list | tuple | np.ndarray) for one in (points, labels)):
            raise ValueError(f"expected two lists, found {type(points).__name__} and {type(labels).__name__}")
        labels = [np.asarray(label) for label in labels]
        if not all(label.dtype.kind in "iu" and label.size == 1 for label in labels):
            raise ValueError("labels that are no whole numbers")
        labels = np.array([int(label.reshape(())) for label in labels], np.int64)
        if len(points) != len(labels) or not len(points):
            raise ValueError(f"{len(points)} clouds, {len(labels)} labels")
        shapes = {np.shape(cloud) for cloud in points}
        if len(shapes) > 1 or not all(len(shape) == 2 and shape[1] >= 3 for shape in shapes):
            raise ValueError(f"clouds of the shapes {', '.join(map(str, sorted(shapes)[:3]))}")
        if not all(np.asarray(cloud).dtype.kind in "iuf" for cloud in points):
            raise ValueError("clouds of other things than real numbers")
        num_points = next(iter(shapes))[0]

    def clouds(count: int) -> Iterator[Cloud]:
        with reading(file, "clouds of numbers"):
            for cloud in points:
                yield Cloud(np.ascontiguousarray(np.asarray(cloud)[:, :3], np.float32))

    objects = _lines(listed) if listed.is_file() else ()
    if len(objects) != len(labels):  # the clouds are in the order of the list beside them
        objects = tuple(f"{file.stem}/{index}" for index in range(len(labels)))
    return Source(file.name, folder, (file,), names, objects, labels, num_points, clouds)


def _find_off(folders: list[Path]) -> list[Path]:
    places = [*folders, *(folder / "ModelNet40" for folder in folders)]
    return [place for place in places if next(place.glob("*/train/*.off"), None)]


def _open_off(folder: Path, split: str) -> Source:
    files = tuple(sorted(folder.glob(f"*/{split}/*.off")))
    names = tuple(sorted({path.parent.parent.name for path in folder.glob("*/*/*.off")}))
    if not files:
        raise DataError(f"{folder}: no <class>/{split}/*.off: get the archive again, it is incomplete")

    def clouds(count: int) -> Iterator[Cloud]:
        # The field's text files have 10000 points of an object.
        yield from map(Cloud, in_parallel(functools.partial(_sample_off, samples=max(10_000, 2 * count)), files))

    labels = _labels([file.parent.parent.name for file in files], names, folder)
    return Source("meshes", folder, files, names, tuple(file.stem for file in files), labels, None, clouds,
                  up="z")  # fmt: skip


def _sample_off(file: Path, samples: int) -> np.ndarray:
    # The meshes have z up, everything that was made of them y.
    return turn_up(torch.from_numpy(read_points(file, samples)), "z").numpy()


_LAYOUTS = {
    "packed": (_find_packed, packed.source),
    "ply_hdf5": (_find_official, _open_official),
    "text": (_find_text, _open_text),
    "dat": (_find_dat, _open_dat),
    "off": (_find_off, _open_off),
}


def _lines(file: Path) -> tuple[str, ...]:
    with reading(file, "a list of names"):
        names = tuple(file.read_text().split())
        if not names or not "".join(names).isprintable():
            raise ValueError("it is empty, or no text")
        return names


def _labels(classes: list[str], names: tuple[str, ...], where: Path) -> np.ndarray:
    number = {name: index for index, name in enumerate(names)}
    unknown = sorted(set(classes) - set(number))
    if unknown:
        raise DataError(f"{where}: {unknown[0]!r} is not one of the {len(names)} classes ({', '.join(names[:3])}, ...)")
    return np.array([number[name] for name in classes], np.int64)

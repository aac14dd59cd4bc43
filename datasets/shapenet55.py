"""ShapeNet-55 (Yu et al., ICCV 2021): clouds of ShapeNetCore's 55 classes, on which the field pre-trains."""

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pointewa.datasets import packed
from pointewa.datasets.files import read_points
from pointewa.datasets.inspect.download import BY_REQUEST
from pointewa.datasets.source import Cloud, Source, refuse_variant
from pointewa.errors import DataError
from pointewa.safe.files import reading

# ShapeNetCore's names of its synsets; sorted, these are the classes.
CLASSES = {
    "02691156": "airplane", "02747177": "trash_bin", "02773838": "bag", "02801938": "basket", "02808440": "bathtub",
    "02818832": "bed", "02828884": "bench", "02843684": "birdhouse", "02871439": "bookshelf", "02876657": "bottle",
    "02880940": "bowl", "02924116": "bus", "02933112": "cabinet", "02942699": "camera", "02946921": "can",
    "02954340": "cap", "02958343": "car", "02992529": "cellphone", "03001627": "chair", "03046257": "clock",
    "03085013": "keyboard", "03207941": "dishwasher", "03211117": "display", "03261776": "earphone",
    "03325088": "faucet", "03337140": "file_cabinet", "03467517": "guitar", "03513137": "helmet", "03593526": "jar",
    "03624134": "knife", "03636649": "lamp", "03642806": "laptop", "03691459": "loudspeaker", "03710193": "mailbox",
    "03759954": "microphone", "03761084": "microwave", "03790512": "motorbike", "03797390": "mug", "03928116": "piano",
    "03938244": "pillow", "03948459": "pistol", "03991062": "flowerpot", "04004475": "printer", "04074963": "remote",
    "04090263": "rifle", "04099429": "rocket", "04225987": "skateboard", "04256520": "sofa", "04330267": "stove",
    "04379243": "table", "04401088": "telephone", "04460130": "tower", "04468005": "train", "04530566": "watercraft",
    "04554684": "washer",
}  # fmt: skip
SIZES = {"train": 41952, "test": 10518}
_FOLDERS = ("", "ShapeNet-55", "ShapeNet55-34", "ShapeNet55-34/ShapeNet-55")
_CLOUDS = "shapenet_pc"


def check_split(source: Source, split: str) -> list[str]:
    """What is missing from a split, or too much in it, compared with the published sizes."""
    found, classes = len(source), len(source.class_names)
    problems = [] if classes == len(CLASSES) else [f"{classes} classes, expected {len(CLASSES)}"]
    return problems + ([] if found == SIZES[split] else [f"{found} objects, expected {SIZES[split]}"])


def source(root: str, split: str, num_points: int, variant: str | None = None) -> Source:
    """A split of ShapeNet-55. An object's class is its synset's number among the sorted synsets of both splits.

    Args:
        root: the folder that holds ``train.txt`` and ``test.txt``, or one or two levels above it (``ShapeNet-55``,
            ``ShapeNet55-34``, ``ShapeNet55-34/ShapeNet-55``), or a packed file. The clouds are in ``shapenet_pc``,
            there or one level above.
        split: "train" or "test".
        num_points: how many points an object must have; the published files have 8192.
        variant: there are none, so None.

    Raises:
        DataError: a variant, nothing found, damaged lists, files that are missing or damaged.
    """
    refuse_variant("shapenet55", variant)
    places = [Path(root, folder) for folder in _FOLDERS]
    packs = [path for place in places for path in sorted(place.glob("shapenet55*.h5"))]
    if Path(root).is_file() or packs:
        file = Path(root) if Path(root).is_file() else packed.with_points(packs, split, num_points)
        found = packed.source(file, split)
    else:
        lists = [place for place in places if all((place / f"{name}.txt").is_file() for name in SIZES)]
        both = [(place, one) for place in lists for one in (place / _CLOUDS, place.absolute().parent / _CLOUDS)
                if one.is_dir()]  # fmt: skip
        if not both:
            missing = f"no folder {_CLOUDS} in {lists[0]} or beside it" if lists else "no train.txt and test.txt there"
            raise DataError(
                f"ShapeNet-55 was not found: {missing}.\nLooked in {Path(root).resolve()} and its folders "
                f"{', '.join(_FOLDERS[1:])}.\n{BY_REQUEST['shapenet55']}"
            )
        found = _open(*both[0], split)
    if problems := check_split(found, split):
        print(f"note: {found.path}: {'; '.join(problems)} in {split}", file=sys.stderr)
    return found


def _open(lists: Path, folder: Path, split: str) -> Source:
    names = {name: _names(lists / f"{name}.txt") for name in SIZES}
    mine = names[split]
    synsets = sorted({name.partition("-")[0] for one in names.values() for name in one})
    with reading(folder, "a folder"):
        present = {entry.name for entry in os.scandir(folder)}  # one call for 52,470 files
    missing = [name for name in mine if name not in present]
    if missing:
        raise DataError(
            f"{folder}: {len(missing)} of {len(mine)} files that {lists / split}.txt lists are missing, the first is "
            f"{missing[0]}: get the archive again, it is incomplete"
        )
    files = [folder / name for name in mine]
    num_points = len(read_points(files[0], 1))

    def clouds(count: int) -> Iterator[Cloud]:
        for file in files:
            points = read_points(file, 1)
            if len(points) != num_points:
                raise DataError(
                    f"{file}: expected {num_points} points as in {files[0].name}, found {len(points)}: get the file "
                    "again, it is damaged or incomplete"
                )
            yield Cloud(points)

    labels = np.array([synsets.index(name.partition("-")[0]) for name in mine], np.int64)
    # The labels come from both lists.
    where = (*(lists / f"{name}.txt" for name in SIZES), *files)
    objects = tuple(name.removesuffix(".npy") for name in mine)
    classes = tuple(CLASSES.get(synset, synset) for synset in synsets)
    return Source("ShapeNet-55", lists, where, classes, objects, labels, num_points, clouds)


def _names(file: Path) -> list[str]:
    with reading(file, "a list of files <synset>-<object>.npy"):
        names = file.read_text().split()
        wrong = [name for name in names if not re.fullmatch(r"\d{8}-[\w-]+\.npy", name, re.ASCII)]
        if wrong or not names:
            raise ValueError(f"found {wrong[0]!r}" if wrong else "it is empty")
        return names

"""ModelNet40 (Wu et al., CVPR 2015): 40 classes of CAD objects, 9,843 for training and 2,468 for testing."""

import sys
from pathlib import Path

import h5py
import numpy as np
import torch

from datasets.base import PointClouds
from datasets.prepare import prepared
from pointewa.errors import DataError

SIZES = {"train": 9843, "test": 2468}
_FOLDERS = ("", "ModelNet", "ModelNet40", "ModelNet40Ply2048", "modelnet40")
_OFFICIAL = "modelnet40_ply_hdf5_2048"

ACCEPTED = f"""\
  {_OFFICIAL}/   ply_data_{{train,test}}*.h5 and shape_names.txt, as published
  modelnet40*.h5              packed: groups train and test with data, label, name; attribute shape_names"""


def load(root: str, split: str) -> PointClouds:
    """A split of ModelNet40, centred, scaled to largest norm 1, y up, from any layout in `ACCEPTED`.

    Args:
        root: a folder that holds the data (also one or two levels down, as other codebases have it), or one file.
        split: "train" or "test".

    Raises:
        DataError: nothing found, or damaged files.
    """
    packed, official = _find(Path(root))
    if packed is not None:
        clouds = prepared(f"modelnet40-{split}", [packed], {"split": split}, lambda: _read_packed(packed, split))
    else:
        names = official / "shape_names.txt"
        files = [names, *sorted(official.glob(f"ply_data_{split}*.h5"))]
        clouds = prepared(
            f"modelnet40-{split}", files, {"split": split}, lambda: _read_official(official, files[1:], names)
        )
    if len(clouds) != SIZES[split]:
        note = f"note: {clouds.source} has {len(clouds)} objects in {split}; the official split has {SIZES[split]}"
        print(note, file=sys.stderr)
    return clouds


def _find(root: Path) -> tuple[Path | None, Path | None]:
    """The packed file, or the folder in the official layout; the packed file with the most objects if several."""
    if root.is_file():
        return root, None
    folders = [root / name for name in _FOLDERS]
    for folder in (root, *(folder / _OFFICIAL for folder in folders)):
        if (folder / "shape_names.txt").is_file() and any(folder.glob("ply_data_*.h5")):
            return None, folder
    packed = [file for folder in folders for file in sorted(folder.glob("modelnet40*.h5"))]
    if packed:
        return max(packed, key=_count), None
    raise DataError(
        "ModelNet40 was not found.\n"
        f"Looked in {root.resolve()} and its folders {', '.join(_FOLDERS[1:])} for one of\n{ACCEPTED}\n"
        "Point DATA_ROOT (data.root) at the folder or file that you have. Without any data: make train DATASET=shapes"
    )


def _count(file: Path) -> int:
    try:
        with h5py.File(file) as h5:
            return len(h5["train/label"])
    except (OSError, KeyError, TypeError):
        return 0


def _damaged(path: Path, problem: object, remedy: str = "get the file again, it is damaged or incomplete") -> DataError:
    return DataError(f"{path}: {problem}: {remedy}")


def _read_packed(path: Path, split: str) -> PointClouds:
    try:
        with h5py.File(path) as h5:
            group, names = h5[split], h5.attrs["shape_names"]
            data = group["data"]
            scale, offset = data.attrs.get("scale_factor", 1.0), data.attrs.get("add_offset", 0.0)
            points = data[:].astype(np.float32) * np.float32(scale) + np.float32(offset)
            labels, objects = group["label"][:], group["name"].asstr()[:]
    except KeyError as error:
        raise _damaged(path, error.args[0], f"expected the packed layout\n{ACCEPTED}") from None
    except (OSError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(path, error) from None
    names = [name.decode() if isinstance(name, bytes) else str(name) for name in names]
    return _clouds(points, labels, names, [str(name) for name in objects], path)


def _read_official(folder: Path, files: list[Path], names_file: Path) -> PointClouds:
    names = names_file.read_text().split()
    points, labels, objects = [], [], []
    for file in files:
        try:
            with h5py.File(file) as h5:
                points.append(h5["data"][:].astype(np.float32))
                labels.append(h5["label"][:].reshape(-1))
        except KeyError as error:
            raise _damaged(file, error.args[0], "expected the datasets data and label") from None
        except (OSError, TypeError, ValueError) as error:
            raise _damaged(file, error) from None
        objects += [f"{file.stem}/{index}" for index in range(len(labels[-1]))]
    if not files:
        raise DataError(f"{folder}: no {'ply_data_*.h5'} of this split: get the archive again, it is incomplete")
    return _clouds(np.concatenate(points), np.concatenate(labels), names, objects, folder)


def _clouds(points: np.ndarray, labels: np.ndarray, names: list[str], objects: list[str], source: Path) -> PointClouds:
    return PointClouds(
        torch.from_numpy(points),
        torch.from_numpy(labels.astype(np.int64)),
        tuple(names),
        tuple(objects),
        str(source),
    )

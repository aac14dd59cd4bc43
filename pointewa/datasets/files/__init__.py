"""Points of one file as users have it: a cloud as it is, or points drawn on a mesh."""

import gzip
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np

from pointewa.datasets.files.arrays import read_numpy
from pointewa.datasets.files.glb import read_glb
from pointewa.datasets.files.las import read_las
from pointewa.datasets.files.meshes import read_obj, read_off, read_stl
from pointewa.datasets.files.pcd import read_pcd
from pointewa.datasets.files.ply import read_ply
from pointewa.datasets.files.shape import MAX_BYTES, MAX_POINTS, NoLabelsError, Shape
from pointewa.datasets.files.text import read_text
from pointewa.datasets.source import Cloud
from pointewa.errors import DataError
from pointewa.safe.files import reading, stands_for

_FEWEST = 0.1  # of a cloud's points that must be finite
_READERS: dict[str, Callable[..., Shape]] = {
    ".ply": read_ply, ".pcd": read_pcd, ".las": read_las, ".laz": read_las, ".npy": read_numpy, ".npz": read_numpy,
    ".off": read_off, ".obj": read_obj, ".stl": read_stl, ".glb": read_glb,
    **dict.fromkeys((".xyz", ".txt", ".pts", ".asc", ".csv"), read_text),
}  # fmt: skip
SUFFIXES = tuple(_READERS)  # each may be followed by .gz
LABELLED = tuple(suffix for suffix, read in _READERS.items() if read in (read_ply, read_pcd, read_numpy, read_text))
_MOST_LABEL = 2**31 - 1


def kind(path: Path) -> str:
    """The suffix that says how a file is read, in lower case and without .gz; empty if it is not read."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    found = suffixes[-2:-1] if suffixes[-1:] == [".gz"] else suffixes[-1:]
    return found[0] if found and found[0] in SUFFIXES else ""


def read_points(path: Path, samples: int, seed: int = 0) -> np.ndarray:
    """The points of `read_cloud`, float64 ``[P, 3]``. A note on stderr says how many were left out."""
    cloud = read_cloud(path, samples, seed)
    if cloud.left_out:
        total = len(cloud.points) + cloud.left_out
        print(f"note: {path}: {cloud.left_out} of {total} points are not finite: they are left out", file=sys.stderr)
    return cloud.points


def read_cloud(path: Path, samples: int, seed: int = 0) -> Cloud:
    """Points float64 ``[P, 3]`` of a file: the finite points of a cloud as they are, or points drawn on a mesh.

    They are not centred, and keep the digits that the file has of them. Nothing else is opened, whatever the file
    refers to. Normals, colours and further columns are ignored.

    Args:
        path: a file with one of `SUFFIXES`, in any case, or that and .gz. PLY, OFF, OBJ, NPZ and GLB hold a mesh if
            they have faces, else a cloud; STL is a mesh, the others are clouds.
        samples: P for a mesh, whose points are uniform by area over all its parts.
        seed: of the points drawn on a mesh.

    Raises:
        DataError: an unknown suffix; a file that is missing, empty, damaged, too large or something else; no points,
            or fewer than a tenth of them finite; coordinates beyond float32; a mesh without area.
    """
    with _reading(path, SUFFIXES) as suffix:
        vertices, faces, *_ = _READERS[suffix](content(path))
        if not len(faces):
            points, left_out = _finite(path, np.ascontiguousarray(vertices))
            _check(path, points)
        else:
            left_out, points = 0, _sample(path, vertices, faces, samples, seed)
        return Cloud(points, left_out=left_out)


def read_labelled(path: Path) -> tuple[Cloud, str]:
    """A cloud as `read_cloud` reads it, with the labels of its points, and the name of the column that holds them,
    none for the last one of columns without names.

    Args:
        path: a file with one of `LABELLED`, in any case, or that and .gz.

    Raises:
        DataError: as `read_cloud`; a mesh; no column that is clearly that of the labels; labels that are not whole
            numbers from 0 up.
    """
    with _reading(path, LABELLED) as suffix:
        try:
            shape = _READERS[suffix](content(path), labels=True)
        except NoLabelsError as error:
            raise DataError(f"{path}: {error}") from error
        if len(shape.faces) or (shape.labels is None and len(shape.vertices)):
            raise DataError(
                f"{path}: expected a cloud with labelled points, found a mesh: draw points on it, give each the label "
                "of its face, and save them as a cloud, such as .ply with a property label"
            )
        points, left_out = _finite(path, np.ascontiguousarray(shape.vertices))
        _check(path, points)
        finite = np.isfinite(shape.vertices).all(-1)
        labels = shape.labels.astype(np.float64)
        wrong = finite & ~((labels == np.round(labels)) & (labels >= 0) & (labels <= _MOST_LABEL))
        if wrong.any():
            point = int(wrong.argmax())
            raise DataError(
                f"{path}: {shape.labelled_by or 'last column'}: expected whole numbers from 0 up, found "
                f"{labels[point]:g} for point {point}: leave out points without a part, or give them one of their own"
            )
        return Cloud(points, labels[finite].astype(np.int64), left_out=left_out), shape.labelled_by


@contextmanager
def _reading(path: Path, suffixes: Sequence[str]) -> Iterator[str]:
    suffix = kind(path)
    if suffix not in suffixes:
        found = "".join(path.suffixes[-2:] if path.suffix.lower() == ".gz" else path.suffixes[-1:]) or "no suffix"
        what = "a file with labelled points," if suffix else "a file"
        raise DataError(f"{path}: expected {what} ending in {', '.join(suffixes)}, or that and .gz, found {found}")
    # A number that does not fit its type is an error too, where numpy would warn and go on with another number.
    quiet = warnings.catch_warnings(action="ignore")
    with reading(path, suffix[1:].upper()), quiet, np.errstate(over="raise", invalid="raise"):
        yield suffix


def content(path: Path) -> bytes:
    """The bytes of a file, unpacked if it ends in .gz.

    Raises:
        DataError: no file, empty, too large, or something that stands for the file.
        ValueError: too large when unpacked.
    """
    size = path.stat().st_size
    if not path.is_file():
        raise DataError(f"{path}: expected a file, found a folder or a device: remove or rename it")
    if not 0 < size <= MAX_BYTES:
        raise DataError(f"{path}: expected 1 to {MAX_BYTES} bytes, found {size}: remove the file or get it again")
    data = path.read_bytes()
    if problem := stands_for(data[:1000]):
        raise DataError(f"{path}: {problem}")
    if path.suffix.lower() == ".gz":
        with gzip.open(BytesIO(data)) as file:
            data = file.read(MAX_BYTES + 1)  # zeros compress well
        if len(data) > MAX_BYTES:
            raise ValueError(f"expected at most {MAX_BYTES} bytes when unpacked")
    return data


def _finite(path: Path, points: np.ndarray) -> tuple[np.ndarray, int]:
    """The points that are finite, and how many are not: a depth camera has a row for each pixel, with or without."""
    finite = np.isfinite(points).all(-1)
    left_out = int((~finite).sum())
    if left_out and finite.sum() < _FEWEST * len(points):
        raise DataError(
            f"{path}: {left_out} of {len(points)} points have coordinates that are not finite, expected at most "
            f"{100 - 100 * _FEWEST:.0f} %: remove or repair the file"
        )
    return (points[finite] if left_out else points), left_out


def _check(path: Path, points: np.ndarray) -> None:
    largest = np.finfo(np.float32).max
    if not points.size:
        problem = "expected points, found none"
    elif points.shape[1:] != (3,) or len(points) > MAX_POINTS:
        problem = f"expected x, y, z of at most {MAX_POINTS} points, found an array {list(points.shape)}"
    elif not (finite := np.isfinite(points).all(1)).all():
        problem = f"{(~finite).sum()} of {len(points)} vertices have coordinates that are not finite"
    elif (found := np.abs(points).max()) > largest:
        problem = f"expected coordinates up to {largest:.2g}, found {found:.2g}"
    else:
        return
    raise DataError(f"{path}: {problem}: remove or repair the file")


def _sample(path: Path, vertices: np.ndarray, faces: np.ndarray, samples: int, seed: int) -> np.ndarray:
    import trimesh

    if not np.isfinite(vertices).all():  # a depth camera's mesh has vertices for all pixels, and faces between some
        used, faces = np.unique(faces, return_inverse=True)
        vertices, faces = vertices[used], faces.reshape(-1, 3)
    _check(path, vertices)
    centre = (vertices.min(0) + vertices.max(0)) / 2  # far from the origin, areas would lose their digits
    mesh = trimesh.Trimesh(vertices - centre, faces, process=False)
    if not mesh.area > 0:
        raise DataError(f"{path}: expected a surface, found faces of area 0 only: remove or repair the file")
    return np.ascontiguousarray(trimesh.sample.sample_surface(mesh, samples, seed=seed)[0] + centre)

"""NumPy's own files."""

from io import BytesIO

import numpy as np

from pointewa.datasets.files.columns import is_label, label, last, xyz
from pointewa.datasets.files.polygons import triangulate
from pointewa.datasets.files.shape import MAX_BYTES, NoLabelsError, Shape

_KEYS = ("points", "xyz", "pos", "data", "arr_0", "vertices")
_MOST_COLUMNS = 16  # that a row of a point is expected to have where there are fewer points


def read_numpy(data: bytes, labels: bool = False) -> Shape:
    """An array ``[P, >= 3]``, or one with named fields; of .npz the one named as in `_KEYS`, or its only one.

    With "faces" it is a mesh.

    Args:
        data: the file.
        labels: read the labels of the points too: the array or field that is named so, else the last column.

    Raises:
        NoLabelsError: no labels, where they are asked for.
        ValueError: no such array; objects, which are not unpickled; an array that may be ``[3, P]`` or ``[P, 3]``.
    """
    if not data.startswith((b"\x93NUMPY", b"PK")):  # NumPy would suggest unpickling it
        raise ValueError("expected an array or archive of NumPy")
    array = np.load(BytesIO(data), allow_pickle=False)
    if not isinstance(array, np.lib.npyio.NpzFile):
        return _points(array, labels)
    if sum(member.file_size for member in array.zip.infolist()) > MAX_BYTES:  # millions of zeros compress well
        raise ValueError(f"expected at most {MAX_BYTES} bytes when unpacked")
    keys = [key for key in _KEYS if key in array] or array.files
    if not keys or (len(keys) > 1 and keys[0] not in _KEYS):
        raise ValueError(f"expected {', '.join(_KEYS)} or a single array, found {', '.join(keys) or 'none'}")
    labels = labels and "faces" not in array  # those of a mesh are of no use
    named = [key for key in array.files if labels and key != keys[0] and is_label(key)]
    shape = _points(np.asarray(array[keys[0]]), labels and not named)
    points = shape.vertices
    if named:  # such an array may also be the class of the object
        fitting = [key for key in named if array[key].size == len(points) and array[key].dtype.kind in "fiub"]
        if not fitting:
            raise NoLabelsError(f"{named[0]}: expected a label for each of {len(points)} points, found "
                                f"{array[named[0]].dtype} {list(array[named[0]].shape)}")  # fmt: skip
        by = fitting[label(fitting)]
        shape = Shape(points, labels=array[by].reshape(-1), labelled_by=by)
    if "faces" not in array:
        return shape
    faces = array["faces"]
    if faces.ndim != 2 or faces.shape[1] < 3 or faces.dtype.kind not in "iu":
        raise ValueError(f"faces: expected whole numbers [F, 3 or more], found {faces.dtype} {list(faces.shape)}")
    return shape._replace(faces=triangulate(points, faces))


def _points(array: np.ndarray, labels: bool) -> Shape:
    found = f"found {array.dtype} {list(array.shape)}"
    by, column = "", None
    if array.dtype.names and array.ndim == 1:
        if labels:
            by = array.dtype.names[label(array.dtype.names)]
            column = array[by]
            if column.ndim != 1 or column.dtype.kind not in "fiub":
                raise NoLabelsError(f"{by}: expected a number for each point, found {array.dtype[by]}")
        whole = [name for name in array.dtype.names if name in _KEYS]
        if len(whole) == 1:  # a field of three numbers
            array = array[whole[0]]
        else:
            array = np.stack([array[array.dtype.names[column]] for column in xyz(array.dtype.names)], 1)
    if array.ndim != 2 or array.dtype.kind not in "fiu":
        raise ValueError(f"expected numbers [P, 3 or more], {found}")
    rows, columns = array.shape
    as_rows = columns >= 3 and (columns <= _MOST_COLUMNS or rows > columns)
    as_columns = rows in (3, 6) and columns >= 3
    if as_rows and as_columns:
        raise ValueError(f"expected points [P, 3 or more], {found}, which may be [3, P] or [6, P] as well")
    if not as_rows and not as_columns and array.size:
        raise ValueError(f"expected numbers [P, 3 or more], {found}")
    values = array.T if as_columns else array
    if labels and not by:
        column = last(values)
    return Shape(values[:, :3].astype(np.float64), labels=column, labelled_by=by)

"""NumPy's own files."""

from io import BytesIO

import numpy as np

from pointewa.datasets.files.columns import xyz
from pointewa.datasets.files.polygons import triangulate
from pointewa.datasets.files.shape import MAX_BYTES, Shape

_KEYS = ("points", "xyz", "pos", "data", "arr_0", "vertices")
_MOST_COLUMNS = 16  # that a row of a point is expected to have where there are fewer points


def read_numpy(data: bytes) -> Shape:
    """An array ``[P, >= 3]``, or one with named fields; of .npz the one named as in `_KEYS`, or its only one.

    With "faces" it is a mesh.

    Raises:
        ValueError: no such array; objects, which are not unpickled; an array that may be ``[3, P]`` or ``[P, 3]``.
    """
    if not data.startswith((b"\x93NUMPY", b"PK")):  # NumPy would suggest unpickling it
        raise ValueError("expected an array or archive of NumPy")
    array = np.load(BytesIO(data), allow_pickle=False)
    if not isinstance(array, np.lib.npyio.NpzFile):
        return Shape(_points(array))
    if sum(member.file_size for member in array.zip.infolist()) > MAX_BYTES:  # millions of zeros compress well
        raise ValueError(f"expected at most {MAX_BYTES} bytes when unpacked")
    keys = [key for key in _KEYS if key in array] or array.files
    if not keys or (len(keys) > 1 and keys[0] not in _KEYS):
        raise ValueError(f"expected {', '.join(_KEYS)} or a single array, found {', '.join(keys) or 'none'}")
    points = _points(np.asarray(array[keys[0]]))
    if "faces" not in array:
        return Shape(points)
    faces = array["faces"]
    if faces.ndim != 2 or faces.shape[1] < 3 or faces.dtype.kind not in "iu":
        raise ValueError(f"faces: expected whole numbers [F, 3 or more], found {faces.dtype} {list(faces.shape)}")
    return Shape(points, triangulate(points, faces))


def _points(array: np.ndarray) -> np.ndarray:
    """float64 ``[P, 3]``."""
    found = f"found {array.dtype} {list(array.shape)}"
    if array.dtype.names and array.ndim == 1:
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
    return (array.T if as_columns else array)[:, :3].astype(np.float64)

"""Legacy pickles of arrays, read without letting them run code."""

import pickle
import warnings
from pathlib import Path
from typing import Any

from datasets.files import reading
from pointewa.errors import DataError

# What NumPy needs to build an array again, under the names of its versions 1 and 2.
_ADMITTED = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
    ("_codecs", "encode"),  # how old pickles hold bytes
}


class _Unpickler(pickle._Unpickler):  # the one in Python: that in C prints on its own of some damage
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not an array: refused")
        return super().find_class(module, name)


def load_arrays(path: Path) -> Any:
    """Content of a pickle of NumPy arrays and plain containers.

    Raises:
        DataError: damaged, or holding anything else, which is not run.
    """
    quiet = warnings.catch_warnings(action="ignore")  # NumPy warns of damaged types
    with reading(path, "a pickle of arrays"), quiet, open(path, "rb") as file:
        try:
            return _Unpickler(file, encoding="latin1").load()
        except pickle.UnpicklingError as error:
            raise DataError(f"{path}: not a pickle of arrays only, or damaged ({error}): get the file again") from None

"""Legacy pickles of arrays, read without letting them run code."""

import mmap
import pickle
import pickletools
import warnings
from pathlib import Path
from typing import Any

from pointewa.errors import DataError
from pointewa.safe.files import reading

# What NumPy needs to rebuild an array, under the names of its versions 1 and 2.
_ADMITTED = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
    ("_codecs", "encode"),  # how old pickles hold bytes
}


class _Unpickler(pickle.Unpickler):
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
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        # Look through it first: a damaged length or number would have the unpickler ask for absurd memory.
        for count, (operation, argument, _) in enumerate(pickletools.genops(content)):
            if operation.name.endswith("PUT") and argument > count:
                raise ValueError(f"it stores object number {argument} after {count} steps")
        content.seek(0)
        try:
            return _Unpickler(content, encoding="latin1").load()
        except (pickle.UnpicklingError, AttributeError, TypeError) as error:  # what a damaged one makes of NumPy
            raise DataError(f"{path}: not a pickle of arrays only, or damaged ({error}): get the file again") from error

"""NumPy's scalars and arrays in files of `torch.save`: stand-ins for the functions and types that their pickles name.

NumPy's own would take any amount of memory (an array of 10^12 elements that are not in the file), and objects of any
kind (type ``O``). These take numbers, truth values and short text, and exactly the bytes that the file holds.
"""

import math
import re
from pickle import UnpicklingError
from typing import Any

import numpy as np

_PLAIN = re.compile(r"[?bBhHiIlLqQefdFD]|[biufc]\d\d?|[SU]\d\d?")


class Dtype:
    """A plain type of numbers, truth values or text, in place of ``numpy.dtype``."""

    def __init__(self, code: Any, align: Any = False, copy: Any = True) -> None:
        if not isinstance(code, str) or not _PLAIN.fullmatch(code.lstrip("<>|=")):
            raise UnpicklingError(f"it asks for a NumPy type {str(code)[:40]!r}, which is neither a number nor text")
        self.value = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        """Takes (version, byte order, and of a plain type nothing else: base, names, fields)."""
        if not isinstance(state, tuple) or len(state) < 5 or state[1] not in ("<", ">", "|", "="):
            raise UnpicklingError("it holds a NumPy type that is damaged")
        if any(part is not None for part in state[2:5]):
            raise UnpicklingError("it asks for a NumPy type with fields, which is not plain")
        self.value = self.value.newbyteorder(state[1])


class Array(np.ndarray):
    """An array of a plain type, in place of ``numpy.ndarray``; empty until its content is read."""

    def __new__(cls, *_: Any) -> "Array":
        """Empty, whatever size a file asks for."""
        return super().__new__(cls, (0,), np.uint8)

    def __setstate__(self, state: Any) -> None:
        """Takes (version, shape, type, whether the first index varies fastest, bytes)."""
        _, shape, dtype, fortran, content = state
        if type(dtype) is not Dtype or type(content) is not bytes or type(shape) is not tuple:
            raise UnpicklingError("it holds a NumPy array that is damaged")
        # Of this order NumPy shares the bytes; of the other it would copy them for every array that is made of them.
        if not dtype.value.isnative:
            raise UnpicklingError("it holds a NumPy array in the byte order of another machine")
        if any(type(size) is not int or size < 0 for size in shape):
            raise UnpicklingError("it holds a NumPy array of a shape that is not valid")
        if math.prod(shape) * dtype.value.itemsize != len(content):
            raise UnpicklingError(f"it holds a NumPy array that announces another size than its {len(content)} bytes")
        super().__setstate__((1, shape, dtype.value, bool(fortran), content))


def _reconstruct(*_: Any) -> Array:
    return Array()


def _no_bytes() -> bytes:
    return b""  # how protocol 2 holds them, such as those of an array without elements


def _scalar(dtype: Any, content: Any = b"") -> Any:
    """A number or text of Python."""
    if type(dtype) is not Dtype or type(content) is not bytes or len(content) != dtype.value.itemsize:
        raise UnpicklingError("it holds a NumPy scalar that is damaged")
    return np.frombuffer(content, dtype.value)[0].item() if content else dtype.value.type().item()


# NumPy 2 renamed numpy.core.
STAND_INS = {
    "numpy.dtype": Dtype,
    "numpy.ndarray": Array,
    "builtins.bytes": _no_bytes,
    **{f"numpy.{core}.multiarray._reconstruct": _reconstruct for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": _scalar for core in ("core", "_core")},
}

"""HDF5 files of unknown origin, opened without risk to the process."""

import functools
import json
import select
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np

from pointewa.errors import DataError
from pointewa.safe.files import reading

# Damage can make the HDF5 library crash, hang or ask for absurd memory, and no caller can catch that. So a file is
# first read by a process that may die: all of it in the old format; in the newer, whose parts have checksums, only
# attributes and text. deflate packs 1032 to 1 at best.
_TRIAL = """
import json, os, resource, sys, h5py
resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33))
for line in sys.stdin:
    path, everything = json.loads(line)
    most, problem = 1100 * os.path.getsize(path) + 2**20, ""
    def visit(name, item):
        list(item.attrs.values())
        if isinstance(item, h5py.Dataset) and item.shape:
            if item.nbytes > most:
                raise OverflowError(f"{name} claims {item.nbytes} bytes, more than the file can hold")
            for start in range(0, len(item) if everything or item.dtype.kind == "O" else 0, 256):
                item[start:start + 256]
    try:
        with h5py.File(path) as h5:
            visit("/", h5)
            h5.visititems(visit)
    except OverflowError as error:
        problem = str(error)
    except Exception:
        pass  # it occurs again, and is reported, when the file is read
    print(json.dumps(problem), flush=True)
"""
_PATIENCE = 20.0  # seconds


@contextmanager
def open_hdf5(path: Path, what: str, trusted: bool = False) -> Iterator[h5py.File]:
    """A file to read from; whatever goes wrong while it is open becomes one error.

    Args:
        path: the file.
        what: what it is expected to be, for the error.
        trusted: it was written by `pointewa.datasets.packed.write`, in whose files no damage is dangerous.

    Raises:
        DataError: naming the file.
    """
    with reading(path, what):
        status = path.stat()
        if not trusted and (problem := _trial(path, status.st_size, status.st_mtime_ns)):
            raise DataError(f"{path}: cannot be read as {what} ({problem}): it is damaged, get it again")
        with h5py.File(path) as h5:
            yield h5


def dataset(group: h5py.Group, name: str) -> h5py.Dataset:
    """A dataset of a group, which in a damaged file may be anything.

    Raises:
        KeyError: nothing of that name.
        ValueError: something else of that name.
    """
    found = group[name]
    if not isinstance(found, h5py.Dataset):
        raise ValueError(f"{name}: expected a dataset, found a {type(found).__name__.lower()}")
    return found


def read_labels(values: h5py.Dataset) -> np.ndarray:
    """int64 ``[n]`` of a dataset ``[n]`` or ``[n, 1]``.

    Raises:
        ValueError: not whole numbers.
    """
    if values.dtype.kind not in "iu":
        raise ValueError(f"{values.name}: expected whole numbers, found {values.dtype}")
    return values[:].reshape(-1).astype(np.int64)


@functools.cache
def _trial(path: Path, size: int, changed: int) -> str:
    """Why the file must not be opened; empty if it may be."""
    with open(path, "rb") as file:
        head = file.read(9)
    old = head[8:9] < b"\2"
    process, seconds = _process(), _PATIENCE + size / 5e6 * old
    process.stdin.write(json.dumps([str(path.resolve()), old]) + "\n")
    process.stdin.flush()
    if select.select([process.stdout], [], [], seconds)[0] and (answer := process.stdout.readline()):
        return json.loads(answer)
    hung = process.poll() is None
    process.kill()
    process.wait()
    _process.cache_clear()
    return f"reading it had not ended after {seconds:.0f} s" if hung else "reading it crashes the HDF5 library"


@functools.cache
def _process() -> subprocess.Popen:
    command = [sys.executable, "-c", _TRIAL]  # it ends with this process, when its input does
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )

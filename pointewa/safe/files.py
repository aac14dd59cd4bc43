"""Reading a file that may hold anything, and writing one so that a reader finds the old content or the new."""

import errno
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pointewa.errors import DataError, UserError, first_line, is_bug

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a full disk, a quota that is used up, a limit on files


@contextmanager
def atomic_write(
    path: str | Path, check: Callable[[Path], None] | None = None, keep: Path | None = None
) -> Iterator[Path]:
    """Yields a temporary path beside ``path`` to write to; it takes the place of ``path`` when the block ends well.

    If anything fails before, the temporary file is removed and ``path`` stays as it was. Missing folders are made.

    Args:
        path: the file.
        check: called with the temporary file when its content is on the disk; raises if it is not as it should be.
        keep: a path in the same folder for what was at ``path``.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        with naming(path):
            yield temporary
        _to_disk(temporary)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes files for their owner only
        if check:
            check(temporary)
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
        _to_disk(path.parent)  # the new name too survives a power cut
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name the file that is being written in what the system refuses, as when the disk is full.

    Python's error names none; h5py, safetensors and torch have errors of their own, with the number in their text.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        number = _refused(error)
        if number is None or getattr(error, "filename", None) is not None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def _refused(error: Exception) -> int | None:
    """The system's number of an error; None for one that is not of the system's."""
    if isinstance(error, OSError):
        return error.errno
    if isinstance(error, RuntimeError) and "unexpected pos" in str(error):  # a short write, by torch
        return errno.ENOSPC
    found = re.search(r"(?:errno =|os error) (\d+)", str(error))
    return int(found[1]) if found else None


def append(path: Path, text: str) -> None:
    """Append text to a file; if it cannot be written whole, none of it stays."""
    with open(path, "ab", buffering=0) as file:
        size, content = file.tell(), text.encode()
        try:
            while content:
                content = content[file.write(content) :]
        except OSError:
            file.truncate(size)
            raise


def remove_temporary(folder: Path) -> None:
    """Remove what `atomic_write` left in a folder when the process was killed. Nobody else may be writing there."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def printable(name: str) -> str:
    """A name on disk as text: bytes that are not UTF-8 become ``\\xe9``."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def stands_for(head: bytes) -> str:
    """What the first bytes of a file show it to be in place of the file that was meant, and what to do; else empty."""
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        return "it is a Git LFS pointer in place of the file: run git lfs pull in its repository, or download the file"
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype html", b"<html")):
        return "it is a web page in place of the file: open its address in a browser, and download the file from there"
    return ""


@contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Turn whatever goes wrong while ``path`` is read as ``what`` into one DataError that names it.

    A UserError passes through, and so does a bug of ours.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # on damaged files parsers raise anything, MemoryError and RecursionError included
        if is_bug(error):
            raise
        problem, remedy = first_line(error), "it may be damaged or incomplete, repair it or get it again"
        if isinstance(error, ModuleNotFoundError) and error.name:
            remedy = f"pip install {error.name}"
        elif isinstance(error, OSError) and error.errno:
            problem, remedy = os.strerror(error.errno), "check the path and its permissions"  # h5py's own is long
        problem = "".join(filter(str.isprintable, problem))[:200]  # it may quote the file
        raise DataError(f"{path}: cannot be read as {what} ({type(error).__name__}: {problem}): {remedy}") from error

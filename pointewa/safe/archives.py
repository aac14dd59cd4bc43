"""Archives of unknown origin, unpacked inside their folder only, or read in memory."""

import stat
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PureWindowsPath

from pointewa.errors import DataError, first_line


def extract(archive: Path, folder: Path, max_bytes: int = 20 << 30) -> Path:
    """Unpack a zip archive to ``folder``, all or nothing; a single folder that holds everything is skipped.

    Args:
        archive: the zip file; only plain files and folders with relative names are accepted in it.
        folder: must not be there yet.
        max_bytes: most that the members may unpack to.

    Raises:
        DataError: ``folder`` is there already, the archive is damaged or not accepted, or there is no room.
    """
    if folder.exists():
        raise DataError(f"{folder} is already there, {archive} was not unpacked: move it away first")
    with (
        _opened(archive, f"unpacked to {folder}", max_bytes) as (zipped, found, place),
        tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary,
    ):
        content = Path(temporary) / "content"  # a folder with the usual permissions
        content.mkdir()
        for info in found:
            place[:] = [info.filename]
            zipped.extract(info, content)  # compares the CRC
        entries = [entry for entry in content.iterdir() if entry.name not in ("__MACOSX", ".DS_Store")]
        single = len(entries) == 1 and entries[0].is_dir()
        return (entries[0] if single else content).rename(folder)


def members(archive: Path, max_bytes: int = 20 << 30) -> list[str]:
    """The names of all files and folders in a zip archive, those of folders with a "/" at their end.

    Raises:
        DataError: as `extract`.
    """
    with _opened(archive, "read", max_bytes) as (_, found, _):
        return [info.filename for info in found]


def contents(archive: Path, names: Iterable[str], max_bytes: int = 1 << 28) -> Iterator[bytes]:
    """The contents of some files of a zip archive in turn, in memory only.

    Args:
        archive: the zip file.
        names: of files in it.
        max_bytes: most that one of them may unpack to.

    Raises:
        DataError: as `extract`.
    """
    with _opened(archive, "read") as (zipped, _, place):
        for name in names:
            place[:] = [name]
            info = zipped.getinfo(name)
            if info.file_size > max_bytes:
                raise DataError(f"{archive}: refused, its member {name!r} unpacks to {info.file_size} bytes, expected "
                                f"at most {max_bytes}")  # fmt: skip
            yield zipped.read(info)  # compares the CRC, and reads no more than the size that it names


@contextmanager
def _opened(
    archive: Path, purpose: str, max_bytes: int = 20 << 30
) -> Iterator[tuple[zipfile.ZipFile, list[zipfile.ZipInfo], list[str]]]:
    """The archive, its accepted members, and a list for the name of the member in work, for messages."""
    place: list[str] = []
    try:
        with zipfile.ZipFile(archive) as zipped:
            found = zipped.infolist()
            for info in found:
                if reason := _objection(info):
                    raise DataError(f"{archive}: refused, its member {info.orig_filename!r} {reason}")
            if (total := sum(info.file_size for info in found)) > max_bytes:
                raise DataError(f"{archive}: refused, it unpacks to {total} bytes, expected at most {max_bytes}")
            yield zipped, found, place
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"{archive} cannot be {purpose}: {error}") from error
    except Exception as error:  # zipfile and the decompressors have many of their own
        member = "".join(f" (member {name!r})" for name in place)
        raise DataError(
            f"{archive}{member}: {first_line(error)}: get it again, it is damaged or no zip file"
        ) from error


def _objection(info: zipfile.ZipInfo) -> str:
    """Why a member is not unpacked; empty if it may be."""
    path = PureWindowsPath(info.orig_filename)  # knows drive letters and both kinds of slash
    if path.anchor or ".." in path.parts or "\\" in info.orig_filename:
        return "would leave the folder or has a name of another system"
    if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is a link or a special file"
    return "is encrypted" if info.flag_bits & 1 else ""

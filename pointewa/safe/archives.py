"""Archives of unknown origin, unpacked inside their folder only."""

import stat
import tempfile
import zipfile
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
    member = ""
    try:
        with zipfile.ZipFile(archive) as zipped:
            members = zipped.infolist()
            for info in members:
                if reason := _objection(info):
                    raise DataError(f"{archive}: refused, its member {info.orig_filename!r} {reason}")
            if (total := sum(info.file_size for info in members)) > max_bytes:
                raise DataError(f"{archive}: refused, it unpacks to {total} bytes, expected at most {max_bytes}")
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
                content = Path(temporary) / "content"  # a folder with the usual permissions
                content.mkdir()
                for info in members:
                    member = f" (member {info.filename!r})"
                    zipped.extract(info, content)  # compares the CRC
                entries = [entry for entry in content.iterdir() if entry.name not in ("__MACOSX", ".DS_Store")]
                single = len(entries) == 1 and entries[0].is_dir()
                return (entries[0] if single else content).rename(folder)
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"{archive} cannot be unpacked to {folder}: {error}") from error
    except Exception as error:  # zipfile and the decompressors have many of their own
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

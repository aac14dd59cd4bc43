"""Published data sets from the internet: fetched from the first mirror that has them, resumed, verified, unpacked."""

import hashlib
import re
import ssl
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from urllib.error import HTTPError, URLError

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from pointewa.errors import DataError, first_line
from pointewa.safe.archives import extract

RETRIES = 3  # of a mirror, in a row, after attempts that brought nothing new
PAUSE = 1.0  # seconds before each
_CHUNK = 1 << 16  # bytes


@dataclass(frozen=True)
class Archive:
    """A published archive: where to get it, and how to tell that it is the right one."""

    name: str  # file name; without its suffix it names the folder that the data comes to
    checksum: str  # "md5:..." or "sha256:...", hexadecimal
    size: int | None  # bytes, if known
    mirrors: tuple[str, ...]  # http or https, tried in this order
    licence: str  # a notice, printed before downloading


ARCHIVES = {
    "modelnet40": Archive(
        name="modelnet40_ply_hdf5_2048.zip",
        checksum="md5:c9ab8e6dfb16f67afdab25e155c79e59",
        size=None,
        mirrors=(
            "https://huggingface.co/datasets/Msun/modelnet40/resolve/main/modelnet40_ply_hdf5_2048.zip",
            "https://github.com/ma-xu/pointMLP-pytorch/releases/download/Modenet40_dataset/modelnet40_ply_hdf5_2048.zip",
            # Where it was published; last, because people report that it has refused connections since 2024.
            "https://shapenet.cs.stanford.edu/media/modelnet40_ply_hdf5_2048.zip",
        ),
        licence="ModelNet40 is Princeton's (https://modelnet.cs.princeton.edu), for research use only; "
        "the CAD models belong to their authors",
    )
}

BY_REQUEST = {
    "scanobjectnn": "ScanObjectNN is not downloaded: its authors give it out to those who accept their terms of use. "
    "Ask for it at https://hkust-vgd.github.io/scanobjectnn/, unpack h5_files.zip to DATA_ROOT/ScanObjectNN, "
    "then: make train DATASET=scanobjectnn DATA_ROOT=...",
    "shapenet55": "ShapeNet-55 is not downloaded: it is made of ShapeNetCore, which https://shapenet.org gives out to "
    "those who accept its terms. The authors' archive is linked from https://github.com/yuxumin/PoinTr (DATASET.md): "
    "unpack it to DATA_ROOT/ShapeNet55-34, then: make train DATASET=shapenet55 DATA_ROOT=...",
    "shapenetpart": "ShapeNetPart is not downloaded: it is made of ShapeNetCore, which https://shapenet.org gives out "
    "to those who accept its terms. The archive is shapenetcore_partanno_segmentation_benchmark_v0_normal.zip: unpack "
    "it to DATA_ROOT, then: make train DATASET=shapenetpart TASK=part_segmentation DATA_ROOT=...",
    "labeled_psb": "The Labeled PSB is not downloaded: its meshes are at https://segeval.cs.princeton.edu, its labels "
    "come with Kalogerakis et al., Learning 3D Mesh Segmentation and Labeling. Draw points on them and save these as "
    "docs/data.md says, then: make train DATASET=labeled_psb TASK=part_segmentation DATA_ROOT=...",
    "sydney": "Sydney Urban Objects is not downloaded here: it is the Australian Centre for Field Robotics' "
    "(https://www.acfr.usyd.edu.au/papers/SydneyUrbanObjectsDataset.shtml), which asks to be cited. Unpack "
    "sydney-urban-objects-dataset.tar.gz in DATA_ROOT, then: make train DATASET=sydney DATA_ROOT=...",
}


class _Failed(Exception):
    """A mirror did not serve the file."""


class _Refused(_Failed):
    """The same, and asking again would not help."""


def download(name: str, root: Path, mirrors: Sequence[str] | None = None, timeout: float = 30.0) -> Path:
    """A data set's folder below ``root``: fetched and unpacked, unless it is there already. The archive stays too.

    Args:
        name: one of `ARCHIVES`.
        root: where the archive and its folder go; made if missing.
        mirrors: addresses to try in place of the archive's own.
        timeout: seconds without a byte after which a connection counts as lost.

    Raises:
        DataError: an unknown name, a data set that is only given out on request, or see `fetch` and `extract`.
    """
    if name in BY_REQUEST:
        raise DataError(BY_REQUEST[name])
    if name not in ARCHIVES:
        known = ", ".join([*ARCHIVES, *BY_REQUEST])
        raise DataError(f"expected a data set to download, one of {known}, found {name!r}; shapes needs no download")
    folder = root / Path(ARCHIVES[name].name).stem
    if folder.exists():
        print(f"{folder} is already there: nothing to do; remove it to have it made again", file=sys.stderr)
        return folder
    return extract(fetch(ARCHIVES[name], root, mirrors, timeout), folder)


def fetch(
    archive: Archive,
    folder: Path,
    mirrors: Sequence[str] | None = None,
    timeout: float = 30.0,
    max_bytes: int = 8 << 30,
) -> Path:
    """The verified archive file in ``folder``: the one that is there, or from the first mirror that serves it.

    A download that breaks off stays as ``<name>.part``; the next attempt, mirror or call resumes at its end.

    Args:
        archive: what to get.
        folder: made if missing.
        mirrors: addresses to try in place of the archive's own.
        timeout: seconds without a byte after which a connection counts as lost.
        max_bytes: most that is written if the archive's size is not known.

    Raises:
        DataError: no mirror served the right file, or it cannot be written.
    """
    path, part = folder / archive.name, folder / f"{archive.name}.part"
    failures = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if path.exists():
            if not (wrong := mismatch(path, archive)):
                return path
            # It may be the user's own, so it stays until there is a right one.
            print(f"note: {path} is {wrong}; getting it again", file=sys.stderr)
        if part.exists() and not mismatch(part, archive):
            return part.replace(path)
        print(f"downloading {archive.name}. {archive.licence}", file=sys.stderr)
        columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
        console = Console(stderr=True)
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            report = partial(progress.update, progress.add_task(archive.name, total=archive.size))
            for mirror in archive.mirrors if mirrors is None else mirrors:
                ask = partial(_ask, mirror, part, archive.size, max_bytes, timeout, report)
                try:
                    _complete(ask, part, archive)
                    return part.replace(path)
                except _Failed as failed:
                    failures.append(f"{mirror}: {failed}")
                    print(f"note: {failures[-1]}", file=sys.stderr)
        kept = f"{_size(part)} bytes are kept, and the same command resumes from there.\n" if part.exists() else ""
    except OSError as error:  # those of the network have become _Failed
        raise DataError(f"{folder}: {archive.name} cannot be written here: {error}") from error
    tried = "\n  ".join(failures or ["no mirror was given"])
    raise DataError(
        f"{archive.name} could not be downloaded.\n  {tried}\n{kept}"
        f"Or get it by hand, from {archive.mirrors[0]} or elsewhere, put it at {path} and run the same command: "
        f"a file there is verified ({archive.checksum}) and used"
    )


def mismatch(path: Path, archive: Archive) -> str:
    """How a file differs from the published one; empty if it does not."""
    algorithm, _, expected = archive.checksum.partition(":")
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()
    return "" if found == expected else f"not the published file ({algorithm} {found}, expected {expected})"


def _complete(ask: Callable[[], None], part: Path, archive: Archive) -> None:
    """Have a mirror complete ``part``, and verify it. Raises `_Failed`, and a wrong file is gone, if that fails."""
    # What is there may be another mirror's and wrong: then this mirror gets a second try, from nothing.
    for _ in range(2 if part.exists() else 1):
        best, left = _size(part), RETRIES
        while True:
            try:
                ask()
                break
            except _Refused:
                raise
            except _Failed:
                reached = _size(part)
                left = RETRIES if reached > best else left - 1
                best = max(best, reached)
                if left < 0:
                    raise
            time.sleep(PAUSE)
        if not (wrong := mismatch(part, archive)):
            return
        part.unlink()
    raise _Failed(wrong)


def _ask(url: str, part: Path, size: int | None, max_bytes: int, timeout: float, report: Callable[..., None]) -> None:
    """One request that completes ``part``, from its end if the server can do that. Raises `_Failed` if it does not."""
    have = _size(part)
    with _open(url, have, part, timeout) as response:
        if response.status not in (200, 206) or response.headers.get_content_type() == "text/html":
            raise _Refused(f"serves no file (status {response.status}, {response.headers['Content-Type']!r})")
        total = None
        if response.status == 200:
            have = 0
        else:
            sent = response.headers.get("Content-Range", "")
            span = re.fullmatch(r"bytes (\d{1,18})-\d{1,18}/(\d{1,18}|\*)", sent.strip())
            if not span or int(span[1]) != have:
                part.unlink(missing_ok=True)  # so that the next request is for the whole file
                raise _Failed(f"sent another range than asked for ({sent[:80]!r})")
            total = int(span[2]) if span[2] != "*" else None
        if total is None:
            total = size if response.length is None else have + response.length
        if total is not None and (total > max_bytes if size is None else total != size):
            raise _Refused(f"offers {total} bytes, expected {size or f'at most {max_bytes}'}")
        with open(part, "ab" if have else "wb") as file:
            while total is None or have < total:
                try:
                    chunk = response.read1(_CHUNK)  # read() would lose what comes before a stall
                except (OSError, HTTPException) as error:
                    raise _Failed(f"{first_line(error)} after {have} bytes") from error
                if not chunk:
                    break
                have += len(chunk)
                if have > (total or max_bytes):
                    part.unlink()
                    raise _Refused(f"sends more than {total or max_bytes} bytes")
                file.write(chunk)
                report(completed=have, total=total)
    if total is not None and have < total:
        raise _Failed(f"the connection ended after {have} of {total} bytes")


def _open(url: str, have: int, part: Path, timeout: float) -> HTTPResponse:
    """The answer to a request for all but the first ``have`` bytes, over http or https, redirects followed."""
    opener = urllib.request.OpenerDirector()  # build_opener() would go on to ftp too
    for handler in ("Proxy", "Unknown", "HTTP", "HTTPS", "HTTPDefaultError", "HTTPRedirect"):
        opener.add_handler(getattr(urllib.request, f"{handler}Handler")())
    opener.add_handler(urllib.request.HTTPErrorProcessor())
    headers = {"User-Agent": "pointewa"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        return opener.open(urllib.request.Request(url, headers=headers), timeout=timeout)
    except HTTPError as error:
        error.close()
        if error.code == 416:  # what is there is no beginning of the file; the next request is for the whole file
            part.unlink(missing_ok=True)
        again = error.code >= 500 or error.code in (408, 416, 429)
        raise (_Failed if again else _Refused)(first_line(error)) from error
    except URLError as error:
        again = not isinstance(error.reason, str | ssl.SSLCertVerificationError)  # str: urllib's own objections
        raise (_Failed if again else _Refused)(str(error.reason)) from error
    except (OSError, HTTPException) as error:
        raise _Failed(first_line(error)) from error
    except ValueError as error:
        raise _Refused(first_line(error)) from error


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0

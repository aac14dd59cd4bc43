"""Archives that are damaged or hostile: refused before anything is written."""

import os
import stat
import struct
import zipfile
from pathlib import Path

import pytest
from file_samples import names, zipped

from pointewa.errors import DataError
from pointewa.safe.archives import contents, extract, members


def link(name):
    info = zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


def flipped(data, position, bits=0xFF):
    return data[:position] + bytes([data[position] ^ bits]) + data[position + 1 :]


GOOD = ("d/good.txt", "good")
PLAIN = zipped(GOOD, ("d/x.txt", b"payload" * 9))
SQUEEZED = zipped(GOOD, ("d/zeros", bytes(10**4)), compression=zipfile.ZIP_DEFLATED)
BOMB = zipped(GOOD, ("d/zeros", bytes(10**6)), compression=zipfile.ZIP_DEFLATED)
ATTACKS = {
    "parent": (zipped(GOOD, ("../evil", "x")), "'../evil' would leave"),
    "absolute": (zipped(GOOD, ("/abs", "x")), "'/abs' would leave"),
    "inner parent": (zipped(GOOD, ("a/../../evil", "x")), "'a/../../evil' would leave"),
    "drive": (zipped(GOOD, ("C:\\x", "x")), r"'C:\\\\x' would leave"),
    "drive and slash": (zipped(GOOD, ("C:/x", "x")), "'C:/x' would leave"),
    "backslashes": (zipped(GOOD, ("a\\..\\..\\evil", "x")), "would leave"),
    "one backslash": (zipped(GOOD, ("d\\x.txt", "x")), "name of another system"),
    "share": (zipped(GOOD, ("\\\\host\\share\\x", "x")), "would leave"),
    "link": (zipped(GOOD, (link("d/link"), "/etc/passwd")), "'d/link' is a link"),
    "encrypted": (flipped(PLAIN, PLAIN.rindex(b"PK\1\2") + 8, 1), "'d/x.txt' is encrypted"),
    "bomb": (BOMB, "unpacks to 1000004 bytes, expected at most 100000"),
    "bomb that lies": (BOMB.replace(struct.pack("<I", 10**6), struct.pack("<I", 10)), "d/zeros.*damaged"),
    "file and folder": (zipped(GOOD, ("d/good.txt/x", "x")), "cannot be unpacked"),
    "truncated": (PLAIN[: len(PLAIN) // 2], "damaged or no zip file"),
    "not a zip": (b"hello", "damaged or no zip file"),
    "CRC": (flipped(PLAIN, PLAIN.index(b"payload")), "d/x.txt.*CRC.*damaged"),
    "bad stream": (flipped(SQUEEZED, SQUEEZED.index(b"d/zeros") + 7), "d/zeros.*damaged"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_hostile_or_damaged_archive_leaves_nothing(tmp_path, attack):
    content, reason = ATTACKS[attack]
    archive = tmp_path / "below" / "bad.zip"
    archive.parent.mkdir()
    archive.write_bytes(content)
    with pytest.raises(DataError, match=reason) as error:
        extract(archive, tmp_path / "below" / "data", max_bytes=100_000)
    assert str(archive) in str(error.value)
    assert names(tmp_path) == ["below", "below/bad.zip"]
    assert not Path("/abs").exists()


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ((("top/", ""), ("top/a.txt", "a"), ("top/deep/b.txt", "b")), ["a.txt", "deep", "deep/b.txt"]),
        ((("top/a.txt", "a"), ("__MACOSX/top/._a.txt", "junk")), ["a.txt"]),
        ((("a.txt", "a"), ("top/b.txt", "b")), ["a.txt", "top", "top/b.txt"]),
        ((("a.txt", "a"),), ["a.txt"]),
    ],
)
def test_extract(tmp_path, members, expected):
    (tmp_path / "x.zip").write_bytes(zipped(*members))
    folder = extract(tmp_path / "x.zip", tmp_path / "data")
    assert names(folder) == expected
    assert sorted(os.listdir(tmp_path)) == ["data", "x.zip"]
    assert folder.stat().st_mode & 0o777 == 0o777 & ~current_umask()


def test_members_are_read_without_unpacking(tmp_path):
    path = tmp_path / "x.zip"
    path.write_bytes(SQUEEZED)
    assert members(path) == ["d/good.txt", "d/zeros"]
    assert list(contents(path, ["d/zeros", "d/good.txt"])) == [bytes(10**4), b"good"]
    with pytest.raises(DataError, match="its member 'd/zeros' unpacks to 10000 bytes, expected at most 100"):
        list(contents(path, ["d/good.txt", "d/zeros"], max_bytes=100))
    path.write_bytes(PLAIN.replace(b"payload", b"pAyload", 1))
    with pytest.raises(DataError, match=r"member 'd/x.txt'\): Bad CRC-32"):
        list(contents(path, ["d/good.txt", "d/x.txt"]))
    for attack in ("parent", "absolute", "drive", "one backslash", "link", "encrypted", "truncated", "not a zip"):
        data, message = ATTACKS[attack]
        path.write_bytes(data)
        for read in (members, lambda path: list(contents(path, ["d/good.txt"]))):
            with pytest.raises(DataError, match=message):
                read(path)
    assert names(tmp_path) == ["x.zip"]


def current_umask():
    os.umask(umask := os.umask(0))
    return umask


def test_extract_leaves_what_is_there(tmp_path):
    (tmp_path / "x.zip").write_bytes(PLAIN)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match="data is already there"):
        extract(tmp_path / "x.zip", tmp_path / "data")
    assert names(tmp_path) == ["data", "data/mine.txt", "x.zip"]

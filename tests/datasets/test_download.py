"""Downloads against a real server that misbehaves in every way, and archives that are damaged or hostile."""

import hashlib
import io
import random
import re
import resource
import socket
import struct
import threading
import time
from collections import Counter
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import h5py
import numpy as np
import pytest
from file_samples import names, zipped

from pointewa import datasets
from pointewa.datasets.inspect import download as module
from pointewa.datasets.inspect.download import ARCHIVES, Archive, download, fetch
from pointewa.errors import DataError

DATA = random.Random(0).randbytes(300_000)
WRONG = random.Random(1).randbytes(300_000)
STEP = 100_000  # bytes that a bad connection lasts
PAGE = b"<html>Please log in</html>"


class Handler(BaseHTTPRequestHandler):
    """Answers ``/<behaviour>/...`` by the method ``on_<behaviour>(start)``; ``start`` is where the range begins."""

    def log_message(self, *args):
        pass

    def do_GET(self):
        start = int((self.headers["Range"] or "bytes=0-")[len("bytes=") : -1])
        self.server.asked.append((self.path[1:], start))
        with suppress(ConnectionError):  # the client has had enough
            getattr(self, f"on_{self.path[1:]}")(start)

    def again(self):
        return Counter(path for path, _ in self.server.asked)[self.path[1:]] > 1

    def head(self, status, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def body(self, content):
        self.server.sent[self.path[1:]] += len(content)  # first, as the client may be done before write() returns
        self.wfile.write(content)

    def serve(self, start, stop=None, data=DATA):
        """All from ``start`` is promised, up to ``stop`` is sent."""
        span = {"Content_Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
        self.head(206 if start else 200, Content_Length=len(data) - start, **span)
        self.body(data[start:stop])

    def on_good(self, start):
        self.serve(start)

    def on_zip(self, start):
        self.serve(start, data=self.server.zip)

    def on_short(self, start):
        self.serve(start, start + STEP)

    def on_reset(self, start):
        self.serve(start, None if start else STEP)
        if not start:
            time.sleep(0.2)  # what was sent arrives before the reset
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def on_stall(self, start):
        self.serve(start, None if start else STEP)
        if not start:
            self.server.over.wait(5)

    def on_silent(self, start):
        self.server.over.wait(5)

    def on_norange(self, start):
        self.serve(0, None if self.again() else STEP)

    def on_half(self, start):
        self.serve(0, STEP)

    def on_nolength(self, start):
        self.head(200)
        self.body(DATA)

    def on_lingering(self, start):
        self.on_nolength(start)
        self.server.over.wait(5)

    def on_chunked(self, start):
        self.protocol_version = "HTTP/1.1"
        self.head(200, Transfer_Encoding="chunked", Connection="close")
        for i in range(0, len(DATA), STEP):
            self.body(b"%x\r\n%b\r\n" % (STEP, DATA[i : i + STEP]))
        self.body(b"0\r\n\r\n")

    def on_badrange(self, start):
        if not start:
            return self.serve(0, None if self.again() else STEP)
        self.head(206, Content_Length=len(DATA), Content_Range=f"bytes 0-{len(DATA) - 1}/{len(DATA)}")
        return self.body(DATA)

    def on_unsatisfiable(self, start):
        if start:
            self.head(416, Content_Range=f"bytes */{len(DATA)}")
        else:
            self.serve(0)

    def on_missing(self, start):
        self.send_error(404)

    def on_broken(self, start):
        self.send_error(503)

    def on_busy(self, start):
        self.serve(start) if self.again() else self.send_error(503)

    def on_moved(self, start):
        self.head(302, Location="/good")

    def on_loop(self, start):
        self.head(302, Location="/loop")

    def on_tofile(self, start):
        self.head(302, Location="file:///etc/hostname")

    def on_toftp(self, start):
        self.head(302, Location="ftp://127.0.0.1/good")

    def on_wrong(self, start):
        self.serve(start, data=WRONG)

    def on_wrong_short(self, start):
        self.serve(start, STEP, data=WRONG) if not start else self.send_error(404)

    def on_page(self, start):
        self.head(200, Content_Type="text/html; charset=utf-8", Content_Length=len(PAGE))
        self.body(PAGE)

    def on_disguised_page(self, start):
        self.head(200, Content_Length=len(PAGE))
        self.body(PAGE)

    def on_endless(self, start):
        self.head(200)
        while not self.server.over.is_set():
            self.body(DATA)


@pytest.fixture(scope="module")
def running():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.over = threading.Event()
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.over.set()
        server.shutdown()


@pytest.fixture
def server(running, monkeypatch):
    monkeypatch.setattr(module, "PAUSE", 0.0)
    monkeypatch.setenv("no_proxy", "*")
    running.asked, running.sent = [], Counter()
    running.url = lambda *paths: tuple(f"http://127.0.0.1:{running.server_port}/{path}" for path in paths)
    return running


@pytest.fixture
def dead():
    """The address of a port at which nobody listens."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}/good"


def published(mirrors=(), data=DATA, **changes):
    settings = {"checksum": f"sha256:{hashlib.sha256(data).hexdigest()}", "size": None, "licence": "for research only"}
    return Archive("data.zip", mirrors=tuple(mirrors), **{**settings, **changes})


def assert_fetched(path, folder):
    assert path == folder / "data.zip"
    assert path.read_bytes() == DATA
    assert names(folder) == ["data.zip"]  # no .part


@pytest.mark.parametrize("size", [None, len(DATA)])
@pytest.mark.parametrize("path", ["good", "moved", "nolength", "chunked", "busy"])
def test_a_file_is_fetched_from_servers_of_all_kinds(server, tmp_path, path, size):
    assert_fetched(fetch(published(server.url(path), size=size), tmp_path), tmp_path)


def test_a_connection_left_open_after_the_last_byte_is_not_waited_for(server, tmp_path):
    assert_fetched(fetch(published(server.url("lingering"), size=len(DATA)), tmp_path), tmp_path)
    assert server.asked == [("lingering", 0)]


def test_the_licence_is_shown_and_a_checksum_may_be_md5(server, tmp_path, capsys):
    archive = published(server.url("good"), checksum=f"md5:{hashlib.md5(DATA).hexdigest()}")
    assert_fetched(fetch(archive, tmp_path / "new" / "folder"), tmp_path / "new" / "folder")
    assert capsys.readouterr().err.strip() == "downloading data.zip. for research only"  # no bar: not a terminal


def test_a_terminal_shows_a_bar_and_the_notes(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert_fetched(fetch(published(server.url("missing", "good")), tmp_path), tmp_path)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
    assert "━" in shown
    assert "missing: HTTP Error 404" in shown


@pytest.mark.parametrize("size", [None, len(DATA)])
@pytest.mark.parametrize(
    ("path", "starts"), [("short", [0, STEP, 2 * STEP]), ("stall", [0, STEP]), ("reset", [0, STEP])]
)
def test_a_lost_connection_goes_on_from_what_there_is(server, tmp_path, path, starts, size):
    timeout = 0.5 if path == "stall" else 10
    assert_fetched(fetch(published(server.url(path), size=size), tmp_path, timeout=timeout), tmp_path)
    assert server.asked == [(path, start) for start in starts]
    assert server.sent[path] == len(DATA)  # not a byte twice


def test_another_call_goes_on_from_what_there_is(server, tmp_path):
    (tmp_path / "data.zip.part").write_bytes(DATA[:123_456])
    assert_fetched(fetch(published(server.url("good")), tmp_path), tmp_path)
    assert server.sent["good"] == len(DATA) - 123_456


def test_another_mirror_goes_on_from_what_there_is(server, tmp_path):
    assert_fetched(fetch(published(server.url("half", "good")), tmp_path), tmp_path)
    assert server.asked[-1] == ("good", STEP)


@pytest.mark.parametrize("path", ["norange", "badrange"])
def test_a_server_that_cannot_resume_is_asked_for_all(server, tmp_path, path):
    assert_fetched(fetch(published(server.url(path)), tmp_path), tmp_path)
    assert len(server.asked) == (2 if path == "norange" else 3)


def test_a_part_that_is_longer_than_the_file_is_dropped(server, tmp_path):
    (tmp_path / "data.zip.part").write_bytes(DATA + b"x")
    assert_fetched(fetch(published(server.url("unsatisfiable")), tmp_path), tmp_path)
    assert server.asked == [("unsatisfiable", len(DATA) + 1), ("unsatisfiable", 0)]


def test_a_mirror_that_gets_no_further_is_given_up(server, tmp_path):
    with pytest.raises(DataError, match=f"ended after {STEP} of {len(DATA)} bytes") as error:
        fetch(published(server.url("half")), tmp_path)
    assert len(server.asked) == 1 + 1 + module.RETRIES  # one that brings bytes, one that does not, and its retries
    assert f"{STEP} bytes are kept" in str(error.value)
    assert (tmp_path / "data.zip.part").read_bytes() == DATA[:STEP]


def test_complete_files_are_verified_and_used_without_a_request(server, tmp_path):
    (tmp_path / "data.zip.part").write_bytes(DATA)
    for _ in range(2):  # first from the .part, then the file itself
        assert_fetched(fetch(published(server.url("good")), tmp_path), tmp_path)
    assert server.asked == []


def test_a_wrong_file_that_was_there_stays_until_there_is_a_right_one(server, tmp_path, capsys):
    (tmp_path / "data.zip").write_bytes(WRONG)
    with pytest.raises(DataError):
        fetch(published(server.url("missing")), tmp_path)
    assert (tmp_path / "data.zip").read_bytes() == WRONG
    assert "data.zip is not the published file" in capsys.readouterr().err
    assert_fetched(fetch(published(server.url("good")), tmp_path), tmp_path)


BAD = {
    "wrong": "not the published file",
    "disguised_page": "not the published file",
    "page": "serves no file",
    "missing": "404",
    "broken": "503",
    "loop": "infinite loop",
    "tofile": "not allowed",
    "toftp": "unknown url type",
    "silent": "timed out",
    "endless": "sends more than 400000 bytes",
}


@pytest.mark.parametrize("path", BAD)
def test_the_next_mirror_follows_a_bad_one(server, tmp_path, capsys, path):
    mirrors = server.url(path, "good")
    timeout = 0.25 if path == "silent" else 10
    assert_fetched(fetch(published(mirrors), tmp_path, timeout=timeout, max_bytes=400_000), tmp_path)
    _, note = capsys.readouterr().err.strip().split("\n")
    assert note.startswith(f"note: {mirrors[0]}: ")
    assert BAD[path] in note
    assert server.asked[-1] == ("good", 0)  # nothing of the bad one was kept
    assert server.asked.count((path, 0)) == {"broken": 4, "silent": 4, "loop": 5}.get(path, 1)


def test_the_beginning_of_a_wrong_file_does_not_spoil_the_next_mirror(server, tmp_path):
    assert_fetched(fetch(published(server.url("wrong_short", "good")), tmp_path), tmp_path)
    assert server.asked[-2:] == [("good", STEP), ("good", 0)]


@pytest.mark.parametrize(
    ("path", "limits"), [("good", {"size": 299_999}), ("good", {"size": 300_001}), ("endless", {"size": 250_000})]
)
def test_no_more_than_the_size_is_written(server, tmp_path, path, limits):
    with pytest.raises(DataError, match=r"offers 300000 bytes, expected|sends more than 250000 bytes"):
        fetch(published(server.url(path), **limits), tmp_path)
    assert names(tmp_path) == []


def test_a_length_above_the_bound_is_refused(server, tmp_path):
    with pytest.raises(DataError, match="offers 300000 bytes, expected at most 200000"):
        fetch(published(server.url("good")), tmp_path, max_bytes=200_000)
    assert server.asked == [("good", 0)]


def test_all_mirrors_fail(server, tmp_path, dead):
    others = ("ftp://127.0.0.1/x", "file:///etc/hostname", "no address", "http://[/x")
    mirrors = (*server.url("missing", "wrong"), dead, *others)
    with pytest.raises(DataError) as error:
        fetch(published(mirrors), tmp_path)
    message = str(error.value)
    for mirror, reason in zip(mirrors, ("404", "not the published file", "refused", *["url"] * 4), strict=True):
        assert re.search(f"  {re.escape(mirror)}: .*{reason}", message, re.IGNORECASE), mirror
    assert f"get it by hand, from {mirrors[0]}" in message
    assert f"put it at {tmp_path / 'data.zip'}" in message
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_written(server, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be written"):
        fetch(published(server.url("good")), tmp_path / "file")


def test_a_full_disk(server, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (STEP, hard))
    try:
        with pytest.raises(DataError, match="cannot be written"):
            fetch(published(server.url("good")), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "data.zip").exists()


def test_download_leads_to_data_that_loads(server, tmp_path, monkeypatch, capsys):
    with h5py.File(h5 := io.BytesIO(), "w") as file:
        file["data"] = np.random.default_rng(0).normal(size=(4, 64, 3)).astype(np.float32)
        file["label"] = np.zeros((4, 1), np.uint8)
    top = Path(ARCHIVES["modelnet40"].name).stem
    server.zip = zipped((f"{top}/shape_names.txt", "airplane\n"), (f"{top}/ply_data_train0.h5", h5.getvalue()))
    checksum = f"md5:{hashlib.md5(server.zip).hexdigest()}"
    archive = Archive(ARCHIVES["modelnet40"].name, checksum, len(server.zip), ("http://nowhere.invalid/",), "")
    monkeypatch.setitem(ARCHIVES, "modelnet40", archive)
    root = tmp_path / "data"
    folder = download("modelnet40", root, mirrors=server.url("missing", "zip"))
    assert folder == root / "modelnet40_ply_hdf5_2048"
    assert names(folder) == ["ply_data_train0.h5", "shape_names.txt"]
    assert len(datasets.load("modelnet40", str(root), "train")) == 4

    server.asked.clear()
    (folder / "shape_names.txt").write_text("mine\n")
    assert download("modelnet40", root, mirrors=server.url("zip")) == folder
    assert "already there: nothing to do" in capsys.readouterr().err
    assert (server.asked, (folder / "shape_names.txt").read_text()) == ([], "mine\n")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("scanobjectnn", "terms of use"),
        ("shapenet55", "https://shapenet.org"),
        ("shapenetpart", "https://shapenet.org"),
        ("labeled_psb", "https://segeval.cs.princeton.edu"),
        ("shapes", r"one of modelnet40, scanobjectnn, .*, sydney, found 'shapes'; shapes needs no"),
    ],
)
def test_what_is_not_downloaded(tmp_path, name, message):
    with pytest.raises(DataError, match=message):
        download(name, tmp_path)
    assert names(tmp_path) == []

"""A disk that is full: the file is named, nothing half-written stays, and the run resumes exactly."""

import errno
import os
import resource
from contextlib import contextmanager

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pointewa import datasets
from pointewa.datasets import packed
from pointewa.errors import CheckpointError
from pointewa.inference.export import SUFFIXES, export
from pointewa.runs import log
from pointewa.runs.log import Logbook, read_metrics
from pointewa.safe.files import append, atomic_write
from pointewa.tools import cli
from pointewa.train import trainer as trainer_module
from pointewa.train.checkpoint import save_state
from tests.train.test_reliability import same, snapshot


@contextmanager
def room_for(size):
    """No file may grow beyond so many bytes: the system refuses that as it refuses to write to a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_line_is_appended_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a"
    append(path, "first\n")
    with room_for(10), pytest.raises(OSError, match="File too large"):
        append(path, "second\n")
    assert path.read_text() == "first\n"
    append(path, "é\n")
    assert path.read_text() == "first\né\n"


def test_what_is_written_in_place_of_another_file(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(OSError, match="File too large") as error, room_for(10), atomic_write(path) as temporary:
        temporary.write_text("x" * 100)
    assert (error.value.filename, error.value.errno) == (str(path), errno.EFBIG)
    assert [one.name for one in tmp_path.iterdir()] == ["a"]
    assert path.read_text() == "old"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's writer
def test_the_logbook_names_its_files(tmp_path):
    with Logbook(tmp_path) as logbook:
        logbook.write(0, 10, {"a": 1.0})
        with room_for((tmp_path / "metrics.jsonl").stat().st_size + 5), pytest.raises(OSError, match="large") as error:
            logbook.write(1, 20, {"a": 2.0})
        assert error.value.filename == str(tmp_path / "metrics.jsonl")
    assert [one["epoch"] for one in read_metrics(tmp_path)] == [0]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1
    (events,) = tmp_path.glob("events*")
    (tmp_path / "metrics.jsonl").unlink()  # the smaller file is to have room
    logbook = Logbook(tmp_path, 1, 10)
    with room_for(95), pytest.raises(OSError, match="large") as error, logbook:
        logbook.write(1, 20, {"a": 2.0})
    assert error.value.filename == str(tmp_path / log.EVENTS)
    assert [one["epoch"] for one in read_metrics(tmp_path)] == [1]
    assert [one.value for one in EventAccumulator(str(events)).Reload().Scalars("a")] == [1.0]


def names_what_to_do(error, name):
    text = str(error.value)
    assert name in text
    assert text.endswith(": free some space, then resume with the same command and RUN=full (run.name=full)")
    assert "\n" not in text


@pytest.mark.parametrize("what", ["metrics.jsonl", "last.ckpt", "model.safetensors", "summary.json"])
def test_a_run_resumes_exactly_once_there_is_room(make_trainer, monkeypatch, what):
    whole = make_trainer("run.name=whole")
    whole.fit()
    expected = whole.finish()

    def limited(module, name, when=lambda *arguments: True):
        original = getattr(module, name)

        def write(*arguments):
            with room_for(100 if when(*arguments) else resource.RLIM_INFINITY):
                return original(*arguments)

        monkeypatch.setattr(module, name, write)

    with monkeypatch.context() as monkeypatch:
        match what:
            case "metrics.jsonl":
                limited(log, "append", lambda path, text: '"epoch": 1' in text)
            case "last.ckpt":
                limited(trainer_module, "save_state", lambda path, state: state["step"] == 20)
            case "model.safetensors":
                limited(trainer_module, "save_model")
            case _:
                limited(trainer_module, "write_summary")
        full = make_trainer("run.name=full")
        with pytest.raises(CheckpointError) as error:
            full.fit() or full.finish()
        names_what_to_do(error, what)
    assert not list(full.folder.glob(".*"))
    assert not (full.folder / "summary.json").exists()
    resumed = make_trainer("run.name=full")
    assert resumed.resumed
    resumed.fit()
    assert resumed.finish()["test"] == expected["test"]
    assert same(snapshot(resumed), snapshot(whole))
    assert [one["epoch"] for one in read_metrics(full.folder)] == [0, 1]


def test_an_error_that_is_no_full_disk_is_not_called_one(make_trainer, monkeypatch):
    def forbidden(*arguments):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "x")

    monkeypatch.setattr(log, "append", forbidden)
    with pytest.raises(PermissionError):
        make_trainer("run.name=a").fit()


def test_a_checkpoint_says_that_the_disk_is_full(tmp_path, make_trainer):
    with (
        room_for(1000),
        pytest.raises(CheckpointError, match=r"\(No space left on device\); nothing was written: free"),
    ):
        save_state(tmp_path / "last.ckpt", {"model": make_trainer("run.name=full").model.state_dict()})
    assert not (tmp_path / "last.ckpt").exists()


SLOW = [pytest.param(one, marks=pytest.mark.slow) for one in ("onnx", "torch_export")]


@pytest.mark.parametrize("format", [*sorted(set(SUFFIXES) - {"onnx", "torch_export"}), *SLOW])
def test_exports_name_the_file(make_trainer, tmp_path, format):
    if format == "onnx":
        pytest.importorskip("onnxruntime")
    trainer = make_trainer("ewa.enabled=false", "model.depth=2")
    path = tmp_path / f"m{SUFFIXES[format]}"
    with room_for(1000), pytest.raises(OSError, match="File too large") as error:
        export(trainer.loaded(trainer.model.eval()), path, format)
    assert error.value.filename.endswith(path.name)
    assert not list(tmp_path.glob("*m*"))


def test_packing_names_the_file(tmp_path):
    source = datasets.open_source("shapes", "", "test")
    with room_for(1000), pytest.raises(OSError, match=r"File too large: '.*p\.h5'$"):
        packed.write(tmp_path / "p.h5", {"test": (source, 64, source.clouds(64))})
    assert not list(tmp_path.iterdir())


def test_the_tools_say_it_in_one_line(tmp_path, capsys):
    def main():
        with atomic_write(tmp_path / "a") as temporary:
            temporary.write_bytes(bytes(2000))

    with pytest.raises(SystemExit) as exit_, room_for(1000):
        cli.run(main)
    assert exit_.value.code == 2
    said = f"error: {tmp_path / 'a'}: File too large: free some space, then give the same command again\n"
    assert capsys.readouterr().err == said

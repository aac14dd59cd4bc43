"""What all command lines do: errors in one line or with their traceback, and signals."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pointewa.errors import ConfigError, Stopped
from pointewa.inference import page
from pointewa.tools import cli, train
from tests.tools.test_tools import FAST

ROOT = Path(__file__).parents[2]
TOOLS = sorted(
    f"{path.parent.name}.{path.stem}"
    for folder in ("tools", "benchmarks")
    for path in (ROOT / folder).glob("*.py")
    if "cli.run(main)" in path.read_text()
)


def wrong():
    try:
        {}["inner"]
    except KeyError as error:
        raise ConfigError("key: expected this, found that") from error


@pytest.mark.parametrize(("value", "shown"), [("1", True), ("0", False), ("", False), (None, False)])
def test_the_traceback_behind_a_one_line_error(monkeypatch, capsys, value, shown):
    monkeypatch.delenv("POINTEWA_DEBUG", raising=False)
    if value is not None:
        monkeypatch.setenv("POINTEWA_DEBUG", value)
    with pytest.raises(SystemExit) as exit_:
        cli.run(wrong)
    lines = capsys.readouterr().err.splitlines()
    assert exit_.value.code == 2
    assert lines[-1] == "error: key: expected this, found that"
    assert (len(lines) > 1) == shown
    for part in ("KeyError: 'inner'", "direct cause of the following exception", "in wrong"):
        assert any(part in line for line in lines) == shown


def test_debug_as_an_argument(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("POINTEWA_DEBUG", "0")  # so that it is put back
    with pytest.raises(SystemExit) as exit_:
        cli.run(lambda: train.main(["--debug", *FAST, f"run.dir={tmp_path}", "train.epoch=3"]))
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback (most recent call last)" in error
    assert error.splitlines()[-1].startswith("error: ")
    assert os.environ["POINTEWA_DEBUG"] == "1"  # for the trainings of a study


def test_what_is_no_error_of_the_user_is_not_caught():
    with pytest.raises(TypeError, match="planted"):
        cli.run(lambda: (_ for _ in ()).throw(TypeError("planted")))


def mapped(process):
    """The libraries that a process has loaded so far."""
    try:
        return Path(f"/proc/{process.pid}/maps").read_text()
    except OSError:
        return ""


def interrupted(tool, library):
    """What a tool says, and its exit code, when it is interrupted as soon as it has loaded a library."""
    command = [sys.executable, "-m", tool, "--help"]
    # A shell's background job ignores SIGINT, and its children would too.
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # fmt: skip
    while process.poll() is None and library not in mapped(process):
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    return error, process.returncode


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="to see how far a process is needs /proc")
@pytest.mark.parametrize("library", ["_posixsubprocess", "libtorch_cpu", "_C.cpython"])
def test_interrupted_while_torch_is_imported(library):
    error, code = interrupted("tools.train", library)
    assert (error, code) == ("\nstopped by SIGINT: nothing had begun\n", 130)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="to see how far a process is needs /proc")
@pytest.mark.parametrize("tool", TOOLS)
def test_every_tool_interrupted_while_torch_is_imported(tool):
    assert interrupted(tool, "libtorch_cpu") == ("\nstopped by SIGINT: nothing had begun\n", 130)


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (Stopped(signal.SIGTERM), 143)])
def test_interrupted_while_the_page_is_drawn_the_run_is_finished(tmp_path, monkeypatch, capsys, error, code):
    def write(folder, *arguments, **options):
        assert (folder / "summary.json").exists()
        raise error

    monkeypatch.setattr(page, "write", write)
    with pytest.raises(SystemExit) as exit_:
        cli.run(lambda: train.main([*FAST, f"run.dir={tmp_path}", "run.name=a", "run.report=true"]))
    assert exit_.value.code == code
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.endswith(f"the run is finished; make report CKPT={tmp_path / 'a'} draws its page")
    assert "resume" not in last


@pytest.mark.parametrize(
    ("own", "spins"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_threads_spin_briefly_unless_the_user_says_how_long(own, spins):
    code = "import os, sys, tools; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    env = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    out = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, env=env | own, text=True)
    assert out == f"{spins} False\n"  # before torch, whose libgomp reads it once

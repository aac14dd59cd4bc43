"""The doctor: what it finds, and that it works where nothing else does."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pointewa import datasets
from pointewa.tools import checks, cli, doctor, installed

ROOT = Path(__file__).parents[2]


def ask(capsys, *arguments):
    doctor.main([*arguments, "train.device=cpu", "--json"])
    result = json.loads(capsys.readouterr().out)
    return result["ready"], {one["name"]: one for one in result["findings"]}


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as exit_:
        cli.run(lambda: doctor.main([*arguments, "--json"]))
    assert exit_.value.code == 2
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert not result["ready"]
    assert captured.err.startswith("error: training cannot run: ")
    return {one["name"]: one for one in result["findings"]}, captured.err


def test_here_training_can_run(capsys, tmp_path):
    ready, found = ask(capsys, f"data.root={tmp_path}", f"run.dir={tmp_path / 'runs'}")
    assert ready
    assert found["torch"]["found"].startswith(torch.__version__.partition("+")[0])
    for name in ("Python", "h5py", "device", "precision", "training step", "disk for runs", "shapes"):
        assert found[name]["state"] == "ok"
    assert found["device"]["found"].startswith("cpu for train.device=cpu")
    assert found["shapes"]["found"].startswith("procedural")
    assert found["data.root"]["found"] == str(tmp_path)
    assert "544" not in found["shapes"]["found"]  # the tests' small set
    for name in ("modelnet40", "scanobjectnn", "shapenet55", "shapenetpart", "labeled_psb", "folder"):
        assert (found[name]["state"], found[name]["found"]) == ("note", "not found")
        assert "data.root=FOLDER" in found[name]["remedy"]
    assert {one["group"] for one in found.values()} == {"packages", "machine", "data"}
    if sys.platform == "linux":
        assert "GiB free" in found["memory"]["found"]
    assert not list(tmp_path.iterdir())


def test_a_variant_of_a_set_that_is_not_the_default_is_found_too(capsys, tmp_path):
    (tmp_path / "object_dataset" / "chair").mkdir(parents=True)
    (tmp_path / "split2").mkdir()
    (tmp_path / "split2" / "training_objectdataset_augmentedrot.h5").write_bytes(b"")
    _, found = ask(capsys, f"data.root={tmp_path}")
    assert (found["scanobjectnn"]["state"], found["scanobjectnn"]["found"]) == (
        "ok",
        "with data.variant=pb_t50_r/split2 or raw",
    )
    found, error = refused(capsys, f"data.root={tmp_path}", "data.name=scanobjectnn", "train.device=cpu")
    assert "was not found, but pb_t50_r/split2, raw: set data.variant" in error
    (tmp_path / "cloud.xyz").write_text("0 0 0\n1 1 1\n0 1 2\n")
    (tmp_path / "more.xyz").write_text("0 0 0\n1 1 1\n0 1 2\n")
    _, found = ask(capsys, f"data.root={tmp_path}", "data.name=folder", "train.task=masked_autoencoding")
    assert found["folder"]["found"].startswith("folder, y_up, 1 test object, ")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["data.num_points=2000"], "data.num_points asks for 2000"),
        (["data.name=images", "data.root=gratings", "data.normalize=center"], "data.normalize: gratings has images"),
        (["data.name=images", "data.root=gratings", "train.task=part_segmentation"], "does not tell the parts"),
    ],
)
def test_data_that_training_refuses_are_not_ok(capsys, keys, message):
    assert message in refused(capsys, *keys, "train.device=cpu")[1]


def test_a_set_whose_variants_cannot_be_listed_hides_no_other(capsys, tmp_path, monkeypatch):
    def fail(root):
        raise PermissionError("no entry")

    monkeypatch.setattr(datasets.NAMES["scanobjectnn"], "variants_at", fail)
    _, found = ask(capsys, f"data.root={tmp_path}")
    assert [found[name]["found"] for name in ("scanobjectnn", "shapenet55", "sydney")] == ["not found"] * 3


def test_a_screen_for_people(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    doctor.main([f"data.root={tmp_path}", "train.device=cpu"])
    out = capsys.readouterr().out
    assert out.endswith("training can run: make train DATASET=shapes\n")
    assert "\x1b" not in out
    assert len(out.splitlines()) <= 40


def test_colours_are_off_under_no_color():
    finding = installed.Finding("machine", "disk", installed.BAD, "full", "free some space")
    code = f"from tools import doctor; from tools.installed import Finding; doctor.show([{finding!r}])"

    def output(**variables):
        environment = {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
        return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True,
                              env=environment | {"FORCE_COLOR": "1", "TERM": "xterm"} | variables).stdout  # fmt: skip

    assert "\x1b[31m" in output()
    assert "\x1b[31m" not in output(NO_COLOR="1")


def test_what_stops_training(capsys, tmp_path, monkeypatch):
    found, error = refused(capsys, "data.name=modelnet40", f"data.root={tmp_path}")
    assert found["modelnet40"]["state"] == "missing"
    assert found["data.root"]["state"] == "ok"
    assert "ModelNet40 was not found." in error
    assert "make data DATASET=modelnet40" in error
    found, error = refused(capsys, "train.device=tpu")
    assert found["device"]["state"] == "missing"
    (tmp_path / "file").touch()
    found, error = refused(capsys, f"run.dir={tmp_path / 'file' / 'runs'}", "train.device=cpu")
    assert "where nothing can be written" in error
    monkeypatch.setattr(checks, "LEAST_DISK", 2**60)
    found, error = refused(capsys, f"run.dir={tmp_path}", "train.device=cpu")
    assert (found["disk for runs"]["state"], found["disk for prepared data"]["state"]) == ("missing", "note")
    assert "free some space, or run.dir=FOLDER" in error
    with pytest.raises(SystemExit):
        cli.run(lambda: doctor.main(["train.epoch=3"]))
    assert "did you mean train.epochs?" in capsys.readouterr().err


def test_a_step_that_fails(capsys, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("no kernel image is available\nand more")

    monkeypatch.setattr(checks, "PointTransformerClassifier", broken)
    found, _ = refused(capsys, "train.device=cpu")
    assert found["training step"]["found"] == "fails on cpu: no kernel image is available"


def test_operators(monkeypatch):
    monkeypatch.setattr(checks, "backend", lambda: "torch")
    monkeypatch.delenv("POINTEWA_OPS", raising=False)
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    finding = checks._operators()
    assert (finding.state, finding.found) == ("note", "torch, slower on GPUs; pytorch3d is not installed")
    monkeypatch.setattr(checks, "find_spec", lambda name: True)
    monkeypatch.setitem(sys.modules, "pytorch3d._C", None)
    monkeypatch.setitem(sys.modules, "pytorch3d", type(sys)("pytorch3d"))
    assert "pytorch3d does not load: " in checks._operators().found

    def unknown():
        raise ValueError("POINTEWA_OPS must be one of pytorch3d, torch, got 'cuda'")

    monkeypatch.setattr(checks, "backend", unknown)
    assert (checks._operators().state, checks._operators().remedy) == ("missing", "unset POINTEWA_OPS")


def test_packages_that_are_missing_or_of_another_version(monkeypatch):
    def without(name):
        return None if name in ("h5py", "trimesh") else True

    monkeypatch.setattr(installed.importlib.util, "find_spec", without)
    monkeypatch.setattr(installed.importlib.metadata, "version", lambda name: "0.1")
    found = {one.name: one for one in installed.packages()}
    assert (found["h5py"].state, found["trimesh"].state, found["torch"].state) == ("missing", "note", "note")
    assert found["h5py"].found == "missing, for training"
    assert found["torch"].found.startswith("0.1, tried with 2.")
    assert found["torch"].remedy == "make setup, or pip install -r requirements.txt"


def test_open3d_without_the_library_that_its_import_needs(monkeypatch, capsys):
    monkeypatch.setattr(installed.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(installed.importlib.metadata, "version", lambda name: "0.20.0")
    for library, state in ((None, "note"), ("libusb-1.0.so.0", "ok")):
        monkeypatch.setattr(installed, "find_library", lambda name, library=library: library)
        found = {one.name: one for one in installed.packages()}["open3d-cpu"]
        assert found.state == state
        installed.tell_of_libraries()
        line = "note: open3d-cpu 0.20.0, but its import needs libusb; pictures are drawn by matplotlib: "
        assert capsys.readouterr().out == ("" if library else f"{line}apt install libusb-1.0-0\n")


def test_open3d_is_installed_by_setup_and_imported_by_nothing_at_the_start():
    assert re.search(r"^open3d-cpu==0\.20\.0;", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    code = "import sys, tools.visualize, tools.train; sys.exit('open3d' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("module", ["rich", "torch", "h5py"])
def test_it_tells_where_nothing_can_be_imported(tmp_path, module):
    """Of a package that is there and broken, as after a half-finished installation."""
    (tmp_path / module).mkdir()
    (tmp_path / module / "__init__.py").write_text("raise ImportError('lib.so: wrong ELF class')")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "tools.doctor"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 2
    assert result.stderr.startswith("error: training cannot run: imports: lib.so: wrong ELF class -> make setup")
    assert len(result.stderr.splitlines()) == 1
    assert "Python" in result.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory(monkeypatch):
    assert 0 < checks.free_memory() < 2**50
    assert checks.keeps_freed_memory() in (True, False)


def test_a_long_scan_is_left(monkeypatch, capsys, tmp_path):
    import threading

    never = threading.Event()
    original = datasets.open_source

    def slow(name, *arguments, **options):
        if name == "modelnet40":
            never.wait(20)
        return original(name, *arguments, **options)

    monkeypatch.setattr(datasets, "open_source", slow)
    monkeypatch.setattr(checks, "SECONDS", 0.5)
    ready, found = ask(capsys, f"data.root={tmp_path}")
    never.set()
    assert ready
    assert found["modelnet40"]["found"].startswith("not searched within 0 s")
    assert found["shapes"]["state"] == "ok"


def test_real_data_is_found(capsys, real_data):
    _, found = ask(capsys, f"data.root={real_data}", "data.name=modelnet40")
    assert found["modelnet40"]["state"] == "ok"
    assert f"2468 test objects, {real_data}/modelnet40_1024.h5" in found["modelnet40"]["found"]

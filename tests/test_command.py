"""The installed command: from a wheel, and from any folder."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import pointewa
from pointewa.__main__ import COMMANDS

ROOT = Path(__file__).parents[1]
FAST = ["train.epochs=1", "model.preset=tiny", "model.width=24", "model.depth=2", "model.heads=2", "model.num_groups=8",
        "model.group_size=8", "data.num_points=64", "train.device=cpu", "run.report=false", "run.name=x"]  # fmt: skip


def call(*arguments, cwd, path=ROOT, program=("-m", "pointewa")):
    done = subprocess.run([sys.executable, *program, *arguments], cwd=cwd, capture_output=True, text=True,
                          env={"PYTHONPATH": str(path), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"})  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_every_command_is_a_tool_and_every_tool_a_command(tmp_path):
    tools = {path.stem for path in (ROOT / "tools").glob("*.py") if "cli.run(main)" in path.read_text()}
    assert {module for module, _ in COMMANDS.values()} == tools
    code, out, _ = call(cwd=tmp_path)
    assert code == 0
    assert re.findall(r"^  ([\w-]+)", out, re.MULTILINE) == list(COMMANDS)


@pytest.mark.parametrize(("command", "meant"), [("evel", "did you mean eval?"), ("x", "expected one of train, eval,")])
def test_an_unknown_command(tmp_path, command, meant):
    code, out, error = call(command, cwd=tmp_path)
    assert (code, out) == (2, "")
    assert error.startswith(f"error: pointewa {command}: there is no such command: {meant}")
    assert error.count("\n") == 1


def test_a_missing_package_is_named(tmp_path):
    (tmp_path / "rich").mkdir()
    (tmp_path / "rich" / "__init__.py").write_text("raise ModuleNotFoundError(name='rich')")
    code, _, error = call("train", cwd=tmp_path)
    assert (code, error) == (2, "error: rich is not installed: pip install 'pointewa[train]'\n")


@pytest.mark.slow
def test_a_wheel_trains_and_evaluates_where_there_is_no_clone(tmp_path):
    build = f"import hatchling.build as b; print(b.build_wheel({str(tmp_path)!r}))"
    code, out, error = call(build, cwd=ROOT, program=("-c",))
    assert code == 0, error
    with zipfile.ZipFile(tmp_path / out.split()[-1]) as wheel:
        wheel.extractall(tmp_path / "site")
    assert {path.name for path in (tmp_path / "site").iterdir() if path.suffix != ".dist-info"} == {"pointewa"}
    work = tmp_path / "work"
    work.mkdir()
    for arguments in (["train", "--config", "shapes", *FAST], ["eval", "runs/x"], ["doctor"]):
        code, out, error = call(*arguments, cwd=work, path=tmp_path / "site")
        assert code == 0, error
    where = "import pointewa.tools.train as one, pointewa.datasets as two; print(one.__file__, two.NAMES['shapes'])"
    assert str(ROOT) not in call(where, cwd=work, path=tmp_path / "site", program=("-c",))[1]


def test_a_clone_named_like_the_package_does_not_hide_it(tmp_path):
    clone = tmp_path / "pointewa"
    clone.symlink_to(ROOT)
    code, out, error = call("import pointewa; print(pointewa.__version__)", cwd=tmp_path, path=clone, program=("-c",))
    assert (code, error) == (0, "")
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", out)


def test_the_folder_of_data_sets_hides_no_package_of_its_name(tmp_path):
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "__init__.py").write_text("mine = True")
    code = "import datasets, pointewa.datasets; print(datasets.mine, sorted(pointewa.datasets.NAMES)[0])"
    assert call(code, cwd=ROOT, path=tmp_path, program=("-c",))[1] == "True folder\n"


def test_the_version_is_the_same_wherever_it_is_said():
    places = {"CITATION.cff": r"^version: (.*)$", "CHANGELOG.md": r"^## (\d.*)$"}
    said = (re.search(pattern, (ROOT / file).read_text(), re.MULTILINE)[1] for file, pattern in places.items())
    assert {*said} == {pointewa.__version__}

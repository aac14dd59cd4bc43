"""What the targets of the Makefile come to."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def place(tmp_path):
    """A clone as far as make looks at it, in a folder with blanks; nothing is installed."""
    folder = tmp_path / "my clone"
    folder.mkdir()
    for name in ("Makefile", "requirements.txt", "pyproject.toml"):
        (folder / name).symlink_to(ROOT / name)
    (folder / ".venv").mkdir()
    (folder / ".venv/.done").touch()
    return folder


def run(place, *arguments, **more):
    environment = {"PATH": os.environ["PATH"]}  # nothing of a make that runs this test
    return subprocess.run(["make", *arguments], cwd=place, env=environment, capture_output=True, text=True, **more)


@pytest.fixture
def make(place):
    """A function from arguments of make to the lines that it would execute."""
    return lambda *arguments: run(place, "-n", *arguments, check=True).stdout.splitlines()


def test_fold_hands_its_arguments_on(make):
    line = make("fold", "CKPT=runs/x", "OUT=a.safetensors", "ARGS=--fuse-batch-norm --json")[-1]
    assert shlex.split(line)[2:] == ["tools.fold", "runs/x", "a.safetensors", "--fuse-batch-norm", "--json"]


def test_test_all_has_all_tests_and_test_has_those_that_are_quick(make):
    marks, own = ["-m", "not slow and not hostile"], ["tests/ewa", "-x"]
    quick, everything = (shlex.split(make(target, "ARGS=tests/ewa -x")[-1]) for target in ("test", "test-all"))
    assert quick == everything[:-2] + marks + own
    assert everything[-2:] == own
    assert not {"slow", "hostile"} & set(" ".join(everything).split())


def test_setup_ends_with_a_word_about_what_an_import_needs(make, place):
    (place / ".venv/.done").unlink()
    installs, word, _ = make("setup")[-3:]
    assert installs.endswith("-r requirements.txt -e .")
    assert word.endswith("-m tools.installed")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("train EPOCH=3", "make train does not take EPOCH: did you mean EPOCHS?"),
        ("pretrain STUDY=x", "make pretrain does not take STUDY: it takes ARGS, DATASET, "),
        ("eval SEED=1 CKPT=runs/x", "make eval does not take SEED: it takes ARGS, CKPT, DATASET, DATA_ROOT, DEVICE."),
        ("predict CKPT=runs/x DEVISE=cpu", "make predict does not take DEVISE: did you mean DEVICE?"),
        ("clean RUN=x", "make clean does not take RUN: it takes none"),
        ("SEED=1", "make does not take SEED: it takes none"),
    ],
)
def test_a_variable_that_would_be_ignored_is_refused(place, arguments, said):
    done = run(place, "-n", *arguments.split())
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_target_uses_every_variable_that_it_takes():
    text = (ROOT / "Makefile").read_text()
    training = re.search(r"^TRAINING = (.*)$", text, re.MULTILINE)[1]
    for target, names in re.findall(r"^takes_([\w-]+) *= (.*)$", text, re.MULTILINE):
        names = names.replace("$(TRAINING)", training).split()
        given = [f"{name}=given_{name}" for name in names]
        shown = run(ROOT, "-n", target, *given).stdout
        assert [name for name in names if f"given_{name}" not in shown] == [], target


def test_values_may_have_blanks_and_quotes(make):
    line = make(
        "eval", "CKPT=runs/John's run", "DATASET=folder", "DATA_ROOT=my meshes", "DEVICE=cpu", "ARGS=--votes 2"
    )[-1]
    assert shlex.split(line)[2:] == ["tools.evaluate", "runs/John's run", "--config", "configs/folder.yaml",
                                     "data.root=my meshes", "train.device=cpu", "--votes", "2"]  # fmt: skip
    line = make("train", "RUN=my run", "DATA_ROOT=a b", "NPROC=2", 'ARGS="data.root=c d"')[-1]
    assert shlex.split(line)[5:] == ["--nproc", "2", "run.name=my run", "data.root=a b", "data.root=c d"]


def test_clean_leaves_trainings_and_clean_runs_wants_to_be_told(place):
    for name in ("runs/x", ".ruff_cache", "pointewa/__pycache__", ".venv/__pycache__"):
        (place / name).mkdir(parents=True)
    assert run(place, "clean").returncode == 0
    there = [
        name
        for name in (".ruff_cache", "pointewa/__pycache__", "runs/x", ".venv/__pycache__")
        if (place / name).exists()
    ]
    assert there == ["runs/x", ".venv/__pycache__"]
    done = run(place, "clean-runs", stdin=subprocess.DEVNULL)
    assert done.returncode == 2
    assert "error: make clean-runs removes all trainings: YES=1 if that is meant" in done.stderr
    assert (place / "runs/x").exists()
    assert run(place, "clean-runs", "YES=1").returncode == 0
    assert not (place / "runs").exists()


def test_data_alone_explains_itself_and_a_set_is_fetched(make):
    said = [shlex.split(make("data", *more)[-1])[2:] for more in ((), ("DATASET=modelnet40",), ("WHAT=inspect",))]
    assert said == [
        ["tools.prepare_data"],
        ["tools.prepare_data", "download", "--config", "configs/modelnet40.yaml"],
        ["tools.prepare_data", "inspect", "--config", "configs/shapes.yaml"],
    ]

"""What the targets of the Makefile come to."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def make(tmp_path):
    """A function from arguments of make to the lines that it would execute; nothing is installed."""
    for name in ("Makefile", "requirements.txt", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv/.done").touch()

    def lines(*arguments):
        environment = {"PATH": os.environ["PATH"]}  # nothing of a make that runs this test
        command = ["make", "-n", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    return lines


def test_fold_hands_its_arguments_on(make):
    line = make("fold", "CKPT=runs/x", "OUT=a.safetensors", "ARGS=--fuse-batch-norm --json")[-1]
    assert line.endswith("-m tools.fold runs/x a.safetensors --fuse-batch-norm --json")


def test_test_all_has_all_tests_and_test_has_those_that_are_quick(make):
    marks, own = ["-m", "not slow and not hostile"], ["tests/ewa", "-x"]
    quick, everything = (shlex.split(make(target, "ARGS=tests/ewa -x")[-1]) for target in ("test", "test-all"))
    assert quick == everything[:-2] + marks + own
    assert everything[-2:] == own
    assert not {"slow", "hostile"} & set(" ".join(everything).split())


def test_setup_ends_with_a_word_about_what_an_import_needs(make, tmp_path):
    (tmp_path / ".venv/.done").unlink()
    installs, word, _ = make("setup")[-3:]
    assert installs.endswith("-r requirements.txt -e .")
    assert word.endswith("-m tools.installed")

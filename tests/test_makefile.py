"""What the targets of the Makefile come to."""

import os
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

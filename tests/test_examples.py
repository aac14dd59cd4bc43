"""The examples, run as they say, only shorter."""

import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(tmp_path):
    """An example from a folder that is not its own."""
    (tmp_path / "elsewhere").mkdir()
    return partial(_run, tmp_path / "elsewhere")


def _run(folder, name, *arguments):
    command = [sys.executable, str(ROOT / f"examples/{name}.py"), *map(str, arguments)]
    wide = os.environ | {"COLUMNS": "300"}  # no name is broken
    done = subprocess.run(command, cwd=folder, env=wide, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_timm_vit_is_folded_to_what_timm_made(run):
    pytest.importorskip("timm")
    out = run("timm_vit", "--steps", 8)
    few = run("timm_vit", "--steps", 8, "--bits", 4)
    kept = [float(re.search(r"backward pass: (\S+) MB", one)[1]) for one in (out, few)]
    assert kept[1] < kept[0] / 4
    assert float(re.search(r"mixture and folded: (\S+)", out)[1]) < 1e-5
    counts = re.search(r"([\d,]+) in training, ([\d,]+) now", out).groups()
    training, folded = (int(count.replace(",", "")) for count in counts)
    assert training - folded == 3 * 3 * (2 * 96 * 384 + 96 + 384)  # three more experts in three of six blocks


def test_own_meshes_are_trained_on_and_new_ones_classified(run, tmp_path):
    out = run("own_meshes", tmp_path, "--epochs", 2)
    assert "2 epochs of 8 steps" in out  # four fifths of 160 meshes in batches of 16
    names = ("box", "cone", "cylinder", "torus")
    assert json.loads((tmp_path / "run/model.json").read_text())["class_names"] == list(names)
    for name in names:
        assert re.search(rf"{name}\.stl", out)
    assert len(re.findall(r"(?:box|cone|cylinder|torus) \d+\.\d %", out)) == 4 * 3  # four files, three guesses each


def test_fine_tuning_starts_from_the_trained_tensors(run):
    out = run("fine_tune", "--steps", 8)
    assert re.search(r"^92 tensors loaded", out, re.MULTILINE)
    assert re.findall(r"^(from scratch|fine-tuned with EWA): [\d.]+ % of 160", out, re.MULTILINE) == [
        "from scratch", "fine-tuned with EWA",
    ]  # fmt: skip

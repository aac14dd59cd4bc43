"""The bench and a study where only the packages are installed that docs/performance.md names."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tools.test_study import MACHINE, TOOL, TRAIN

ROOT = Path(__file__).parents[2]
MISSING = ("pytorch3d", "fpsample", "trimesh", "open3d", "timm", "torchvision", "onnx", "onnxscript", "onnxruntime",
           "tensorboard", "sklearn", "pypcd4", "laspy", "mapbox_earcut",
           "torch_pointcloud", "torch_geometric", "transformers", "pandas")  # fmt: skip
STUDY = """
settings:
  model: {width: 24, depth: 2, heads: 2, num_groups: 4, group_size: 4}
  data: {num_points: 64, val_fraction: 0.25}
  train: {epochs: 1, batch_size: 8, warmup_epochs: 0, precision: float32}
arms:
  dense: {ewa: {enabled: false}}
  ewa:
seeds: [0]
"""


@pytest.fixture
def bare(tmp_path):
    """Runs Python in a folder of its own, without those packages, in its children too."""
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({MISSING}))\n")

    def run(*words):
        places = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "POINTEWA_CACHE": str(tmp_path / "cache")}
        done = subprocess.run([sys.executable, *words], cwd=tmp_path, env=os.environ | places, capture_output=True,
                              text=True, check=False)  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    return run


@pytest.mark.slow
def test_the_bench_measures_with_torchs_operators(bare, tmp_path):
    words = [
        "--preset",
        "tiny",
        "--batch-size",
        "2",
        "--budget",
        "0",
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "out"),
    ]
    done = bare("-m", "benchmarks.bench", *words, "--only", "machine", "train", "inference", "memory", "--json")
    found = json.loads(done.stdout)
    assert found["ops"] == "torch"
    assert list(found["figures"]) == ["machine", "train", "inference", "memory"]
    assert (tmp_path / "out/README.md").is_file()


@pytest.mark.slow
def test_a_study_trains_reports_and_goes_on(bare, tmp_path):
    (tmp_path / "mine.yaml").write_text(STUDY)
    words = ["-c", TOOL.format(TRAIN), "mine.yaml", MACHINE]
    bare(*words, "--budget", "0")  # it starts none, and the next call goes on
    done = bare(*words)
    summaries = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("runs/mine/*/summary.json"))]
    assert [one["environment"]["ops"] for one in summaries] == ["torch", "torch"]
    logs = "".join(path.read_text() for path in tmp_path.glob("runs/mine/*.log"))
    assert "tensorboard is not installed" in logs
    assert "Traceback" not in logs + done.stderr
    assert (tmp_path / "runs/mine/report").is_dir()

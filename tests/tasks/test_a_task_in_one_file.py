"""The task that CONTRIBUTING.md shows is all there is to a task: it trains, resumes, folds, reports and is studied."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from pointewa import tasks
from pointewa.models import registry
from pointewa.runs.weights import load_any
from pointewa.study.definition import load_study
from pointewa.study.queue import QueueProgress, work
from pointewa.study.report import table, write_report

ROOT = Path(__file__).parents[2]
SMALL = ["model.width=8", "data.num_points=64", "train.task=height", "train.lr=1e-2", "train.precision=float32",
         *(f"model.{key}=null" for key in ("depth", "heads", "num_groups", "group_size"))]  # fmt: skip
STUDY = """
configs: [{configs}]
settings:
  train: {{task: height, epochs: 1, batch_size: 16, device: cpu}}
  model: {{width: 8}}
  data: {{num_points: 64}}
arms: {{dense: {{ewa: {{enabled: false}}}}, ewa: }}
seeds: [0, 1]
"""
# The command line with the task, and few objects.
TOOL = """
import sys
sys.path.insert(0, {folder!r})
import height
from pointewa.datasets.layouts import shapes
shapes.PER_CLASS = {{"train": 4, "test": 2}}
from pointewa.tools import cli, {tool}
cli.run({tool}.main)
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder with the task in its file."""
    folder = tmp_path_factory.mktemp("task")
    code = next(
        code
        for code in re.findall(r"^```python\n(.*?)^```", (ROOT / "CONTRIBUTING.md").read_text(), re.M | re.S)
        if "@register" in code
    )
    (folder / "height.py").write_text(code)
    return folder


@pytest.fixture
def known(written, monkeypatch):
    """The task in this process, for one test."""
    monkeypatch.syspath_prepend(str(written))
    importlib.import_module("height")
    yield
    for known in (sys.modules, registry.KINDS, tasks._REGISTERED):
        del known["height"]


def test_it_trains_resumes_and_folds(known, make_trainer):
    recipe = [*SMALL, "data.val_fraction=0.2", "train.epochs=8", "moe.num_experts=2"]
    whole = make_trainer(*recipe, "run.name=whole")
    whole.fit()
    summary = whole.finish()
    assert summary["task"] == "height"
    assert summary["test"]["error"] == pytest.approx(summary["test_before_folding"]["error"], abs=2e-6)
    epochs = [json.loads(line) for line in (whole.folder / "metrics.jsonl").read_text().splitlines()]
    assert epochs[-1]["val/error"] < epochs[0]["val/error"] / 2
    assert epochs[-1]["train/error"] < epochs[0]["train/error"] / 2

    part, step = make_trainer(*recipe, "run.name=part", "train.save_every=5"), type(whole).train_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(whole), "train_step", lambda self, batch: step(self, batch) if self.step < 18 else stop())
        with pytest.raises(KeyboardInterrupt):
            part.fit()
    resumed = make_trainer(*recipe, "run.name=part", "train.save_every=5")
    assert resumed.step == 16
    resumed.fit()
    assert resumed.finish()["test"] == summary["test"]
    for path in (whole.folder, whole.folder / "last.ckpt"):
        loaded = load_any(path)
        points = torch.randn(3, 64, 3)
        torch.testing.assert_close(loaded.model(points), whole.model.eval()(points))
        assert loaded.model.width == 8


def test_its_model_may_keep_gated_experts(known, make_trainer):
    trainer = make_trainer(*SMALL, "moe.router=top_k", "moe.num_experts=2", "run.name=gated")
    trainer.fit()
    assert trainer.finish()["test_before_folding"] is None
    points = torch.randn(3, 64, 3)
    for path in (trainer.folder, trainer.folder / "last.ckpt"):
        torch.testing.assert_close(load_any(path).model(points), trainer.model.eval()(points))


def stop():
    raise KeyboardInterrupt


def tool(name, written, *arguments):
    code = TOOL.format(folder=str(written), tool=name)
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_command_lines_show_its_metrics(known, written, tmp_path):
    recipe = ["--config=configs/shapes.yaml", *SMALL, "train.epochs=1", "train.batch_size=16", f"run.dir={tmp_path}"]
    done = tool("train", written, *recipe, "run.name=a")
    assert done.returncode == 0, done.stderr
    assert re.search(r"epoch 1/1  loss \S+  error 0\.\d{4}", done.stdout)
    assert "mean absolute error" in done.stdout
    assert "overall accuracy" not in done.stdout
    page = (tmp_path / "a/report.html").read_text()
    assert "mean absolute error" in page
    evaluated = tool("evaluate", written, str(tmp_path / "a"), "--json")
    assert evaluated.returncode == 0, evaluated.stderr
    summary = json.loads((tmp_path / "a/summary.json").read_text())
    assert json.loads(evaluated.stdout)["error"] == pytest.approx(summary["test"]["error"], abs=1e-4)


def test_it_is_studied(known, written, tmp_path):
    path = tmp_path / "heights.yaml"
    path.write_text(STUDY.format(configs=ROOT / "configs/shapes.yaml"))
    study = load_study(path, [f"run.dir={tmp_path / 'runs'}"])
    command = [sys.executable, "-c", TOOL.format(folder=str(written), tool="train")]
    outcome = work(study.runs, command, QueueProgress(Console(quiet=True), study.name, study.runs, 2))
    assert not outcome.failures, outcome.failures
    arms = write_report(study, tmp_path / "report")
    rows = table(arms)
    assert [row["arm"] for row in rows] == ["dense", "ewa"]
    errors = [run.summary()["test"]["error"] for run in study.runs if run.arm == "dense"]
    assert rows[0]["test mean absolute error"].startswith(f"{sum(errors) / 2:.4f} ± ")
    text = (tmp_path / "report/README.md").read_text()
    assert "| difference to dense |" in text
    assert (tmp_path / "report/curves.png").exists()

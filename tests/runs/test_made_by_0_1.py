"""Runs made by version 0.1 load, evaluate and resume: the folders beside this file."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from pointewa.config import load_config
from pointewa.models import PRESETS
from pointewa.runs.folder import find_run
from pointewa.runs.summary import read_summary
from pointewa.runs.weights import load_any
from pointewa.tasks import task_of
from pointewa.tasks.classification import evaluate

MADE = Path(__file__).parent / "made_by_0_1"


@pytest.fixture(autouse=True)
def smaller_preset(monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", replace(PRESETS["tiny"], patch_width=8, patch_out=24))


def overrides(name, tmp_path):
    """The run's own configuration, as a command line would say it today."""
    schemes = {
        "ewa": (), "rup": ("ewa.enabled=false", "moe.router=random"), "dense": ("ewa.enabled=false",),
        "gated": ("moe.router=top_k", "ewa.until=0.5"), "pretraining": ("train.task=masked_autoencoding",),
    }  # fmt: skip
    more = {
        "ewa": ("train.ema_decay=0.9", "data.val_fraction=0.2", "train.layer_decay=0.8"),
        "pretraining": ("model.decoder_depth=1",),
    }
    small = ("model.width=16", "model.depth=2", "model.heads=2", "train.epochs=4", "train.lr=1e-2",
             "train.weight_decay=0", "model.head=linear", "train.precision=float32", f"run.name={name}")  # fmt: skip
    return [*small, *schemes[name], *more.get(name, ()), *(["train.save_every=27"] if name in more else [])]


@pytest.mark.parametrize("name", ["ewa", "gated", "rup", "dense", "pretraining"])
def test_their_configuration_is_that_of_todays_keys(name, tmp_path, make_trainer):
    shutil.copytree(MADE / name, tmp_path / name)
    trainer = make_trainer(*overrides(name, tmp_path))  # it would refuse another configuration
    assert trainer.folder == tmp_path / name
    assert trainer.config.scheme == {"gated": "moe_ewa", "pretraining": "ewa"}.get(name, name)


@pytest.mark.parametrize("name", ["gated", "rup", "dense"])
def test_finished_runs_load_and_evaluate_to_their_figures(name, tmp_path, make_trainer):
    loaded, summary = load_any(MADE / name), read_summary(MADE / name)
    data = make_trainer("run.name=other", *overrides(name, tmp_path)[:-1], "run.name=other").data
    found = evaluate(loaded.model, data.test).metrics
    assert {key: found[key] for key in summary["test"]} == pytest.approx(summary["test"], abs=1e-3)
    columns, rows = task_of(summary).result(summary)
    assert columns[-1] == {"gated": "gated MoE", "rup": "folded (dense)", "dense": "dense"}[name]
    assert rows[0][-1] == f"{summary['test']['oa']:.2f} %"


@pytest.mark.parametrize("name", ["ewa", "pretraining"])
def test_an_unfinished_run_resumes_to_the_weights_that_version_0_1_reached(name, tmp_path, make_trainer):
    shutil.copytree(MADE / name, tmp_path / name)
    trainer = make_trainer(*overrides(name, tmp_path))
    assert trainer.step == 27
    trainer.fit()
    trainer.finish()
    expected = safetensors.torch.load_file(MADE / name / "expected.safetensors")
    found = load_any(trainer.folder).model.state_dict()
    assert found.keys() == expected.keys()
    # A bias before a batch norm has no gradient but rounding errors, which Adam makes steps of, and moves its mean.
    free = re.compile(r"(first_conv\.[03]|second_conv\.0)\.bias|running_mean")
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-3 if free.search(key) else 1e-5)
    epochs = [json.loads(line)["epoch"] for line in (trainer.folder / "metrics.jsonl").read_text().splitlines()]
    assert epochs == [0, 1, 2, 3]


def test_a_run_folder_is_found_by_its_own_configuration(tmp_path):
    shutil.copytree(MADE / "rup", tmp_path / "rup")
    config = load_config([MADE / "rup/config.yaml"], [f"run.dir={tmp_path}", "run.name=rup"])
    assert find_run(config) == tmp_path / "rup"

"""Trainings by the real command line are killed and resumed: a small version of `make soak`."""

import json
import random
import shutil
import sys
from dataclasses import replace
from itertools import count
from signal import Signals

import pytest
import safetensors.torch
import torch

from benchmarks import soak
from pointewa.runs.weights import LAST, MODEL
from pointewa.safe.torch_files import read_state

SHORT = ("train.batch_size=64",)  # 17 steps an epoch


def few(name, kinds, root, epochs):
    scenario = soak.SCENARIOS[name]
    scenario = replace(scenario, overrides=(*scenario.overrides, *SHORT))
    return soak.soak(scenario, kinds, epochs, random.Random(0), root)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A soaked scenario and the folder of its runs."""
    root = tmp_path_factory.mktemp("soak")
    return few("ewa", soak.KINDS, root, 3), root


@pytest.mark.slow
def test_a_training_that_was_killed_three_times_ends_with_the_same_bits(killed):
    outcome, root = killed
    assert outcome.wrong == []
    assert sorted(attempt.signal for attempt in outcome.attempts if attempt.killed) == ["SIGINT", "SIGKILL", "SIGTERM"]
    assert outcome.attempts[-1].after == soak.saved_steps(root / "reference" / "run") == 3 * 17
    assert outcome.row["identical"] == "yes"


@pytest.mark.slow
def test_so_does_one_of_two_processes(tmp_path):
    outcome = few("ewa, 2 processes", [Signals.SIGKILL, Signals.SIGTERM], tmp_path, 2)
    assert outcome.wrong == []
    assert [outcome.row[name] for name in ("SIGKILL", "SIGTERM", "SIGINT", "identical")] == ["1", "1", "0", "yes"]


@pytest.fixture(scope="module")
def reference(trainer_in, tmp_path_factory):
    """The folder of a finished run."""
    trainer = trainer_in(tmp_path_factory.mktemp("runs"), "run.name=run", "train.epochs=3", "train.batch_size=64")
    trainer.fit()
    trainer.finish()
    return trainer.folder


@pytest.fixture
def pair(reference, tmp_path):
    """A run folder and a copy of it."""
    shutil.copytree(reference, tmp_path / "copy")
    assert soak.first_difference(reference, tmp_path / "copy") is None
    return reference, tmp_path / "copy"


def test_the_least_change_of_a_weight_is_named(pair):
    weights = safetensors.torch.load_file(pair[1] / MODEL)
    bias = weights["cls_head_finetune.0.bias"]
    bias[3] = bias[3].nextafter(torch.tensor(torch.inf))
    safetensors.torch.save_file(weights, pair[1] / MODEL)
    assert soak.first_difference(*pair) == f"{MODEL}/content/cls_head_finetune.0.bias: tensors differ"


def test_so_is_that_of_a_moment_of_the_optimizer(pair):
    state = read_state(pair[1] / LAST)
    state["optimizer"]["norm.weight"]["exp_avg"].view(-1)[0] *= -1
    torch.save(state, pair[1] / LAST)
    assert soak.first_difference(*pair) == f"{LAST}/optimizer/norm.weight/exp_avg: tensors differ"


def test_of_a_metric_and_of_the_summary(pair):
    lines = [json.loads(line) for line in (pair[1] / "metrics.jsonl").read_text().splitlines()]
    lines[1]["seconds"] += 1  # no difference
    lines[2]["train/loss"] *= 1 + 1e-15
    (pair[1] / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert soak.first_difference(*pair).startswith("metrics.jsonl/2/train/loss: ")
    shutil.copy(pair[0] / "metrics.jsonl", pair[1])
    summary = json.loads((pair[1] / "summary.json").read_text())
    (pair[1] / "summary.json").write_text(json.dumps(summary | {"run": "elsewhere", "seconds": 0}))
    assert soak.first_difference(*pair) is None
    (pair[1] / "summary.json").write_text(json.dumps(summary | {"skipped_steps": 1}))
    assert soak.first_difference(*pair) == "summary.json/skipped_steps: 0 and 1"
    (pair[1] / "summary.json").unlink()
    assert soak.first_difference(*pair) == "summary.json: missing"


SAVED = "stopped by SIGTERM: 20 of 99 steps are saved in x; resume with the same command"


@pytest.mark.parametrize(
    ("attempt", "text", "fault"),
    [
        (soak.Attempt(10, "SIGTERM", code=143, after=20), f"resuming x (10 steps)\n{SAVED}", None),
        (soak.Attempt(0, "SIGTERM", code=143), "stopped by SIGTERM: nothing was saved", None),
        (soak.Attempt(0, "SIGTERM", code=143, after=99, done=True), "nothing was saved", None),
        (soak.Attempt(0, "SIGTERM", code=1, after=20), SAVED, "exit code 1 after SIGTERM, done: False"),
        (soak.Attempt(0, "SIGTERM", code=0, after=20), SAVED, "exit code 0 after SIGTERM, done: False"),
        (soak.Attempt(0, code=2), "error: no", "exit code 2 after no signal, done: False: error: no"),
        (soak.Attempt(0, code=0), "", "exit code 0 after no signal, done: False"),
        (soak.Attempt(0, "SIGINT", code=130, after=9), "stopped", "SIGINT after 9 steps, and no word of how to resume"),
        (soak.Attempt(0, "SIGTERM", code=143, after=13), SAVED, "it said that 20 steps are saved, there are 13"),
        (
            soak.Attempt(20, after=99, done=True),
            "resuming x (13 steps)",
            "it resumed from 13 steps, 20 were saved",
        ),
        (soak.Attempt(20, "SIGKILL", code=137), "", "20 steps were saved, and it started over"),
        (soak.Attempt(20, after=99, done=True), "it will take about 1 s", "20 steps were saved, and it started over"),
    ],
)
def test_attempts_are_judged(attempt, text, fault):
    faults = soak.judge(attempt, text)
    assert len(faults) == (fault is not None)
    assert not fault or faults[0].startswith(fault)


def test_the_exit_codes_of_torchrun_are_its_own():
    attempt = soak.Attempt(0, "SIGTERM", code=1, after=20)
    assert soak.judge(attempt, SAVED, exact=False) == []
    assert len(soak.judge(replace(attempt, code=0), SAVED, exact=False)) == 1
    assert len(soak.judge(replace(attempt, signal="", code=1), SAVED, exact=False)) == 1


class Stub(soak.Scenario):
    """A few lines of Python in place of a training."""

    def command(self, folder, epochs):
        return [sys.executable, "-c", self.overrides[0]]


def test_what_a_process_leaves_behind_is_found_and_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(soak, "GRACE", 0.2)
    monkeypatch.setenv("POINTEWA_TEST", str(tmp_path))
    program = "import subprocess; subprocess.Popen(['sleep', '1000'], start_new_session=True)"
    attempt = soak.start(Stub("", (program,)), tmp_path, 1, random.Random(0))
    assert attempt.faults[0] == "1 processes stayed behind, without a signal"
    assert soak.processes_of(f"POINTEWA_TEST={tmp_path}") == []


def test_a_signal_that_comes_too_late_is_given_to_another_run(tmp_path, monkeypatch):
    """The first run ends by itself before its second signal."""
    numbers = count()

    def start(scenario, folder, epochs, rng, kind=None, wait=0.0):
        number = next(numbers)
        folder.mkdir(parents=True, exist_ok=True)
        for name in (soak.LAST, soak.CONFIG):
            (folder / name).touch()
        killed = bool(kind) and number != 2
        return soak.Attempt(0, kind.name if killed else "", code=137 if killed else 0, done=not killed)

    monkeypatch.setattr(soak, "start", start)
    monkeypatch.setattr(soak, "saved_steps", lambda folder: 10)
    compared = []
    monkeypatch.setattr(soak, "first_difference", lambda reference, folder: compared.append(folder.parent.name))
    outcome = soak.soak(soak.SCENARIOS["ewa"], [Signals.SIGKILL] * 3, 1, random.Random(0), tmp_path)
    assert [attempt.signal for attempt in outcome.attempts] == ["", "SIGKILL", "", "SIGKILL", "SIGKILL", ""]
    assert compared == ["killed0", "killed1"]  # what ended early is compared too


def test_kills_are_shared_out():
    assert [len(share) for share in soak.shares(30, 5)] == [6] * 5
    assert all(share.count(kind) == 2 for share in soak.shares(30, 5) for kind in soak.KINDS)
    assert [len(share) for share in soak.shares(4, 3)] == [1, 1, 2]


def test_the_report_names_what_is_wrong():
    good = soak.Outcome("ewa", 4, [soak.Attempt(0, "SIGKILL", code=137, after=7)])
    bad = soak.Outcome("dense", 4, [soak.Attempt(0, faults=["exit code 9"])], ["summary.json: missing"])
    text = soak.report("python -m benchmarks.soak", [good, bad])
    assert "| ewa | 1 | 0 | 0 | 1 | 0 | 0 | 0 | 0 | yes |" in text
    assert "- dense: summary.json: missing\n- dense: exit code 9" in text
    assert "- dense" not in soak.report("python -m benchmarks.soak", [good])

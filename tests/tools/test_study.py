"""Studies by the real command line: their numbers, being killed and going on; queues of stubs in place of trainings."""

import csv
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from benchmarks import soak
from pointewa.datasets.layouts import shapes
from pointewa.runs.folder import Lock
from pointewa.runs.log import METRICS
from pointewa.runs.summary import SUMMARY
from pointewa.runs.weights import LAST
from pointewa.study.definition import load_study, time_left
from pointewa.tools import cli, study, train

ROOT = Path(__file__).parents[2]
OBJECTS = {"train": 12, "test": 4}  # of a class, in the trainings too, which are processes of their own
TRAIN = f"""from pointewa.datasets.layouts import shapes; shapes.PER_CLASS = {OBJECTS}
from pointewa.tools import cli, train; cli.run(train.main)"""
TOOL = "import sys; from pointewa.tools import cli, study as s; s.TRAIN = sys.executable, '-c', {!r}; cli.run(s.main)"
STUDY = """
description: Does it help?
settings:
  model: {width: 24, depth: 2, heads: 2, num_groups: 4, group_size: 4}
  data: {num_points: 64, val_fraction: 0.25}
  train: {epochs: 6, batch_size: 8, lr: 3e-3, save_every: 8, warmup_epochs: 0, precision: float32}
arms:
  dense: {ewa: {enabled: false}}
  ewa:
seeds: [0, 1]
"""
RUNS = ["dense-seed0", "ewa-seed0", "dense-seed1", "ewa-seed1"]
MACHINE = "train.device=cpu"
# In place of a training: ends as its arm says, and leaves what a finished run leaves.
STUB = """
import json, pathlib, signal, sys, time
keys = dict(word.split("=", 1) for word in sys.argv[1:])
name, root = json.loads(keys["run.name"]), pathlib.Path(json.loads(keys["run.dir"]))
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
with open(root / "order", "a") as file:
    print(name, file=file)
if name.startswith("bad"):
    print("all is well"), sys.exit("error: no such thing\\n\\n")
if name.startswith("slow"):
    time.sleep(60)
(root / name).mkdir()
test = {"oa": 50 + int(keys["train.seed"]), "macc": 40, "loss": 1}
summary = {"dataset": "shapes", "epochs": 3, "test": test, "test_before_folding": None, "seconds": 2.5,
           "largest_logit_difference": 0, "parameters": 7, "parameters_in_training": 9}
(root / name / "summary.json").write_text(json.dumps(summary))
"""


@pytest.fixture(scope="module", autouse=True)
def no_commit():
    """The commit is part of the report, and may change while the tests run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GIT_DIR", os.devnull)
        yield


@pytest.fixture
def stubs(monkeypatch, tmp_path):
    """From arms, options and seeds to the tool's arguments; the trainings are stubs."""
    monkeypatch.setattr(study, "TRAIN", (sys.executable, "-S", "-c", STUB))

    def arguments(arms, *options, seeds="[0, 1]"):
        own = "".join(f"  {arm}: {{train: {{epochs: {number}}}}}\n" for number, arm in enumerate(arms, 1))
        (tmp_path / "s.yaml").write_text(f"settings: {{train: {{warmup_epochs: 0}}}}\narms:\n{own}seeds: {seeds}\n")
        where = [] if "--publish" in options else ["--out", str(tmp_path / "out")]
        return [str(tmp_path / "s.yaml"), f"run.dir={tmp_path}", *where, *options]

    return arguments


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The study file, and the folder of its runs and its report, when nothing came between."""
    root = tmp_path_factory.mktemp("straight")
    (root / "small.yaml").write_text(STUDY)
    keys = [MACHINE, f"run.dir={root}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "PER_CLASS", OBJECTS)
        for run in load_study(root / "small.yaml", keys).runs:
            train.main([*run.arguments, "--json"])
    study.main([str(root / "small.yaml"), *keys, "--out", str(root / "out"), "--json"])
    return root / "small.yaml", root


def test_the_report_has_the_numbers_of_the_runs(straight, capsys):
    path, root = straight
    out = root / "out"
    summaries = {name: json.loads((root / "small" / name / SUMMARY).read_text()) for name in RUNS}
    epochs = {name: list(map(json.loads, (root / "small" / name / METRICS).read_text().splitlines())) for name in RUNS}
    rows = {f"{row['arm']}-seed{row['seed']}": row for row in csv.DictReader((out / "results.csv").open())}
    assert sorted(rows) == sorted(RUNS)
    for name, row in rows.items():
        assert {key: float(row[f"test_{key}"]) for key in ("oa", "macc", "loss")} == {
            key: value for key, value in summaries[name]["test"].items() if key != "f1"
        }
        vals = [epoch["val/oa"] for epoch in epochs[name]]
        assert (float(row["val_oa_last"]), float(row["val_oa_best"])) == (vals[-1], max(vals))
        assert int(row["val_best_epoch"]) == vals.index(max(vals)) + 1
    oa = [[summaries[f"{arm}-seed{seed}"]["test"]["oa"] for seed in (0, 1)] for arm in ("dense", "ewa")]
    assert len({*oa[0], *oa[1]}) > 2  # else there is nothing to see
    differences = [ewa - dense for dense, ewa in zip(*oa, strict=True)]
    mean, half = sum(differences) / 2, abs(differences[0] - differences[1]) / 2 * math.tan(math.pi * 0.475)
    text = (out / "README.md").read_text()
    for values in oa:
        assert f"| 2 | {sum(values) / 2:.2f} ± {abs(values[0] - values[1]) / math.sqrt(2):.2f} |" in text
    assert f"| {mean:+.2f} | {mean - half:+.2f} to {mean + half:+.2f} |" in text
    losses = [[epochs[f"{arm}-seed{seed}"][-1]["train/loss"] for seed in (0, 1)] for arm in ("dense", "ewa")]
    fits = [ewa - dense for dense, ewa in zip(*losses, strict=True)]
    spread = abs(losses[1][0] - losses[1][1]) / math.sqrt(2)
    assert f"| {sum(losses[1]) / 2:.4f} ± {spread:.4f} | {sum(fits) / 2:+.4f} (" in text
    count = summaries["ewa-seed0"]
    assert f"| {count['parameters_in_training']:,} | {count['parameters']:,} |" in text
    for part in ("All 4 runs are finished.", "Does it help?", "shapes, 6 epochs", f"\npython -m tools.study {path}\n",
                 f"Commit unknown. Machine: cpu in {count['precision']}, ", "![curves](curves.png)"):  # fmt: skip
        assert part in text
    assert not any(word in text for word in (MACHINE, "run.dir", "nan"))
    assert (out / "study.yaml").read_text() == STUDY
    costs = {f"{row['arm']}-seed{row['seed']}": row for row in csv.DictReader((out / "costs.csv").open())}
    assert {name: float(row["seconds"]) for name, row in costs.items()} == {
        name: summary["seconds"] for name, summary in summaries.items()
    }
    curves = list(csv.DictReader((out / "curves.csv").open()))
    assert len(curves) == 4 * 6
    assert [bool(row["disagreement"]) for row in curves] == [False] * 12 + [True] * 12


def test_the_report_is_the_same_every_time(straight, tmp_path, capsys):
    path, root = straight
    study.main([str(path), MACHINE, f"run.dir={root}", "--out", str(tmp_path), "--report-only", "--json"])
    arms = json.loads(capsys.readouterr().out)
    assert [arm["arm"] for arm in arms] == ["dense", "ewa"]
    made = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert made == {file.name: file.read_bytes() for file in (root / "out").iterdir()}
    assert {"curves.png", "disagreement.png", "differences.png"} < made.keys()


@pytest.mark.slow
def test_a_study_that_is_killed_goes_on_to_the_same_report(straight, tmp_path, capsys, monkeypatch):
    """Killed: first the tool, whose training then ends by itself; then all its processes at once; then by a budget.

    Of the four runs two are there already, to save time.
    """
    path, root = straight
    token = f"POINTEWA_TEST_STUDY={tmp_path}"
    arguments = [str(path), MACHINE, f"run.dir={tmp_path}", "--out", str(tmp_path / "out")]
    environment = os.environ | dict([token.split("=")])
    for run in RUNS[:2]:
        shutil.copytree(root / "small" / run, tmp_path / "small" / run)
    for run, kill in zip(RUNS[2:], (os.kill, os.killpg), strict=True):
        command = [sys.executable, "-c", TOOL.format(TRAIN), *arguments]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
        wait_for((tmp_path / "small" / run / LAST).exists)
        kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        wait_for(lambda: not soak.processes_of(token))
    log = (tmp_path / "small" / f"{RUNS[2]}.log").read_text()
    assert re.search(r"stopped by SIGTERM: \d+ of \d+ steps are saved", log)
    assert "resuming" in log
    assert not (tmp_path / "small" / RUNS[3] / SUMMARY).exists()
    monkeypatch.setattr(study, "TRAIN", (sys.executable, "-c", TRAIN))
    capsys.readouterr()
    study.main([*arguments, "--budget", "2"])
    out = capsys.readouterr().out
    assert "The budget of 2 s is used up: " in out
    assert "the same command resumes" in out
    assert f"{RUNS[3]}: resumes" in out
    study.main(arguments)
    assert "4 of 4 runs done" in capsys.readouterr().out
    for name in ("README.md", "results.csv", "curves.csv", "curves.png", "differences.png", "study.yaml"):
        assert (tmp_path / "out" / name).read_bytes() == (root / "out" / name).read_bytes()


def wait_for(condition, seconds=120):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_run_that_fails_does_not_stop_the_others(stubs, tmp_path, capsys):
    error = fails(stubs(["good", "bad", "fine"]), capsys, out=True)
    assert "error: 2 of 6 runs failed:" in error
    assert f"bad-seed0: exit code 1: error: no such thing ({tmp_path}/s/bad-seed0.log)" in error
    order = (tmp_path / "s" / "order").read_text().split()
    assert order == [f"{arm}-seed{seed}" for seed in (0, 1) for arm in ("good", "bad", "fine")]
    text = (tmp_path / "out" / "README.md").read_text()
    assert "4 of 6 runs are finished; missing: bad-seed0, bad-seed1." in text
    assert "| good | 2 | 50.50 ± 0.71 | 40.00 ± 0.00 | baseline | - | - |" in text
    assert "| bad | 0 | - | - | - | - | - |" in text
    assert "| fine | 2 | 50.50 ± 0.71 | 40.00 ± 0.00 | +0.00 | +0.00 to +0.00 | - |" in text


def test_only_some_arms_by_two_at_a_time(stubs, tmp_path, capsys):
    study.main([*stubs(["a", "b", "c"], seeds="[3]"), "--jobs", "2", "--only", "a", "c", "train.lr=1e-3"])
    assert sorted((tmp_path / "s" / "order").read_text().split()) == ["a-seed3", "c-seed3"]
    text = (tmp_path / "out" / "README.md").read_text()
    assert "| c | 1 | 53.00 | 40.00 | - | - | - |" in text
    assert f"python -m tools.study {tmp_path}/s.yaml train.lr=1e-3\n" in text


def test_arms_may_have_seeds_of_their_own(stubs, tmp_path, capsys):
    arguments = stubs(["a", "b", "c"], seeds="{default: [0], a: [0, 1, 2], c: [0, 2]}")
    study.main(arguments)
    expected = ["a-seed0", "b-seed0", "c-seed0", "a-seed1", "a-seed2", "c-seed2"]
    assert (tmp_path / "s" / "order").read_text().split() == expected
    text = (tmp_path / "out" / "README.md").read_text()
    assert "All 6 runs are finished" in text
    assert "| a | 3 |" in text
    assert "| b | 1 |" in text
    assert "| c | 2 | 51.00 ± 1.41 | 40.00 ± 0.00 | +0.00 | +0.00 to +0.00 |" in text  # of the seeds that both have


def test_the_report_goes_beside_the_runs_unless_it_is_published(stubs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [word for word in stubs(["a", "b"]) if word not in ("--out", str(tmp_path / "out"))]
    study.main(arguments)
    report = tmp_path / "s/report"
    assert "All 4 runs are finished." in (report / "README.md").read_text()
    assert f"report: {report}/README.md" in capsys.readouterr().out
    assert not (tmp_path / "results").exists()
    full = {file.name: file.read_bytes() for file in report.iterdir()}
    for path in (tmp_path / "s").glob("[ab]-*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    study.main([*arguments, "--only", "a"])  # beside the runs it follows them
    assert "2 of 4 runs are finished; missing: b-seed0, b-seed1." in (report / "README.md").read_text()
    shutil.rmtree(tmp_path / "s")
    study.main([*arguments, "--publish"])
    assert not report.exists()
    assert {file.name: file.read_bytes() for file in (tmp_path / "results/s").iterdir()} == full


def test_a_fuller_table_is_not_replaced(stubs, tmp_path, capsys, monkeypatch):
    """Not by a report of fewer runs, whether that is clear before the trainings or only after them."""
    monkeypatch.chdir(tmp_path)
    study.main(stubs(["a", "b"], "--publish"))
    published = tmp_path / "results/s"
    before = {file: file.read_bytes() for file in published.iterdir()}
    shutil.rmtree(tmp_path / "s")
    capsys.readouterr()
    line = "results/s: has the table of 4 finished runs, and this one would have {}: "
    assert line.format(2) in fails(stubs(["a", "b"], "--publish", "--only", "a"), capsys)
    assert line.format(2) in fails([*stubs(["a", "b"], "--out", "results/s"), "--only", "a"], capsys)
    assert line.format(2) in fails(stubs(["a", "b"], "--publish", seeds="[5]"), capsys)
    assert line.format(0) in fails(stubs(["a", "b"], "--publish", "--report-only"), capsys)
    assert not (tmp_path / "s").exists()  # nothing was trained
    error = fails(stubs(["a", "bad"], "--publish"), capsys, out=True)
    assert line.format(2) in error
    assert "; the report is in s/report\n2 of 4 runs failed:\n" in error.replace(f"{tmp_path}/", "")
    assert "2 of 4 runs are finished" in (tmp_path / "s/report/README.md").read_text()
    assert {file: file.read_bytes() for file in published.iterdir()} == before
    shutil.rmtree(tmp_path / "s")
    study.main(stubs(["a", "b"], "--publish"))  # as many as there
    assert {file: file.read_bytes() for file in published.iterdir()} == before


def test_what_is_no_report_is_not_replaced(stubs, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/README.md").write_text("mine")
    error = fails(stubs(["a"]), capsys)
    assert f"{tmp_path}/out: has a README.md that is no study's report: choose another folder" in error
    assert not (tmp_path / "s").exists()
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["README.md"]


def test_signals_and_the_budget_stop_the_trainings(stubs, tmp_path, capsys):
    arguments = stubs(["slow", "a"])
    study.main([*arguments, "--budget", "0.5"])  # ends long before the stub would
    assert "The budget of 0.5 s is used up: 0 of 4 runs done; the same command resumes" in capsys.readouterr().out
    started = tmp_path / "s" / "order"  # by the first training

    def stop(number):
        while not started.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    for number in (signal.SIGTERM, signal.SIGINT):
        started.unlink(missing_ok=True)
        threading.Thread(target=stop, args=[number], daemon=True).start()
        message = fails([*arguments, "--jobs", "2"], capsys, 128 + number, out=True)
        assert f"stopped by {number.name}: " in message
        assert "the same command resumes" in message
        for path in (tmp_path / "s").glob("a-*/*"):
            path.unlink()
            path.parent.rmdir()


def test_no_two_at_the_same_runs(stubs, tmp_path, capsys):
    arguments = stubs(["a", "b"], seeds="[0]")
    (tmp_path / "s" / "a-seed0").mkdir(parents=True)
    with Lock(tmp_path / "s"):
        assert "another process is training" in fails(arguments, capsys)
    claim = Lock(tmp_path / "s" / "a-seed0")  # as a training has that an earlier call left behind
    study.main([*arguments, "--budget", "1"])
    assert "a-seed0: another process trains in" in capsys.readouterr().out
    assert (tmp_path / "s" / "order").read_text().split() == ["b-seed0"]
    claim.release()


def test_the_time_left(stubs, tmp_path):
    arguments = stubs(["a", "b"])
    runs = load_study(arguments[0], [arguments[1]]).runs  # a has one epoch, b two
    assert time_left(runs) is None
    runs[1].folder.mkdir(parents=True)
    (runs[1].folder / METRICS).write_text('{"epoch": 0, "seconds": 6}\n{"epoch": 1, "sec')
    assert time_left(runs) == 6 + 2 * 6 + 1 * 6 + 1 * 6
    assert time_left(runs, 2) == 15


def test_a_study_with_folds_trains_each(stubs, tmp_path, capsys):
    arguments = stubs(["a", "bad"], seeds="[0, 1]\nfolds: {data: {variant: [x, y]}}")
    error = fails(arguments, capsys, out=True)
    assert "bad-y-seed1: exit code 1" in error
    order = (tmp_path / "s" / "order").read_text().split()
    assert order == [f"{arm}-{fold}-seed{seed}" for seed in (0, 1) for fold in "xy" for arm in ("a", "bad")]


def fails(arguments, capsys, code=2, out=False):
    """The message of a command that the user got wrong, or stopped."""
    with pytest.raises(SystemExit) as exit_:
        cli.run(lambda: study.main(arguments))
    captured = capsys.readouterr()
    assert exit_.value.code == code
    assert "Traceback" not in captured.err
    assert out or (captured.out == "" and captured.err.startswith("error: "))
    return captured.err


def test_a_run_that_was_made_otherwise(straight, tmp_path, capsys):
    path, root = straight
    arguments = [str(path), MACHINE, f"run.dir={root}", f"--out={tmp_path}", "train.lr=1e-2"]
    error = fails(arguments, capsys)
    assert "arms.dense, seed 0: run.name: " in error
    assert "train.lr: 0.003 -> 0.01" in error
    assert f"In a study: remove {root}/small/dense-seed0, or rename {path}" in error


def test_pairs_of_different_precision_are_pointed_out(straight, tmp_path, capsys):
    path, root = straight
    shutil.copytree(root / "small", tmp_path / "small")
    summary = tmp_path / "small/ewa-seed1" / SUMMARY
    content = json.loads(summary.read_text())
    other = content["precision"]
    summary.write_text(json.dumps(content | {"precision": "float16"}))
    keys = [MACHINE, f"run.dir={tmp_path}", "--report-only", "--out", str(tmp_path / "out")]
    study.main([str(path), *keys])
    pair = f"ewa-seed1 (float16) with dense-seed1 ({other})"
    assert f"caution: runs of different precision are compared: {pair}" in capsys.readouterr().out
    assert f"are compared: {pair}.**" in (tmp_path / "out/README.md").read_text()
    assert "precision are compared" not in (root / "out/README.md").read_text()

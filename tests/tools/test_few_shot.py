"""Few-shot tables by the real command line: their numbers, being killed and going on, what is refused."""

import csv
import json
import math
import os
import pickle
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks import soak
from pointewa.config import load_config
from pointewa.datasets.layouts import shapes
from pointewa.runs.folder import CONFIG
from pointewa.runs.log import METRICS
from pointewa.runs.summary import SUMMARY
from pointewa.study import definition
from pointewa.study.few_shot import load_few_shot
from pointewa.tools import cli, evaluate, few_shot, study, train
from pointewa.train.build import task_of_run

ROOT = Path(__file__).parents[2]
OBJECTS = {"train": 12, "test": 21}  # of a class, in the trainings too, which are processes of their own
TRAIN = f"""from pointewa.datasets.layouts import shapes; shapes.PER_CLASS = {OBJECTS}
from pointewa.tools import cli, train; cli.run(train.main)"""
TOOL = f"""import sys; from pointewa.datasets.layouts import shapes; shapes.PER_CLASS = {OBJECTS}
from pointewa.tools import cli, few_shot, study
study.TRAIN = sys.executable, '-c', {TRAIN!r}
cli.run(few_shot.main)"""
MODEL = ["model.width=24", "model.depth=2", "model.heads=2", "model.num_groups=4", "model.group_size=4",
         "data.num_points=64", "train.device=cpu"]  # fmt: skip
KEYS = ["--config=configs/shapes.yaml", *MODEL, "train.epochs=4", "train.lr=3e-3", "train.batch_size=5",
        "train.precision=float32", "train.save_every=1", "--folds=2", "--settings", "3w5s"]  # fmt: skip
RUNS = [f"3w5s-{arm}-fold{fold}" for fold in (0, 1) for arm in ("scratch", "pretrained", "pretrained-ewa")]


@pytest.fixture(autouse=True)
def few_objects():
    """In place of the fixture of the other tools, whose sets have no queries."""


@pytest.fixture(scope="module", autouse=True)
def small():
    """Few objects; the commit, which is part of the report, may change while the tests run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GIT_DIR", os.devnull)
        patch.setattr(shapes, "PER_CLASS", OBJECTS)
        patch.chdir(ROOT)
        yield


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A short pre-training."""
    root = tmp_path_factory.mktemp("pretrained")
    train.main([*MODEL, "train.epochs=2", "train.task=masked_autoencoding", "ewa.enabled=false", "run.report=false",
                "run.name=x", f"run.dir={root}", "--json"])  # fmt: skip
    return str(root / "x")


@pytest.fixture(scope="module")
def straight(tmp_path_factory, pretrained):
    """Folder of the runs and the report of a table that was not interrupted, trained in this process."""
    root = tmp_path_factory.mktemp("straight")
    keys = [key for key in KEYS if "=" in key and not key.startswith("--")]
    table = load_few_shot(["configs/shapes.yaml"], [*keys, f"run.dir={root}"], pretrained, ["3w5s"], 2, "t")
    for run in table.study.runs:
        train.main([*run.arguments, "--json"])
    few_shot.main([*KEYS, f"run.dir={root}", "--name=t", f"--init-from={pretrained}", "--report-only"])
    return root / "t"


def summaries(folder):
    return {name: json.loads((folder / name / SUMMARY).read_text()) for name in RUNS}


def test_the_best_epoch_is_that_of_the_queries_and_the_last_is_the_result(straight):
    for name, summary in summaries(straight).items():
        accuracies = [json.loads(line)["test/oa"] for line in (straight / name / METRICS).read_text().splitlines()]
        assert len(accuracies) == 4
        best = summary["few_shot"]["best_on_queries"]
        assert best == {"oa": round(max(accuracies), 4), "epoch": accuracies.index(max(accuracies)) + 1}
        assert round(accuracies[-1], 4) == summary["test"]["oa"]  # also with EWA: of the folded model


def test_arms_differ_in_what_they_start_from_and_share_their_folds(straight, pretrained, capsys):
    configs = {name: load_config([straight / name / CONFIG]) for name in RUNS}
    starts = {name: (config.train.init_from, config.ewa.enabled) for name, config in configs.items()}
    for fold in (0, 1):
        assert starts[f"3w5s-scratch-fold{fold}"] == (None, False)
        assert starts[f"3w5s-pretrained-fold{fold}"] == (pretrained, False)
        assert starts[f"3w5s-pretrained-ewa-fold{fold}"] == (pretrained, True)
        data = [configs[f"3w5s-{arm}-fold{fold}"] for arm in ("scratch", "pretrained", "pretrained-ewa")]
        assert data[0].data == data[1].data == data[2].data
        assert [one.train.seed for one in data] == [fold] * 3
    evaluate.main([str(straight / "3w5s-pretrained-fold1"), "--json"])
    result = json.loads(capsys.readouterr().out)
    found = summaries(straight)["3w5s-pretrained-fold1"]
    assert result["objects"] == 60
    assert result["oa"] == pytest.approx(found["test"]["oa"], abs=1e-3)
    assert list(result["per_class"]) == found["few_shot"]["classes"]


def test_the_report_is_the_same_every_time(straight, pretrained, tmp_path, capsys):
    arguments = [*KEYS, f"run.dir={straight.parent}", "--name=t", f"--init-from={pretrained}"]
    few_shot.main([*arguments, "--out", str(tmp_path), "--report-only", "--json"])
    figures = json.loads(capsys.readouterr().out)
    assert figures["drawn"]
    assert len(figures["cells"]) == len(figures["differences"]) == 3
    for path in (straight / "report").iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()
    few_shot.main(arguments)  # nothing is left to train
    out = capsys.readouterr().out
    assert "6 of 6 runs done" in out
    assert "Best epoch, as published: selected by the queries themselves." in out


@pytest.mark.slow
def test_a_table_that_is_killed_goes_on_to_the_same_table(straight, pretrained, tmp_path, capsys, monkeypatch):
    """All processes are killed at once in the middle of a run, of those that are left to do."""
    token = f"POINTEWA_TEST_STUDY={tmp_path}"
    arguments = [*KEYS, f"run.dir={tmp_path}", "--name=t", f"--init-from={pretrained}"]
    (tmp_path / "t").mkdir()
    left = ["3w5s-pretrained-ewa-fold1"]
    for name in RUNS:
        if name not in left:
            subprocess.run(["cp", "-r", straight / name, tmp_path / "t" / name], check=True)
            config = tmp_path / "t" / name / CONFIG
            config.write_text(config.read_text().replace(str(straight.parent), str(tmp_path)))
    environment = os.environ | dict([token.split("=")])
    process = subprocess.Popen([sys.executable, "-c", TOOL, *arguments], cwd=ROOT, env=environment,
                               start_new_session=True)  # fmt: skip
    metrics = tmp_path / "t" / left[0] / METRICS
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 2)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    wait_for(lambda: not soak.processes_of(token))
    assert not (tmp_path / "t" / left[0] / SUMMARY).exists()
    monkeypatch.setattr(study, "TRAIN", (sys.executable, "-c", TRAIN))
    few_shot.main(arguments)
    assert f"{left[0]}: resumes" in capsys.readouterr().out
    assert "resuming" in (tmp_path / "t" / f"{left[0]}.log").read_text()
    assert not list(tmp_path.glob("t/*/*.ckpt"))  # states of finished runs are removed, models stay
    assert len(list(tmp_path.glob("t/*/model.safetensors"))) == 6
    for name in ("README.md", "results.csv"):
        assert (tmp_path / "t/report" / name).read_bytes() == (straight / "report" / name).read_bytes()


def wait_for(condition, seconds=120):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


# A training that takes no time, for what does not depend on trainings.
STUB = """
import json, pathlib, sys, zlib
keys = dict(word.split("=", 1) for word in sys.argv[1:])
folder = pathlib.Path(json.loads(keys["run.dir"])) / json.loads(keys["run.name"])
fold = int(keys["data.fold"])
drawn = DRAWN
folder.mkdir()
varied = zlib.crc32(folder.name.encode()) % 997 / 100 if VARIED else fold
test = {"oa": 50 + varied, "macc": 40, "loss": 1}
best = {"oa": round(60 + 2 * varied, 2), "epoch": 2}
entry = {"way": 3, "shot": 5, "fold": fold, "drawn": drawn, "classes": ["a"], "best_on_queries": best}
summary = {"dataset": "shapes", "epochs": 3, "test": test, "test_before_folding": None, "seconds": 2.5,
           "parameters": 7, "parameters_in_training": 9, "few_shot": entry}
(folder / "summary.json").write_text(json.dumps(summary))
"""
SHORT = ["--config=configs/shapes.yaml", "--settings", "3w5s", "--folds=2", "train.epochs=3", "train.device=cpu"]


def stub(drawn="True", varied="False"):
    return STUB.replace("DRAWN", drawn).replace("VARIED", varied)


@pytest.fixture
def stubs(monkeypatch, tmp_path):
    monkeypatch.setattr(study, "TRAIN", (sys.executable, "-S", "-c", stub()))
    monkeypatch.setattr(definition, "find_run", lambda config: None)  # stubs leave no configuration
    return [*SHORT, f"run.dir={tmp_path}"]


def report(tmp_path, name="few_shot-shapes-tiny"):
    return (tmp_path / name / "report/README.md").read_text()


def cell(values):
    return f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"


def test_the_table_has_the_numbers_of_the_runs(stubs, pretrained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(study, "TRAIN", (sys.executable, "-S", "-c", stub(varied="True")))
    arguments = [*stubs, *MODEL, f"--init-from={pretrained}", "--settings", "4w6s", "--folds=3", "--name=t"]
    few_shot.main(arguments)
    found = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.glob("t/*/summary.json")}
    assert len({one["test"]["oa"] for one in found.values()}) == len(found) == 18
    text, oa = report(tmp_path, "t"), {}
    for arm in ("scratch", "pretrained", "pretrained-ewa"):
        mine = [[found[f"{setting}-{arm}-fold{fold}"] for fold in range(3)] for setting in ("3w5s", "4w6s")]
        oa[arm] = [[one["test"]["oa"] for one in runs] for runs in mine]
        best = [[one["few_shot"]["best_on_queries"]["oa"] for one in runs] for runs in mine]
        assert f"| {arm} | last epoch | {' | '.join(map(cell, oa[arm]))} |" in text
        assert f"| {arm} | best epoch, as published | {' | '.join(map(cell, best))} |" in text
    for arm, base in (("pretrained", "scratch"), ("pretrained-ewa", "scratch"), ("pretrained-ewa", "pretrained")):
        difference = np.subtract(oa[arm][1], oa[base][1])
        half = 4.302653 * np.std(difference, ddof=1) / math.sqrt(3)  # Student's t, 2 degrees of freedom
        mean = np.mean(difference)
        assert f"| 4-way 6-shot | {arm} | {base} | {mean:+.2f} | {mean - half:+.2f} to {mean + half:+.2f} |" in text
    for part in ("18 of 18 runs are finished", "not comparable with published folds", "it selects on the test data",
                 "| arm | accuracy of | 3-way 5-shot | 4-way 6-shot |", "3 epochs, of which 6.7% warm up"):  # fmt: skip
        assert part in text
    rows = {
        f"{row['arm']}-fold{row['fold']}": row for row in csv.DictReader((tmp_path / "t/report/results.csv").open())
    }
    assert rows.keys() == found.keys()
    for name, row in rows.items():
        assert {key: float(row[f"test_{key}"]) for key in ("oa", "macc", "loss")} == found[name]["test"]
        assert (row["folds"], row["classes"], row["way"]) == ("drawn", "a", name[0])


def test_without_a_pretraining_only_scratch_is_trained(stubs, tmp_path, capsys):
    few_shot.main([*stubs, "train.weight_decay=0.1"])
    assert sorted(path.name for path in tmp_path.glob("*/*-fold?")) == ["3w5s-scratch-fold0", "3w5s-scratch-fold1"]
    text = report(tmp_path)
    assert "| scratch | last epoch | 50.50 ± 0.71 |" in text
    assert "| scratch | best epoch, as published | 61.00 ± 1.41 |" in text
    assert "--settings 3w5s --folds=2 train.epochs=3 train.weight_decay=0.1\n" in text
    few_shot.main([*stubs, "train.weight_decay=0.1", "--only", "scratch-ewa", "--folds=1"])
    assert "| scratch-ewa | last epoch | 50.00 |" in report(tmp_path)


def test_steps_decide_the_epochs_of_each_setting(stubs, tmp_path, capsys):
    """3 x 5 and 3 x 10 objects are 1 and 3 batches of 8."""
    stubs = [one for one in stubs if not one.startswith(("train.epochs=", "train.batch_size="))]
    few_shot.main([*stubs, "--settings", "3w10s", "--steps", "10", "--folds=1", "train.batch_size=8"])
    text = report(tmp_path)
    assert "3w5s 10 epochs, 3w10s 4 epochs, of which 6.7% warm up" in text
    assert "--steps=10 train.batch_size=8\n" in text


def test_the_report_of_a_warm_up_by_its_fraction(stubs, tmp_path, capsys):
    few_shot.main([*stubs, "--folds=1", "train.warmup_fraction=0.2"])
    assert "3 epochs, of which 20.0% warm up" in report(tmp_path)


@pytest.mark.parametrize(("key", "epochs", "fraction"), [("fraction=0.2", None, 0.2), ("epochs=1", 1, None)])
@pytest.mark.parametrize("in_a_file", [False, True])
def test_a_warm_up_of_one_s_own_is_kept(tmp_path, key, epochs, fraction, in_a_file):
    name, _, value = key.partition("=")
    (tmp_path / "own.yaml").write_text(f"train: {{warmup_{name}: {value}}}\n")
    files = ["configs/shapes.yaml", *([str(tmp_path / "own.yaml")] if in_a_file else [])]
    keys = [f"run.dir={tmp_path}", "train.epochs=6", *([] if in_a_file else [f"train.warmup_{key}"])]
    run = load_few_shot(files, keys, settings=["3w5s"], folds=1).study.runs[0]
    assert (run.config.train.warmup_epochs, run.config.train.warmup_fraction) == (epochs, fraction)
    task_of_run(run.config, run.folder)  # not both of the recipe's and one's own
    usual = load_few_shot(["configs/shapes.yaml"], keys[:2], settings=["3w5s"], folds=1).study.runs[0]
    assert usual.config.train.warmup_epochs == pytest.approx(0.4)  # a fifteenth, as of the recipe's epochs


def test_the_command_of_a_table_trains_its_arms_only(tmp_path):
    made = load_few_shot(["configs/shapes.yaml"], [f"run.dir={tmp_path}"], settings=["3w5s"], only=["scratch-ewa"])
    assert shlex.join(made.command).startswith("python -m tools.few_shot --config=configs/shapes.yaml --name=")
    assert " --only scratch-ewa --settings 3w5s " in shlex.join(made.command)
    assert "--only" not in load_few_shot(["configs/shapes.yaml"], [f"run.dir={tmp_path}"], settings=["3w5s"]).command


def test_a_part_of_the_folds_is_said_to_be_a_part(stubs, tmp_path, capsys):
    few_shot.main(stubs)
    few_shot.main([*stubs, "--folds=4", "--report-only"])
    assert "| scratch | last epoch | 50.50 ± 0.71 (2 of 4) |" in report(tmp_path)
    assert "2 of 4 runs are finished" in report(tmp_path)


def test_arms_that_lack_their_start_are_named(stubs, pretrained, tmp_path, capsys):
    few_shot.main([*stubs, *MODEL, f"--init-from={pretrained}", "--only", "pretrained"])
    capsys.readouterr()
    few_shot.main([*stubs, *MODEL])
    assert "note: without pretrained, which have runs: say what they start from" in capsys.readouterr().out


def test_a_report_is_published_where_it_does_not_replace_a_larger_one(stubs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    few_shot.main([*stubs, "--name=few_shot", "--publish"])
    assert "| scratch | last epoch | 50.50" in (tmp_path / "results/few_shot/README.md").read_text()
    error = fails([*stubs, "--name=few_shot", "--publish", "--report-only", "--folds=1"], capsys)
    assert "results/few_shot: has the table of 2 finished runs, and this one would have 1" in error


def test_drawn_and_published_folds_do_not_mix(stubs, tmp_path, capsys, monkeypatch):
    few_shot.main([*stubs, "--folds=1"])
    monkeypatch.setattr(study, "TRAIN", (sys.executable, "-S", "-c", stub("fold == 0")))
    error = fails(stubs, capsys)
    assert "3w5s-scratch-fold0 was trained on a fold that this library drew, and " in error
    assert "3w5s-scratch-fold1 on a published one: remove the runs of one kind" in error


def test_a_failing_run_is_reported(stubs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(study, "TRAIN", (sys.executable, "-S", "-c", "import sys; sys.exit('error: no luck')"))
    error = fails(stubs, capsys)
    assert "error: 2 of 2 runs failed:" in error
    assert "3w5s-scratch-fold1: exit code 1: error: no luck" in error


def fails(arguments, capsys):
    """The message of a command that the user got wrong."""
    with pytest.raises(SystemExit) as exit_:
        cli.run(lambda: few_shot.main(arguments))
    captured = capsys.readouterr()
    assert exit_.value.code == 2
    assert "Traceback" not in captured.err
    return captured.err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--settings", "5x10"], "--settings: expected some such as 5w10s 5w20s 10w10s 10w20s, found '5x10'"),
        (["--settings", "1w10s"], "data.way: expected at least 2, found 1"),
        (["--settings", "18w5s"], "data.way: expected at most 17, the classes of shapes, found 18"),
        (["--settings", "3w13s"], "expected at least 13 objects of every class in the train split, for 13 shots"),
        (["--folds", "0"], "--folds: expected at least 1, found 0"),
        (["--only", "ewa"], "--only: expected some of scratch, scratch-ewa, pretrained, pretrained-ewa, found 'ewa'"),
        (["--only", "pretrained"], "--only: pretrained needs a pre-training: say which by --init-from (CKPT=runs/x)"),
        (["--init-from", "nowhere"], "nowhere"),
        (["--name", "a/b"], "--name: expected a name of letters, digits, '.', '_', '+', '-', found 'a/b'"),
        (["--steps", "9"], "--steps: they decide the epochs, and train.epochs is given: leave one of them out"),
        (["--config", "{own}"], "data.fold: few-shot sets it for each of its runs, and a file of --config does"),
        (["data.fold=1"], "data.fold: few-shot sets it for each of its runs: leave it out"),
        (["ewa.enabled=true"], "ewa.enabled: few-shot sets it for each of its runs: leave it out"),
        (["train.seed=1"], "train.seed: the study sets it for each of its runs: leave it out"),
        (["data.val_fraction=0.1"], "data.val_fraction: a fold (data.way) is trained on its whole support set"),
        (["--report-only", "--jobs", "2"], "--jobs: --report-only does not use it: leave it out"),
        (["--report-only"], "few_shot-shapes-tiny: has no runs to report on"),
        (
            ["--config", "configs/task/masked_autoencoding.yaml"],
            "train.task: few-shot is of classification, found mask",
        ),
    ],
)
def test_mistakes_are_refused_before_anything_is_trained(stubs, tmp_path, capsys, arguments, expected):
    (tmp_path / "own.yaml").write_text("data: {way: 3, shot: 5, fold: 1}\n")
    error = fails([*stubs, *(one.replace("{own}", str(tmp_path / "own.yaml")) for one in arguments)], capsys)
    assert error.startswith("error: ")
    assert expected in error
    assert error.count("\n") == 1
    assert not list(tmp_path.glob("*/*-fold*"))


def test_weights_that_do_not_fit_are_refused_at_once(stubs, pretrained, tmp_path, capsys):
    error = fails([*stubs, f"--init-from={pretrained}"], capsys)  # of the model tiny, which is wider
    assert error.count("\n") == 1
    assert not list(tmp_path.glob("*/*-fold*"))


def test_a_published_fold_that_is_missing_is_refused_at_once(stubs, tmp_path, capsys):
    place = tmp_path / "data/ModelNetFewshot/3way_5shot"
    place.mkdir(parents=True)
    rng = np.random.default_rng(0)
    content = {split: [(rng.normal(size=(80, 6)).astype(np.float32), label, label) for label in [0, 1, 2] * count]
               for split, count in (("train", 5), ("test", 20))}  # fmt: skip
    (place / "0.pkl").write_bytes(pickle.dumps(content))
    arguments = [
        *stubs,
        "--config",
        "configs/modelnet40.yaml",
        *MODEL,
        "model.preset=tiny",
        f"data.root={tmp_path}/data",
    ]
    error = fails(arguments, capsys)
    assert f"{place}/1.pkl: no such file, though {place} has published folds" in error
    assert not list(tmp_path.glob("*/*-fold*"))


def test_a_run_without_the_figures_of_a_fold_is_refused(stubs, tmp_path, capsys):
    few_shot.main(stubs)
    path = tmp_path / "few_shot-shapes-tiny/3w5s-scratch-fold0" / SUMMARY
    path.write_text(json.dumps(json.loads(path.read_text()) | {"few_shot": {"drawn": True}}))
    assert "its summary has no figures of a few-shot fold: remove it" in fails([*stubs, "--report-only"], capsys)

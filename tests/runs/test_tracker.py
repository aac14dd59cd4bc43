"""Trackers of experiments: what they are told, and that they end no training. The libraries here are fakes."""

import json
import sys
import warnings
from types import ModuleType, SimpleNamespace

import pytest
import torch

from pointewa.errors import ConfigError, Stopped
from pointewa.runs.log import read_metrics
from pointewa.runs.tracker import TRACKED
from pointewa.tools import cli, train
from pointewa.train.trainer import Trainer

KINDS = ["wandb", "trackio", "mlflow"]


class Fake(ModuleType):
    """Has what is used of the three; ``calls`` is what it was told."""

    def __init__(self, name):
        super().__init__(name)
        self.calls, self.broken, self.started = [], None, 0
        self.run = SimpleNamespace(log=self._call("log"), finish=self._call("finish"))
        if name == "mlflow":
            for function in ("set_experiment", "log_params", "log_metrics", "end_run"):
                setattr(self, function, self._call(function))
            self.start_run = self._starting("start_run")
        else:
            self.init = self._starting("init")

    def _call(self, function):
        def call(*arguments, **options):
            if self.broken == function:
                raise ConnectionError("no network\nmore lines")
            self.calls.append((function, arguments, options))
            print("what it prints")

        return call

    def _starting(self, function):
        call = self._call(function)

        def start(**options):
            call(**options)
            self.started += 1
            self.run.info = SimpleNamespace(run_id=options.get("run_id") or f"run{self.started}")
            return self.run

        return start

    def told(self, *functions):
        return [(arguments, options) for function, arguments, options in self.calls if function in functions]


@pytest.fixture(params=KINDS)
def fake(request, monkeypatch):
    for name in ("WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"):
        monkeypatch.delenv(name, raising=False)
    module = Fake(request.param)
    monkeypatch.setitem(sys.modules, request.param, module)
    return module


def test_a_run_is_tracked_from_its_configuration_to_its_summary(make_trainer, fake):
    name = fake.__name__
    trainer = make_trainer("run.name=a", f"run.tracker={name}")
    trainer.fit()
    summary = trainer.finish()
    identity = json.loads((trainer.folder / TRACKED).read_text())
    assert identity["tracker"] == name
    ((_, start),) = fake.told("init", "start_run")
    if name == "mlflow":
        assert fake.calls[0][:2] == ("set_experiment", ("pointewa",))
        assert start == {"run_name": "a"}
        ((config,), _), *_ = fake.told("log_params")
        assert fake.calls[-1][:2] == ("end_run", ("FINISHED",))
    else:
        config = start["config"]
        own = {"id": identity["id"], "name": "a"} if name == "wandb" else {"name": f"a-{identity['id']}"}
        assert {key: start[key] for key in start if key != "config"} == {
            "project": "pointewa",
            "resume": "allow",
            **own,
        }
        assert fake.calls[-1][0] == "finish"
    assert (config["train.epochs"], config["train.lr"], config["data.name"]) == (2, 2e-3, "shapes")
    assert not [key for key in config if key.startswith("run.")]
    *epochs, last = fake.told("log", "log_metrics")
    records = read_metrics(trainer.folder)
    assert [options for _, options in epochs] == [{"step": 10}, {"step": 20}]
    assert [scalars for (scalars,), _ in epochs] == [
        {key: value for key, value in record.items() if key != "epoch"} for record in records
    ]
    (figures,), options = last
    assert options == {"step": 20}
    assert figures["test/oa"] == summary["test"]["oa"]
    assert figures["parameters"] == summary["parameters"]
    assert all(type(value) in (int, float) for value in figures.values())


def stopped_at(monkeypatch, step):
    original = Trainer.train_step

    def stopping(self, batch):
        if self.lock and self.step == step:
            raise Stopped(15)
        original(self, batch)

    monkeypatch.setattr(Trainer, "train_step", stopping)


def test_a_resumed_run_is_the_same_in_the_tracker(make_trainer, fake, monkeypatch):
    options = ["run.name=a", f"run.tracker={fake.__name__}"]
    with monkeypatch.context() as patch:
        stopped_at(patch, 13)
        with pytest.raises(Stopped):
            make_trainer(*options).fit()
    assert fake.calls[-1][0] in ("finish", "end_run")
    assert fake.calls[-1][1] == (("KILLED",) if fake.__name__ == "mlflow" else ())
    resumed = make_trainer(*options)
    resumed.fit()
    resumed.finish()
    (_, first), (_, second) = fake.told("init", "start_run")
    identity = json.loads((resumed.folder / TRACKED).read_text())["id"]
    if fake.__name__ == "mlflow":
        assert (identity, second) == ("run1", {"run_id": "run1"})
        assert len(fake.told("log_params")) == 1  # they may not change
    else:
        assert second == first
    assert [options["step"] for _, options in fake.told("log", "log_metrics")] == [10, 20, 20]


def test_a_run_that_starts_over_is_another_one(make_trainer, fake):
    found = []
    for _ in range(2):
        trainer = make_trainer("run.name=a", f"run.tracker={fake.__name__}", "run.overwrite=true", "train.epochs=1")
        trainer.fit()
        found.append(json.loads((trainer.folder / TRACKED).read_text())["id"])
    assert found[0] != found[1]


@pytest.mark.parametrize("broken", ["init start_run", "log log_metrics", "finish end_run", "log_params"])
def test_a_tracker_that_fails_ends_no_training(make_trainer, fake, broken):
    fake.broken = next((one for one in broken.split() if one in ("init", "log", "finish")), broken)
    if fake.__name__ == "mlflow":
        fake.broken = broken.split()[-1]
    elif broken == "log_params":
        pytest.skip("only of mlflow")
    trainer = make_trainer("run.name=a", f"run.tracker={fake.__name__}", "train.epochs=1")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit()
        summary = trainer.finish()
    (text,) = [str(one.message) for one in caught if "run.tracker" in str(one.message)]
    assert text == f"run.tracker: {fake.__name__} fails (ConnectionError: no network): the training goes on without it"
    assert (trainer.folder / "summary.json").exists()
    assert summary["epochs"] == len(read_metrics(trainer.folder)) == 1


def test_the_training_is_the_same_with_a_tracker(make_trainer, fake):
    trainers = [make_trainer(f"run.tracker={name}") for name in ("none", fake.__name__)]
    for trainer in trainers:
        trainer.fit()
    for one, other in zip(*(trainer.model.parameters() for trainer in trainers), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", KINDS)
def test_one_that_is_not_installed_is_refused_before_anything_is_made(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, name, None)  # as if it were not there
    arguments = ["model.preset=tiny", "train.device=cpu", f"run.dir={tmp_path}", f"run.tracker={name}"]
    with pytest.raises(SystemExit) as exit_:
        cli.run(lambda: train.main(arguments))
    assert exit_.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: run.tracker: {name} does not load (")
    assert said.endswith(f"): pip install {name}\n")
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_another_tracker_does_not_exist(make_trainer):
    with pytest.raises(ConfigError, match=r"run\.tracker"):
        make_trainer("run.tracker=neptune")


def test_none_is_imported_unless_it_is_asked_for(make_trainer, monkeypatch):
    for name in KINDS:
        monkeypatch.setitem(sys.modules, name, None)
    trainer = make_trainer("run.name=a", "train.epochs=1")
    with warnings.catch_warnings(action="error", category=UserWarning):
        trainer.fit()
    trainer.finish()
    assert not (trainer.folder / TRACKED).exists()


def test_stdout_is_for_results(make_trainer, fake, capsys):
    trainer = make_trainer(f"run.tracker={fake.__name__}", "train.epochs=1")
    trainer.fit()
    trainer.finish()
    captured = capsys.readouterr()
    assert "what it prints" not in captured.out
    assert "what it prints" in captured.err

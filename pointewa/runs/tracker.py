"""Trackers of experiments, beside TensorBoard: Weights & Biases, MLflow, Trackio, each only where it is asked for."""

import importlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, Self
from uuid import uuid4

from pointewa.config import Config, flat
from pointewa.errors import ConfigError, first_line
from pointewa.safe.files import atomic_write

TRACKED = "tracker.json"  # in a run folder: the tracker, and under which identity it has the run
_PROJECT = "pointewa"


class _Tracked(Protocol):
    """A run in a tracker."""

    identity: str

    def log(self, scalars: Mapping[str, float], step: int) -> None: ...

    def end(self, finished: bool) -> None: ...


class _Wandb:
    """Also Trackio, which has the same functions; it tells runs apart by their names."""

    def __init__(self, module: ModuleType, name: str, identity: str | None, config: Mapping[str, Any]) -> None:
        self.identity = identity or uuid4().hex[:12]
        if module.__name__ == "trackio":
            named: dict[str, Any] = {"project": _PROJECT, "name": f"{name}-{self.identity}"}
        else:
            named = {"project": os.environ.get("WANDB_PROJECT", _PROJECT), "name": name, "id": self.identity}
        self._run = module.init(**named, config=dict(config), resume="allow")

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        self._run.log(dict(scalars), step=step)

    def end(self, finished: bool) -> None:
        self._run.finish()


class _Mlflow:
    def __init__(self, module: ModuleType, name: str, identity: str | None, config: Mapping[str, Any]) -> None:
        self._mlflow = module
        if identity is None and "MLFLOW_EXPERIMENT_NAME" not in os.environ and "MLFLOW_EXPERIMENT_ID" not in os.environ:
            module.set_experiment(_PROJECT)
        run = module.start_run(run_id=identity) if identity else module.start_run(run_name=name)
        self.identity = run.info.run_id
        if identity is None:  # they may not change
            module.log_params(dict(config))

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        self._mlflow.log_metrics(dict(scalars), step=step)

    def end(self, finished: bool) -> None:
        self._mlflow.end_run("FINISHED" if finished else "KILLED")


_KINDS: dict[str, Callable[..., _Tracked]] = {"wandb": _Wandb, "trackio": _Wandb, "mlflow": _Mlflow}


def check_tracker(name: str) -> None:
    """Import a tracker, so that a missing one is noticed before a training.

    Raises:
        ConfigError: it is not installed.
    """
    if name == "none":
        return
    try:
        importlib.import_module(name)
    except Exception as error:  # missing, or broken, as by another library's version
        raise ConfigError(f"run.tracker: {name} does not load ({first_line(error)}): pip install {name}") from error


class Tracker:
    """A run of ours in the tracker of ``run.tracker``, resumed if its folder says that it is there already.

    Whatever the library raises, such as without a network, ends in one warning, and the training goes on without it.
    A ``with`` block that does not end well ends it, as of a run that may be resumed.

    Args:
        folder: of the run.
        config: of the run.
    """

    def __init__(self, folder: Path, config: Config) -> None:
        self._name, self._run = config.run.tracker, None
        if self._name == "none":
            return
        # Values such as lists are text in one of the trackers anyway; run.name and the like say where, not how.
        values = {key: value for key, value in flat(config).items() if not key.startswith("run.")}
        module = importlib.import_module(self._name)
        self._safely(lambda: self._open(module, folder, values))

    def _open(self, module: ModuleType, folder: Path, values: Mapping[str, Any]) -> None:
        known = _read(folder / TRACKED, self._name)
        run = _KINDS[self._name](module, folder.name, known, values)
        if known is None:
            with atomic_write(folder / TRACKED) as temporary:
                temporary.write_text(json.dumps({"tracker": self._name, "id": run.identity}) + "\n")
        self._run = run

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, *error: object) -> None:
        if kind:
            self.end(finished=False)

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        """Pass on the scalars after ``step`` iterations."""
        if run := self._run:
            self._safely(lambda: run.log(scalars, step))

    def summarise(self, summary: Mapping[str, Any], step: int) -> None:
        """Pass on the figures of a finished run: its metrics on the test split, and other numbers."""
        numbers = {key: value for key, value in summary.items() if type(value) in (int, float)}
        self.log({f"test/{key}": value for key, value in summary["test"].items()} | numbers, step)

    def end(self, finished: bool = True) -> None:
        """Nothing more will be passed on; a run that is not finished may be resumed later."""
        if run := self._run:
            self._safely(lambda: run.end(finished))
            self._run = None

    def _safely(self, action: Callable[[], None]) -> None:
        try:
            with redirect_stdout(sys.stderr):  # stdout is for results
                action()
        except Exception as error:  # anything: a tracker must not end a training
            self._run = None
            warnings.warn(
                f"run.tracker: {self._name} fails ({type(error).__name__}: {first_line(error)[:200]}): the training "
                "goes on without it",
                stacklevel=2,
            )


def _read(path: Path, name: str) -> str | None:
    """The identity of a run in a tracker; None if it is not in this one yet."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None
    matches = isinstance(found, dict) and found.get("tracker") == name and isinstance(found.get("id"), str)
    return found["id"] if matches else None

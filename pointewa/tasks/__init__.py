"""What is learned, one module per task. Nothing outside this package asks which task it is."""

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from pointewa.errors import CheckpointError, ConfigError
from pointewa.tasks.base import Task

_REGISTERED: dict[str, type[Task]] = {}


def register(task: type[Task]) -> type[Task]:
    """Decorator that makes a task known by its name. Modules in this folder are imported when their task is needed."""
    _REGISTERED[task.name] = task
    return task


def names() -> list[str]:
    """The names of all tasks."""
    found = {module.name for module in pkgutil.iter_modules(__path__)} - {"base"}
    return sorted(found | _REGISTERED.keys())


def task_class(name: str) -> type[Task]:
    """The task with a name.

    Raises:
        ConfigError: no such task.
    """
    if name not in names():
        raise ConfigError(f"train.task: expected one of {', '.join(names())}, found {name!r}")
    if name not in _REGISTERED:
        importlib.import_module(f"{__name__}.{name}")
    return _REGISTERED[name]


def task_of(summary: Mapping[str, Any], source: str = "summary") -> type[Task]:
    """The task of a finished run, by its summary, which must have the task's metrics; those come first that the run's
    data set reports.

    Raises:
        CheckpointError: an unknown task, or a metric is missing.
    """
    try:
        name = str(summary.get("task", "classification"))  # version 0.1 named only the other one
        task = task_class({"pretraining": "masked_autoencoding"}.get(name, name))
    except ConfigError as error:
        raise CheckpointError(f"{source}: {error}") from error
    task = task.reporting(summary.get("reported"))
    task.check_summary(summary, source)
    return task

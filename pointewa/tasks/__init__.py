"""What is learned, a module a task. Nothing outside this room asks which task it is."""

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from pointewa.errors import CheckpointError, ConfigError
from pointewa.tasks.base import Task

_REGISTERED: dict[str, type[Task]] = {}


def register(task: type[Task]) -> type[Task]:
    """Make a task known by its name; a decorator. A module in this folder does it when its name is asked for."""
    _REGISTERED[task.name] = task
    return task


def names() -> list[str]:
    """All tasks."""
    found = {module.name for module in pkgutil.iter_modules(__path__)} - {"base"}
    return sorted(found | _REGISTERED.keys())


def task_class(name: str) -> type[Task]:
    """The task of a name.

    Raises:
        ConfigError: no such task.
    """
    if name not in names():
        raise ConfigError(f"train.task: expected one of {', '.join(names())}, found {name!r}")
    if name not in _REGISTERED:
        importlib.import_module(f"{__name__}.{name}")
    return _REGISTERED[name]


def task_of(summary: Mapping[str, Any], source: str = "summary") -> type[Task]:
    """The task of a finished run, whose metrics are in its summary.

    Raises:
        CheckpointError: an unknown task, or a metric is missing.
    """
    try:
        name = str(summary.get("task", "classification"))  # version 0.1 named the other one only
        task = task_class({"pretraining": "masked_autoencoding"}.get(name, name))
    except ConfigError as error:
        raise CheckpointError(f"{source}: {error}") from error
    task.check_summary(summary, source)
    return task

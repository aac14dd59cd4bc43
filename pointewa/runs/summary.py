"""The summary of a finished run."""

import json
import math
import re
from pathlib import Path
from typing import Any

from pointewa.errors import CheckpointError, first_line
from pointewa.safe.files import atomic_write

SUMMARY = "summary.json"


def read_summary(folder: Path) -> dict[str, Any] | None:
    """The summary of a finished run; None for an unfinished one.

    Raises:
        CheckpointError: damaged.
    """
    path = folder / SUMMARY
    try:
        if not path.exists():
            return None
        if not path.is_file():  # a pipe would be waited for
            raise ValueError("not a file")
        summary = json.loads(path.read_text())
        _check(summary)
    except (OSError, ValueError, KeyError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: damaged ({first_line(error)}): remove it, and the same command makes it again"
        ) from error
    return summary | {"run": str(folder)}


def after_training(summary: dict[str, Any]) -> str:
    """When the result was measured, for people: after the last of so many epochs."""
    return "after the only epoch" if summary["epochs"] == 1 else f"after the last of {summary['epochs']} epochs"


def fold_text(fold: dict[str, Any]) -> str:
    """A few-shot fold, as summaries have it, for people."""
    origin = (
        "as published" if not fold["drawn"] else "drawn by this library's seed: not comparable with published folds"
    )
    return f"{fold['way']}-way {fold['shot']}-shot, fold {fold['fold']}, {origin}"


def _check(summary: Any) -> None:
    if not isinstance(summary, dict):
        raise ValueError("not a mapping")
    numbers = [summary[key] for key in ("parameters", "parameters_in_training", "seconds", "epochs")]
    for metrics in (summary["test"], summary["test_before_folding"] or summary["test"]):
        if not isinstance(metrics, dict) or not metrics:
            raise ValueError("no metrics of the test split")
        numbers += metrics.values()
    if not all(type(number) in (int, float) and abs(number) < math.inf for number in numbers):
        raise ValueError("not numbers")
    if not isinstance(summary["dataset"], str) or not re.fullmatch(r"[\w.-]+", summary["dataset"]):
        raise ValueError("dataset")


def write_summary(folder: Path, summary: dict) -> None:
    """Write ``summary.json``: the run is finished."""
    with atomic_write(folder / SUMMARY) as temporary:
        temporary.write_text(json.dumps(summary, indent=1) + "\n")

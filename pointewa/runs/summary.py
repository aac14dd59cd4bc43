"""The figures of a finished run."""

import json
import math
import re
from pathlib import Path
from typing import Any

from pointewa.errors import CheckpointError, first_line
from pointewa.safe.files import atomic_write

SUMMARY = "summary.json"


def read_summary(folder: Path) -> dict[str, Any] | None:
    """The figures of a finished run; None of an unfinished one.

    Raises:
        CheckpointError: damaged.
    """
    try:
        if not (folder / SUMMARY).exists():
            return None
        if not (folder / SUMMARY).is_file():  # a pipe would be waited for
            raise ValueError("not a file")
        summary = json.loads((folder / SUMMARY).read_text())
        figures = [summary["test"], summary["test_before_folding"] or summary["test"]]
        numbers = [summary[key] for key in ("parameters", "parameters_in_training", "seconds", "epochs")]
        if summary.get("task") == "pretraining":
            numbers += [one["loss"] for one in figures]
        else:
            numbers += [one[key] for one in figures for key in ("oa", "macc")] + [summary["largest_logit_difference"]]
        if not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers):
            raise ValueError("not numbers")
        if not re.fullmatch(r"[\w.-]+", summary["dataset"]):
            raise ValueError("dataset")
        return summary | {"run": str(folder)}
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise CheckpointError(
            f"{folder / SUMMARY}: damaged ({first_line(error)}): remove it, and the same command makes it again"
        ) from error


def write_summary(folder: Path, summary: dict) -> None:
    """Write ``summary.json``: the run is finished."""
    with atomic_write(folder / SUMMARY) as temporary:
        temporary.write_text(json.dumps(summary, indent=1) + "\n")

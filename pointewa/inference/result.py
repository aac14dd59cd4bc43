"""The result of a run, as people read it."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Label(NamedTuple):
    """How a metric is shown: its name, and a format such as ``"{:.2f} %"``."""

    name: str
    form: str

    @property
    def axis(self) -> str:
        """For the axis of a diagram: the name, and the unit if it has one."""
        return f"{self.name}, %" if self.form.endswith("%") else self.name


Labels = Mapping[str, Label]  # by the keys of the metrics, in the order in which they are shown


class Result(NamedTuple):
    """A table.

    Args:
        columns: headings of the columns of values.
        rows: a name and a value for each column; empty where there is none.
    """

    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]


def result_table(summary: Mapping[str, Any], labels: Labels) -> Result:
    """The metrics and costs of a finished run: of the model as it was trained, and folded if it was.

    Args:
        summary: of `pointewa.runs.summary.read_summary`.
        labels: of the metrics that are shown; those that the summary does not have are left out.
    """
    before, after = summary["test_before_folding"], summary["test"]
    tested = [one for one in (before, after) if one]
    metrics = [(label.name, *(label.form.format(one[key]) for one in tested)) for key, label in labels.items()
               if all(isinstance(one.get(key), int | float) for one in tested)]  # fmt: skip
    counts = [f"{summary[key]:,}" for key in ("parameters_in_training", "parameters")]
    seconds = f"{summary['seconds']:.0f}"
    if not before:
        columns = ("gated MoE" if summary.get("ewa") else "dense",)
        return Result(columns, [*metrics, ("parameters", counts[1]), ("seconds of training", seconds)])
    rows = [*metrics, ("parameters", *counts)]
    if "largest_logit_difference" in summary:
        rows.append(("largest difference of logits", "", f"{summary['largest_logit_difference']:.1e}"))
    rows.append(("seconds of training", seconds, ""))
    return Result(("in training (MoE)", "folded (dense)"), rows)

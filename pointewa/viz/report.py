"""The parts of a run's page that are not clouds: its figures, its curves, its configuration."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from pointewa.viz.clouds import save_figure
from pointewa.viz.confusion import confusion_figure
from pointewa.viz.panels import BACKGROUND, COLOURS, FAINT

# Of each panel its label, whether its axis is logarithmic, and its series: name and key in metrics.jsonl.
_CURVES = (
    ("loss", False, (("training", "train/loss"), ("validation", "val/loss"))),
    ("overall accuracy, %", False, (("training", "train/oa"), ("validation", "val/oa"))),
    ("learning rate", True, (("learning rate", "train/lr"),)),
    ("norm of the gradient", True, (("norm of the gradient", "train/grad_norm"),)),
)


def table_html(rows: Sequence[Sequence[Any]], header: Sequence[str] = ()) -> str:
    """A table; in one with a header numbers are aligned to the right."""

    def cell(value: Any) -> str:
        number = str(value)[:1].isdigit() and bool(header)
        return f"<td{' class=number' if number else ''}>{escape(str(value))}</td>"

    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>\n" for row in rows)
    return f"<table>\n{f'<tr>{head}</tr>' if head else ''}{body}</table>\n"


def result_html(summary: Mapping[str, Any]) -> str:
    """The figures of a finished run: of `pointewa.runs.summary.read_summary`."""
    before, after = summary["test_before_folding"], summary["test"]
    columns = ["", *(["in training (MoE)"] if before else []), "folded (dense)" if before else "dense"]
    rows: list[list[Any]] = []
    for name, key, form in (("overall accuracy", "oa", "{:.2f} %"), ("mean-class accuracy", "macc", "{:.2f} %"),
                            ("loss", "loss", "{:.4f}")):  # fmt: skip
        if key in after:
            rows.append([name, *(form.format(one[key]) for one in (before, after) if one)])
    counts = [f"{summary[key]:,}" for key in ("parameters_in_training", "parameters")]
    rows.append(["parameters", *(counts if before else counts[1:])])
    if before and "largest_logit_difference" in summary:
        rows.append(["largest difference of logits", "", f"{summary['largest_logit_difference']:.1e}"])
    rows.append(
        ["seconds of training", *([f"{summary['seconds']:.0f}", ""] if before else [f"{summary['seconds']:.0f}"])]
    )
    return table_html(rows, columns)


def curves_figure(records: Sequence[Mapping[str, Any]]) -> Any | None:
    """A matplotlib figure of the figures of each epoch, of `pointewa.runs.log.read_metrics`; None where there are
    none."""
    from matplotlib.figure import Figure  # without pyplot: no display is looked for, no state is left
    from matplotlib.ticker import MaxNLocator

    panels = []
    for label, logarithmic, series in _CURVES:
        found = {name: [(one["epoch"] + 1, one[key]) for one in records if isinstance(one.get(key), int | float)]
                 for name, key in series}  # fmt: skip
        if any(found.values()):
            panels.append((label, logarithmic, {name: values for name, values in found.items() if values}))
    if not panels:
        return None
    figure = Figure((10, 3.1 * -(-len(panels) // 2)), facecolor=BACKGROUND, layout="constrained")
    grid = figure.subplots(-(-len(panels) // 2), 2, squeeze=False).ravel()
    for one in grid[len(panels) :]:
        one.set_axis_off()
    for one, (label, logarithmic, found) in zip(grid, panels, strict=False):
        for (name, values), colour in zip(found.items(), COLOURS, strict=False):
            marker = "o" if len(values) < 3 else None
            one.plot(*zip(*values, strict=True), color=colour, label=name, linewidth=1.6, marker=marker)
        if logarithmic and all(value > 0 for values in found.values() for _, value in values):
            one.set_yscale("log")
        one.xaxis.set_major_locator(MaxNLocator(integer=True))
        one.grid(color=FAINT, alpha=0.5)
        one.spines[["top", "right"]].set_visible(False)
        one.set(xlabel="epoch", ylabel=label)
        if len(found) > 1:
            one.legend(frameon=False)
    return figure


def confusion_html(matrix: Tensor, names: Sequence[str], title: str) -> str:
    """The confusion matrix int64 ``[C, C]`` as a picture in the page."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "confusion.png")
        save_figure(path, confusion_figure(matrix, names, title), dpi=150)
        data = base64.b64encode(path.read_bytes()).decode()
    width = min(100, 30 + 2 * len(names))
    return f'<img alt="confusion matrix" style="width:{width}%" src="data:image/png;base64,{data}">\n'


def text_html(text: str) -> str:
    """Text as it is, in a fixed width."""
    return f"<pre>{escape(text)}</pre>\n"

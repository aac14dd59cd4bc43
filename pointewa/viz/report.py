"""The parts of a page that are not clouds: tables, curves, the confusion matrix, text."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from torch import Tensor

from pointewa.viz.clouds import save_figure
from pointewa.viz.confusion import confusion_figure
from pointewa.viz.panels import BACKGROUND, FAINT, palette


class Curves(NamedTuple):
    """A diagram of `curves_figure`.

    Args:
        label: of its vertical axis.
        series: the keys of its curves, by their names.
        logarithmic: its vertical axis is, if no value is 0 or less.
    """

    label: str
    series: Mapping[str, str]
    logarithmic: bool = False


def section_html(heading: str, *parts: str) -> str:
    """Parts of a page under a heading."""
    return "".join([f"<h2>{escape(heading)}</h2>\n", *parts])


def table_html(rows: Sequence[Sequence[Any]], header: Sequence[str] = ()) -> str:
    """A table; in one with a header numbers are aligned to the right."""

    def cell(value: Any) -> str:
        number = str(value).lstrip("+-< ")[:1].isdigit() and bool(header)
        return f"<td{' class=number' if number else ''}>{escape(str(value))}</td>"

    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>\n" for row in rows)
    return f"<table>\n{f'<tr>{head}</tr>' if head else ''}{body}</table>\n"


def curves_figure(records: Sequence[Mapping[str, Any]], diagrams: Sequence[Curves]) -> Any | None:
    """A matplotlib figure of what was recorded after each epoch.

    Args:
        records: of the epochs: "epoch", counted from 0, and values by their keys.
        diagrams: what is drawn; curves without values, and diagrams without curves, are left out.

    Returns:
        None if nothing is left.
    """
    from matplotlib.figure import Figure  # without pyplot: no display is looked for, no state is left
    from matplotlib.ticker import MaxNLocator

    panels = []
    for diagram in diagrams:
        found = {name: [(one["epoch"] + 1, one[key]) for one in records if isinstance(one.get(key), int | float)]
                 for name, key in diagram.series.items()}  # fmt: skip
        if any(found.values()):
            panels.append((diagram, found))
    if not panels:
        return None
    figure = Figure((10, 3.1 * -(-len(panels) // 2)), facecolor=BACKGROUND, layout="constrained")
    grid = figure.subplots(-(-len(panels) // 2), 2, squeeze=False).ravel()
    for one in grid[len(panels) :]:
        one.set_axis_off()
    for one, (diagram, found) in zip(grid, panels, strict=False):
        # In all diagrams a name has the same colour, also where others have no values.
        for (name, values), colour in zip(found.items(), palette(len(found)), strict=True):
            if not values:
                continue
            marker = "o" if len(values) < 3 else None
            one.plot(*zip(*values, strict=True), color=colour, label=name, linewidth=1.6, marker=marker)
        if diagram.logarithmic and all(value > 0 for values in found.values() for _, value in values):
            one.set_yscale("log")
        one.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        one.grid(color=FAINT, alpha=0.5)
        one.spines[["top", "right"]].set_visible(False)
        one.set(xlabel="epoch", ylabel=diagram.label)
        if len(one.lines) > 1:
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

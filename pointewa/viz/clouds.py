"""Pictures of clouds as files: no display, no GPU, the same camera and the same drawing as in the HTML page."""

import io
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pointewa.errors import ConfigError
from pointewa.safe.files import atomic_write
from pointewa.viz.panels import BACKGROUND, DISTANCE, FOG, INK, PITCH, Panel, Picture, dot, rgb, view_matrix

_SIDE, _LINE = 2.3, 0.19  # inches: a panel, and a line of text
_SHADES = 224  # in a file
FIGURES, PAGES = (".png", ".pdf", ".svg"), (".html", ".htm")
# The same bytes each time; letters as outlines, and in a PDF as TrueType, since publishers refuse Type 3.
VECTOR = {"svg.hashsalt": "pointewa", "svg.fonttype": "path", "pdf.fonttype": 42}
REACH = 1.06  # of a panel, from its middle: a fitted cloud and half a point


def clouds_figure(picture: Picture, rendered: Sequence[np.ndarray] | None = None) -> Any:
    """A matplotlib figure of a picture: far points are drawn first, and paler.

    Args:
        picture: what is drawn.
        rendered: uint8 ``[H, W, 3]`` for each panel, from `pointewa.viz.offscreen.render`, in place of its points.
    """
    from matplotlib.figure import Figure  # without pyplot: no display is looked for, no state is left

    columns = picture.width
    rows = -(-len(picture.panels) // columns)
    wide = columns * _SIDE
    heading = textwrap.wrap(picture.heading, max(20, int(wide * 12)))
    lines = max(panel.title.count("\n") + 1 if panel.title else 0 for panel in picture.panels)
    foot = 0.38 + 0.24 * (_legend_rows(picture.legend, wide) - 1) if picture.legend else 0.06
    top, under = 0.12 + 0.24 * len(heading), 0.06 + _LINE * lines
    high = top + rows * (_SIDE + under) + foot
    figure = Figure((wide, high), facecolor=BACKGROUND)
    for number, panel in enumerate(picture.panels):
        row, column = divmod(number, columns)
        bottom = high - top - row * (_SIDE + under) - _SIDE
        axes = figure.add_axes((column / columns, bottom / high, 1 / columns, _SIDE / high))
        if rendered is None:
            _draw(axes, panel.fitted())
        else:
            axes.imshow(rendered[number], extent=(-REACH, REACH, -REACH, REACH))
        axes.set(xlim=(-REACH, REACH), ylim=(-REACH, REACH))
        axes.set_axis_off()
        if panel.title:
            x, y = (column + 0.5) / columns, (bottom - 0.02) / high
            figure.text(x, y, panel.title, ha="center", va="top", color=INK, fontsize=9, linespacing=1.25)
    if heading:
        y = 1 - 0.1 / high
        figure.text(0.5, y, "\n".join(heading), ha="center", va="top", color=INK, fontsize=12, linespacing=1.2)
    if picture.legend:
        _legend(figure, picture.legend, wide)
    return figure


def _legend_rows(legend: Sequence[tuple[str, str]], wide: float) -> int:
    longest = sum(0.35 + 0.075 * len(text) for _, text in legend)  # inches, all of it in a row
    columns = len(legend) if longest < wide else max(1, int(len(legend) * wide / longest))
    return -(-len(legend) // columns)


def _legend(figure: Any, legend: Any, wide: float) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], marker="o", linestyle="", color=colour, label=text) for colour, text in legend]
    columns = -(-len(handles) // _legend_rows(legend, wide))
    figure.legend(handles=handles, loc="lower center", ncols=columns, frameon=False, fontsize=9, labelcolor=INK,
                  handletextpad=0.2, columnspacing=1.2, borderaxespad=0.3)  # fmt: skip


def project(points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points ``[P, 3]`` of a fitted panel on the sheet: places ``[P, 2]``, within the unit circle, how much nearness
    enlarges ``[P]``, and depth ``[P]``, 0 for the nearest and 1 for the farthest possible."""
    seen = points @ view_matrix().T.astype(np.float32)
    nearness = math.sqrt(DISTANCE**2 - 1) / np.maximum(DISTANCE - seen[:, 2], 0.1)  # a sphere fills [-1, 1]
    return seen[:, :2] * nearness[:, None], nearness, np.clip((1 - seen[:, 2]) / 2, 0, 1)


def upright(points: np.ndarray) -> tuple[float, float]:
    """Lowest and highest place on the sheet that points ``[P, 3]`` of a fitted panel take as they are turned about the
    up axis. What is outside of the unit sphere counts as if it were on it."""
    points = points / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1)
    up, radius, pitch = points[:, 1], np.hypot(points[:, 0], points[:, 2]), math.radians(PITCH)
    places = [
        (up * math.cos(pitch) - back * math.sin(pitch)) * math.sqrt(DISTANCE**2 - 1)
        / (DISTANCE - up * math.sin(pitch) - back * math.cos(pitch))
        for back in (radius, -radius)  # nearest to the reader, and farthest: between them the place is monotone
    ]  # fmt: skip
    return float(np.min(places)), float(np.max(places))


def faded(colours: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """Colours uint8 ``[P, 3]`` at depths ``[P]`` from 0 to 1, paler the farther they are: ``[P, 3]`` in [0, 1]."""
    fog = FOG * depth[:, None] ** 1.5
    return np.minimum((colours * (1 - fog) + rgb(BACKGROUND) * fog) / 255, 1)  # rounding may exceed it


def _draw(axes: Any, panel: Panel) -> None:
    places, nearness, depth = project(panel.points)
    order = np.argsort(-depth, kind="stable")
    colours = faded(panel.colours, depth)
    diameter = dot(len(panel.points)) * panel.sizes * nearness * _SIDE / 2 * 72  # typographic points
    axes.scatter(*places[order].T, s=diameter[order] ** 2, c=colours[order], linewidths=0)


def check_suffix(option: str, path: Path, suffixes: Sequence[str] = FIGURES) -> None:
    """Refuse the name of a picture or page that cannot be written, before any work is done.

    Raises:
        ConfigError: naming ``option``.
    """
    if path.suffix.lower() not in suffixes:
        expected = f"{', '.join(suffixes[:-1])} or {suffixes[-1]}"
        raise ConfigError(f"{option}: expected a name ending in {expected}, found {path}")


def save_figure(path: Path, figure: Any, dpi: int = 130) -> None:
    """Write any matplotlib figure as its name says: as PNG, with few colours, which makes it a third as large, or, for
    papers, as PDF or SVG; the same bytes each time.

    Raises:
        ConfigError: a name with another ending.
        OSError: it cannot be written.
    """
    import matplotlib
    from PIL import Image  # matplotlib needs it itself

    check_suffix("picture", path)
    kind, drawn = path.suffix.lower()[1:], io.BytesIO()
    undated = {"png": {"Software": None}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}[kind]
    with matplotlib.rc_context(VECTOR):
        figure.savefig(drawn, dpi=dpi, format=kind, facecolor=BACKGROUND, metadata=undated)
    with atomic_write(path) as temporary:
        if kind == "png":
            image = Image.open(drawn).convert("RGB")
            image = image.quantize(_SHADES, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
            image.save(temporary, format="png", optimize=True)
        else:
            temporary.write_bytes(drawn.getvalue())

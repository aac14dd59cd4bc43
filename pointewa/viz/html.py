"""Self-contained HTML pages with clouds that turn in any browser: no network, no library, nothing beside the file."""

import base64
import io
import json
import math
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from pointewa.safe.files import atomic_write
from pointewa.viz.clouds import REACH, VECTOR, upright
from pointewa.viz.panels import BACKGROUND, DARK, DISTANCE, FOG, PITCH, YAW, Panel, Picture, dot, rgb

HINT = "Drag to turn, use the wheel or two fingers to zoom, double-click to reset; the arrow keys, + and - work too."
_HERE = Path(__file__).parent
_REACH = 4.0  # of a fitted cloud's coordinates; what is farther out, as bad predictions may be, is moved to this rim


def clouds_html(picture: Picture) -> str:
    """The clouds of a picture as a part of a page made by `page`. All of them turn together. A row is as high as its
    clouds need."""
    view = {"yaw": math.radians(YAW), "pitch": math.radians(PITCH), "distance": DISTANCE, "fog": FOG,
            "background": rgb(BACKGROUND).tolist(), "dark": rgb(DARK).tolist()}  # fmt: skip
    legend = "".join(f'<li><i style="background:{escape(colour)}"></i>{escape(text)}</li>'
                     for colour, text in picture.legend)  # fmt: skip
    fitted = [panel.fitted() for panel in picture.panels]
    rows = [fitted[start : start + picture.width] for start in range(0, len(fitted), picture.width)]
    return "".join([
        f'<div class="clouds" style="--columns:{picture.width}" data-view="{escape(json.dumps(view))}">',
        *(_canvas(panel, number, _height(row)) for number, row in enumerate(rows) for panel in row),
        "</div>\n", f'<ul class="legend">{legend}</ul>\n' if legend else "",
    ])  # fmt: skip


def _height(row: Sequence[Panel]) -> float:
    """Of the fitted panels of a row in the first view, in widths: as high as they need, however they are turned about
    the up axis. The viewer shrinks them where they are seen from higher or lower and would not fit."""
    low, high = np.array([upright(panel.points) for panel in row]).T
    return float(np.clip((high.max() - low.min()) / 2 + REACH - 1, 0.3, REACH)) / REACH


def _canvas(fitted: Panel, row: int, height: float) -> str:
    reach = float(min(_REACH, max(1.0, np.abs(fitted.points).max())))
    points = np.round(np.clip(fitted.points, -reach, reach) * (32767 / reach)).astype("<i2")
    sizes = np.clip(np.round(fitted.sizes * 16), 1, 255).astype(np.uint8)
    data = {"count": len(points), "scale": reach / 32767, "dot": dot(len(points)), "points": _base64(points),
            "colours": _base64(np.ascontiguousarray(fitted.colours, np.uint8)),
            "sizes": _base64(sizes), "row": row}  # fmt: skip
    attributes = " ".join(f'data-{name}="{value}"' for name, value in data.items())
    label = escape(" ".join(fitted.title.split()) or "point cloud")
    caption = f"<figcaption>{escape(fitted.title)}</figcaption>" if fitted.title else ""
    canvas = f'<canvas tabindex="0" role="img" aria-label="{label}" style="aspect-ratio:{1 / height:.3f}" {attributes}>'
    return f"<figure>{canvas}</canvas>{caption}</figure>\n"


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode()


def svg_html(figure: Any) -> str:
    """A matplotlib figure as a part of a page, sharp at any size."""
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context(VECTOR):
        figure.savefig(text, format="svg", facecolor=BACKGROUND, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    return re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")  # in HTML they are implied


def page(title: str, parts: Sequence[str]) -> str:
    """A whole page of ready-made parts (`clouds_html`, `svg_html`, or any HTML).

    Args:
        title: plain text.
        parts: from top to bottom.
    """
    turning = any('class="clouds"' in part for part in parts)
    script = f"<script>\n{(_HERE / 'viewer.js').read_text()}</script>\n" if turning else ""
    return "".join([
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n',
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n',
        f"<title>{escape(title)}</title>\n<style>\n{(_HERE / 'page.css').read_text()}</style>\n</head>\n<body>\n",
        f"<h1>{escape(title)}</h1>\n", f'<p class="hint">{HINT}</p>\n' if turning else "",
        *parts, script, "</body>\n</html>\n",
    ])  # fmt: skip


def save_page(path: Path, title: str, parts: Sequence[str]) -> None:
    """Write a `page`.

    Raises:
        OSError: it cannot be written.
    """
    with atomic_write(path) as temporary:
        temporary.write_text(page(title, parts), encoding="utf-8")

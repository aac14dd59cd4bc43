"""What all pictures of clouds share: a cloud with its colours and its title, the palette, the camera."""

import colorsys
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from pointewa.ops import farthest_point_sample

BACKGROUND, INK, FAINT = "#ffffff", "#1f2933", "#c9ced6"
DARK = "#1a1a1a"  # the background of a page in dark mode, and what its style sheet makes of white in a figure
# Degrees about the up axis (ModelNet40's chairs have their backs at z > 0: they are seen from the front), degrees from
# above, radii of the cloud.
YAW, PITCH, DISTANCE = 145.0, 22.0, 4.0
FOG = 0.55  # how much of the farthest point's colour is the background's
MOST_POINTS = 4096  # of a cloud that is drawn: more only hide each other

# Okabe and Ito's palette, for readers with colour vision deficiencies, without black and yellow.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
AGAINST, NEUTRAL, FOR = "#2166ac", "#d5d8dc", "#c4161c"  # blue and red, with grey where nothing depends on it
_LOW, _HIGH = "#1d3f72", "#4fb3bf"  # of a plain cloud, from its foot to its top


@dataclass(frozen=True)
class Panel:
    """One cloud of a picture.

    Args:
        points: float32 ``[P, 3]``, y up.
        colours: uint8 ``[P, 3]``, red, green, blue.
        title: drawn under the cloud; may have several lines.
        sizes: float32 ``[P]`` diameters, 1 is the usual one; None: all 1.
        frame: float32 ``[F, 3]``, the points that have to fit into the panel, so that several panels can have the same
            scale; None: its own.
    """

    points: np.ndarray
    colours: np.ndarray
    title: str = ""
    sizes: np.ndarray | None = None
    frame: np.ndarray | None = None

    def fitted(self) -> "Panel":
        """Moved and scaled so that the frame's box is centred at 0 and its farthest point is at 1."""
        frame = self.points if self.frame is None else self.frame
        centre = (frame.min(0) + frame.max(0)) / 2
        radius = np.linalg.norm(frame - centre, axis=1).max() or 1.0
        sizes = np.ones(len(self.points), np.float32) if self.sizes is None else self.sizes
        sizes = sizes * (dot(max(len(frame), len(self.points))) / dot(len(self.points)))  # as large as the frame's
        return replace(self, points=((self.points - centre) / radius).astype(np.float32), sizes=sizes, frame=None)


@dataclass(frozen=True)
class Picture:
    """Clouds in a grid.

    Args:
        panels: row by row, one at least.
        heading: above the grid.
        columns: of the grid; None for one that is about 4 wide and 3 high.
        legend: colours ("#rrggbb") and what they mean.
    """

    panels: Sequence[Panel]
    heading: str = ""
    columns: int | None = None
    legend: Sequence[tuple[str, str]] = ()

    @property
    def width(self) -> int:
        """Columns of the grid."""
        count = len(self.panels)
        return max(1, min(count, self.columns or (count if count <= 4 else math.ceil(math.sqrt(count * 4 / 3)))))


def rgb(colour: str) -> np.ndarray:
    """``"#rrggbb"`` as uint8 ``[3]``."""
    return np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)], np.uint8)


def palette(count: int) -> list[str]:
    """``count`` colours that can be told apart on white: the fixed ones while they last, then hues all around, in
    three lightnesses."""
    if count <= len(COLOURS):
        return list(COLOURS[:count])
    tones = [colorsys.hls_to_rgb((i * 0.618034) % 1, (0.36, 0.5, 0.62)[i % 3], 0.62) for i in range(count)]
    return ["#" + "".join(f"{round(255 * part):02x}" for part in tone) for tone in tones]


def blend(low: str, high: str, share: np.ndarray) -> np.ndarray:
    """Colours uint8 ``[P, 3]`` between two, for shares ``[P]`` in [0, 1]."""
    share = np.clip(share, 0, 1)[:, None]
    return np.round(rgb(low) * (1 - share) + rgb(high) * share).astype(np.uint8)


def by_height(points: np.ndarray) -> np.ndarray:
    """The colours of a plain cloud ``[P, 3]``, darker at its foot: uint8 ``[P, 3]``."""
    height = points[:, 1] - points[:, 1].min()
    return blend(_LOW, _HIGH, height / (height.max() or 1))


def by_sign(values: np.ndarray) -> np.ndarray:
    """Red for positive values ``[P]``, blue for negative ones, grey about 0: uint8 ``[P, 3]``. The strongest colour is
    at the 98th percentile of their sizes, so that a few points do not take all of the range. NaN is grey."""
    values = np.nan_to_num(values)
    share = values / (np.quantile(np.abs(values), 0.98) or np.abs(values).max() or 1)
    return np.where(share[:, None] > 0, blend(NEUTRAL, FOR, share), blend(NEUTRAL, AGAINST, -share))


def plain_panel(points: Tensor, title: str) -> Panel:
    """A cloud ``[P, 3]``, y up, coloured by height; of a large one its farthest-point sample."""
    points = points.detach().float().cpu()
    if len(points) > MOST_POINTS:
        points = points[farthest_point_sample(points[None], MOST_POINTS)[0]]
    return Panel(points.numpy(), by_height(points.numpy()), title)


def view_matrix(yaw: float = YAW, pitch: float = PITCH) -> np.ndarray:
    """From points (y up) to right, up, and towards the reader: ``[3, 3]``, for ``points @ matrix.T``. In degrees."""
    a, b = math.radians(yaw), math.radians(pitch)
    turn = np.array([[math.cos(a), 0, math.sin(a)], [0, 1, 0], [-math.sin(a), 0, math.cos(a)]])
    tilt = np.array([[1, 0, 0], [0, math.cos(b), -math.sin(b)], [0, math.sin(b), math.cos(b)]])
    return tilt @ turn


def dot(count: int) -> float:
    """Diameter of a usual point of a cloud of ``count``, in half-widths of its panel."""
    return min(0.06, max(0.012, 0.9 / math.sqrt(max(1, count))))


def stacked(parts: Sequence[tuple[Tensor, str]]) -> tuple[np.ndarray, np.ndarray]:
    """Points ``[..., 3]`` of several colours as one cloud: points ``[P, 3]`` and colours ``[P, 3]``."""
    flat = [(points.detach().float().cpu().reshape(-1, 3), colour) for points, colour in parts]
    points = torch.cat([one for one, _ in flat]).numpy()
    return points, np.concatenate([np.tile(rgb(colour), (len(one), 1)) for one, colour in flat])

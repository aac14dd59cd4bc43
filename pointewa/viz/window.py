"""A window of Open3D, where there is a display."""

import os
import sys

import numpy as np

from pointewa.errors import ConfigError, first_line
from pointewa.viz.offscreen import REMEDY
from pointewa.viz.panels import BACKGROUND, Picture, rgb, view_matrix

_GAP = 2.3  # between the middles of neighbouring clouds, in their radii


def placed(picture: Picture) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All clouds of a picture side by side: points ``[P, 3]``, colours ``[P, 3]`` in [0, 1], sizes ``[P]``.

    They are turned about the up axis by the usual angle, so that they look as in the other pictures."""
    turn = view_matrix(pitch=0)
    points, colours, sizes = [], [], []
    for number, panel in enumerate(picture.panels):
        row, column = divmod(number, picture.width)
        fitted = panel.fitted()
        points.append(fitted.points @ turn.T + _GAP * np.array([column, -row, 0]))
        colours.append(panel.colours / 255)
        sizes.append(fitted.sizes)
    return np.concatenate(points), np.concatenate(colours), np.concatenate(sizes)


def show(picture: Picture) -> None:
    """Open a window and wait until it is closed.

    Raises:
        ConfigError: no display, no Open3D, or no window can be opened.
    """
    if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        raise ConfigError("--show: there is no display here: use --html x.html, which turns in any browser, or --out")
    try:
        import open3d  # slow, and needs system libraries: only here
    except (ImportError, OSError) as error:
        raise ConfigError(
            f"--show: needs Open3D, which cannot be imported ({first_line(error)}): {REMEDY}, or use --html x.html"
        ) from error
    cloud = open3d.geometry.PointCloud()
    points, colours, sizes = placed(picture)
    cloud.points, cloud.colors = open3d.utility.Vector3dVector(points), open3d.utility.Vector3dVector(colours)
    window = open3d.visualization.Visualizer()
    if not window.create_window(picture.heading or "clouds", 1200, 900):
        raise ConfigError("--show: Open3D could not open a window: use --html x.html, which turns in any browser")
    window.add_geometry(cloud)
    for point, colour in zip(points[sizes > 1.5], colours[sizes > 1.5], strict=True):  # points have one size there
        ball = open3d.geometry.TriangleMesh.create_sphere(0.03, 8).translate(point)
        window.add_geometry(ball.paint_uniform_color(colour))
    window.get_render_option().background_color = rgb(BACKGROUND) / 255
    window.get_render_option().point_size = 4
    window.run()
    window.destroy_window()

"""Clouds rendered as lit balls by Open3D, without a window.

It runs in a process of its own: Filament, its renderer, ends the whole process when a system library is missing.
"""

import importlib.util
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from pointewa.viz.clouds import REACH, faded, project
from pointewa.viz.panels import BACKGROUND, DISTANCE, Panel, Picture, dot, rgb, view_matrix

REMEDY = "pip install open3d-cpu and apt install libusb-1.0-0 libgl1 libegl1 libvulkan1 mesa-vulkan-drivers"
_SIDE, _FINER = 600, 2  # pixels of an image, and how many are rendered for each: nothing else smooths the edges
_NEAR = 0.1  # of the camera: a ball that is nearer is left out
_SECONDS = 60  # for Open3D to start, and as long again for each panel, on a slow processor
_BALL = 6  # rings of a ball: round enough at a few pixels
_LIGHT = (0.3, -0.6, -0.7)  # from above on the left, as the reader sees it


class RenderError(Exception):
    """Open3D is installed but cannot render; the message, one line, says why."""


def available() -> bool:
    """Whether Open3D is installed; it is not imported."""
    return importlib.util.find_spec("open3d") is not None


def render(picture: Picture) -> list[np.ndarray]:
    """Each panel's cloud as matplotlib would place it, the points as lit balls on the background.

    Returns:
        RGB images, uint8 ``[H, W, 3]``, of the square from ``-REACH`` to ``REACH`` of `project`.

    Raises:
        RenderError: Open3D cannot be imported, or cannot render here.
    """
    with tempfile.TemporaryDirectory() as folder:
        given, drawn = Path(folder, "in.npz"), Path(folder, "out.npz")
        np.savez(given, **{f"{i}{key}": value for i, panel in enumerate(picture.panels)
                           for key, value in _balls(panel.fitted()).items()})  # fmt: skip
        limit = _SECONDS * (1 + len(picture.panels))
        try:
            ended = subprocess.run(_command(given, drawn), env=_environment(), capture_output=True, text=True,
                                   errors="replace", timeout=limit, stdin=subprocess.DEVNULL, check=False)  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise RenderError(f"Open3D rendered nothing within {limit} s") from error
        if ended.returncode:
            raise RenderError(_reason(ended))
        with np.load(drawn) as images:
            return [images[str(i)] for i in range(len(picture.panels))]


def _command(given: Path, drawn: Path) -> list[str]:
    return [sys.executable, "-m", "pointewa.viz.offscreen", str(given), str(drawn)]


def _environment() -> dict[str, str]:
    """Whatever the working directory, the child process finds this package."""
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def _reason(ended: "subprocess.CompletedProcess[str]") -> str:
    code = ended.returncode
    number = -code if code < 0 else code - 128
    try:
        how = f"was ended by {signal.Signals(number).name}"
    except ValueError:
        how = f"ended with exit code {code}"
    lines = [line.strip() for line in re.sub(r"\x1b\[[\d;]*m", "", ended.stderr).splitlines() if line.strip()]
    lines = [line for line in lines if line.startswith("reason:")] or lines  # Filament's own, before a stack trace
    return f"Open3D's renderer {how}" + (f", {lines[-1].removeprefix('reason: ')}" if lines else "")


def _balls(panel: Panel) -> dict[str, np.ndarray]:
    """Of a fitted panel: centres ``[P, 3]`` as the camera sees them, radii ``[P]``, colours ``[P, 3]`` in [0, 1]."""
    centres = panel.points @ view_matrix().T
    radii = dot(len(panel.points)) * panel.sizes * REACH / 2  # half-widths of a panel are REACH wide
    seen = np.isfinite(centres).all(1) & (centres[:, 2] + radii < DISTANCE - _NEAR)
    found = {"centres": centres, "radii": radii, "colours": faded(panel.colours, project(panel.points)[2])}
    return {name: value[seen] for name, value in found.items()}


def _mesh(open3d: Any, centres: np.ndarray, radii: np.ndarray, colours: np.ndarray) -> Any:
    ball = open3d.geometry.TriangleMesh.create_sphere(1.0, _BALL)
    corners, triangles = np.asarray(ball.vertices), np.asarray(ball.triangles)
    first = len(corners) * np.arange(len(centres))[:, None, None]
    mesh = open3d.geometry.TriangleMesh()
    vectors = open3d.utility.Vector3dVector
    mesh.vertices = vectors((centres[:, None] + radii[:, None, None] * corners).reshape(-1, 3))
    mesh.triangles = open3d.utility.Vector3iVector((triangles + first).reshape(-1, 3))
    mesh.vertex_normals = vectors(np.tile(corners, (len(centres), 1)))  # those of a true ball, however few its corners
    mesh.vertex_colors = vectors(np.repeat(colours, len(corners), 0))
    return mesh


def _draw(given: Path, drawn: Path) -> None:
    """In the child: from the balls of each panel to its image."""
    import open3d

    rendering, wide = open3d.visualization.rendering, _SIDE * _FINER
    renderer = rendering.OffscreenRenderer(wide, wide)
    scene, material = renderer.scene, rendering.MaterialRecord()
    scene.set_background([*rgb(BACKGROUND) / 255, 1])
    scene.view.set_post_processing(False)  # its tone mapping makes white grey, and every colour another
    scene.set_lighting(scene.LightingProfile.SOFT_SHADOWS, _LIGHT)
    material.shader, material.base_roughness, material.base_reflectance = "defaultLit", 1.0, 0.0  # chalk: no gloss
    angle = 2 * math.degrees(math.atan(REACH / math.sqrt(DISTANCE**2 - 1)))
    images = {}
    with np.load(given) as arrays:
        for i in range(len(arrays.files) // 3):
            centres, radii, colours = (arrays[f"{i}{name}"] for name in ("centres", "radii", "colours"))
            scene.clear_geometry()
            if len(centres):
                scene.add_geometry("balls", _mesh(open3d, centres, radii, colours), material)
            far = DISTANCE + 1 - min(0, centres[:, 2].min(initial=0))
            renderer.setup_camera(angle, [0, 0, 0], [0, 0, DISTANCE], [0, 1, 0], _NEAR, far)
            fine = np.asarray(renderer.render_to_image()).reshape(_SIDE, _FINER, _SIDE, _FINER, 3)
            images[str(i)] = fine.mean((1, 3)).round().astype(np.uint8)
    np.savez(drawn, **images)


if __name__ == "__main__":
    _draw(Path(sys.argv[1]), Path(sys.argv[2]))

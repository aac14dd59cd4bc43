"""Open3D's pictures agree with matplotlib's, and matplotlib's are drawn, with a word why, where there are none."""

import io
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from pointewa.tools import cli, visualize
from pointewa.viz import clouds, offscreen
from pointewa.viz.panels import Panel, Picture

CLOUD = ["cloud", "--count", "1", "data.num_points=64"]


def two_parts():
    """A cube, red on the reader's left, blue on the right."""
    points = np.random.default_rng(0).random((800, 3)).astype(np.float32) - 0.5
    right = points @ clouds.view_matrix()[0] > 0
    return Panel(points, np.where(right[:, None], np.uint8([0, 0, 255]), np.uint8([255, 0, 0])))


@pytest.fixture
def child(monkeypatch):
    """Open3D seems to be there, and this code runs in place of the child's."""
    monkeypatch.setattr(offscreen, "available", lambda: True)
    return lambda code: monkeypatch.setattr(offscreen, "_command", lambda *files: [sys.executable, "-c", code])


def fails(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        cli.run(lambda: visualize.main([*CLOUD, *arguments]))
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert error.count("\n") == 1
    return error


def test_without_open3d(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "open3d", None)
    visualize.main(CLOUD)
    assert capsys.readouterr().out == "wrote cloud.png (drawn by matplotlib)\n"
    visualize.main([*CLOUD, "--renderer", "matplotlib", "--out", "x.png"])
    assert (tmp_path / "x.png").read_bytes() == (tmp_path / "cloud.png").read_bytes()
    error = fails(capsys, "--renderer", "open3d", "--out", "y.png")
    assert error.startswith("error: --renderer open3d: Open3D is not installed: pip install open3d-cpu")
    assert "mesa-vulkan-drivers" in error
    assert not (tmp_path / "y.png").exists()


DEATHS = [
    ("import os; os.abort()", "was ended by SIGABRT"),
    ("import sys; sys.exit(134)", "was ended by SIGABRT"),
    ("import sys; print('a trace\\nreason: no \\x1b[1mVulkan\\n#1 0x55', file=sys.stderr); sys.exit(134)",
     "was ended by SIGABRT, no Vulkan"),
    ("raise OSError('libusb-1.0.so.0: cannot open')", "ended with exit code 1, OSError: libusb-1.0.so.0: cannot open"),
]  # fmt: skip


@pytest.mark.parametrize(("code", "why"), DEATHS)
def test_a_child_that_dies(child, tmp_path, monkeypatch, capsys, code, why):
    monkeypatch.chdir(tmp_path)
    child(code)
    visualize.main(CLOUD)
    assert capsys.readouterr().out == f"wrote cloud.png (drawn by matplotlib: Open3D's renderer {why})\n"
    visualize.main([*CLOUD, "--renderer", "matplotlib", "--out", "x.png"])
    assert (tmp_path / "x.png").read_bytes() == (tmp_path / "cloud.png").read_bytes()
    capsys.readouterr()
    assert why in fails(capsys, "--renderer", "open3d", "--out", "y.png")
    assert not (tmp_path / "y.png").exists()


def test_a_child_that_hangs(child, monkeypatch):
    child("import time; time.sleep(600)")
    monkeypatch.setattr(offscreen, "_SECONDS", 0.2)
    with pytest.raises(offscreen.RenderError, match=r"rendered nothing within 0\.4 s"):
        offscreen.render(Picture([two_parts()]))


def test_what_is_no_place_is_left_out():
    points = np.array([[0, 0, 0], [np.nan, 0, 0], 5 * clouds.view_matrix()[2]], np.float32)  # the last: behind it
    found = offscreen._balls(Panel(points, np.zeros((3, 3), np.uint8), sizes=np.ones(3, np.float32)))
    assert {name: len(value) for name, value in found.items()} == {"centres": 1, "radii": 1, "colours": 1}


@pytest.fixture(scope="module")
def rendered():
    """Two panels by Open3D, the second a single point in the middle."""
    pytest.importorskip("open3d", reason="no Open3D here: pip install open3d-cpu", exc_type=ImportError)
    lone = Panel(np.zeros((1, 3), np.float32), np.zeros((1, 3), np.uint8), frame=two_parts().points)
    try:
        return offscreen.render(Picture([two_parts(), lone]))
    except offscreen.RenderError as error:
        pytest.skip(str(error))


def test_a_rendered_cloud_is_where_matplotlib_draws_it(rendered):
    image, lone = rendered
    assert image.shape == lone.shape == (600, 600, 3)
    assert image.dtype == np.uint8
    assert (image[:40] == 255).all()
    assert (image[:, :40] == 255).all()
    drawn, file = image.min(-1) < 200, io.BytesIO()
    figure = Figure((clouds._SIDE, clouds._SIDE))
    axes = figure.add_axes((0, 0, 1, 1))
    clouds._draw(axes, two_parts().fitted())
    axes.set(xlim=(-clouds.REACH, clouds.REACH), ylim=(-clouds.REACH, clouds.REACH))
    axes.set_axis_off()
    figure.savefig(file, dpi=600 / clouds._SIDE, format="png")
    flat = imread(io.BytesIO(file.getvalue()))[..., :3].min(-1) < 200 / 255
    assert flat.shape == drawn.shape
    assert (drawn & flat).sum() / (drawn | flat).sum() > 0.9  # 0.967 with Open3D 0.20.0
    middle = np.argwhere(lone.min(-1) < 200).mean(0)
    assert middle == pytest.approx([300, 300], abs=40)


def test_rendered_colours_are_where_they_should_be(rendered):
    image = rendered[0].astype(int)
    red, blue = image[..., 0] > image[..., 2] + 60, image[..., 2] > image[..., 0] + 60
    assert red[:, :280].sum() > 5000
    assert blue[:, 320:].sum() > 5000
    assert not red[:, 320:].any()
    assert not blue[:, :280].any()

"""Pages are whole in themselves, and their clouds turn in a real browser."""

import base64
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from pointewa.viz.clouds import project, upright
from pointewa.viz.experts import experts_figure
from pointewa.viz.html import clouds_html, page, save_page, svg_html
from pointewa.viz.panels import Panel, Picture, dot, plain_panel, rgb


class Collector(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def of(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def clouds(count=3, points=200):
    return torch.rand(count, points, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([3.0, 1.0, 0.4])


def picture(count=3, **kwargs):
    return Picture([plain_panel(one, f"cloud {i} <&>\nsecond line") for i, one in enumerate(clouds(count))], **kwargs)


def test_a_page_holds_the_numbers_and_refers_to_nothing_else():
    drawn = picture(heading="a <b> & c", legend=[("#ff0000", "red & <hot>")])
    text = page("a <b> & c", [clouds_html(drawn), svg_html(experts_figure({}, {"l": torch.rand(3, 3)}, "t"))])
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\((?!#)", text)
    parsed = Collector(text)
    assert not [attrs for _, attrs in parsed.tags if "src" in attrs]
    assert all(value.startswith(("data:", "#")) for _, attrs in parsed.tags if (value := attrs.get("href")))
    canvases = parsed.of("canvas")
    assert len(canvases) == 3
    assert len(parsed.of("figcaption")) == 3
    assert len(parsed.of("svg")) == 1
    assert "<b>" not in text
    assert "red &amp; &lt;hot&gt;" in text
    assert "<script>" in text
    view = json.loads(parsed.of("div")[0]["data-view"])
    assert view["background"] == [255, 255, 255]
    assert view["distance"] == 4.0
    for canvas, panel in zip(canvases, drawn.panels, strict=True):
        raw = np.frombuffer(base64.b64decode(canvas["data-points"]), "<i2").reshape(-1, 3)
        points = raw * float(canvas["data-scale"])
        assert np.abs(points - panel.fitted().points).max() < 4e-5
        assert np.linalg.norm(points, axis=1).max() == pytest.approx(1, abs=1e-4)
        colours = np.frombuffer(base64.b64decode(canvas["data-colours"]), np.uint8).reshape(-1, 3)
        assert (colours == panel.colours).all()
        assert set(base64.b64decode(canvas["data-sizes"])) == {16}
        assert int(canvas["data-count"]) == 200
        assert float(canvas["data-dot"]) == pytest.approx(dot(200))
    assert "<script>" not in page("flat", ["<p>x</p>"])  # no clouds, no viewer


def ratios(text):
    """Width over height of each canvas."""
    return [float(re.fullmatch(r"aspect-ratio:([\d.]+)", one["style"])[1]) for one in Collector(text).of("canvas")]


def test_a_row_is_as_high_as_its_clouds_need():
    ball = torch.nn.functional.normalize(torch.randn(2000, 3), dim=1)
    flat, tall = ball * torch.tensor([1, 0.1, 0.6]), ball * torch.tensor([0.2, 1, 0.2])
    panels = [plain_panel(one, "") for one in (flat, flat, flat, tall, ball, flat)]
    found = ratios(clouds_html(Picture(panels, columns=3)))
    first, second = found[:3], found[3:]
    assert len(set(first)) == len(set(second)) == 1  # what is side by side stays so
    low, high = upright(panels[0].fitted().points)
    assert first[0] == pytest.approx(1.06 / ((high - low) / 2 + 0.06), abs=2e-3)
    assert first[0] > 1.9
    assert second[0] == pytest.approx(1, abs=0.01)
    dot_only = Panel(np.zeros((1, 3), np.float32), np.zeros((1, 3), np.uint8))
    assert 3 < ratios(clouds_html(Picture([dot_only])))[0] < 4  # there is a limit


def test_nothing_is_cut_off_however_a_flat_cloud_is_turned(browser, tmp_path):
    ball = torch.nn.functional.normalize(torch.randn(2000, 3), dim=1)
    flat = plain_panel(ball * torch.tensor([1, 0.1, 1]), "flat")
    save_page(tmp_path / "x.html", "x", [clouds_html(Picture([flat, flat, flat]))])
    browser.problems.clear()
    browser.open(tmp_path / "x.html")
    rim = """(() => { const canvas = document.querySelector("canvas"), w = canvas.width, h = canvas.height;
        const data = canvas.getContext("2d").getImageData(0, 0, w, h).data, dark = (i) => data[4 * i] < 250;
        let rim = 0, low = h, high = 0;
        for (let y = 0; y < h; y++) for (let x = 0; x < w; x++) if (dark(y * w + x)) {
            rim += y === 0 || y === h - 1, low = Math.min(low, y), high = Math.max(high, y);
        }
        return [rim, (high - low) / h, h / w]; })()"""
    browser.pixels()
    cut, filled, ratio = browser.run(rim)
    assert cut == 0
    assert filled > 0.8
    assert ratio < 0.6
    browser.drag(130, 0)  # about the up axis
    browser.pixels()
    assert browser.run(rim)[0] == 0
    for _ in range(3):  # to the view from above, where it is a disc
        browser.drag(0, 90)
    browser.pixels()
    cut, filled, _ = browser.run(rim)
    assert cut == 0
    assert filled > 0.8
    assert not browser.problems


def test_what_is_far_outside_its_frame_is_moved_to_the_rim():
    points = np.array([[-1, 0, 0], [1, 0, 0], [1000, 0, 0]], np.float32)
    panel = Panel(points, np.zeros((3, 3), np.uint8), frame=points[:2])
    (canvas,) = Collector(clouds_html(Picture([panel]))).of("canvas")
    raw = np.frombuffer(base64.b64decode(canvas["data-points"]), "<i2").reshape(-1, 3) * float(canvas["data-scale"])
    assert np.allclose(raw, [[-1, 0, 0], [1, 0, 0], [4, 0, 0]], atol=2e-4)


def test_a_browser_draws_turns_and_zooms(browser, tmp_path):
    save_page(tmp_path / "x.html", "x", [clouds_html(picture())])
    browser.problems.clear()
    browser.open(tmp_path / "x.html")
    first = [browser.pixels(i) for i in range(3)]
    assert all(drawn > 500 and width >= 200 for drawn, _, width in first)
    assert [browser.pixels(i) for i in range(3)] == first  # it stands still by itself
    browser.drag(80, 0)
    turned = [browser.pixels(i) for i in range(3)]
    assert all(a[1] != b[1] for a, b in zip(first, turned, strict=True))  # all of them turn together
    browser.drag(-80, 0)
    assert [browser.pixels(i) for i in range(3)] == first
    browser.drag(0, 60, number=1)
    assert browser.pixels()[1] != first[0][1]
    browser.run("document.querySelector('canvas').dispatchEvent(new MouseEvent('dblclick'))")
    assert browser.pixels() == first[0]
    browser.wheel(400)  # away from it
    assert browser.pixels()[0] < 0.7 * first[0][0]
    browser.run("document.querySelector('canvas').dispatchEvent(new KeyboardEvent('keydown', {key: 'Home'}))")
    assert browser.pixels() == first[0]
    assert not browser.problems


def test_two_fingers_zoom_and_one_turns(browser, tmp_path):
    save_page(tmp_path / "x.html", "x", [clouds_html(picture(1))])
    browser.problems.clear()
    browser.open(tmp_path / "x.html")
    first, (x, y) = browser.pixels(), browser.middle()

    def touch(kind, *places):
        browser.ask("Input.dispatchTouchEvent", type=kind,
                    touchPoints=[{"x": x + dx, "y": y, "id": i} for i, dx in enumerate(places)])  # fmt: skip

    touch("touchStart", -60, 60)
    touch("touchMove", -30, 30)
    touch("touchEnd")
    assert browser.pixels()[0] < 0.5 * first[0]  # half as wide
    browser.run("document.querySelector('canvas').dispatchEvent(new MouseEvent('dblclick'))")
    touch("touchStart", 0)
    touch("touchMove", 50)
    touch("touchEnd")
    assert browser.pixels()[1] != first[1]
    assert not browser.problems


def test_the_browser_s_view_is_the_png_s(browser, tmp_path):
    """The same three points are in the same places."""
    points = np.array([[0.9, 0, 0], [0, 0.9, 0], [0, -0.5, 0.7]], np.float32)
    middle = sum(upright(points)) / 2  # of the panel's height
    frame = np.array([[-1, 0, 0], [1, 0, 0]], np.float32)
    colours = np.array([rgb(colour) for colour in ("#ff0000", "#00ff00", "#0000ff")])
    panel = Panel(points, colours, frame=frame)
    save_page(tmp_path / "x.html", "x", [clouds_html(Picture([panel]))])
    browser.open(tmp_path / "x.html")
    found = browser.run("""(() => {
        const canvas = document.querySelector("canvas"), side = canvas.width, high = canvas.height;
        const data = canvas.getContext("2d").getImageData(0, 0, side, high).data, sums = [0, 1, 2].map(() => [0, 0, 0]);
        for (let i = 0; i < data.length; i += 4) for (const k of [0, 1, 2]) {
            const weight = Math.max(0, data[i + k] - Math.max(data[i + (k + 1) % 3], data[i + (k + 2) % 3]));
            sums[k][0] += weight, sums[k][1] += weight * ((i / 4) % side + 0.5);
            sums[k][2] += weight * (Math.floor(i / 4 / side) + 0.5);
        }
        return sums.map(([w, x, y]) => [(x / w / side * 2 - 1) * 1.06, (high / side - y / w / side * 2) * 1.06]);
    })()""")
    assert np.allclose(np.add(found, [0, middle]), project(points)[0], atol=0.01)

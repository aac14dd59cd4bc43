"""`python -m tools.report`: one whole page of a run, which a browser opens without a complaint."""

import html
import json
import os
import re
import shlex
import shutil
from datetime import UTC, datetime, timedelta

import pytest
from tensorboard.backend.event_processing.event_accumulator import IMAGES, SCALARS, TENSORS, EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from pointewa.config import differences, load_config, to_yaml
from pointewa.datasets.layouts import shapes
from pointewa.inference import page
from pointewa.tasks.classification import Classification
from pointewa.tools import cli, evaluate, report, train
from pointewa.viz.report import curves_figure
from tests.tools.test_visualize import FAST, runs  # noqa: F401, a fixture
from tests.viz.conftest import browser  # noqa: F401, a fixture


@pytest.mark.parametrize("name", ["ewa", "dense"])
def test_the_page_tells_what_the_run_found(runs, capsys, name):  # noqa: F811
    summary = json.loads((runs / name / "summary.json").read_text())
    capsys.readouterr()
    report.main([str(runs / name), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["oa"] == pytest.approx(summary["test"]["oa"], abs=1e-3)
    text = (runs / name / "report.html").read_text()
    assert not re.search(r"https?:", text)
    for part in ("Result", "Training", "Confusion matrix", "What predictions rest on", "Environment", "Configuration"):
        assert f"<h2>{part}</h2>" in text
    assert ("<h2>Experts</h2>" in text) == (name == "ewa") == ("in training (MoE)" in text)
    assert f"{summary['test']['oa']:.2f} %" in text
    assert f"{summary['parameters']:,}" in text
    assert "group_size: 8" in text
    assert text.count("<canvas") == 8 + 3 * 3
    assert f"of {found['mistakes']} mistakes on 68 objects" in text
    report.main([str(runs / name), "--count", "3", "--out", str(runs / "again.html")])
    assert (runs / "again.html").read_text().count("<canvas") == 3 + 3 * 3


def test_the_page_says_when_and_by_which_command(runs, tmp_path):  # noqa: F811
    report.main([str(runs / "ewa"), "--out", str(tmp_path / "x.html")])
    text = html.unescape((tmp_path / "x.html").read_text())
    ended = datetime.fromisoformat(json.loads((runs / "ewa/summary.json").read_text())["finished"])
    assert datetime.now(UTC) - timedelta(hours=1) < ended <= datetime.now(UTC)
    assert f"Finished {ended:%Y-%m-%d %H:%M} UTC." in text
    (command,) = re.findall(r"<h2>The same training again</h2>\n<pre>(.*?)</pre>", text)
    python, _, module, *keys = shlex.split(command)
    assert (python, module) == ("python", "tools.train")
    trained, again = load_config([runs / "ewa/config.yaml"]), load_config(overrides=keys)
    assert not differences(trained, again, ["run.name", "run.dir", "run.report"])
    assert not any(key.startswith("run.") for key in keys)


@pytest.mark.parametrize("value", ["a b", "yes", "1e3", "null", "it's", "$HOME", "a: b", "[1]", "x,y", ""])
def test_the_command_quotes_what_has_to_be(runs, tmp_path, value):  # noqa: F811
    shutil.copytree(runs / "dense", tmp_path / "x")
    config = load_config([runs / "dense/config.yaml"])
    config.train.init_from, config.data.augment = value, ["jitter", "scale_shift"]
    (tmp_path / "x/config.yaml").write_text(to_yaml(config))
    words = shlex.split(page._command(tmp_path / "x", {"processes": 2}))
    assert words[3:5] == ["--nproc", "2"]
    assert not differences(config, load_config(overrides=words[5:]), ["run.name", "run.dir", "run.report"])


def test_the_page_of_an_older_run_or_one_of_a_damaged_configuration(runs, tmp_path):  # noqa: F811
    """The date is that of the summary; there is no command."""
    folder = tmp_path / "x"
    shutil.copytree(runs / "dense", folder)
    summary = json.loads((folder / "summary.json").read_text())
    del summary["finished"]
    (folder / "summary.json").write_text(json.dumps(summary))
    os.utime(folder / "summary.json", (0, 1_000_000_000))
    (folder / "config.yaml").write_text("data: [")
    report.main([str(folder)])
    text = (folder / "report.html").read_text()
    assert "Finished 2001-09-09 01:46 UTC." in text
    assert "The same training again" not in text


def test_the_page_has_a_table_of_the_classes_and_the_share_rate(runs, capsys, tmp_path):  # noqa: F811
    evaluate.main([str(runs / "ewa"), "--confusion", "--json"])
    found = json.loads(capsys.readouterr().out)
    report.main([str(runs / "ewa"), "--out", str(tmp_path / "x.html")])
    table = re.search(r"<h2>Classes</h2>\n<table>(.*?)</table>", (tmp_path / "x.html").read_text(), re.DOTALL)[1]
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in table.split("<tr>")[2:]]
    assert [row[0] for row in rows] == list(found["per_class"])
    for number, (row, counts) in enumerate(zip(rows, found["confusion"], strict=True)):
        assert row[1:4] == ["4", str(counts[number]), f"{25 * counts[number]:.1f} %"]
        others = [count for other, count in enumerate(counts) if other != number]
        assert row[4] == "-" if not any(others) else row[4].endswith(f" ({max(others)})")
    records = [{"epoch": 0, "ewa/share_rate": 0.1}, {"epoch": 1, "ewa/share_rate": 0.2}]
    (axes,) = [axes for axes in curves_figure(records, page._diagrams(Classification)).axes if axes.get_ylabel()]
    assert axes.get_ylabel() == "share rate"
    assert axes.lines[0].get_xydata().tolist() == [[1, 0.1], [2, 0.2]]


def test_the_page_is_dark_where_the_reader_s_pages_are(runs, browser, tmp_path):  # noqa: F811
    report.main([str(runs / "ewa"), "--out", str(tmp_path / "x.html")])
    corner = """(() => { const canvas = document.querySelector("canvas");
        return [...canvas.getContext("2d").getImageData(0, 0, 1, 1).data]; })()"""
    looks = "((one) => [one.backgroundColor, one.color, one.filter])(getComputedStyle(document.querySelector('{}')))"
    browser.open(tmp_path / "x.html")
    browser.run("document.querySelector('canvas').scrollIntoView()")
    browser.pixels()
    try:
        for mode, shade, ink in (("light", 255, "rgb(31, 41, 51)"), ("dark", 26, "rgb(230, 230, 230)")):
            browser.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": mode}])
            browser.pixels()  # the page is open: it follows
            assert browser.run(corner) == [shade, shade, shade, 255]
            assert browser.run(looks.format("body"))[:2] == [f"rgb({shade}, {shade}, {shade})", ink]
            for picture in ("svg", "img"):
                inverted = browser.run(looks.format(picture))[2]
                assert inverted == ("none" if mode == "light" else "invert(0.9) hue-rotate(180deg)")
    finally:
        browser.ask("Emulation.setEmulatedMedia", features=[])


def test_the_page_of_a_pretraining_shows_reconstructions(runs, capsys):  # noqa: F811
    report.main([str(runs / "pre"), "--count", "2", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found == {"html": str(runs / "pre/report.html"), "objects": 68}
    text = (runs / "pre/report.html").read_text()
    for part in ("Result", "Training", "Reconstructions", "Environment", "Configuration"):
        assert f"<h2>{part}</h2>" in text
    for part in ("Confusion matrix", "Experts", "in training (MoE)", "accuracy", "Evaluated again"):
        assert part not in text
    loss = json.loads((runs / "pre/summary.json").read_text())["test"]["loss"]
    assert f"<td>Chamfer distance of masked patches</td><td class=number>{loss:.3e}</td>" in text
    assert text.count("<canvas") == 2 * 3


def test_the_page_of_a_gated_run_does_not_call_it_dense(tmp_path):
    train.main([*FAST, "moe.router=top_k", "run.report=true", f"run.dir={tmp_path}", "run.name=a"])
    text = (tmp_path / "a/report.html").read_text()
    assert "<th></th><th>gated MoE</th></tr>" in text
    assert "<th>dense</th>" not in text
    assert "<h2>Experts</h2>" in text


def test_a_browser_opens_it(runs, browser):  # noqa: F811
    report.main([str(runs / "ewa")])
    browser.problems.clear()
    browser.open(runs / "ewa/report.html")
    browser.run("document.querySelectorAll('.clouds')[1].scrollIntoView()")
    first = browser.pixels(8)
    assert first[0] > 100
    browser.drag(60, 20, number=8)
    assert browser.pixels(8)[1] != first[1]
    assert not browser.problems


def test_a_training_ends_with_its_page_and_with_what_tensorboard_shows(tmp_path, capsys):
    train.main([*FAST, "run.report=true", f"run.dir={tmp_path}", "run.name=a"])
    assert f"its page: {tmp_path}/a/report.html" in capsys.readouterr().out
    assert "<h2>What predictions rest on</h2>" in (tmp_path / "a/report.html").read_text()
    board = EventAccumulator(str(tmp_path / "a"), {TENSORS: 0, IMAGES: 0, SCALARS: 0}).Reload()
    tags = board.Tags()
    assert tags["images"] == ["confusion matrix"]
    for kind in ("clouds", "patches"):
        assert f"{kind}/airplane_test_0000_VERTEX" in tags["tensors"]
        assert make_ndarray(board.Tensors(f"{kind}/airplane_test_0000_VERTEX")[0].tensor_proto).shape == (1, 64, 3)
        colours = make_ndarray(board.Tensors(f"{kind}/airplane_test_0000_COLOR")[0].tensor_proto)[0]
        assert len({tuple(colour) for colour in colours.tolist()}) > 6  # by height; a patch a colour
    summary = json.loads((tmp_path / "a/summary.json").read_text())
    assert [event.value for event in board.Scalars("result/oa")] == pytest.approx([summary["test"]["oa"]])
    (features,) = (tmp_path / "a").glob("*/features/tensors.tsv")
    assert len(features.read_text().splitlines()) == 68
    assert features.with_name("metadata.tsv").read_text().splitlines()[:2] == list(shapes.CLASSES)[:2]
    pages = (tmp_path / "a/report.html").stat().st_mtime_ns
    train.main(
        [*FAST, "run.report=true", f"run.dir={tmp_path}", "run.name=a"]
    )  # it is finished: nothing is drawn again
    assert (tmp_path / "a/report.html").stat().st_mtime_ns == pages


def test_a_page_that_cannot_be_drawn_leaves_the_run_finished(tmp_path, capsys, monkeypatch):
    def fails(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(page, "save_page", fails)
    train.main([*FAST, "run.report=true", f"run.dir={tmp_path}", "run.name=a"])
    out = capsys.readouterr().out
    assert "no page of the run: disk full" in out
    assert "overall accuracy" in out
    assert (tmp_path / "a/summary.json").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [("nowhere", "expected a run folder"), ("half", "not finished")],
)
def test_mistakes_are_one_line(runs, tmp_path, capsys, name, message):  # noqa: F811
    if name == "half":
        (runs / "half").mkdir()
        for file in ("config.yaml", "model.safetensors", "model.json"):
            (runs / "half" / file).write_bytes((runs / "ewa" / file).read_bytes())
    with pytest.raises(SystemExit) as caught:
        cli.run(lambda: report.main([str(runs / name), "--out", str(tmp_path / "x.html")]))
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())

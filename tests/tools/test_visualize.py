"""`python -m tools.visualize`: each kind from a small real run; for each mistake one line, exit code 2, no file."""

import json
import re
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from matplotlib.image import imread

from pointewa.datasets.layouts import shapes
from pointewa.runs.weights import load_model
from pointewa.tools import cli, evaluate, report, theory, train, visualize
from pointewa.viz import window

ROOT = Path(__file__).parents[2]
FAST = [
    "model.width=24", "model.depth=2", "model.heads=2", "model.num_groups=8", "model.group_size=8",
    "data.num_points=64", "train.epochs=2", "train.batch_size=64", "train.device=cpu",
    "run.report=false",
]  # fmt: skip
KINDS = {
    "cloud": [], "patches": [], "saliency": ["--run", "ewa"], "errors": ["--run", "ewa"],
    "reconstruction": ["--run", "pre"], "embedding": ["--run", "ewa"], "experts": ["--run", "ewa"],
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """An EWA run, a dense one and a pre-training, on the procedural set."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "PER_CLASS", {"train": 8, "test": 4})
        for name, more in (("ewa", []), ("dense", ["ewa.enabled=false"]),
                           ("pre", ["ewa.enabled=false", "train.task=masked_autoencoding"])):  # fmt: skip
            train.main([*FAST, *more, f"run.dir={folder}", f"run.name={name}", "--json"])
    return folder


@pytest.fixture(scope="module")
def real_runs(real_data, tmp_path_factory):
    """A short EWA run and a pre-training on a few of ModelNet40's clouds, in a packed file."""
    folder = tmp_path_factory.mktemp("real")
    with h5py.File(real_data / "modelnet40_1024.h5") as whole, h5py.File(folder / "modelnet40_few.h5", "w") as few:
        few.attrs["shape_names"] = whole.attrs["shape_names"]
        for split, step in (("train", 60), ("test", 30)):
            group = few.create_group(split)
            for key in ("data", "label", "name"):
                group[key] = whole[split][key][::step]
                group[key].attrs.update(whole[split][key].attrs)
    real = [*FAST, "data.name=modelnet40", f"data.root={folder}", f"run.dir={folder}", "data.num_points=512",
            "train.batch_size=32", "train.epochs=1", "--json"]  # fmt: skip
    train.main([*real, "run.name=ewa"])
    train.main([*real, "run.name=pre", "train.task=masked_autoencoding", "ewa.enabled=false"])
    return folder


def where(runs, arguments):
    return [str(runs / part) if part in ("ewa", "dense", "pre") else part for part in arguments]


def check(png, html):
    image = imread(png)[..., :3]
    assert (image.min(-1) < 0.9).mean() > 0.005
    assert (image[0, 0] == 1).all()
    text = html.read_text()
    assert not re.search(r"https?:", text)
    assert "<canvas" in text or "<svg" in text


def draw(tmp_path, capsys, *arguments):
    capsys.readouterr()
    png, html = tmp_path / "a.png", tmp_path / "a.html"
    visualize.main([*arguments, "--out", str(png), "--html", str(html), "--json"])
    check(png, html)
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("what", KINDS)
def test_each_kind_from_a_run(runs, tmp_path, capsys, what):
    more = FAST if what in ("cloud", "patches") else []
    assert draw(tmp_path, capsys, what, *where(runs, KINDS[what]), *more)["what"] == what


@pytest.mark.slow
@pytest.mark.parametrize("what", KINDS)
def test_each_kind_on_real_clouds(real_runs, tmp_path, capsys, what):
    run = real_runs / (KINDS[what] or ["ewa"])[-1]
    few = [] if what in ("embedding", "experts") else ["--count", "2"]
    assert draw(tmp_path, capsys, what, "--run", str(run), *few)["what"] == what


def test_objects_by_index_name_class_and_file(tmp_path, capsys):
    np.save(tmp_path / "mine.npy", np.random.default_rng(0).random((3000, 3)))
    arguments = ["--object", "5", "--object", "mug_test_0002", "--object", "chair", "--object",
                 str(tmp_path / "mine.npy"), "--count", "2", "--up", "z", *FAST]  # fmt: skip
    found = draw(tmp_path, capsys, "cloud", *arguments)
    fifth = f"{list(shapes.CLASSES)[5]}_test_0000"
    assert found["objects"] == [fifth, "mug_test_0002", "chair_test_0000", "chair_test_0001", "mine.npy"]
    assert draw(tmp_path, capsys, "cloud", *FAST, "--count", "3")["objects"][0] == "airplane_test_0000"
    assert len(draw(tmp_path, capsys, "cloud", *FAST, "--count", "99")["objects"]) == len(shapes.CLASSES)
    assert draw(tmp_path, capsys, "cloud", *FAST, "--split", "train", "--object", "0")["objects"] == [
        "airplane_train_0000"
    ]


def test_a_file_needs_no_data_set(runs, tmp_path, capsys):
    np.save(tmp_path / "mine.npy", np.random.default_rng(0).random((300, 3)))
    for what in ("cloud", "saliency"):
        draw(tmp_path, capsys, what, "--run", str(runs / "ewa"), "--object", str(tmp_path / "mine.npy"),
             "data.name=modelnet40", "data.root=/nowhere")  # fmt: skip


def test_errors_are_those_that_evaluation_counts(runs, tmp_path, capsys):
    found = draw(tmp_path, capsys, "errors", "--run", str(runs / "dense"), "--count", "5")
    evaluate.main([str(runs / "dense"), "--json"])
    judged = json.loads(capsys.readouterr().out)
    assert found["mistakes"] == round(found["objects"] * (1 - judged["oa"] / 100))
    confidences = [row["confidence"] for row in found["shown"]]
    assert len(confidences) == 5
    assert confidences == sorted(confidences, reverse=True)
    assert all(row["truth"] != row["predicted"] and row["object"].startswith(row["truth"]) for row in found["shown"])
    again = draw(tmp_path, capsys, "saliency", "--run", str(runs / "dense"), "--object", found["shown"][0]["object"])
    assert again["objects"][0]["predicted"] == found["shown"][0]["predicted"]
    assert again["objects"][0]["probability"] == pytest.approx(confidences[0], abs=1e-4)


def test_a_classifier_of_another_codebase(runs, tmp_path, capsys):
    state = load_model(runs / "dense").model.state_dict()
    torch.save({"base_model": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "ckpt.pth")
    ours = draw(tmp_path, capsys, "errors", "--run", str(runs / "dense"))
    theirs = draw(tmp_path, capsys, "errors", "--run", str(tmp_path / "ckpt.pth"), *FAST)
    assert theirs["shown"] == ours["shown"]


def test_objects_of_a_folder_of_files_go_by_their_names(tmp_path, capsys):
    for name in ("a", "b"):
        for number in range(3):
            path = tmp_path / "data" / name / f"{number}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, np.random.default_rng(number).random((100, 3)))
    named = ["--object", "b", *FAST, "data.name=folder", f"data.root={tmp_path / 'data'}"]
    (found,) = draw(tmp_path, capsys, "cloud", *named)["objects"]
    assert draw(tmp_path, capsys, "cloud", "--object", found, *named[2:])["objects"] == [found]


def test_a_file_of_few_points(runs, tmp_path, capsys):
    np.save(tmp_path / "few.npy", np.random.default_rng(0).random((4, 3)))
    few = ["--object", str(tmp_path / "few.npy")]
    draw(tmp_path, capsys, "saliency", "--run", str(runs / "ewa"), *few)  # as the model takes it: points repeat
    with pytest.raises(SystemExit) as caught:
        cli.run(lambda: visualize.main(["patches", "--num-groups", "8", *few, "--out", str(tmp_path / "x.png")]))
    assert caught.value.code == 2
    assert "few.npy: num_groups must be 1 to 4, the points of the cloud, got 8" in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()


def test_patches_as_asked_for(tmp_path, capsys):
    found = draw(tmp_path, capsys, "patches", *FAST, "--num-groups", "4", "--group-size", "9", "--object", "cup")
    assert (found["num_groups"], found["group_size"]) == (4, 9)


def test_says_how_it_was_drawn(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "open3d", None)
    visualize.main(["cloud", *FAST, "--count", "1"])
    assert capsys.readouterr().out == "wrote cloud.png (drawn by matplotlib)\n"
    visualize.main(["cloud", *FAST, "--count", "1", "--out", "x.html"])
    assert capsys.readouterr().out == "wrote x.html (open it in any browser)\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cloud.png", "x.html"]


MISTAKES = [
    (["saliency"], "--run: saliency needs a run"),
    (["cloud", "--object", "999"], "expected 0 to 67, found 999"),
    (["cloud", "--object", "teapot"], "found 'teapot'"),
    (["cloud", "--object", "no/such.ply"], "no/such.ply"),
    (["cloud", "--count", "0"], "--count: expected at least 1"),
    (["cloud", "--out", "x.jpg"], "--out: expected a name ending in .png, .pdf, .svg, .html or .htm, found x.jpg"),
    (["cloud", "--out", "x"], "--out: expected a name ending in"),
    (["errors", "--run", "nowhere", "--html", "x.png"], "--html: expected a name ending in .html or .htm, found x.png"),
    (["cloud", "--out", "x.html", "--html", "y.html"], "--out and --html: both are pages, x.html and y.html"),
    (["patches", "--num-groups", "65", "data.num_points=64"], "1 to 64"),
    (["errors", "--run", "pre"], "predicts no classes"),
    (["reconstruction", "--run", "ewa"], "reconstructs nothing"),
    (["experts", "--run", "dense"], "has no experts"),
    (["experts", "--run", "nowhere"], "nowhere"),
    (["cloud", "data.nam=x"], "data.nam"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_mistakes_are_one_line(runs, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    more = FAST if arguments[0] == "cloud" else []
    with pytest.raises(SystemExit) as caught:
        cli.run(lambda: visualize.main([*where(runs, arguments), *more]))
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert message in error
    assert error.count("\n") == 1
    assert error.startswith("error: ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("what", ["cloud", "embedding"])
@pytest.mark.parametrize(("suffix", "start"), [("pdf", b"%PDF-"), ("svg", b"<?xml")])
def test_pictures_for_papers(runs, tmp_path, capsys, what, suffix, start):
    """The same bytes each time, and in a PDF fonts that publishers take."""
    for name in ("a", "B"):
        out = tmp_path / f"{name}.{suffix.upper() if name == 'B' else suffix}"
        own = ["--count", "1"] if what == "cloud" else ["--method", "pca"]
        visualize.main(
            [what, "--run", str(runs / "ewa"), *own, "--renderer", "matplotlib", "--out", str(out), "--json"]
        )
        assert json.loads(capsys.readouterr().out)[suffix] == str(out)
    first, second = (path.read_bytes() for path in sorted(tmp_path.iterdir()))
    assert first == second
    assert first.startswith(start)
    assert b"/Type3" not in first
    assert b"<dc:date>" not in first


@pytest.mark.parametrize(
    ("tool", "arguments", "message"),
    [
        (evaluate, ["nowhere", "--confusion", "x.jpg"], "--confusion: expected a name ending in .png, .pdf or .svg, "),
        (report, ["nowhere", "--out", "x.pdf"], "--out: expected a name ending in .html or .htm, found x.pdf"),
        (theory, ["--out", "x.gif"], "--out: expected a name ending in .png, .pdf or .svg, found x.gif"),
    ],
)
def test_other_tools_check_names_before_they_work(tool, arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.run(lambda: tool.main(arguments))
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_a_window_needs_a_display(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    with pytest.raises(SystemExit) as caught:
        cli.run(lambda: visualize.main(["cloud", *FAST, "--count", "1", "--show"]))
    assert caught.value.code == 2
    assert "there is no display here: use --html" in capsys.readouterr().err
    monkeypatch.setenv("DISPLAY", ":77")
    monkeypatch.setitem(sys.modules, "open3d", None)
    with pytest.raises(window.ConfigError, match="needs Open3D"):
        window.show(None)


def test_as_a_command():
    help_text = subprocess.run([sys.executable, "-m", "tools.visualize", "--help"], cwd=ROOT, capture_output=True,
                               text=True, check=True).stdout  # fmt: skip
    assert all(what in help_text for what in KINDS)
    assert "--html" in help_text

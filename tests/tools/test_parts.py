"""A part segmentation on the command line, and what does not apply to one."""

import json

import pytest

from pointewa.datasets.layouts import shapes
from pointewa.tools import compare, evaluate, export, fold, svm, train, visualize
from tests.tools.test_messages import fails, figures

SMALL = ["--config", "configs/shapes.yaml", "--config", "configs/task/part_segmentation.yaml", "model.width=24",
         "model.depth=2", "model.heads=2", "model.num_groups=8", "model.group_size=8", "data.num_points=96",
         "train.device=cpu", "train.lr=3e-3", "train.epochs=3"]  # fmt: skip
FEW = {"train": 8, "test": 2}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Of parts with its page, an EWA run and a dense one; and a classifier."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "PER_CLASS", FEW)
        train.main([*SMALL, f"run.dir={folder}", "run.name=parts", "--json"])
        more = ["run.report=false", "ewa.enabled=false", "train.epochs=1", "--json"]
        train.main([*SMALL, f"run.dir={folder}", "run.name=dense", *more])
        train.main([*SMALL, f"run.dir={folder}", "run.name=classes", "train.task=classification", *more])
    return folder


@pytest.fixture(autouse=True)
def few_objects(monkeypatch):
    monkeypatch.setattr(shapes, "PER_CLASS", FEW)


def test_evaluation_gives_what_the_training_gave(runs, capsys):
    summary = json.loads((runs / "parts/summary.json").read_text())
    found = figures(capsys, evaluate.main, runs / "parts")
    assert {key: found[key] for key in summary["test"]} == pytest.approx(summary["test"], abs=1e-3)
    assert found["miou_by_class"] == pytest.approx(summary["miou_by_class"], abs=1e-3)
    assert (found["objects"], found["points"], found["argmax"]) == (34, "sample", "category")
    evaluate.main([str(runs / "parts"), "--points", "all", "--argmax", "all", "--votes", "2"])
    out = " ".join(capsys.readouterr().out.split())
    for text in ("all points, argmax over all parts", "plain", "2 votes", "instance mIoU", "airplane"):
        assert text in out


def test_the_other_conventions_are_other_figures(runs, capsys):
    plain = figures(capsys, evaluate.main, runs / "parts")
    among_all = figures(capsys, evaluate.main, runs / "parts", "--argmax", "all")
    assert among_all["miou"] < plain["miou"]
    assert among_all["loss"] == pytest.approx(plain["loss"])
    everywhere = figures(capsys, evaluate.main, runs / "parts", "--points", "all")
    assert everywhere["points"] == "all"
    assert everywhere["miou"] != plain["miou"]
    assert everywhere["miou"] == pytest.approx(plain["miou"], abs=10)
    lowered = figures(capsys, evaluate.main, runs / "parts", "--precision", "bfloat16")
    assert (plain["precision"], lowered["precision"]) == ("float32", "bfloat16")
    assert 0 < abs(lowered["loss"] - plain["loss"]) < 0.02 * plain["loss"]
    voted = figures(capsys, evaluate.main, runs / "parts", "--votes", 4)
    assert voted["miou"] == plain["miou"]
    assert voted["voted"]["loss"] != plain["loss"]
    assert voted["voted"] == figures(capsys, evaluate.main, runs / "parts", "--votes", 4)["voted"]


def test_of_as_many_points_as_the_files_have_all_are_the_sample(runs, capsys):
    seen = ["data.num_points=1024"]
    sample, every = (figures(capsys, evaluate.main, runs / "dense", *seen, *more) for more in ([], ["--points", "all"]))
    assert every["miou"] == pytest.approx(sample["miou"], abs=1e-2)
    assert every["accuracy"] == pytest.approx(sample["accuracy"], abs=1e-2)


def test_the_page_shows_categories_and_parts(runs):
    page = (runs / "parts/report.html").read_text()
    for text in ("<h2>Categories</h2>", "<td>seat, back, leg, arm</td>", "<h2>Lowest IoU</h2>", "<h2>Parts</h2>",
                 "prediction", "errors: ", "predicted wrongly", "mIoU", "point accuracy"):  # fmt: skip
        assert text in page


def test_parts_are_drawn(runs, tmp_path, capsys):
    out = [tmp_path / "p.png", tmp_path / "p.html"]
    found = figures(capsys, visualize.main, "parts", "--run", runs / "parts", "--object", "chair", "--count", 2,
                    "--out", out[0], "--html", out[1], "--renderer", "matplotlib")  # fmt: skip
    assert all(path.stat().st_size > 1000 for path in out)
    assert [one["object"] for one in found["objects"]] == ["chair_test_0000", "chair_test_0001"]
    assert all(0 <= one["iou"] <= 100 and 0 <= one["wrong"] <= 96 for one in found["objects"])
    assert "chair_test_0000: IoU" in out[1].read_text()


def test_folding_gives_the_segmenter(runs, tmp_path, capsys):
    fold.main([str(runs / "parts"), str(tmp_path / "f.safetensors")])
    capsys.readouterr()
    whole, folded = (figures(capsys, evaluate.main, one) for one in (runs / "parts", tmp_path / "f.safetensors"))
    assert whole == folded
    fold.main([str(runs / "parts"), str(tmp_path / "g.safetensors"), "--fuse-batch-norm"])
    fused = figures(capsys, evaluate.main, tmp_path / "g.safetensors")
    assert fused["loss"] == pytest.approx(whole["loss"], rel=1e-4)


def test_runs_are_compared_by_their_metrics(runs, capsys):
    found = figures(capsys, compare.main, runs / "parts", runs / "dense")
    assert [one["miou"] for one in found["runs"]] == [
        json.loads((runs / name / "summary.json").read_text())["test"]["miou"] for name in ("parts", "dense")
    ]
    assert found["comparisons"][0]["test"] is None
    assert "task is part_segmentation and classification" in fails(
        capsys, compare.main, runs / "parts", runs / "classes"
    )


NO_CLASSES = "a part segmentation, which predicts no classes: name a classifier's run"


@pytest.mark.parametrize(
    ("main", "run", "more", "said"),
    [
        (evaluate.main, "parts", ["--corrupt"], "--corrupt: part_segmentation does not use it: leave it out"),
        (evaluate.main, "parts", ["--confusion"], "--confusion: part_segmentation does not use it"),
        (evaluate.main, "classes", ["--points", "all"], "--points: classification does not use it"),
        (evaluate.main, "classes", ["--argmax", "all"], "--argmax: classification does not use it"),
        (svm.main, "parts", [], "a part segmentation, which has no features of whole objects"),
        (visualize.main, "parts", ["saliency"], NO_CLASSES),
        (visualize.main, "parts", ["errors"], NO_CLASSES),
        (visualize.main, "parts", ["reconstruction"], "a part segmentation, which reconstructs nothing"),
        (visualize.main, "parts", ["embedding"], "a part segmentation, which has no features of whole objects"),
        (visualize.main, "classes", ["parts"], "a classifier, which predicts no parts: name a part segmentation's run"),
    ],
)
def test_what_does_not_apply_is_refused(runs, tmp_path, capsys, main, run, more, said):
    more = [word.replace("{out}", str(tmp_path)) for word in more]
    arguments = (
        [*more, "--run", runs / run, "--out", tmp_path / "a.png"] if main is visualize.main else [runs / run, *more]
    )
    assert said in fails(capsys, main, *arguments)
    assert not list(tmp_path.iterdir())


def test_another_set_is_refused(runs, tmp_path, capsys):
    none = fails(capsys, evaluate.main, runs / "parts", "data.name=folder", f"data.root={tmp_path}")
    assert "folder" in none or str(tmp_path) in none


def test_a_file_has_no_known_parts(runs, tmp_path, capsys):
    (tmp_path / "x.xyz").write_text("\n".join(f"{i % 7} {i % 5} {i % 3}" for i in range(200)))
    said = fails(capsys, visualize.main, "parts", "--run", runs / "parts", "--object", tmp_path / "x.xyz",
                 "--out", tmp_path / "a.png")  # fmt: skip
    assert "the category and the parts of x.xyz are not known: make predict" in said


def test_a_file_of_another_codebase_is_evaluated_by_a_configuration(runs, tmp_path, capsys):
    export.main([str(runs / "dense"), str(tmp_path / "c.pth"), "--format", "point_mae", "--json"])
    capsys.readouterr()
    found = figures(capsys, evaluate.main, tmp_path / "c.pth", *SMALL)
    expected = figures(capsys, evaluate.main, runs / "dense")
    assert found["miou"] == pytest.approx(expected["miou"], abs=1e-3)
    assert "no segmenter of 17 categories" in fails(capsys, evaluate.main, tmp_path / "c.pth", *SMALL,
                                                    "model.decoder=point_mae")  # fmt: skip

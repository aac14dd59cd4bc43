"""`python -m tools.compare`: real runs side by side, as text, JSON and page; for each mistake one line."""

import json
import shutil

import pytest

from pointewa.runs.weights import MODEL
from pointewa.tools import cli, compare, evaluate
from tests.tools.test_visualize import runs  # noqa: F401, a fixture


def told(capsys, arguments):
    capsys.readouterr()
    compare.main([*map(str, arguments), "--json"])
    return json.loads(capsys.readouterr().out)


def test_the_figures_are_those_of_the_evaluation(runs, capsys, tmp_path):  # noqa: F811
    found = told(capsys, [runs / "dense", runs / "ewa", "--out", tmp_path / "x.html"])
    evaluated = []
    for name in ("dense", "ewa"):
        evaluate.main([str(runs / name), "--json"])
        evaluated.append(json.loads(capsys.readouterr().out))
    dense, ewa = evaluated
    assert (found["dataset"], found["objects"]) == ("shapes", 68)
    assert [(one["run"], one["oa"]) for one in found["runs"]] == [("dense", dense["oa"]), ("ewa", ewa["oa"])]
    (both,) = found["comparisons"]
    assert both["difference"] == pytest.approx(ewa["oa"] - dense["oa"])
    test = both["test"]
    assert 100 * (test["only_second"] - test["only_first"]) / 68 == pytest.approx(both["difference"])
    assert test["only_first"] + test["only_second"] > 0
    assert both["per_class"] == {
        name: pytest.approx(ewa["per_class"][name] - accuracy) for name, accuracy in dense["per_class"].items()
    }
    assert both["changed"] == ["ewa.enabled: False -> True"]
    text = (tmp_path / "x.html").read_text()
    assert "<h2>What differs in the configuration: dense -&gt; ewa</h2>" in text
    assert "<svg" in text


def test_the_text(runs, capsys):  # noqa: F811
    shutil.copytree(runs / "ewa", runs / "other/ewa", dirs_exist_ok=True)
    compare.main([str(runs / "dense"), str(runs / "ewa"), str(runs / "other/ewa")])
    out = capsys.readouterr().out
    for part in ("overall accuracy", "p, Holm", "airplane", "ewa.enabled: False -> True", "McNemar's exact test"):
        assert part in out
    assert str(runs / "other/ewa") in out.replace("\n", "")  # two of the same name: their paths
    assert "caution" not in out


def test_pretrainings_have_metrics_only(runs, capsys):  # noqa: F811
    shutil.copytree(runs / "pre", runs / "pre2", dirs_exist_ok=True)
    found = told(capsys, [runs / "pre", runs / "pre2"])
    assert found["comparisons"][0]["test"] is None
    assert found["comparisons"][0]["changed"] == []
    compare.main([str(runs / "pre"), str(runs / "pre2")])
    assert "Chamfer" in capsys.readouterr().out


def test_mistakes_are_one_line(runs, capsys, tmp_path):  # noqa: F811
    shutil.copytree(runs / "dense", tmp_path / "unfinished")
    (tmp_path / "unfinished/summary.json").unlink()
    shutil.copytree(runs / "dense", tmp_path / "light")
    for path in (tmp_path / "light").glob("*"):
        if path.name == MODEL or path.suffix == ".ckpt":
            path.unlink()
    dense = runs / "dense"
    for arguments, message in (
        ([dense], "expected two or more different runs, found"),
        ([dense, dense], "expected two or more different runs, found"),
        ([dense, runs / "nowhere"], "nowhere: expected a run folder, found no config.yaml in it"),
        ([dense, runs / "pre"], "dense and pre: task is classification and masked_autoencoding"),
        ([dense, tmp_path / "unfinished"], "unfinished: not finished"),
        (
            [dense, tmp_path / "light"],
            "light: expected a run folder with model.safetensors or last.ckpt, found",
        ),
        ([dense, runs / "ewa", "--out", tmp_path / "x.png"], "--out: expected a name ending in .html or .htm"),
        ([dense, runs / "ewa", "data.nam=x"], "unknown key data.nam"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.run(lambda arguments=arguments: compare.main([*map(str, arguments)]))
        captured = capsys.readouterr()
        assert ended.value.code == 2
        assert message in captured.err
        assert captured.err.count("\n") == 1
        assert not captured.out

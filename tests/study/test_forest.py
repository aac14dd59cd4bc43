"""The differences of several studies, from their tables."""

import json

import pytest

from pointewa.errors import ConfigError
from pointewa.study.forest import read_rows
from pointewa.tools import forest

LINES = {
    "quick": "arm,seed,test_oa\ndense,0,80\ndense,1,82\newa,0,81\newa,1,85\nrup,0,70\n",
    # seed 2 of both lacks a fold
    "folds": "arm,seed,fold,test_f1\ndense,2,a,90\ndense,2,b,50\newa,2,a,90\n"
    "dense,0,a,50\ndense,0,b,60\ndense,1,a,52\ndense,1,b,62\n"
    "ewa,0,a,51\newa,0,b,61\newa,1,a,52\newa,1,b,68\n",
}


@pytest.fixture
def reports(tmp_path):
    for name, text in LINES.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.csv").write_text(text)
    return tmp_path


def test_differences_are_paired_by_seed_over_the_mean_of_its_folds(reports):
    (quick,), (folds,) = read_rows(reports / "quick"), read_rows(reports / "folds")  # rup has one seed
    assert (quick.study, quick.arm, quick.base, quick.difference.mean, quick.difference.pairs) == (
        "quick",
        "ewa",
        "dense",
        2,
        2,
    )
    assert (folds.difference.mean, folds.difference.pairs) == (2, 2)  # 1 and 3
    assert [row.difference.mean for row in read_rows(reports / "quick", [("dense", "ewa"), ("x", "dense")])] == [-2]


def test_table_picture_and_json(reports, capsys):
    given = [str(reports / "quick"), str(reports / "folds")]
    forest.main([*given, "--out", str(reports / "a.png"), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert [(one["study"], one["mean"]) for one in found] == [("quick", 2), ("folds", 2)]
    forest.main([*given, "--out", str(reports / "b.png")])
    assert "+2.00" in capsys.readouterr().out
    assert (reports / "a.png").read_bytes() == (reports / "b.png").read_bytes()
    forest.main([*given, "--out", str(reports / "a.pdf")])
    assert (reports / "a.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("arm,seed,test_oa\n", "expected a study's table"),
        ("arm,seed,test_oa\ndense,x,1\n", "expected a study's table"),
        ("arm,seed,test_oa\ndense,0,\n", "expected a study's table"),
        ("arm,seed,way,test_oa\nscratch,0,5,80\n", "found that of few-shot folds"),
        ("arm,seed,test_loss\ndense,0,1\n", "expected a metric in percent, found test_loss"),
    ],
)
def test_other_tables_are_refused(reports, text, message):
    (reports / "quick/results.csv").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_rows(reports / "quick")


def test_equal_differences_have_no_p(reports, capsys):
    (reports / "quick/results.csv").write_text("arm,seed,test_oa\ndense,0,80\ndense,1,82\newa,0,81\newa,1,83\n")
    forest.main([str(reports / "quick"), "--json"])
    assert json.loads(capsys.readouterr().out)[0]["p"] is None
    forest.main([str(reports / "quick")])
    assert "nan" not in capsys.readouterr().out


def test_what_cannot_be_compared_is_refused(reports):
    for arguments, message in [
        ([reports / "none"], "found no results.csv"),
        ([reports / "quick", "--pairs", "ewa"], "expected ARM=BASELINE"),
        ([reports / "quick", "--pairs", "rup=dense"], "two or more common seeds"),
        ([reports / "quick", "--out", "x.txt"], "--out"),
    ]:
        with pytest.raises(ConfigError, match=message):
            forest.main([*map(str, arguments)])

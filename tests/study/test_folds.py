"""Studies with folds: a seed's result is the mean over them."""

import csv
import json
import shutil

import pytest

from pointewa.study.definition import load_study
from pointewa.study.figures import gather, mixed_precision
from pointewa.tools import study
from tests.study.finished import finish

FOLDED = """
arms: {a: {ewa: {enabled: false}}, b: {}}
seeds: [0, 1]
folds: {data.variant: [fold0, fold1]}
"""


def test_folds_are_averaged_within_a_seed(tmp_path, capsys):
    path = tmp_path / "f.yaml"
    path.write_text(FOLDED)
    keys = [f"run.dir={tmp_path}"]
    made = load_study(path, keys)
    names = [run.name for run in made.runs]
    first, second = ([f"{arm}-{fold}-seed{seed}" for fold in ("fold0", "fold1") for arm in "ab"] for seed in (0, 1))
    assert names == first + second
    assert [run.config.data.variant for run in made.runs] == ["fold0", "fold0", "fold1", "fold1"] * 2
    for run, oa in zip(made.runs, [50, 60, 70, 74, 40, 50, 64, 66], strict=True):
        if run.name != "b-fold1-seed1":
            finish(run, oa, seconds=oa)
    report = [str(path), *keys, "--report-only", "--out", str(tmp_path / "out")]
    study.main(report)
    text = (tmp_path / "out/README.md").read_text()
    assert "7 of 8 runs are finished; missing: b-fold1-seed1." in text
    assert "| a | 2 | 56.00 ± 5.66 | 28.00 ± 2.83 | baseline |" in text  # of 60 and 52
    assert "| b | 1 | 67.00 | 33.50 | - |" in text  # a seed without one of its folds does not count
    finish(made.runs[-1], 66)
    study.main([*report, "--json"])
    _, b = json.loads(capsys.readouterr().out.split("\n")[-2])
    assert (b["test_oa"], b["difference"], b["pairs"], b["seeds"]) == (62.5, 6.5, 2, [0, 1])  # 67 - 60 and 58 - 52
    assert (b["low"], b["high"]) == pytest.approx((6.5 - 0.5 * 12.706205, 6.5 + 0.5 * 12.706205))
    text = (tmp_path / "out/README.md").read_text()
    assert "| a | 45.00 ± 7.07 | 67.00 ± 4.24 |\n| b | 55.00 ± 7.07 | 70.00 ± 5.66 |" in text
    assert "(`data.variant`) fold0, fold1." in text
    rows = list(csv.DictReader((tmp_path / "out/results.csv").open()))
    assert [f"{row['arm']}-{row['fold']}-seed{row['seed']}" for row in rows] == sorted(
        names, key=lambda n: (n[0], n[-1])
    )
    assert "| a | 2 | 56.0 ± 5.7 |" in (tmp_path / "out/costs.md").read_text()
    curves = gather(made)[0].results[0].epochs
    assert curves == [{"epoch": 0, "train/loss": 6.0}, {"epoch": 1, "train/loss": 5.0}]
    shutil.rmtree(made.runs[-1].folder)
    finish(made.runs[-1], 66, precision="bfloat16")
    assert mixed_precision(gather(made)) == ["b-fold1-seed1 (bfloat16) with a-fold1-seed1 (float32)"]

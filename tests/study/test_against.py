"""Arms that are compared with another one than the first."""

import json

import pytest

from pointewa.errors import ConfigError
from pointewa.study.definition import load_study
from pointewa.study.figures import gather, mixed_precision
from pointewa.study.forest import read_rows
from pointewa.study.report import write_report
from pointewa.tools import study
from tests.study.finished import finish

ARMS = """
arms:
  dense: {ewa: {enabled: false}}
  ewa:
  dense_2: {ewa: {enabled: false}, train: {lr: 0.1}}
  ewa_2: {train: {lr: 0.1}}
"""
AGAINST = f"{ARMS}\nseeds: [0, 1]\nagainst: {{ewa_2: dense_2}}\n"


def test_each_arm_is_compared_with_its_own_baseline(tmp_path, capsys):
    path = tmp_path / "s.yaml"
    path.write_text(AGAINST)
    keys, out = [f"run.dir={tmp_path}"], tmp_path / "report"
    made = load_study(path, keys)
    accuracy = {"dense": 80, "ewa": 81, "dense_2": 70, "ewa_2": 73}
    for run in made.runs:
        finish(run, accuracy[run.arm] + run.seed * len(run.arm), precision=run.arm[-1])
    arms = {arm.name: arm for arm in gather(made)}
    assert {name: arm.base for name, arm in arms.items()} == {
        "dense": "", "ewa": "dense", "dense_2": "dense", "ewa_2": "dense_2",
    }  # fmt: skip
    assert arms["ewa_2"].by_seed == {0: 3, 1: 1}  # 73 - 70, 78 - 77
    assert arms["ewa_2"].difference.mean == 2
    assert arms["dense_2"].by_seed == {0: -10, 1: -8}
    mixed = mixed_precision(list(arms.values()))
    assert not any(text.startswith("ewa_2") for text in mixed)
    assert len(mixed) == 4  # ewa and dense_2, which differ from dense
    write_report(made, out)
    text = (out / "README.md").read_text()
    assert "| compared with | difference | 95 % interval |" in text
    assert "| ewa_2 | 2 | 75.50 ± 3.54 | 37.75 ± 1.77 | dense_2 | +2.00 |" in text
    assert "relative to the baseline" in (out / "costs.md").read_text()
    assert [(row.arm, row.base, row.difference.mean) for row in read_rows(out)] == [
        ("ewa", "dense", 0), ("dense_2", "dense", -9), ("ewa_2", "dense_2", 2),
    ]  # fmt: skip
    study.main([str(path), *keys, "--report-only", "--json"])
    assert [one["base"] for one in json.loads(capsys.readouterr().out)] == [None, "dense", "dense", "dense_2"]


@pytest.mark.parametrize(
    "against", ["{ewa_2: dense_3}", "{dense: ewa}", "{ewa: ewa}", "{other: dense}", "[ewa]", "{ewa_2: [dense]}"]
)
def test_what_is_no_pair_of_arms_is_refused(tmp_path, against):
    path = tmp_path / "s.yaml"
    path.write_text(f"{ARMS}\nseeds: [0]\nagainst: {against}\n")
    with pytest.raises(ConfigError, match=r"s.yaml: against.*: expected a mapping of arms to other arms"):
        load_study(path, [f"run.dir={tmp_path}"])

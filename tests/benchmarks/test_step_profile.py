"""Where a step's time goes: every operator has a place in the table."""

import re

import pytest

from benchmarks import step_profile


@pytest.mark.parametrize("options", [["--batch-size", "2"], ["--inference", "--batch-size", "1"]])
def test_the_parts_of_a_step(capsys, monkeypatch, options):
    monkeypatch.setattr(step_profile, "PROFILED", 1)
    monkeypatch.setattr(step_profile, "STEPS", 1)
    step_profile.main(["--preset", "tiny", "--precision", "float32", *options])
    rows = dict(re.findall(r"│ (\S.*?) +│ ([\d.]+) +│", capsys.readouterr().out))
    assert {"matrix products", "GELU", "layer norms", "sampling and neighbours", "the rest"} <= set(rows)
    assert ("AdamW" in rows) == ("--inference" not in options)
    assert float(rows["matrix products"]) > float(rows["layer norms"])

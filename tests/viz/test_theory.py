"""The theory's plots show measured values, and these are what the formulas say."""

import json

import numpy as np
import pytest

from pointewa.tools import theory
from pointewa.viz.theory import EXPERTS, SHARE_RATE, contraction, expected_spread, factor, fold_gaps, stationary_spread


@pytest.mark.parametrize("experts", EXPERTS)
def test_measured_values_are_those_of_the_formulas(experts):
    steps = range(11)
    expected = [factor(experts, SHARE_RATE) ** step for step in steps]
    assert contraction(experts, SHARE_RATE, 10) == pytest.approx(expected, rel=1e-9)
    tolerance = 4 * (2 / (experts - 1) / 2000) ** 0.5  # chi-square with N-1 degrees of freedom
    assert stationary_spread(experts, 0.2, 60, 2000) == pytest.approx(expected_spread(experts, 0.2), rel=tolerance)


def test_the_fold_gap_has_slope_2():
    deviations = [1e-3, 1e-2]
    assert np.diff(np.log10(fold_gaps(4, deviations)))[0] == pytest.approx(2, abs=0.01)


def test_the_command_draws_them(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("pointewa.viz.theory.EXPERTS", (4,))
    theory.main(["--out", str(tmp_path / "t.png"), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")
    assert found["contraction"]["4"][1] == pytest.approx(factor(4, SHARE_RATE))

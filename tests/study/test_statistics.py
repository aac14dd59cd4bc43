"""Against numbers that are worked out by hand."""

import math
from types import SimpleNamespace

import pytest

from pointewa.study.figures import gather
from pointewa.study.statistics import Paired, holm, mean_std, paired
from pointewa.tasks import task_class


def test_mean_and_sample_standard_deviation():
    assert mean_std([80.0, 82.0, 87.0]) == (83, pytest.approx(math.sqrt((9 + 1 + 16) / 2)))
    assert mean_std([80.0])[0] == 80
    assert math.isnan(mean_std([80.0])[1])
    assert all(map(math.isnan, mean_std([])))


def test_holm_by_hand():
    assert holm([]) == []
    assert holm([0.03]) == [0.03]
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]


def test_three_pairs():
    """Differences 1, 2, 3: t = 2 sqrt(3), and Student's distribution of 2 degrees of freedom has a closed form."""
    found = paired([81.0, 82.0, 83.0], [80.0, 80.0, 80.0])
    t, quantile = 2 * math.sqrt(3), 4.302652729911275  # of 0.975, as tables have it
    half = quantile / math.sqrt(3)
    assert (found.mean, found.pairs) == (2, 3)
    assert (found.low, found.high) == (pytest.approx(2 - half), pytest.approx(2 + half))
    assert found.p == pytest.approx(1 - t / math.sqrt(2 + t * t))


def test_two_pairs():
    """Differences 0 and 2: t = 1, of which Cauchy's distribution has a quarter above and a quarter below -1."""
    found = paired([80.0, 84.0], [80.0, 82.0])
    assert (found.mean, found.p) == (1, pytest.approx(0.5))
    assert found.high == pytest.approx(1 + math.tan(math.pi * 0.475))


def test_equal_differences_have_no_p_and_round_off_is_none():
    found = paired([0.3, 0.5, 0.9], [0.2, 0.4, 0.8])
    assert (found.mean, found.low, found.high) == (pytest.approx(0.1), found.mean, found.mean)
    assert math.isnan(found.p)
    assert isinstance(paired([1.0, 1.0], [1.0, 1.0]), Paired)


def test_too_few_or_no_pairs():
    assert paired([80.0], [81.0]) is None
    assert paired([], []) is None
    with pytest.raises(ValueError, match="expected pairs, found 2 and 1 values"):
        paired([1.0, 2.0], [1.0])


def test_arms_have_p_corrected_for_their_number_and_the_difference_of_the_training_loss():
    """Three seeds; arm c has one seed, so no p; arm d differs by the same everywhere, so that its p is unknown."""
    oa = {"base": [80.0, 81, 82], "a": [82.0, 82, 85], "b": [80.0, 83, 83], "c": [85.0], "d": [81.0, 82, 83]}
    loss = {"base": [1.0, 1.2, 1.1], "a": [0.9, 1.0, 1.1], "b": [1.0, 1.2], "c": [1.0], "d": []}
    runs = [SimpleNamespace(arm=arm, seed=seed, fold="", name=f"{arm}{seed}", epochs=lambda arm=arm, seed=seed: (
                [{"epoch": 0, **({"train/loss": loss[arm][seed]} if seed < len(loss[arm]) else {})}]),
                summary=lambda one=one: {"test": {"oa": one}, "seconds": 1.0})
            for arm, values in oa.items() for seed, one in enumerate(values)]  # fmt: skip
    study = SimpleNamespace(task=task_class("classification"), arms=tuple(oa), runs=runs, folds=("",), against={})
    arms = {arm.name: arm for arm in gather(study)}
    p = [arms[name].difference.p for name in "ab"]
    small, large = sorted(p)
    assert sorted(arms[name].corrected for name in "ab") == pytest.approx(sorted([2 * small, max(2 * small, large)]))
    assert [arms[name].corrected for name in ("base", "c", "d")] == [None, None, None]
    assert arms["a"].fit.mean == pytest.approx(-0.1)
    assert arms["b"].fit.pairs == 2
    assert (arms["c"].fit, arms["d"].fit) == (None, None)

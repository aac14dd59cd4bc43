"""What no share rate, schedule, number of steps or model can be is refused at once, not at the first step."""

import numpy as np
import pytest

import pointewa.ewa as ewa
from tests.ewa.test_averaging import make_model


@pytest.mark.parametrize("wrong", [2.0, 1.01, -0.1, float("nan"), float("inf"), "0.3", None, True, [0.3]])
def test_a_share_rate_that_none_can_be_is_refused_at_once(wrong):
    model = make_model()
    for make in (
        lambda: ewa.constant(wrong),
        lambda: ewa.linear(wrong, 10),
        lambda: ewa.ShareRate(wrong, 3),
        lambda: ewa.ExpertAveraging(model, wrong),
        lambda: ewa.ExpertAveraging(model, lambda _: wrong),
    ):
        with pytest.raises(ValueError, match=r"share_rate must be a number between 0 and 1, got"):
            make()


@pytest.mark.parametrize("wrong", [0, -1, 1.5, float("nan"), float("inf"), "10", None, True])
def test_a_number_of_steps_that_none_can_be_is_refused_at_once(wrong):
    with pytest.raises(ValueError, match="total_steps must be a whole number at least 1, got"):
        ewa.linear(0.3, wrong)
    with pytest.raises(ValueError, match="total_steps must be a whole number at least 1, got"):
        ewa.until(ewa.constant(0.3), 0.5, wrong)
    if wrong != 0:
        with pytest.raises(ValueError, match="rise_steps must be a whole number at least 0, got"):
            ewa.ShareRate(0.3, wrong)
    if wrong not in (0, None):
        with pytest.raises(ValueError, match="stop_step must be a whole number at least 0, got"):
            ewa.ShareRate(0.3, 10, wrong)


@pytest.mark.parametrize("wrong", [-0.1, 1.1, float("nan"), "half", None])
def test_a_fraction_that_none_can_be_is_refused_at_once(wrong):
    with pytest.raises(ValueError, match="fraction must be a number between 0 and 1, got"):
        ewa.until(ewa.constant(0.3), wrong, 10)
    with pytest.raises(ValueError, match=r"schedule must be a ShareRate, such as ewa\.linear\(...\), got 0.3"):
        ewa.until(0.3, 0.5, 10)


def test_what_is_no_model_has_no_experts_to_average():
    with pytest.raises(ValueError, match=r"model must be what ewa\.to_moe returned, got list"):
        ewa.ExpertAveraging([], 0.3)


def test_numbers_of_numpy_are_numbers():
    schedule = ewa.until(ewa.linear(np.float32(0.5), np.int64(11)), np.float64(0.5), np.int32(11))
    assert [float(schedule(step)) for step in (0, 4, 10)] == [0.0, pytest.approx(0.2), 0.0]

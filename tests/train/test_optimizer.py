"""The learning rate over a run."""

import pytest

from pointewa.config import TrainConfig
from pointewa.train.optimizer import learning_rate


def test_warm_up_is_linear_then_a_cosine():
    config = TrainConfig(epochs=300, lr=5e-4, min_lr=1e-6)  # 10 of 300 epochs of warm-up
    assert learning_rate(0, 100, config) == pytest.approx(1e-6)
    assert learning_rate(500, 100, config) == pytest.approx((5e-4 + 1e-6) / 2)
    assert learning_rate(1000, 100, config) == pytest.approx(5e-4)
    assert learning_rate(1000 + 29_000 // 2, 100, config) == pytest.approx((5e-4 + 1e-6) / 2)
    assert learning_rate(29_999, 100, config) == pytest.approx(1e-6, rel=1e-3)
    rates = [learning_rate(step, 100, config) for step in range(30_000)]
    assert rates[:1001] == sorted(rates[:1001])
    assert rates[1000:] == sorted(rates[1000:], reverse=True)


def test_a_short_run_has_a_short_warm_up():
    config = TrainConfig(epochs=10)
    assert learning_rate(round(307 / 3), 307, config) == pytest.approx(config.lr)
    assert learning_rate(0, 307, TrainConfig(epochs=1, warmup_epochs=0)) == pytest.approx(5e-4)

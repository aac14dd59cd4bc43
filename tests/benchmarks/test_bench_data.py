"""The bench of data, small."""

import json

import numpy as np
import pytest

from benchmarks import bench_data
from pointewa.datasets.layouts import shapes


def test_orders_and_epochs(capsys, monkeypatch):
    monkeypatch.setattr(shapes, "PER_CLASS", {"train": 8, "test": 4})
    monkeypatch.setattr(bench_data, "SIZES", ((256, 256), (512, 100)))
    monkeypatch.setattr(bench_data, "ROUNDS", 2)
    monkeypatch.setattr(bench_data, "STEPS", 2)
    small = ["model.width=24", "model.depth=2", "model.heads=2", "train.batch_size=8", "train.device=cpu"]
    bench_data.main([*small, "data.num_points=64", "--json"])
    figures = json.loads(capsys.readouterr().out)
    assert {row["by"] for row in figures["ordering"]} >= {"torch", "fpsample"}
    assert all(row["shortfall"] < 1e-6 and row["objects_an_hour"] > 0 for row in figures["ordering"])
    for figure in figures["epochs"].values():
        assert 0 < figure["ratio"][0] <= figure["ratio"][2]
    assert bench_data.shortfall(np.array([[0.0, 0, 0], [1, 0, 0], [3, 0, 0]]), [0, 1, 2]) == pytest.approx(2 / 3)
    bench_data.main([*small, "data.num_points=64"])
    assert "objects/h" in capsys.readouterr().out

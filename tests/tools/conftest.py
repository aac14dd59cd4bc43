"""The command lines are tried on a small procedural set."""

import pytest

from pointewa.datasets.layouts import shapes


@pytest.fixture(autouse=True)
def few_objects(monkeypatch):
    monkeypatch.setattr(shapes, "PER_CLASS", {"train": 8, "test": 4})

"""The bench of compression, small."""

import json

import pytest

from benchmarks import compression

SMALL = ["--preset", "tiny", "--batch-size", "2", "--device", "cpu", "--precision", "float32", "--json"]
pytestmark = pytest.mark.slow


def test_errors_of_gradients_by_bits_and_group(capsys, monkeypatch):
    monkeypatch.setattr(compression, "BITS", {"8": (8, 8), "4": (4, 8), "4 everywhere": (4, 4)})
    compression.main([*SMALL, "--only", "errors"])
    rows = json.loads(capsys.readouterr().out)["errors"]
    assert list(rows) == ["8", "4", "4 everywhere", "8, sharp", "4, sharp", "4 everywhere, sharp"]
    for sharp in ("", ", sharp"):
        for group in ("patch encoder", "qkv", "fc1", "fc2", "norms"):
            assert 0 < rows[f"8{sharp}"][group] < 0.2 * rows[f"4{sharp}"][group]
        assert rows[f"4 everywhere{sharp}"]["attention's output"] > 2.5 * rows[f"4{sharp}"]["attention's output"]
    assert rows["4 everywhere, sharp"]["qkv"] > 1.1 * rows["4, sharp"]["qkv"]


def test_memory_of_processes_of_their_own(capsys, monkeypatch):
    monkeypatch.setattr(compression, "ARMS", {name: compression.ARMS[name] for name in ("EWA", "EWA, 4 bits")})
    compression.main([*SMALL, "--only", "memory", "--steps", "1"])
    plain, few = json.loads(capsys.readouterr().out)["memory"].values()
    assert few["kept for backward MB"] < plain["kept for backward MB"] / 4
    assert few["moments MB"] == plain["moments MB"]
    assert few["ms a step"] > 0
    assert few["peak of the process MB"] > 100

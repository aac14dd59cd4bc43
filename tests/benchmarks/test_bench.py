"""The bench, small: every section has its figures."""

import json

import pytest

from benchmarks import bench

SMALL = ["--preset", "tiny", "--batch-size", "2", "--budget", "0", "--device", "cpu", "--precision", "float32"]


def figures(folder, capsys, *sections):
    """What the bench printed, which is also what it wrote."""
    bench.main([*SMALL, "--only", *sections, "--out", str(folder), "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((folder / "bench.json").read_text())
    assert "| EWA |" in (folder / "README.md").read_text()
    assert {"cpu", "commit", "precision"} <= result.keys()
    return result["figures"]


@pytest.mark.slow
def test_it_measures_every_section_against_the_twin(tmp_path, capsys):
    found = figures(tmp_path, capsys, "machine", "train", "parts", "inference", "memory", "epochs")
    assert list(found["train"]) == ["twin", "twin, memory kept", "dense", "EWA"]
    assert found["train"]["twin"]["of twin"] == "1.000 (1.000 to 1.000)"
    # Two thirds of the patch encoder's arithmetic are saved in float32, nothing elsewhere; EWA's is the dense model's.
    assert 0.6 < found["train"]["dense"]["GFLOP"] / found["train"]["twin"]["GFLOP"] < 0.8
    assert found["train"]["EWA"]["GFLOP"] == pytest.approx(found["train"]["dense"]["GFLOP"], rel=0.01)
    assert found["machine"]["copy"]["GB/s"] > 0
    assert {"folded, batch norms fused, batch 1", "throughput"} <= found["inference"].keys()
    assert list(found["epochs"]) == ["1000 objects", "3000 objects", "10000 objects"]


def test_the_memory_of_experts_is_that_of_their_parameters(tmp_path, capsys):
    memory = figures(tmp_path, capsys, "memory")["memory"]
    # Four experts in three of six blocks: three further copies of those FFNs, each with gradient and two moments.
    more = 4 * 4 * 3 * 3 * (2 * 192 * 768 + 192 + 768) / 1e6
    state = [row["weights, gradients, moments MB"] for row in memory.values()]
    assert state[1] - state[0] == pytest.approx(more, rel=1e-3)
    kept = [row["kept for backward MB"] for row in memory.values()]
    assert kept[1] == pytest.approx(kept[0], rel=0.05)


def test_it_compares_the_operators(capsys, monkeypatch):
    monkeypatch.setattr(bench, "OPERATORS", {"FPS": lambda points, name: bench.farthest_point_sample(points, 4)})
    bench.main(["--preset", "tiny", "--batch-size", "2", "--budget", "0", "--device", "cpu", "--only", "operators"])
    assert "FPS, ours" in capsys.readouterr().out

"""The bench, small: every section has its figures."""

import json
import sys

import pytest
import torch

from benchmarks import bench, peers
from benchmarks.agreement import has_int8
from pointewa.datasets.layouts import shapes
from pointewa.errors import ConfigError
from pointewa.tools import train

CPU = torch.device("cpu")
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


def test_a_bench_that_was_cut_off_goes_on(tmp_path, capsys, monkeypatch):
    """What is there is not measured again, and it was written as soon as it was measured."""
    memory, words = figures(tmp_path, capsys, "memory"), [*SMALL, "--out", str(tmp_path), "--resume"]
    monkeypatch.setattr(bench.Bench, "memory", lambda self: 1 / 0)
    monkeypatch.setattr(bench.Bench, "machine", lambda self: {"copy": {"GB/s": 7.0}})
    monkeypatch.setattr(bench.Bench, "parts", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bench.main([*words, "--only", "memory", "machine", "parts"])
    found = json.loads((tmp_path / "bench.json").read_text())["figures"]
    assert found == memory | {"machine": {"copy": {"GB/s": 7.0}}}
    assert "| 7 |" in (tmp_path / "README.md").read_text()
    with pytest.raises(ConfigError, match=r"measured with batch_size 2, and now it is 4: leave --resume out"):
        bench.main([*words, "--only", "memory", "--batch-size", "4"])
    with pytest.raises(ConfigError, match="--resume: it needs --out"):
        bench.main([*SMALL, "--resume"])


def test_it_compares_the_operators(capsys, monkeypatch):
    monkeypatch.setattr(bench, "OPERATORS", {"FPS": lambda points, name: bench.farthest_point_sample(points, 4)})
    bench.main(["--preset", "tiny", "--batch-size", "2", "--budget", "0", "--device", "cpu", "--only", "operators"])
    assert "FPS, ours" in capsys.readouterr().out


def test_it_compares_the_predictions_of_a_trained_model_in_both_precisions(tmp_path, capsys, monkeypatch):
    """The sets are so small that few predictions, or none, differ."""
    monkeypatch.setattr(shapes, "PER_CLASS", {"train": 4, "test": 3})
    words = ["model.width=24", "model.depth=2", "model.heads=2", "model.num_groups=8", "data.num_points=64",
             "train.device=cpu", "train.epochs=1", "run.report=false", f"run.dir={tmp_path}", "--json"]  # fmt: skip
    train.main(["run.name=classes", *words])
    part_labels = ["train.task=part_segmentation", "data.name=shapes"]
    train.main(["run.name=parts", *part_labels, *words])
    capsys.readouterr()
    for run, least in (("classes", 80), ("parts", 90)):
        bench.main([*SMALL[:-1], "bfloat16", "--only", "agreement", "--run", str(tmp_path / run), "--json"])
        found = json.loads(capsys.readouterr().out)["figures"]["agreement"]
        assert list(found) == ["float32", "bfloat16", *(["int8"] if run == "classes" and has_int8(CPU) else [])]
        assert found["float32"]["agreement %"] == 100
        assert least < found["bfloat16"]["agreement %"] <= 100
        assert found["bfloat16"]["loss"] != found["float32"]["loss"]
        assert 50 < found.get("int8", found["float32"])["agreement %"] <= 100
    assert found["float32"]["predictions"] == 17 * 3 * 64  # parts of points


@pytest.mark.slow
def test_it_measures_8_bits(capsys):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    bench.main([*SMALL, "--only", "int8", "--json"])
    found = json.loads(capsys.readouterr().out)["figures"]["int8"]
    assert {"twin, batch 2", "int8, batch 2", "int8, batch 1"} < found.keys()
    assert "of twin" in found["int8, batch 1"]


def test_a_peer_computes_the_same_and_is_timed(capsys):
    pytest.importorskip("torch_pointcloud.models")
    bench.main([*SMALL, "--only", "peer", "--peer", "torch-pointcloud", "--json"])
    found = json.loads(capsys.readouterr().out)["figures"]["peer"]
    (peer,) = {name.removeprefix("step, ") for name in found if name.startswith("step, torch-pointcloud 0.0.18")}
    assert 0 < found["logits"]["largest difference, of their spread"] < 1e-4
    assert found[f"batch 1, {peer}"][f"of {peer}"] == "1.000 (1.000 to 1.000)"
    assert {"step, dense", "step, EWA", "batch 2, float32", "batch 1, float32"} < found.keys()


def test_a_peer_of_other_weights_or_none_is_refused(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "torch_pointcloud"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch_pointcloud", None)
    with pytest.raises(ConfigError, match=r"--peer torch-pointcloud: not installed .*: pip install torch-pointcloud"):
        bench.main([*SMALL, "--only", "peer", "--peer", "torch-pointcloud"])
    with pytest.raises(ConfigError, match="--only peer: it needs --peer"):
        bench.main([*SMALL, "--only", "peer"])


def test_other_logits_are_refused():
    points = torch.randn(2, 64, 3)
    ours = torch.nn.Flatten()
    with pytest.raises(RuntimeError, match="not the same model"):
        peers.check(_Packed(), ours, points)


class _Packed(torch.nn.Module):
    def forward(self, _, points, clouds):
        return points.view(2, -1) + 0.01

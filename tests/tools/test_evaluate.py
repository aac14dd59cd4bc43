"""Evaluation beyond plain accuracy: votes, corruptions, confusion, models of one data set on another."""

import json

import h5py
import numpy as np
import pytest
import torch
from pointewa.datasets.layouts.modelnet40 import OFFICIAL
from pointewa.datasets.layouts.scanobjectnn import CLASSES

from pointewa.config import build_architecture, load_config
from pointewa.datasets import subjects
from pointewa.datasets.layouts import shapes
from pointewa.inference.corruptions import CORRUPTIONS, SEVERITIES
from pointewa.models import PointTransformerClassifier
from pointewa.runs.description import LoadedModel
from pointewa.runs.weights import save_model
from pointewa.tools import cli, evaluate, train

SMALL = ["model.width=24", "model.depth=2", "model.heads=2", "model.num_groups=8", "model.group_size=8",
         "data.num_points=64", "train.device=cpu", "run.report=false"]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained run, good enough to be better than chance."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "PER_CLASS", {"train": 16, "test": 4})
        train.main([*SMALL, f"run.dir={folder}", "run.name=a", "train.epochs=30", "train.batch_size=16",
                    "train.lr=3e-3", "ewa.enabled=false", "--json"])  # fmt: skip
    return folder / "a"


def figures(capsys, *arguments):
    capsys.readouterr()
    evaluate.main([*map(str, arguments), "--json"])
    return json.loads(capsys.readouterr().out)


def test_votes_are_another_figure_beside_the_plain_one(run, capsys):
    plain, voted = figures(capsys, run), figures(capsys, run, "--votes", 5)
    assert voted["oa"] == plain["oa"]
    assert "voted" not in plain
    assert voted["voted"]["votes"] == 5
    assert voted["voted"] == figures(capsys, run, "--votes", 5)["voted"]  # reproducible
    assert voted["voted"] != figures(capsys, run, "--votes", 5, "train.seed=1")["voted"]
    assert voted["voted"]["oa"] > 30  # chance is 6
    evaluate.main([str(run), "--votes", "5"])
    out = capsys.readouterr().out
    assert "plain" in out
    assert "5 votes" in out
    assert f"{voted['voted']['oa']:.2f} %" in out


def test_the_precision_is_said_where_it_is_not_float32(run, capsys):
    plain, lowered = figures(capsys, run), figures(capsys, run, "--precision", "bfloat16")
    assert (plain["precision"], lowered["precision"]) == ("float32", "bfloat16")
    assert plain["loss"] == figures(capsys, run, "--precision", "float32")["loss"]
    assert 0 < abs(lowered["loss"] - plain["loss"]) < 0.02 * plain["loss"]
    assert abs(lowered["oa"] - plain["oa"]) < 5
    for precision, said in (("float32", False), ("bfloat16", True)):
        evaluate.main([str(run), "--precision", precision])
        assert ("in bfloat16" in " ".join(capsys.readouterr().out.split())) == said


def test_one_vote_of_a_sample_without_room_is_the_mean_of_itself(run, capsys, monkeypatch):
    """Where nothing is left to chance, voting changes nothing."""
    monkeypatch.setattr(subjects, "random_subset", lambda points, count, generator: points[:, :count])
    monkeypatch.setattr(subjects, "scale_shift", lambda points, generator: points)
    result = figures(capsys, run, "--votes", 3)
    assert result["voted"]["oa"] == pytest.approx(result["oa"])
    assert result["voted"]["macc"] == pytest.approx(result["macc"])


def test_corruptions(run, capsys):
    result = figures(capsys, run, "--corrupt")
    errors = result["corruption_errors"]
    assert list(errors) == list(CORRUPTIONS)
    assert all(len(row) == len(SEVERITIES) for row in errors.values())
    assert result["mean_corruption_error"] == pytest.approx(np.mean(list(errors.values())))
    assert result["mean_corruption_error"] > 100 - result["oa"]  # it does hurt
    assert errors == figures(capsys, run, "--corrupt")["corruption_errors"]
    evaluate.main([str(run), "--corrupt"])
    out = capsys.readouterr().out
    for part in ("severity", "occlusion", "mean corruption error", f"{result['mean_corruption_error']:.2f}"):
        assert part in out


def test_the_confusion_matrix_as_text_and_picture(run, capsys, tmp_path):
    png = tmp_path / "confusion.png"
    result = figures(capsys, run, "--confusion", png)
    matrix = np.array(result["confusion"])
    assert matrix.sum(1).tolist() == [4] * 17
    assert 100 * matrix.trace() / matrix.sum() == pytest.approx(result["oa"])
    assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    evaluate.main([str(run), "--confusion"])
    lines = capsys.readouterr().out.splitlines()
    row = next(line.split() for line in lines if line.split()[:2] == ["airplane", "0"])
    assert [0 if cell == "." else int(cell) for cell in row[2:]] == matrix[0].tolist()


def save(path, names, dataset, normalize):
    torch.manual_seed(0)
    arch = build_architecture(load_config(overrides=SMALL).model)
    model = PointTransformerClassifier(arch, len(names)).eval()
    save_model(path, LoadedModel(model, tuple(names), 64, dataset, normalize))
    return path


@pytest.fixture
def scans(tmp_path):
    folder = tmp_path / "scans" / "main_split"
    folder.mkdir(parents=True)
    with h5py.File(folder / "test_objectdataset_augmentedrot_scale75.h5", "w") as h5:
        h5["data"] = (np.random.default_rng(0).normal(size=(45, 128, 3)) * 5 + 2).astype(np.float32)
        h5["label"] = np.arange(45) % 15
    return tmp_path / "scans"


def test_a_modelnet40_model_on_scans(tmp_path, scans, capsys):
    """Eleven shared classes, argmax among these; the scans are brought to the unit sphere as the model knows them."""
    model = save(tmp_path / "m.safetensors", OFFICIAL, "modelnet40", "unit_sphere")
    seen = []

    class Spy(subjects.EvalLoader):
        def __iter__(self):
            for batch in super().__iter__():
                seen.append(batch.points)
                yield batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subjects, "EvalLoader", Spy)
        result = figures(
            capsys, model, "--config", "configs/scanobjectnn.yaml", f"data.root={scans}", "train.device=cpu"
        )
    points = torch.cat(seen)
    assert points.shape == (45, 64, 3)  # the model's number of points, not the recipe's 2048
    assert points.norm(dim=-1).max() <= 1 + 1e-5
    assert (result["dataset"], result["objects"], result["restricted"]) == ("scanobjectnn", 33, True)
    assert list(result["per_class"]) == ["bed", "cabinet", "chair", "desk", "display", "door", "shelf", "sink", "sofa",
                                         "table", "toilet"]  # fmt: skip
    evaluate.main([str(model), "--config", "configs/scanobjectnn.yaml", f"data.root={scans}", "train.device=cpu"])
    assert "argmax over these" in " ".join(capsys.readouterr().out.split())


def test_a_scan_model_on_modelnet40(tmp_path, capsys):
    model = save(tmp_path / "s.safetensors", CLASSES, "scanobjectnn", "none")
    with h5py.File(tmp_path / "modelnet40.h5", "w") as h5:
        h5.attrs["shape_names"] = list(OFFICIAL)
        h5["test/data"] = np.random.default_rng(0).normal(size=(80, 128, 3)).astype(np.float32)
        h5["test/label"], h5["test/name"] = np.arange(80) % 40, [str(i) for i in range(80)]
    result = figures(capsys, model, "data.name=modelnet40", f"data.root={tmp_path}", "train.device=cpu")
    assert len(result["per_class"]) == 11
    assert result["objects"] == 2 * 14  # 14 of ModelNet40's classes are one of the eleven


def test_what_is_refused(run, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.run(lambda: evaluate.main([str(run), "--votes", "-1"]))
    assert exit_.value.code == 2
    assert "--votes: expected at least 1, found -1" in capsys.readouterr().err

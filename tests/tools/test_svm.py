"""The linear SVM on frozen features."""

import json

import pytest
import torch

from pointewa import datasets
from pointewa.config import load_config
from pointewa.datasets import subjects
from pointewa.datasets.splits import training_split
from pointewa.runs.weights import load_any
from pointewa.tools import cli, svm, train

SMALL = ["data.name=shapes", "data.num_points=128", "model.width=24", "model.depth=2", "model.heads=2",
         "model.num_groups=8", "model.group_size=8", "train.epochs=2", "train.device=cpu", "train.batch_size=16",
         "data.train_fraction=0.2", "ewa.enabled=false", "run.report=false"]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    train.main([*SMALL, f"run.dir={root}", "run.name=classifier"])
    train.main([*SMALL, f"run.dir={root}", "run.name=pretrained", "train.task=masked_autoencoding"])
    return root


@pytest.mark.parametrize("name", ["classifier", "pretrained"])
def test_it_is_far_above_chance_and_leaves_the_model_alone(folders, capsys, name):
    before = load_any(folders / name).model.state_dict()
    svm.main([str(folders / name), "--json", "data.train_fraction=0.5"])
    figures = json.loads(capsys.readouterr().out)
    assert figures["oa"] > 35  # of 17 classes: chance is 6
    after = load_any(folders / name).model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    svm.main([str(folders / name), "data.train_fraction=0.5"])
    assert f"overall accuracy {figures['oa']:.2f} %" in capsys.readouterr().out


def test_it_is_fitted_on_the_objects_of_the_training(tmp_path, monkeypatch):
    """Neither on those that were held out for validation, nor on those that a fraction left out."""
    options = ["data.val_fraction=0.25", "data.train_fraction=0.5"]
    train.main([*SMALL, *options, f"run.dir={tmp_path}", "run.name=a", "train.epochs=1"])
    trained = training_split(load_config([tmp_path / "a/config.yaml"]))[0].object_names
    fitted, original = [], subjects.Subjects.batches

    def spy(self, transform=None, title="", clouds=None):
        fitted.extend(clouds.object_names if clouds is not None else ())
        return original(self, transform, title, clouds)

    monkeypatch.setattr(subjects.Subjects, "batches", spy)
    svm.main([str(tmp_path / "a")])
    assert tuple(fitted) == trained
    assert len(trained) == 4 * 17  # of 8 of each class
    fitted.clear()
    svm.main([str(tmp_path / "a"), "data.train_fraction=0.75"])  # what is held out stays out
    whole = datasets.load("shapes", "", "train", 128)
    held_out = set(whole.split(0.25, seed=0)[1].object_names)
    assert len(held_out) == 2 * 17
    assert set(fitted) == set(whole.object_names) - held_out


def test_features_of_an_autoencoder_are_maximum_and_mean_of_its_unmasked_tokens(folders):
    model = load_any(folders / "pretrained").model
    points = datasets.load("shapes", "", "test", 128).points[:3, :128]
    features = model.features(points)
    assert features.shape == (3, 48)
    assert torch.equal(features, model.features(points))
    assert (features[:, :24] >= features[:, 24:]).all()


def test_a_strength_that_cannot_be_is_refused(folders, capsys):
    with pytest.raises(SystemExit):
        cli.run(lambda: svm.main([str(folders / "classifier"), "--c", "0"]))
    assert "--c: expected more than 0, found 0\n" in capsys.readouterr().err

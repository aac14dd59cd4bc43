"""The splits of a configuration: sets that are smaller than a batch, and of one class."""

import os

import numpy as np
import pytest

from pointewa.config import load_config
from pointewa.datasets.layouts import images
from pointewa.datasets.splits import training_data, training_split
from pointewa.errors import ConfigError
from pointewa.tools import cli, train

TINY = ["model.width=24", "model.depth=2", "model.heads=2", "model.num_groups=8", "model.group_size=8",
        "train.epochs=1", "data.num_points=32", "train.device=cpu", "run.report=false", "train.warmup_epochs=0",
        ]  # fmt: skip


def folder(root, *classes, count=7):
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for number in range(count):
            points = np.random.default_rng(10 * label + number).normal(size=(40, 3))
            np.save(root / name / f"{number}.npy", points + np.array([500_000, 5_400_000, 300]))
    return [f"data.root={root}", "data.name=folder"]


def test_a_set_smaller_than_the_default_batch(tmp_path, capsys):
    data = folder(tmp_path / "my clouds", "cup", "table")
    assert len(training_data(load_config([], [*data, *TINY])).train) == 1
    note = "note: 12 training objects are fewer than train.batch_size=32: 12 is used\n"
    assert note in capsys.readouterr().err
    loader = training_data(load_config([], [*data, *TINY, "train.accumulate=8"])).train
    assert (loader.batch_size, len(loader)) == (8, 1)
    with pytest.raises(ConfigError, match=r"train\.batch_size: expected 1 to 12, the training objects, found 40"):
        training_data(load_config([], [*data, *TINY, "train.batch_size=40"]))


def test_the_smallest_set_is_trained_on(tmp_path):
    data = folder(tmp_path / "my clouds", "a cup", "a table")
    train.main([*data, *TINY, f"run.dir={tmp_path}", "run.name=small"])
    assert {"model.safetensors", "summary.json", "last.ckpt"} <= set(os.listdir(tmp_path / "small"))


def test_the_training_split_of_another_task_than_the_configuration(monkeypatch):
    monkeypatch.setattr(images, "COUNT", {"train": 20, "test": 10})
    config = load_config([], ["data.name=images", "data.root=gratings", "train.device=cpu"])
    train, held_out = training_split(config, "image_classification")
    assert (len(train), held_out) == (20, None)
    with pytest.raises(ConfigError, match=r"train\.task=classification expects point clouds, found images"):
        training_split(config)
    with pytest.raises(ConfigError, match=r"train\.task=image_classification expects images, found point clouds"):
        training_split(load_config([], TINY), "image_classification")


def test_one_class_is_refused_before_anything_is_written(tmp_path, capsys):
    data = folder(tmp_path / "clouds", "cup")
    with pytest.raises(SystemExit) as ended:
        cli.run(lambda: train.main([*data, *TINY, f"run.dir={tmp_path / 'runs'}"]))
    assert ended.value.code == 2
    assert "expected at least two classes to tell apart, found 1 (cup): add folders" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()

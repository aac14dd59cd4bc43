"""Shared fixtures. Nothing is downloaded; prepared clouds and runs stay in temporary folders."""

import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console

from pointewa import datasets
from pointewa.config import load_config
from pointewa.datasets.loader import EvalLoader, TrainLoader
from pointewa.runs.folder import find_run
from pointewa.train.data import Data
from pointewa.train.distributed import ALONE
from pointewa.train.trainer import Trainer

# The models here are tiny: threads would only wait for each other, most of all where another process has work too.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Prepared clouds are shared by the tests of a session, and never with the user's own cache."""
    os.environ["POINTEWA_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    return Path(os.environ["POINTEWA_CACHE"])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def real_data():
    """The folder with ModelNet40, for tests on real clouds."""
    folder = os.environ.get("POINTEWA_TEST_DATA")
    if not folder:
        pytest.skip("POINTEWA_TEST_DATA does not name a folder with modelnet40_1024.h5")
    assert Path(folder, "modelnet40_1024.h5").is_file(), f"POINTEWA_TEST_DATA={folder} holds no modelnet40_1024.h5"
    return Path(folder).resolve()


@pytest.fixture
def interrupt(monkeypatch):
    """From a trainer and a step to a training that Ctrl-C ends before that step."""

    def fit(trainer, step):
        def stop(trainer, batch, train_step=Trainer.train_step):
            if trainer.step == step and trainer.lock:  # none in the steps that are tried for their time
                raise KeyboardInterrupt
            train_step(trainer, batch)

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "train_step", stop)
            with pytest.raises(KeyboardInterrupt):
                trainer.fit()

    return fit


TINY = [  # a real run of the whole path in a few seconds
    "model.width=24", "model.depth=4", "model.heads=2", "model.num_groups=8", "model.group_size=8",
    "data.num_points=128", "train.epochs=2", "train.batch_size=16", "train.device=cpu", "train.lr=2e-3",
]  # fmt: skip


def build_trainer(folder, *overrides, world=ALONE, console=None):
    """A trainer on 160 procedural objects of 5 classes, 60 to test on."""

    def few(split, objects):
        clouds = datasets.load("shapes", "", split)
        clouds = clouds.take((clouds.labels < 5).nonzero().squeeze(1)[:objects])
        return replace(clouds, class_names=clouds.class_names[:5])

    config = load_config(overrides=[*TINY, f"run.dir={folder}", *overrides])
    train, val, share = few("train", 160), None, (world.rank, world.size)
    points, batch, seed = config.data.num_points, config.train.batch_size, config.train.seed
    if config.data.val_fraction:
        train, val = train.split(config.data.val_fraction, seed)
        val = EvalLoader(val, 32, points, None, *share)
    loader = TrainLoader(train, batch, points, config.data.augment, seed, *share)
    data = Data(loader, val, EvalLoader(few("test", 60), 32, points, None, *share), train.class_names)
    return Trainer(config, data, find_run(config), console or Console(quiet=True), world)


@pytest.fixture(scope="session")
def trainer_in():
    """`build_trainer`: from a folder and overrides to a trainer."""
    return build_trainer


@pytest.fixture
def make_trainer(tmp_path):
    """`build_trainer` with the test's own temporary folder."""
    return partial(build_trainer, tmp_path)

"""A finished run whose files are damaged."""

import shutil

import pytest

from tests.runs.mutations import limited

TINY = ("model.width=8", "model.depth=2", "data.num_points=64", "train.save_every=3")


@pytest.fixture(scope="module")
def run(trainer_in, tmp_path_factory):
    """A trainer whose run of 20 steps is finished, and the content of its folder."""
    trainer = trainer_in(tmp_path_factory.mktemp("runs"), *TINY, "run.name=a")
    trainer.fit()
    trainer.finish()
    with limited():
        yield trainer, {path.name: path.read_bytes() for path in trainer.folder.iterdir()}


@pytest.fixture
def folder(run):
    """The run's folder, as it was."""
    trainer, files = run
    shutil.rmtree(trainer.folder)
    trainer.folder.mkdir()
    for name, content in files.items():
        (trainer.folder / name).write_bytes(content)
    return trainer.folder

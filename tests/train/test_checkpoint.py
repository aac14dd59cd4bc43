"""What is read back is what was written; what is damaged, foreign or hostile is refused with a reason."""

import json
import os
import pickle

import pytest
import safetensors.torch
import torch

from pointewa.errors import CheckpointError
from pointewa.models import Architecture, PointTransformerClassifier
from pointewa.runs.weights import LoadedModel, load_model, read_weights, restore, save_model
from pointewa.safe.files import atomic_write
from pointewa.safe.torch_files import read_state
from pointewa.train import checkpoint
from pointewa.train.checkpoint import save_state

SMALL = Architecture(width=24, depth=2, heads=2, num_groups=8, group_size=6, patch_width=8, patch_out=24)


@pytest.fixture
def saved(tmp_path):
    model = PointTransformerClassifier(SMALL, 3).eval()
    save_model(tmp_path / "model.safetensors", LoadedModel(model, ("a", "b", "c"), 64, "shapes", "none"))
    return tmp_path / "model.safetensors", model


def test_a_model_comes_back_as_it_was(saved):
    path, model = saved
    for place in (path, path.parent):
        loaded = load_model(place)
        points = torch.randn(2, 64, 3)
        assert torch.equal(loaded.model(points), model(points))
        assert (loaded.class_names, loaded.num_points) == (("a", "b", "c"), 64)
        assert (loaded.dataset, loaded.normalize) == ("shapes", "none")
        assert not loaded.model.training


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("read", [read_state, read_weights, restore, load_model])
@pytest.mark.parametrize("write", [torch.save, lambda state, path: path.write_bytes(pickle.dumps(state, protocol=2))])
def test_a_checkpoint_cannot_run_code(tmp_path, read, write):
    write({"model": Bomb(tmp_path / "executed")}, tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match=r"last\.ckpt: not a checkpoint of tensors and plain values"):
        read(tmp_path / "last.ckpt")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("keep", [0, 10, 500, 0.5, 0.99])
def test_truncated_files_are_refused(tmp_path, saved, keep):
    path, model = saved
    save_state(tmp_path / "last.ckpt", {"model": model.state_dict()})
    for file, read in ((tmp_path / "last.ckpt", read_state), (path, load_model)):
        content = file.read_bytes()
        file.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
        with pytest.raises(CheckpointError, match=file.name):
            read(file)


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"expected a run folder with model\.safetensors or last\.ckpt"):
        load_model(tmp_path)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load_model(tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match=r"x\.safetensors: no such file"):
        load_model(tmp_path / "x.safetensors")


def test_weights_of_another_architecture_than_described(saved):
    path, _ = saved
    description = json.loads(path.with_suffix(".json").read_text())
    description["architecture"]["depth"] = 3
    path.with_suffix(".json").write_text(json.dumps(description))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: the weights are of another architecture.*Missing"):
        load_model(path)


@pytest.mark.parametrize(
    "change",
    [{"architecture": {"width": 0}}, {"architecture": {"size": 3}}, {"class_names": None}, {"num_points": "many"}],
)
def test_descriptions_that_are_not_valid(saved, change):
    path, _ = saved
    description = json.loads(path.with_suffix(".json").read_text()) | change
    path.with_suffix(".json").write_text(json.dumps(description))
    with pytest.raises(CheckpointError, match="description of the model is not valid"):
        load_model(path)
    path.with_suffix(".json").write_text("{")
    with pytest.raises(CheckpointError, match="not readable as JSON"):
        load_model(path)


def test_foreign_checkpoints_are_not_training_states(tmp_path):
    save_state(tmp_path / "a.pth", {"base_model": {"norm.weight": torch.ones(3)}})
    with pytest.raises(CheckpointError, match=r"not a training state.*found base_model.*another codebase"):
        restore(tmp_path / "a.pth")
    save_state(tmp_path / "b.pth", {})
    torch.save([1, 2], tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match="expected a dictionary, found a list"):
        read_state(tmp_path / "c.pth")


def test_a_full_disk_leaves_the_old_file_and_nothing_half_written(tmp_path, monkeypatch, saved):
    path, model = saved
    before = path.read_bytes()

    def full(tensors, file, *rest):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*model\.safetensors'"):
        save_model(path, LoadedModel(model, ("a", "b", "c"), 64, "shapes", "none"))
    assert path.read_bytes() == before
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match="nothing was written"):
        save_state(tmp_path / "last.ckpt", {})
    assert {file.name for file in tmp_path.iterdir()} == {"model.safetensors", "model.json"}


def test_atomic_write_replaces_whole_files_with_ordinary_permissions(tmp_path):
    path = tmp_path / "new" / "file"
    with atomic_write(path) as temporary:
        temporary.write_text("first")
        assert not path.exists()
    (tmp_path / "plain").touch()
    assert path.read_text() == "first"
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode

    def interrupted():
        with atomic_write(path) as temporary:
            temporary.write_text("second")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "first"
    assert [file.name for file in path.parent.iterdir()] == ["file"]


def test_a_checkpoint_whose_fsync_fails_takes_no_place(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    save_state(path, {"step": 1})
    save_state(path, {"step": 2})
    events = []

    def fsync(handle):
        events.append("fsync")
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(CheckpointError, match=r"cannot write the checkpoint .*Input/output error.*is kept"):
            save_state(path, {"step": 3})
    assert [read_state(tmp_path / name)["step"] for name in ("previous.ckpt", "last.ckpt")] == [1, 2]
    assert sorted(one.name for one in tmp_path.iterdir()) == ["last.ckpt", "previous.ckpt"]
    # What is read back is what the disk has been told to keep.
    sync, check = os.fsync, checkpoint.check_sums
    monkeypatch.setattr(os, "fsync", lambda handle: (events.append("fsync"), sync(handle)))
    monkeypatch.setattr(checkpoint, "check_sums", lambda path: (events.append("read"), check(path)))
    events.clear()
    save_state(path, {"step": 3})
    assert events[:2] == ["fsync", "read"]

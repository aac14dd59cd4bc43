"""A fault in what looks through a checkpoint is not taken for damage to the file."""

import pytest
import torch

from pointewa.errors import CheckpointError
from pointewa.safe import torch_files


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", [AttributeError, NameError, TypeError])
def test_a_fault_of_ours_is_not_that_of_a_file(tmp_path, monkeypatch, kind, zipped):
    def planted(*arguments):
        raise kind("planted")

    torch.save({"a": torch.ones(2)}, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    assert torch_files.read_state(tmp_path / "a.pth")["a"].tolist() == [1, 1]
    with monkeypatch.context() as patch:
        patch.setattr(torch_files, "_check_pickle", planted)
        with pytest.raises(kind, match="planted"):
            torch_files.read_state(tmp_path / "a.pth")
    monkeypatch.setattr(torch, "load", planted)  # of torch's reader it may well be the file's
    with pytest.raises(CheckpointError, match="damaged"):
        torch_files.read_state(tmp_path / "a.pth")

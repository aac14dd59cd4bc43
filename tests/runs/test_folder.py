"""Run folders: names, and which existing folder may be used how."""

import pytest

from pointewa.config import load_config
from pointewa.errors import CheckpointError, ConfigError
from pointewa.runs.folder import Lock, can_resume, find_run, start_run
from pointewa.runs.summary import read_summary


def config(folder, *overrides):
    return load_config(overrides=[f"run.dir={folder}", *overrides])


def test_the_default_name_tells_the_run_and_is_numbered(tmp_path):
    names = []
    for _ in range(3):
        folder = find_run(config(tmp_path))
        assert not folder.exists()  # found, not made
        start_run(folder, config(tmp_path))
        names.append(folder.name)
    assert names == ["shapes-tiny-ewa-seed0", "shapes-tiny-ewa-seed0-2", "shapes-tiny-ewa-seed0-3"]
    assert find_run(config(tmp_path, "ewa.enabled=false", "train.seed=4")).name == "shapes-tiny-dense-seed4"


def test_an_existing_run_goes_on_or_is_overwritten_when_told(tmp_path):
    named = config(tmp_path, "run.name=a")
    start_run(find_run(named), named)
    assert find_run(named) == tmp_path / "a"
    assert not can_resume(tmp_path / "a", named)  # nothing saved yet
    for name in ("old", "last.ckpt"):
        (tmp_path / "a" / name).touch()
    (tmp_path / "a" / "plugins").mkdir()
    assert can_resume(tmp_path / "a", named)
    again = config(tmp_path, "run.name=a", "run.overwrite=true", "train.lr=0.1")
    assert not can_resume(find_run(again), again)
    start_run(find_run(again), again)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["config.yaml"]
    assert "lr: 0.1" in (tmp_path / "a/config.yaml").read_text()


def test_a_folder_that_is_no_run_is_left_alone(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").touch()
    for overwrite in ("true", "false"):
        with pytest.raises(ConfigError, match="is not a run folder"):
            find_run(config(tmp_path, "run.name=photos", f"run.overwrite={overwrite}"))
    (tmp_path / "empty").mkdir()  # a process that was killed before it wrote anything leaves this
    assert find_run(config(tmp_path, "run.name=empty")) == tmp_path / "empty"


def test_a_changed_configuration_is_shown_and_refused(tmp_path):
    start_run(tmp_path / "a", config(tmp_path, "run.name=a"))
    free = ("run.name=a", "data.root=elsewhere", "train.device=cpu", "train.save_every=3")
    assert find_run(config(tmp_path, *free, "train.activation_checkpointing=true")) == tmp_path / "a"
    with pytest.raises(ConfigError, match=r"(?s)another configuration.*run.overwrite=true") as error:
        find_run(config(tmp_path, *free, "train.lr=0.1", "moe.num_experts=8"))
    assert str(error.value).splitlines()[1:] == ["  moe.num_experts: 4 -> 8", "  train.lr: 0.0005 -> 0.1"]


def test_a_run_folder_has_one_process_at_a_time(tmp_path):
    named = config(tmp_path, "run.name=a")
    claim = start_run(tmp_path / "a", named)
    (tmp_path / "a/.last.ckpt.x.tmp").touch()  # being written
    for use in (lambda: Lock(tmp_path / "a"), lambda: start_run(tmp_path / "a", named)):
        with pytest.raises(CheckpointError, match=r"a: another process is training in this folder"):
            use()
    assert (tmp_path / "a/.last.ckpt.x.tmp").exists()
    claim.release()
    Lock(tmp_path / "a")
    assert not (tmp_path / "a/.last.ckpt.x.tmp").exists()  # left by one that was killed


def test_figures_of_a_finished_run(tmp_path):
    start_run(tmp_path / "a", config(tmp_path, "run.name=a"))
    assert read_summary(tmp_path / "a") is None
    for damaged in ("", "[]", "{}", '{"test": 3}', "[" * 100_000):
        (tmp_path / "a/summary.json").write_text(damaged)
        with pytest.raises(CheckpointError, match=r"summary\.json: damaged .*: remove it"):
            read_summary(tmp_path / "a")

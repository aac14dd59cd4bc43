"""Run folders: names, and which existing folder may be used how."""

import pytest

from pointewa.config import load_config
from pointewa.engine.runs import find_run, start_run, write_summary
from pointewa.errors import CheckpointError, ConfigError


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


def test_an_existing_run_is_only_overwritten_when_told(tmp_path):
    named = config(tmp_path, "run.name=a")
    start_run(find_run(named), named)
    (tmp_path / "a" / "old").touch()
    with pytest.raises(ConfigError, match=r"a exists \(not finished\): go on with run.resume=true, start over with"):
        find_run(named)
    again = config(tmp_path, "run.name=a", "run.overwrite=true")
    start_run(find_run(again), again)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["config.yaml"]


def test_a_folder_that_is_no_run_is_never_overwritten(tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(ConfigError, match="is not a run folder"):
        find_run(config(tmp_path, "run.name=photos", "run.overwrite=true"))


def test_what_can_be_resumed(tmp_path):
    resumed = ("run.name=a", "run.resume=true")
    with pytest.raises(ConfigError, match="which run"):
        find_run(config(tmp_path, "run.resume=true"))
    with pytest.raises(CheckpointError, match="no such run to resume"):
        find_run(config(tmp_path, *resumed))
    start_run(tmp_path / "a", config(tmp_path, "run.name=a"))
    with pytest.raises(CheckpointError, match=r"no last\.ckpt to resume from"):
        find_run(config(tmp_path, *resumed))
    (tmp_path / "a" / "last.ckpt").touch()
    assert find_run(config(tmp_path, *resumed, "data.root=elsewhere", "train.device=cpu")) == tmp_path / "a"
    with pytest.raises(ConfigError, match=r"another configuration: train.lr: 0.0005 -> 0.1"):
        find_run(config(tmp_path, *resumed, "train.lr=0.1"))
    write_summary(tmp_path / "a", {})
    with pytest.raises(ConfigError, match="is finished"):
        find_run(config(tmp_path, *resumed))

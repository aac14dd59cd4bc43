"""Run folders: finding, locking and starting them."""

import fcntl
import os
import reprlib
import shutil
from pathlib import Path
from typing import Self

from pointewa.config import Config, TrainConfig, differences, load_config, to_yaml
from pointewa.errors import CheckpointError, ConfigError, first_line
from pointewa.runs.weights import RUN_CONFIG as CONFIG
from pointewa.runs.weights import has_state
from pointewa.safe.files import atomic_write, remove_temporary

# What may differ between a run and its continuation, since it does not change the result.
_FREE = (
    "run.name", "run.dir", "run.overwrite", "run.report", "run.tracker", "data.root", "data.stream",
    "train.device", "train.save_every", "train.max_skipped", "train.activation_checkpointing",
)  # fmt: skip


def find_run(config: Config) -> Path:
    """The folder of a new run, or of the unfinished or finished one of that name. Writes nothing.

    Without ``run.name`` it is a new run, named after data set, model, scheme and seed, with a number if that name is
    taken.

    Raises:
        ConfigError: the folder is not a run folder, or its run has another configuration and ``run.overwrite`` is
            not set.
    """
    root, name = Path(config.run.dir), config.run.name
    if name is None:
        task = "" if config.train.task == TrainConfig.task else f"{config.train.task}-"
        data = config.data
        fold = "" if data.fold is None else f"{data.way}w{data.shot}s-fold{data.fold}-"
        base = (
            f"{data.name}-{config.model.preset.replace(':', '-')}-{task}{fold}{config.scheme}-seed{config.train.seed}"
        )
        numbered = (base if number == 1 else f"{base}-{number}" for number in range(1, 100_000))
        name = base if config.run.overwrite else next(name for name in numbered if not (root / name).exists())
    folder = root / name
    try:
        if not any(not path.name.startswith(".") for path in folder.iterdir()):
            return folder
    except FileNotFoundError:
        return folder
    except (OSError, ValueError) as error:  # a file; a name that is too long or has forbidden characters
        reason = error.strerror if isinstance(error, OSError) else first_line(error)
        raise ConfigError(f"run.name: {reprlib.repr(str(folder))} cannot be used ({reason})") from error
    if not (folder / CONFIG).is_file():
        raise ConfigError(f"run.name: {folder} exists and is not a run folder: it is left alone; choose another name")
    if not config.run.overwrite:
        try:
            recorded = load_config([folder / CONFIG])
        except ConfigError as error:
            raise ConfigError(
                f"run.name: {folder} has a damaged configuration ({error}): start over with run.overwrite=true, or "
                "choose another name"
            ) from error
        changed = differences(recorded, config, ignore=_FREE)
        if changed:
            raise ConfigError(
                f"run.name: {folder} was made with another configuration: start over with run.overwrite=true, or "
                "choose another name; what differs:" + "".join(f"\n  {line}" for line in changed)
            )
    return folder


def can_resume(folder: Path, config: Config) -> bool:
    """Whether the run in a folder of `find_run` is to resume from a checkpoint."""
    return not config.run.overwrite and has_state(folder)


def again(folder: Path) -> str:
    """How a run goes on once there is room on the disk."""
    return f"free some space, then resume with the same command and RUN={folder.name} (run.name={folder.name})"


class Lock:
    """Locks a run folder for this process, until it ends, until `release`, or in a ``with`` block.

    Raises:
        CheckpointError: another process holds the lock.
    """

    _handle = -1

    def __init__(self, folder: Path) -> None:
        self._handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CheckpointError(
                f"{folder}: another process is training in this folder: wait for it, stop it, or choose another name"
            ) from error
        remove_temporary(folder)

    def release(self) -> None:
        """Release the lock."""
        if self._handle >= 0:
            os.close(self._handle)
        self._handle = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    __del__ = release


def start_run(folder: Path, config: Config) -> Lock:
    """Make and lock the folder of a new run; an older run that `find_run` allows to be overwritten is removed.

    Raises:
        CheckpointError: it cannot be written, or another process holds its lock.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = Lock(folder)
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != CONFIG:  # kept to the end, so that it stays a run folder if this is interrupted
                path.unlink()
        with atomic_write(folder / CONFIG) as temporary:
            temporary.write_text(to_yaml(config))
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot make the run folder ({first_line(error)})") from error
    return lock

"""Run folders."""

import json
import shutil
from pathlib import Path

from pointewa.config import Config, differences, load_config, to_yaml
from pointewa.engine.checkpoint import LAST
from pointewa.errors import CheckpointError, ConfigError, first_line
from pointewa.files import atomic_write

CONFIG, METRICS, SUMMARY = "config.yaml", "metrics.jsonl", "summary.json"

# What may differ between a run and its continuation.
_FREE = ("run.name", "run.dir", "run.overwrite", "run.resume", "train.device", "train.save_every", "data.root")


def find_run(config: Config) -> Path:
    """The folder of a new run, or of the one to resume. Checks that it may be used and writes nothing.

    Without ``run.name`` the name tells data set, model, scheme and seed, and a number where that is taken.

    Raises:
        ConfigError: the folder exists and neither ``run.resume`` nor ``run.overwrite`` is set, or the run to resume
            is finished or was made with another configuration.
        CheckpointError: the run to resume has no checkpoint.
    """
    root, name = Path(config.run.dir), config.run.name
    if name is None:
        if config.run.resume:
            raise ConfigError("run.resume: which run? Name it: run.name=... (RUN=...)")
        scheme = "ewa" if config.ewa.enabled else "dense"
        base = f"{config.data.name}-{config.model.preset}-{scheme}-seed{config.train.seed}"
        numbered = (base if number == 1 else f"{base}-{number}" for number in range(1, 100_000))
        name = base if config.run.overwrite else next(name for name in numbered if not (root / name).exists())
    folder = root / name
    if config.run.resume:
        _check_resume(folder, config)
        return folder
    if folder.exists():
        if not config.run.overwrite:
            state = "finished" if (folder / SUMMARY).exists() else "not finished"
            raise ConfigError(
                f"run.name: {folder} exists ({state}): go on with run.resume=true, start over with "
                "run.overwrite=true, or choose another name"
            )
        if not (folder / CONFIG).is_file():
            raise ConfigError(f"run.name: {folder} exists and is not a run folder: it is not overwritten")
    return folder


def start_run(folder: Path, config: Config) -> None:
    """Make the folder of a new run, in the place of an older one if `find_run` found that it may be overwritten.

    Raises:
        CheckpointError: it cannot be written.
    """
    try:
        if folder.exists():
            shutil.rmtree(folder)
        with atomic_write(folder / CONFIG) as temporary:
            temporary.write_text(to_yaml(config))
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot make the run folder ({first_line(error)})") from None


def _check_resume(folder: Path, config: Config) -> None:
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder}: no such run to resume: expected a folder with {CONFIG}")
    if (folder / SUMMARY).is_file():
        raise ConfigError(f"run.resume: {folder} is finished; its figures are in {SUMMARY}")
    if not (folder / LAST).is_file():
        raise CheckpointError(f"{folder}: no {LAST} to resume from: start over with run.overwrite=true")
    changed = differences(load_config([folder / CONFIG]), config, ignore=_FREE)
    if changed:
        raise ConfigError(f"run.resume: {folder} was made with another configuration: {'; '.join(changed)}")


def write_summary(folder: Path, summary: dict) -> None:
    """Write ``summary.json``: the run is finished."""
    with atomic_write(folder / SUMMARY) as temporary:
        temporary.write_text(json.dumps(summary, indent=1) + "\n")


class Logbook:
    """Scalars of each epoch, to ``metrics.jsonl`` and TensorBoard.

    Args:
        folder: of the run.
        first_epoch: what earlier, interrupted training wrote for this epoch or later ones is taken out.
        first_step: the iteration it starts at.
    """

    def __init__(self, folder: Path, first_epoch: int = 0, first_step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only training needs it

        self._path = folder / METRICS
        if self._path.exists():
            lines = [line for line in self._path.read_text().splitlines() if _epoch(line) < first_epoch]
            with atomic_write(self._path) as temporary:
                temporary.write_text("".join(f"{line}\n" for line in lines))
        self._board = SummaryWriter(str(folder), purge_step=first_step or None)

    def write(self, epoch: int, step: int, scalars: dict[str, float]) -> None:
        """Add a line for an epoch, counted from 0."""
        with open(self._path, "a") as file:
            file.write(json.dumps({"epoch": epoch, **scalars}) + "\n")
        for name, value in scalars.items():
            self._board.add_scalar(name, value, step)
        self._board.flush()

    def close(self) -> None:
        """Finish writing."""
        self._board.close()


def _epoch(line: str) -> float:
    try:
        return json.loads(line)["epoch"]
    except ValueError:  # cut off by whatever ended the run
        return float("inf")

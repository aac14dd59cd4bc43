"""The scalars of each epoch of a run."""

import json
import os
import warnings
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pointewa.errors import CheckpointError
from pointewa.safe.files import append, atomic_write, naming

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

METRICS = "metrics.jsonl"
EVENTS = "events.out.tfevents"  # how the names of TensorBoard's files begin


def board_writer(folder: Path, **options: Any) -> "SummaryWriter | None":
    """TensorBoard's writer to a folder; None, with a warning, where TensorBoard is not installed.

    Args:
        folder: where its files are.
        **options: of the writer.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only training needs it
    except ImportError:
        warnings.warn(f"tensorboard is not installed, so {folder} gets no files for it: pip install tensorboard",
                      stacklevel=2)  # fmt: skip
        return None
    return SummaryWriter(str(folder), **options)


class Logbook:
    """Scalars of each epoch, to ``metrics.jsonl`` and, where it is installed, TensorBoard.

    Args:
        folder: of the run.
        first_epoch: records of this epoch and later ones, from an interrupted training, are removed.
        first_step: the iteration at which training starts.
    """

    def __init__(self, folder: Path, first_epoch: int = 0, first_step: int = 0) -> None:
        self._path = folder / METRICS
        if os.path.lexists(self._path) and not self._path.is_file():
            raise CheckpointError(f"{self._path}: expected a file, found a folder or a device: remove it")
        if self._path.exists():
            kept = [record for record in read_metrics(folder) if record["epoch"] < first_epoch]
            with atomic_write(self._path) as temporary:
                temporary.write_text("".join(f"{json.dumps(record)}\n" for record in kept))
        self._folder = folder
        with naming(folder / EVENTS):
            self._board = board_writer(folder, purge_step=first_step or None)
            if self._board:
                self._board.flush()  # so that a full disk is noticed here, and not by a thread of its own

    def write(self, epoch: int, step: int, scalars: dict[str, float]) -> None:
        """Add a line for an epoch, counted from 0."""
        with naming(self._path):
            append(self._path, json.dumps({"epoch": epoch, **scalars}) + "\n")
        if not self._board:
            return
        with naming(self._folder / EVENTS):
            for name, value in scalars.items():
                self._board.add_scalar(name, value, step)
            self._board.flush()

    def __enter__(self) -> Self:
        return self

    def close(self) -> None:
        """Finish writing."""
        if not self._board:
            return
        with naming(self._folder / EVENTS):
            self._board.close()

    def __exit__(self, kind: type | None, *error: object) -> None:
        with suppress(OSError) if kind else nullcontext():  # what went wrong first is reported
            self.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records in a run's ``metrics.jsonl``, in order; lines that are cut off or hold no record are left out.

    Raises:
        CheckpointError: there is no such file.
    """
    path = folder / METRICS
    if not path.is_file():
        raise CheckpointError(f"{path}: expected the metrics of a run, found no such file: name a run folder")
    records = map(_record, path.read_text(errors="replace").split("\n"))
    return [record for record in records if record is not None]


def _record(line: str) -> dict[str, Any] | None:
    """An epoch's record; None for a line that was cut off when the run ended."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and type(record.get("epoch")) is int else None

"""What the trainer is given to train and evaluate on."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from pointewa.tasks.base import Batch


class TrainBatches(Protocol):
    """Batches of an epoch, entered anywhere; see `datasets.loader.TrainLoader`."""

    def __len__(self) -> int: ...

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """This process's parts of the batches from number ``start`` on."""
        ...

    def object_names(self, epoch: int, number: int) -> list[str]:
        """What is in a whole batch."""
        ...


@dataclass(frozen=True)
class Data:
    """What is trained and evaluated on, on the device of the training. With several processes, this one's part of it.

    Args:
        train: the batches of training.
        val: those of the validation split; None without one.
        test: those of the test split.
        class_names: C names.
        normalize: what was done to the clouds, see `pointewa.runs.description.LoadedModel`.
    """

    train: TrainBatches
    val: Iterable[Batch] | None
    test: Iterable[Batch]
    class_names: tuple[str, ...]
    normalize: str = "unit_sphere"

"""The data that a trainer needs."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from pointewa.models.parts import Parts
from pointewa.tasks.base import Batch


class TrainBatches(Protocol):
    """Batches of an epoch, from any batch on; see `pointewa.datasets.loader.TrainLoader`."""

    def __len__(self) -> int: ...

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """This process's parts of the batches from number ``start`` on."""
        ...

    def object_names(self, epoch: int, number: int) -> list[str]:
        """The names of the objects in a whole batch."""
        ...


@dataclass(frozen=True)
class Data:
    """The data of a training, on its device. With several processes, this one's part of it.

    Args:
        train: the batches of training.
        val: those of the validation split; None without one.
        test: those of the test split.
        class_names: C names.
        parts: what the labels of points count.
        normalize, up: what was done to the clouds, see `pointewa.runs.description.LoadedModel`.
        reported: metrics that the data set asks for, see `pointewa.tasks.base.Task.reporting`.
        fold: what the summary says of a few-shot fold; the test split is then evaluated after every epoch.
    """

    train: TrainBatches
    val: Iterable[Batch] | None
    test: Iterable[Batch]
    class_names: tuple[str, ...]
    normalize: str = "unit_sphere"
    up: str = "y"
    parts: Parts | None = None
    reported: tuple[str, ...] = ()
    fold: dict[str, Any] | None = None

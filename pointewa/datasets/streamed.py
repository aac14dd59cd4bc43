"""The clouds of a packed file that are read while they are trained on, behind the interface of resident ones."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pointewa.datasets.base import Clouds, Labelled, check_labels, check_parts
from pointewa.datasets.packed import WHAT, Split
from pointewa.errors import DataError
from pointewa.models.parts import Parts
from pointewa.safe.hdf5 import open_hdf5


@dataclass(frozen=True)
class StreamedClouds(Clouds):
    """Clouds of a prepared split that stay on disk; a thread reads batches in advance.

    Args:
        packed: the split.
        rows: int64 ``[N]``, which of its objects.
        labels: int64 ``[N]``, on the device that batches are put on.
        ahead: batches that are read in advance.
    """

    packed: Split
    rows: Tensor
    labels: Tensor
    ahead: int = 4

    def __post_init__(self) -> None:
        check_labels(self.labels, self.class_names, self.object_names, self.source)

    @classmethod
    def of(cls, packed: Split) -> "StreamedClouds":
        """All objects of a split."""
        return cls(packed, torch.arange(packed.shape[0]), torch.from_numpy(packed.labels))

    @property
    def class_names(self) -> tuple[str, ...]:
        """C names."""
        return self.packed.class_names

    @property
    def object_names(self) -> tuple[str, ...]:
        """N names."""
        return tuple(self.packed.object_names[row] for row in self.rows.tolist())

    @property
    def source(self) -> str:
        """The file."""
        return str(self.packed.path)

    @property
    def normalized(self) -> bool:
        """Each cloud was centred and scaled to largest norm 1."""
        return self.packed.normalized

    @property
    def centered(self) -> bool:
        """Each cloud was centred, and has the units of its file."""
        return self.packed.centered

    @property
    def num_points(self) -> int:
        """P, the points that each cloud has."""
        return self.packed.shape[1]

    @property
    def parts(self) -> Parts | None:
        """What the labels of points count."""
        return self.packed.parts

    @property
    def up(self) -> str:
        """The axis that points up in the files that they were made of."""
        return self.packed.up or "y"

    def batches(self, indices: Iterable[Tensor], count: int) -> Iterator[Labelled]:
        """For each of ``indices`` ``[B]`` the first ``count`` points of those clouds.

        Raises:
            DataError: the file is damaged, or a coordinate is not finite.
        """
        device, labels = self.labels.device, self.labels.cpu()
        with open_hdf5(self.packed.path, WHAT, self.packed.trusted) as h5, ThreadPoolExecutor(1) as thread:

            def read(index: Tensor) -> list[Tensor | None]:
                found = self.packed.read_from(h5, self.rows[index].tolist(), min(count, self.num_points))
                tensors = [torch.from_numpy(found[0]).float(), None if found[1] is None else torch.from_numpy(found[1])]
                if not torch.isfinite(tensors[0]).all():
                    raise DataError(f"{self.source}: coordinates that are not finite: pack it again from its source")
                if tensors[1] is not None:
                    names = [self.packed.object_names[row] for row in self.rows[index].tolist()]
                    check_parts(tensors[1], labels[index], self.parts, self.class_names, names, self.source)
                return [one if one is None or device.type != "cuda" else one.pin_memory() for one in tensors]

            def next_batch() -> Labelled:
                tensors = pending.popleft().result()
                return Labelled(*(None if one is None else one.to(device, non_blocking=True) for one in tensors))

            pending: deque = deque()
            for index in indices:
                pending.append(thread.submit(read, index.cpu()))
                if len(pending) > self.ahead:
                    yield next_batch()
            while pending:
                yield next_batch()

    def take(self, indices: Sequence[int] | Tensor) -> "StreamedClouds":
        """The clouds at ``indices``."""
        indices = torch.as_tensor(indices)
        return replace(self, rows=self.rows[indices], labels=self.labels[indices.to(self.labels.device)])

    def relabelled(self, labels: Tensor, class_names: tuple[str, ...]) -> "StreamedClouds":
        """The same clouds with other labels, and without those of their points."""
        packed = replace(self.packed, class_names=class_names, point_labels=None, parts=None)
        return replace(self, packed=packed, labels=labels.to(self.labels.device))

    def to(self, device: torch.device | str) -> "StreamedClouds":
        """The clouds with their labels and batches on a device."""
        return replace(self, labels=self.labels.to(device))

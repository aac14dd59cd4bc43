"""Batches of clouds, drawn and augmented on the training device: no worker processes, no Python per object."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from pointewa.datasets.base import Clouds, Labelled
from pointewa.datasets.transforms import AUGMENTATIONS, augment, pool_size, select, subset_indices
from pointewa.errors import ConfigError, counted
from pointewa.tasks.base import Batch


class TrainLoader:
    """Shuffled and augmented batches of equal size; an incomplete last one is dropped.

    Everything drawn for a batch depends on the seed, the epoch, the number of the batch and the rank only: an epoch can
    be entered at any batch, and two runs with different models see the same data. Several processes share a batch.

    Args:
        clouds: in farthest-point order, on the device of the training.
        batch_size: B over all processes, at most the number of clouds.
        num_points: points a cloud.
        augmentations: of `pointewa.datasets.transforms.AUGMENTATIONS`, in the order in which they are applied.
        seed: of the order and the augmentation.
        rank: number of this process.
        world_size: number of processes.

    Raises:
        ConfigError: an unknown augmentation, a batch larger than the set, or one that cannot be divided equally.
    """

    known: Sequence[str] = AUGMENTATIONS

    def __init__(
        self,
        clouds: Clouds,
        batch_size: int,
        num_points: int,
        augmentations: Sequence[str],
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if unknown := [name for name in augmentations if name not in self.known]:
            raise ConfigError(f"data.augment: expected a list of {', '.join(self.known)}, found {unknown[0]!r}")
        if not 1 <= batch_size <= len(clouds):
            raise ConfigError(
                f"train.batch_size: expected 1 to {len(clouds)}, the training objects, found {batch_size}"
            )
        if batch_size % world_size:
            raise ConfigError(
                f"train.batch_size: expected a multiple of {world_size} processes, which share it, found {batch_size}"
            )
        self.clouds, self.batch_size, self.num_points, self.seed = clouds, batch_size, num_points, seed
        self.rank, self.world_size = rank, world_size
        self.augmentations = tuple(augmentations)
        self._generator = torch.Generator(clouds.labels.device)

    def __len__(self) -> int:
        return len(self.clouds) // self.batch_size

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """This process's parts, B / ``world_size`` clouds of ``num_points`` points, of the batches of an epoch, from
        number ``start`` on."""
        parts = [batch.chunk(self.world_size)[self.rank] for batch in self._batches(epoch)[start:]]
        pools = self.clouds.batches(parts, pool_size(self.num_points))
        for number, (index, pool) in enumerate(zip(parts, pools, strict=True), start):
            points, point_labels = self._drawn(pool, self._seeded(epoch, number, self.rank))
            yield Batch(points, self.clouds.labels[index], point_labels)

    def _drawn(self, pool: Labelled, generator: torch.Generator) -> Labelled:
        """What is trained on, drawn from the pools of a batch."""
        drawn = select(pool, subset_indices(pool.points, generator, self.num_points))
        return augment(drawn, self.augmentations, generator)

    def object_names(self, epoch: int, number: int) -> list[str]:
        """Names of the objects of a batch, over all processes."""
        return [self.clouds.object_names[index] for index in self._batches(epoch)[number].tolist()]

    def _batches(self, epoch: int) -> tuple[Tensor, ...]:
        order = torch.randperm(len(self.clouds), device=self.clouds.labels.device, generator=self._seeded(epoch))
        return order[: len(self) * self.batch_size].split(self.batch_size)

    def _seeded(self, *key: int) -> torch.Generator:
        seed = np.random.SeedSequence([self.seed, *key]).generate_state(2, np.uint32)
        return self._generator.manual_seed(int(seed[0]) << 31 | int(seed[1]) >> 1)


class EvalLoader:
    """All clouds in their order; without a transform each as its farthest-point sample of ``num_points``.

    Args:
        clouds: in farthest-point order.
        batch_size: B.
        num_points: points a cloud.
        transform: from points ``[B, P, 3]``, P the size of the pool that training draws from if there are as many,
            to the points that are evaluated. Their labels are then not given, since it may draw and reorder points,
            unless ``ordered``.
        ordered: the transform gives the first points, in their order.
        rank: number of this process. The clouds are divided among the processes, each going to exactly one.
        world_size: number of processes.

    Raises:
        ConfigError: fewer clouds than processes.
    """

    def __init__(
        self,
        clouds: Clouds,
        batch_size: int,
        num_points: int,
        transform: Callable[[Tensor], Tensor] | None = None,
        rank: int = 0,
        world_size: int = 1,
        ordered: bool = False,
    ) -> None:
        if len(clouds) < world_size:
            raise ConfigError(
                f"{world_size} processes, but only {counted(len(clouds), 'object')} to evaluate: start fewer"
            )
        self.clouds, self.batch_size, self.num_points, self.transform = clouds, batch_size, num_points, transform
        self.rank, self.world_size, self.ordered = rank, world_size, ordered

    def __len__(self) -> int:
        return len(self._indices())

    def _indices(self) -> tuple[Tensor, ...]:
        everything = torch.arange(len(self.clouds), device=self.clouds.labels.device)
        return everything.tensor_split(self.world_size)[self.rank].split(self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        indices = self._indices()
        count = pool_size(self.num_points) if self.transform else self.num_points
        for index, (points, point_labels) in zip(indices, self.clouds.batches(indices, count), strict=True):
            if self.transform:
                points = self.transform(points)
                kept = self.ordered and point_labels is not None
                point_labels = point_labels[:, : points.shape[1]] if kept else None
            yield Batch(points, self.clouds.labels[index], point_labels)

"""Batches of clouds, drawn and augmented on the training device: no worker processes, no Python for single objects."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from datasets.base import Clouds
from datasets.transforms import AUGMENTATIONS, pool_size, random_subset
from pointewa.errors import ConfigError


class TrainLoader:
    """Shuffled and augmented batches of equal size; an incomplete last one is left out.

    Everything drawn for a batch depends on the seed, the epoch and the number of the batch only: an epoch can be
    entered anywhere, and two runs that differ in their models see the same data.

    Args:
        clouds: in farthest-point order, on the device of the training.
        batch_size: B, at most the number of clouds.
        num_points: points a cloud.
        augment: one of `datasets.transforms.AUGMENTATIONS`.
        seed: of the order and the augmentation.

    Raises:
        ConfigError: an unknown augmentation, or more in a batch than there is.
    """

    def __init__(self, clouds: Clouds, batch_size: int, num_points: int, augment: str, seed: int) -> None:
        if augment not in AUGMENTATIONS:
            raise ConfigError(f"data.augment: expected one of {', '.join(AUGMENTATIONS)}, found {augment!r}")
        if not 1 <= batch_size <= len(clouds):
            raise ConfigError(
                f"train.batch_size: expected 1 to {len(clouds)}, the training objects, found {batch_size}"
            )
        self.clouds, self.batch_size, self.num_points, self.seed = clouds, batch_size, num_points, seed
        self._augment = AUGMENTATIONS[augment]
        self._generator = torch.Generator(clouds.labels.device)

    def __len__(self) -> int:
        return len(self.clouds) // self.batch_size

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch from number ``start`` on: points ``[B, num_points, 3]``, labels ``[B]``."""
        labels = self.clouds.labels
        order = torch.randperm(len(self.clouds), device=labels.device, generator=self._seeded(epoch))
        batches = order[: len(self) * self.batch_size].split(self.batch_size)[start:]
        clouds = self.clouds.batches(batches, pool_size(self.num_points))
        for number, (index, points) in enumerate(zip(batches, clouds, strict=True), start):
            generator = self._seeded(epoch, number)
            points = random_subset(points, self.num_points, generator)
            yield self._augment(points, generator), labels[index]

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
            to the points that are evaluated.
    """

    def __init__(
        self,
        clouds: Clouds,
        batch_size: int,
        num_points: int,
        transform: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.clouds, self.batch_size, self.num_points, self.transform = clouds, batch_size, num_points, transform

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        indices = torch.arange(len(self.clouds), device=self.clouds.labels.device).split(self.batch_size)
        count = pool_size(self.num_points) if self.transform else self.num_points
        for index, points in zip(indices, self.clouds.batches(indices, count), strict=True):
            yield self.transform(points) if self.transform else points, self.clouds.labels[index]

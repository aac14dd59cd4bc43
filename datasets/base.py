"""What every data module returns."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pointewa.errors import DataError


@dataclass(frozen=True)
class PointClouds:
    """Labelled clouds of equal size.

    Args:
        points: float32 ``[N, P, 3]``. As returned by `datasets.load` each cloud is in farthest-point order, so that
            its first k points are its farthest-point sample of size k.
        labels: int64 ``[N]``, indices into ``class_names``.
        class_names: C names.
        object_names: N names.
        source: the file or folder it came from, for messages.

    Raises:
        DataError: wrong shapes, a label out of range, a coordinate that is not finite.
    """

    points: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    object_names: tuple[str, ...]
    source: str

    def __post_init__(self) -> None:
        points, labels = self.points, self.labels
        if points.ndim != 3 or points.shape[-1] != 3 or 0 in points.shape:
            raise DataError(f"{self.source}: expected points [N, P, 3] with N, P > 0, found {list(points.shape)}")
        if not len(points) == len(labels) == len(self.object_names):
            raise DataError(
                f"{self.source}: {len(points)} clouds, {len(labels)} labels, {len(self.object_names)} object names"
            )
        out_of_range = (labels < 0) | (labels >= len(self.class_names))
        if out_of_range.any():
            index = int(out_of_range.nonzero()[0])
            raise DataError(
                f"{self.source}: object {index} ({self.object_names[index]}) has label {int(labels[index])}, "
                f"expected 0 to {len(self.class_names) - 1}"
            )
        bad = ~torch.isfinite(points).flatten(1).all(1)
        if bad.any():
            index = int(bad.nonzero()[0])
            raise DataError(
                f"{self.source}: object {index} ({self.object_names[index]}) has coordinates that are not finite, "
                f"as {int(bad.sum())} of {len(bad)} objects do: remove or repair them"
            )

    def __len__(self) -> int:
        return len(self.points)

    def take(self, indices: Sequence[int] | Tensor) -> "PointClouds":
        """The clouds at ``indices``."""
        indices = torch.as_tensor(indices)
        names = tuple(self.object_names[i] for i in indices.tolist())
        return replace(self, points=self.points[indices], labels=self.labels[indices], object_names=names)

    def to(self, device: torch.device | str) -> "PointClouds":
        """The clouds on a device."""
        return replace(self, points=self.points.to(device), labels=self.labels.to(device))

    def split(self, fraction: float, seed: int) -> tuple["PointClouds", "PointClouds"]:
        """Hold out ``fraction`` of each class (rounded, at least one object), chosen by ``seed``.

        Returns:
            The rest, and what is held out, both in their original order.
        """
        generator = torch.Generator().manual_seed(seed)
        held_out = torch.zeros(len(self), dtype=torch.bool)
        for label in self.labels.unique():
            members = (self.labels == label).nonzero().squeeze(1).cpu()
            count = max(1, round(fraction * len(members)))
            held_out[members[torch.randperm(len(members), generator=generator)[:count]]] = True
        return self.take((~held_out).nonzero().squeeze(1)), self.take(held_out.nonzero().squeeze(1))

"""What every data module returns."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor

from pointewa.errors import DataError
from pointewa.models.parts import Parts


class Labelled(NamedTuple):
    """Points of several clouds, float32 ``[B, P, 3]``, and where the set has them their labels, int64 ``[B, P]``."""

    points: Tensor
    point_labels: Tensor | None = None


class Clouds(ABC):
    """Labelled clouds of equal size in farthest-point order, wherever their points are kept.

    The first k points of a cloud are its farthest-point sample of size k.

    Attributes:
        labels: int64 ``[N]``, indices into ``class_names``, on the device of the training.
        class_names: C names.
        object_names: N names.
        source: the file or folder it came from, for messages.
        normalized: each cloud was centred and scaled to largest norm 1.
        centered: without ``normalized``: each cloud was centred, and has the units of its file.
        num_points: P, the points that each cloud has.
        up: the axis that points up in the files that they were read from; in the clouds it is y.
        parts: what the labels of points count; None if the set has no parts.
    """

    labels: Tensor
    class_names: tuple[str, ...]
    object_names: tuple[str, ...]
    source: str
    normalized: bool
    centered: bool = False
    num_points: int
    up: str
    parts: Parts | None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def normalize(self) -> str:
        """How the objects were normalised, see `pointewa.runs.description.LoadedModel`."""
        return "unit_sphere" if self.normalized else "center" if self.centered else "none"

    @abstractmethod
    def batches(self, indices: Iterable[Tensor], count: int) -> Iterator[Labelled]:
        """For each of ``indices`` ``[B]`` the first ``count`` points of those clouds, on the device."""

    @abstractmethod
    def take(self, indices: Sequence[int] | Tensor) -> Self:
        """The clouds at ``indices``."""

    @abstractmethod
    def relabelled(self, labels: Tensor, class_names: tuple[str, ...]) -> Self:
        """The same clouds with other labels int64 ``[N]``, of other classes; without the parts of their points, which
        count by the classes that they had."""

    @abstractmethod
    def to(self, device: torch.device | str) -> Self:
        """The same clouds on a device; streamed ones put their batches there."""

    def split(self, fraction: float, seed: int) -> tuple[Self, Self]:
        """Hold out ``fraction`` of each class (rounded, at least one object), chosen by ``seed``.

        Returns:
            The rest, and what is held out, both in their original order.
        """
        held_out = torch.zeros(len(self), dtype=torch.bool)
        held_out[hold_out(self.labels.cpu(), fraction, seed)] = True
        return self.take((~held_out).nonzero().squeeze(1)), self.take(held_out.nonzero().squeeze(1))


def check_labels(labels: Tensor, class_names: Sequence[str], object_names: Sequence[str], source: str | Path) -> None:
    """Refuse labels ``[N]`` that do not fit the names.

    Raises:
        DataError: naming ``source`` and the first object that is wrong.
    """
    if len(labels) != len(object_names):
        raise DataError(f"{source}: {len(labels)} labels, {len(object_names)} object names")
    out_of_range = (labels < 0) | (labels >= len(class_names))
    if out_of_range.any():
        index = int(out_of_range.nonzero()[0])
        raise DataError(
            f"{source}: object {index} ({object_names[index]}) has label {int(labels[index])}, "
            f"expected 0 to {len(class_names) - 1}"
        )


def check_parts(
    point_labels: Tensor,
    labels: Tensor,
    parts: Parts | None,
    class_names: Sequence[str],
    object_names: Sequence[str],
    source: str | Path,
) -> None:
    """Refuse point labels ``[N, P]`` that are no parts of the classes ``[N]`` of their objects; without parts none are.

    Raises:
        DataError: naming ``source``, and the first object and point that are wrong.
    """
    if parts is None:
        return
    mask = parts.mask(len(class_names)).to(point_labels.device)
    inside = (point_labels >= 0) & (point_labels < len(parts))
    wrong = ~(inside & mask[labels].gather(1, point_labels.clamp(0, len(parts) - 1)))
    if wrong.any():
        index, point = wrong.nonzero()[0].tolist()
        mine = mask[labels[index]].nonzero().squeeze(1).tolist()
        found = f"point {point} has label {int(point_labels[index, point])}"
        expected = f"expected a part of {class_names[int(labels[index])]} ({', '.join(map(str, mine)) or 'none'})"
        raise DataError(f"{source}: object {index} ({object_names[index]}): {found}, {expected}")


def hold_out(labels: Tensor, fraction: float, seed: int) -> Tensor:
    """Indices of ``fraction`` of each class (rounded, at least one object), chosen by ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for label in labels.unique():
        members = (labels == label).nonzero().squeeze(1)
        count = max(1, round(fraction * len(members)))
        chosen.append(members[torch.randperm(len(members), generator=generator)[:count]])
    return torch.cat(chosen)


@dataclass(frozen=True)
class PointClouds(Clouds):
    """Clouds that are held in memory, on the device of the training.

    Args:
        points: float32 ``[N, P, 3]``. As returned by `pointewa.datasets.load` each cloud is in farthest-point order.
        labels: int64 ``[N]``, indices into ``class_names``.
        class_names: C names.
        object_names: N names.
        source: the file or folder it came from, for messages.
        normalized: each cloud was centred and scaled to largest norm 1.
        point_labels: int64 ``[N, P]``, of the points, in step with them; None if the set has none.
        up: the axis that points up in the files that they were read from.
        parts: what ``point_labels`` count.
        centered: without ``normalized``: each cloud was centred, and has the units of its file.

    Raises:
        DataError: wrong shapes, a label out of range, a part that objects of the category do not have, a
            coordinate that is not finite.
    """

    points: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    object_names: tuple[str, ...]
    source: str
    normalized: bool = False
    point_labels: Tensor | None = None
    up: str = "y"
    parts: Parts | None = None
    centered: bool = False

    def __post_init__(self) -> None:
        points = self.points
        if points.ndim != 3 or points.shape[-1] != 3 or 0 in points.shape:
            raise DataError(f"{self.source}: expected points [N, P, 3] with N, P > 0, found {list(points.shape)}")
        if len(points) != len(self.labels):
            raise DataError(f"{self.source}: {len(points)} clouds, {len(self.labels)} labels")
        if self.point_labels is not None and self.point_labels.shape != points.shape[:2]:
            raise DataError(
                f"{self.source}: expected point labels {list(points.shape[:2])}, found {list(self.point_labels.shape)}"
            )
        check_labels(self.labels, self.class_names, self.object_names, self.source)
        if self.point_labels is not None:
            check_parts(self.point_labels, self.labels, self.parts, self.class_names, self.object_names, self.source)
        bad = ~torch.isfinite(points).flatten(1).all(1)
        if bad.any():
            index = int(bad.nonzero()[0])
            raise DataError(
                f"{self.source}: object {index} ({self.object_names[index]}) has coordinates that are not finite, "
                f"as {int(bad.sum())} of {len(bad)} objects do: remove or repair them"
            )

    @property
    def num_points(self) -> int:
        """P, the points that each cloud has."""
        return self.points.shape[1]

    def batches(self, indices: Iterable[Tensor], count: int) -> Iterator[Labelled]:
        """For each of ``indices`` ``[B]`` the first ``count`` points of those clouds."""
        labels = self.point_labels
        return (Labelled(self.points[i, :count], None if labels is None else labels[i, :count]) for i in indices)

    def take(self, indices: Sequence[int] | Tensor) -> "PointClouds":
        """The clouds at ``indices``."""
        indices = torch.as_tensor(indices)
        return replace(
            self,
            points=self.points[indices],
            point_labels=None if self.point_labels is None else self.point_labels[indices],
            labels=self.labels[indices],
            object_names=tuple(self.object_names[i] for i in indices.tolist()),
        )

    def relabelled(self, labels: Tensor, class_names: tuple[str, ...]) -> "PointClouds":
        """The same clouds with other labels, and without those of their points."""
        labels = labels.to(self.labels.device)
        return replace(self, labels=labels, class_names=class_names, point_labels=None, parts=None)

    def to(self, device: torch.device | str) -> "PointClouds":
        """The clouds on a device."""
        point_labels = None if self.point_labels is None else self.point_labels.to(device)
        return replace(self, points=self.points.to(device), labels=self.labels.to(device), point_labels=point_labels)

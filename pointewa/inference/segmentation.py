"""Evaluation of a segmenter: by votes, and on all points of objects of which it sees a sample."""

from collections.abc import Iterable, Iterator

import torch
from torch import Generator, Tensor, nn

from pointewa.errors import DataError
from pointewa.inference.all_points import on_all_points
from pointewa.models import PointTransformerSegmenter
from pointewa.tasks.base import Batch, evaluating
from pointewa.tasks.part_segmentation import Predict, Segmentation, measured, plain

_SMALLEST, _LARGEST = 0.8, 1.25  # scales of a vote: those of the training


def votes(count: int, device: torch.device, seed: int = 0) -> Predict:
    """The mean logits over copies of each cloud that are scaled by U(0.8, 1.25): its points, and so their labels, stay.

    Args:
        count: how many copies.
        device: of the batches.
        seed: of the scales.
    """
    generator = Generator(device).manual_seed(seed)

    def predict(model: nn.Module, batch: Batch) -> Tensor:
        total = torch.zeros((), device=device)
        for _ in range(count):
            scale = torch.rand(len(batch.points), 1, 1, device=device, generator=generator)
            total = total + plain(
                model, batch._replace(points=batch.points * (_SMALLEST + scale * (_LARGEST - _SMALLEST)))
            )
        return total / count

    return predict


def segment_all_points(
    model: PointTransformerSegmenter,
    batches: Iterable[Batch],
    objects: Iterable[tuple[Tensor, Tensor]],
    predict: Predict = plain,
    every_part: bool = False,
) -> Segmentation:
    """`pointewa.tasks.part_segmentation.segment`, measured on all points of each object, each counted once.

    Args:
        model: the segmenter.
        batches: the samples that it sees.
        objects: points ``[P, 3]`` and parts ``[P]`` of the same objects in the same order, of any sizes, without the
            points with which those of fewer than others start over.
        predict: from the model and a batch to the logits of its points.
        every_part: predict any part, not only those of the true category.

    Raises:
        DataError: another number of objects than in the batches.
    """
    rows, rest = [], iter(objects)
    with evaluating(model):
        for batch in batches:
            for logits, sample, label, (points, truth) in zip(
                predict(model, batch), batch.points, batch.labels, _next(rest, len(batch.labels)), strict=True
            ):
                everywhere = on_all_points(logits.float(), sample, points)
                one = Batch(points[None], label[None], truth[None])
                rows.append(measured(model, one, everywhere[None], every_part) | {"predicted": torch.empty(1, 0)})
    return Segmentation(**{name: torch.cat([row[name] for row in rows]) for name in rows[0]})


def _next(objects: Iterator[tuple[Tensor, Tensor]], count: int) -> list[tuple[Tensor, Tensor]]:
    found = [one for _, one in zip(range(count), objects, strict=False)]
    if len(found) < count:
        raise DataError("the files of the data set have fewer objects than what was prepared of them: remove the "
                        "prepared ones (pointewa doctor says where they are)")  # fmt: skip
    return found

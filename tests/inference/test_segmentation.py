"""A segmenter on all points of objects, and by votes."""

import pytest
import torch
from torch import nn

from pointewa.errors import DataError
from pointewa.inference.all_points import on_all_points
from pointewa.inference.segmentation import segment_all_points, votes
from pointewa.models.parts import Parts
from pointewa.tasks.base import Batch
from pointewa.tasks.part_segmentation import segment

PARTS = Parts(("left", "right", "other"), (0, 0, 1))


class Sides(nn.Module):
    """Says of each point on which side of x = 0.1 it is."""

    parts, num_classes = PARTS, 2

    def forward(self, points, labels):
        x = points[..., :1] - 0.1
        return torch.cat([-x, x, torch.full_like(x, -9)], -1)


def object_of(size):
    points = torch.rand(size, 3) * 2 - 1
    return points, (points[:, 0] > 0).long()


def test_a_point_has_the_weighted_logits_of_its_three_nearest():
    sample, logits = torch.randn(20, 3), torch.randn(20, 3)
    points = torch.randn(50, 3)
    found = on_all_points(logits.repeat(2, 1)[:33], sample.repeat(2, 1)[:33], points)
    for one, mine in zip(points, found, strict=True):
        distance = (sample - one).square().sum(1)
        near = distance.argsort()[:3]
        weight = 1 / (distance[near] + 1e-8)
        torch.testing.assert_close(mine, (logits[near] * weight[:, None]).sum(0) / weight.sum(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(on_all_points(logits, sample, sample), logits, rtol=0, atol=1e-4)


def test_all_points_of_objects_of_different_sizes_count_once():
    objects = [object_of(size) for size in (300, 200, 64, 40)]
    objects[0][0][-1] = objects[0][0][0]  # a point that comes twice in a file counts twice
    # The last one has fewer points than the sample, which starts over.
    samples = [tuple(one.repeat(2, *[1] * (one.ndim - 1))[:64] for one in two) for two in objects]
    points, truth = (torch.stack(column) for column in zip(*samples, strict=True))
    labels = torch.zeros(4, dtype=torch.int64)
    batches = [Batch(points[:3], labels[:3], truth[:3]), Batch(points[3:], labels[3:], truth[3:])]
    result = segment_all_points(Sides(), batches, objects)
    assert result.points.tolist() == [300, 200, 64, 40]
    right, ious = [], []
    for (cloud, true), sample in zip(objects, points, strict=True):
        logits = on_all_points(Sides()(sample[None], None)[0], sample, cloud)
        predicted = logits[:, :2].argmax(1)
        right.append(int((predicted == true).sum()))
        ious.append(
            sum(((predicted == p) & (true == p)).sum() / ((predicted == p) | (true == p)).sum() for p in (0, 1))
        )
    assert result.correct.tolist() == right
    assert result.ious.tolist() == pytest.approx([50 * float(iou) for iou in ious])
    assert result.metrics["loss"] > 0
    whole = segment(Sides(), batches)
    assert result.correct[2] == whole.correct[2]  # of 64 points all were seen
    with pytest.raises(DataError, match="fewer objects than what was prepared"):
        segment_all_points(Sides(), batches, objects[:3])


def test_votes_scale_and_keep_the_points():
    points, truth = object_of(500)
    batch = Batch(points[None], torch.tensor([0]), truth[None])
    seen = []

    class Spy(Sides):
        def forward(self, points, labels):
            seen.append(points)
            return super().forward(points, labels)

    logits = votes(200, torch.device("cpu"), 3)(Spy(), batch)
    scales = torch.stack([(one[0] / points).mean() for one in seen])
    assert all(torch.allclose(one[0], points * scale, atol=1e-5) for one, scale in zip(seen, scales, strict=True))
    assert 0.8 <= scales.min() < 0.82
    assert 1.23 < scales.max() <= 1.25
    torch.testing.assert_close(logits, Sides()(points[None] * scales.mean(), None), rtol=0, atol=1e-4)
    assert torch.equal(
        votes(3, torch.device("cpu"), 1)(Sides(), batch), votes(3, torch.device("cpu"), 1)(Sides(), batch)
    )

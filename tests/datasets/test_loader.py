"""Batches: what is drawn, that it is reproducible, and what the augmentation does."""

import pytest
import torch

from datasets import PointClouds
from datasets.loader import EvalLoader, TrainLoader
from datasets.transforms import random_subset, rotate_up, scale_shift
from pointewa.errors import ConfigError


@pytest.fixture
def clouds():
    n, p = 23, 40
    labels = torch.arange(n) % 3
    return PointClouds(torch.randn(n, p, 3), labels, ("a", "b", "c"), tuple(map(str, range(n))), "x")


def batches(clouds, epoch=0, start=0, seed=0, augment="scale_shift"):
    return list(TrainLoader(clouds, 4, 16, augment, seed).epoch(epoch, start))


def test_batches_follow_from_seed_epoch_and_number(clouds):
    whole = batches(clouds, epoch=2)
    for (a, x, _), (b, y, _) in zip(whole, batches(clouds, epoch=2), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(x, y)
    for (a, *_), (b, *_) in zip(whole[3:], batches(clouds, epoch=2, start=3), strict=True):
        assert torch.equal(a, b)  # entered in the middle
    assert not torch.equal(whole[0][0], batches(clouds, epoch=3)[0][0])
    assert not torch.equal(whole[0][0], batches(clouds, epoch=2, seed=1)[0][0])


def test_drawing_batches_leaves_the_global_generator_alone(clouds):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    batches(clouds)
    assert torch.equal(torch.rand(3), expected)


def test_an_epoch_shows_each_object_at_most_once_and_only_full_batches(clouds):
    data = batches(clouds, augment="none")
    assert [points.shape for points, *_ in data] == [(4, 16, 3)] * 5
    seen = []
    for points, labels, *_ in data:
        for cloud, label in zip(points, labels, strict=True):
            inside = [i for i in range(23) if (cloud[:, None] == clouds.points[i]).all(-1).any(1).all()]
            assert len(inside) == 1
            assert clouds.labels[inside[0]] == label
            seen += inside
    assert len(set(seen)) == 20


def test_evaluation_takes_the_prefix_of_every_object_in_order(clouds):
    data = list(EvalLoader(clouds, 10, 7))
    assert [len(labels) for _, labels, *_ in data] == [10, 10, 3]
    assert torch.equal(torch.cat([points for points, *_ in data]), clouds.points[:, :7])
    assert torch.equal(torch.cat([labels for _, labels, *_ in data]), clouds.labels)


def test_subset_is_drawn_from_the_prefix_of_1200_of_1024_without_repeats():
    index = torch.arange(4096.0).view(1, -1, 1).expand(64, -1, 3)
    drawn = random_subset(index, 1024, torch.Generator().manual_seed(0))[..., 0]
    assert drawn.max() < 1200
    assert all(len(row.unique()) == 1024 for row in drawn)
    assert not torch.equal(drawn[0], drawn[1])
    # every point of the pool is as likely: 1024/1200 of 64 draws, and comes first as likely as any other
    counts = torch.bincount(drawn.flatten().long(), minlength=1200)
    assert counts.float().mean().item() == pytest.approx(64 * 1024 / 1200)
    assert len(drawn[:, 0].unique()) > 50


def test_scale_shift_has_the_recipes_ranges():
    generator = torch.Generator().manual_seed(0)
    points = torch.tensor([[0.0, 0, 0], [1.0, 1, 1]]).expand(20_000, 2, 3)
    out = scale_shift(points, generator)
    shift, scale = out[:, 0], out[:, 1] - out[:, 0]
    assert shift.abs().max() <= 0.2
    assert (scale.min() >= 2 / 3 - 1e-6) & (scale.max() <= 1.5 + 1e-6)
    torch.testing.assert_close(scale.mean(0), torch.full((3,), 13 / 12), rtol=0, atol=0.01)
    torch.testing.assert_close(shift.mean(0), torch.zeros(3), rtol=0, atol=0.005)
    assert torch.corrcoef(torch.cat([scale, shift], 1).T).sub(torch.eye(6)).abs().max() < 0.03  # per axis


def test_rotate_up_turns_about_y_by_any_angle():
    points = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]]).expand(20_000, 3, 3)
    x, y, z = rotate_up(points, torch.Generator().manual_seed(0)).unbind(1)
    assert torch.equal(y, points[:, 1])
    assert x[:, 1].abs().max() == 0
    torch.testing.assert_close(x.norm(dim=1), torch.ones(20_000))
    torch.testing.assert_close(torch.linalg.cross(z, x), points[:, 1])  # a rotation, no mirror image
    angle = torch.atan2(x[:, 2], x[:, 0])
    counts = torch.histc(angle, 8, -torch.pi, torch.pi)
    assert (counts - 2500).abs().max() < 5 * 2500**0.5


def test_a_transform_sees_the_pool_and_the_whole_order(clouds):
    data = list(EvalLoader(clouds, 10, 17, lambda points: points[:, ::2] * 2))
    assert torch.equal(torch.cat([points for points, *_ in data]), clouds.points[:, :20:2] * 2)  # 20 of 17
    assert torch.equal(torch.cat([labels for _, labels, *_ in data]), clouds.labels)


def test_what_cannot_be_drawn_is_refused(clouds):
    with pytest.raises(ConfigError, match=r"train\.batch_size: expected 1 to 23, the training objects, found 24"):
        TrainLoader(clouds, 24, 16, "none", 0)
    with pytest.raises(ConfigError, match=r"data\.augment: expected one of none, scale_shift, rotate_up, found 'flip'"):
        TrainLoader(clouds, 4, 16, "flip", 0)

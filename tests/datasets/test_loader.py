"""Batches: what is drawn, that it is reproducible, and what the augmentation does."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pointewa.datasets import PointClouds
from pointewa.datasets.base import Labelled
from pointewa.datasets.loader import EvalLoader, TrainLoader
from pointewa.datasets.transforms import (
    augment,
    dropout_indices,
    jitter,
    random_subset,
    rotate_up,
    scale_shift,
    scale_shift_uniform,
)
from pointewa.errors import ConfigError


@pytest.fixture
def clouds():
    n, p = 23, 40
    labels = torch.arange(n) % 3
    return PointClouds(torch.randn(n, p, 3), labels, ("a", "b", "c"), tuple(map(str, range(n))), "x")


def batches(clouds, epoch=0, start=0, seed=0, augment=("scale_shift",)):
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
    data = batches(clouds, augment=())
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


def test_scale_shift_uniform_scales_all_axes_alike():
    generator = torch.Generator().manual_seed(0)
    points = torch.tensor([[0.0, 0, 0], [1.0, 1, 1]]).expand(20_000, 2, 3)
    out = scale_shift_uniform(points, generator)
    shift, scale = out[:, 0], out[:, 1] - out[:, 0]
    torch.testing.assert_close(scale, scale[:, :1].expand(-1, 3), rtol=0, atol=1e-6)
    assert 0.8 - 1e-6 <= scale.min() < 0.801
    assert 1.249 < scale.max() <= 1.25 + 1e-6
    assert shift.abs().max() <= 0.1
    assert shift.abs().max() > 0.099
    assert scale.mean().item() == pytest.approx(1.025, abs=0.005)
    assert torch.corrcoef(torch.cat([scale[:, :1], shift], 1).T).sub(torch.eye(4)).abs().max() < 0.03


def test_labels_stay_where_the_transform_keeps_the_order(clouds):
    labelled = replace(clouds, point_labels=torch.arange(40).expand(23, -1))
    for ordered in (False, True):
        batch = next(iter(EvalLoader(labelled, 10, 7, lambda pool: pool[:, :7] * 2, ordered=ordered)))
        assert batch.points.shape == (10, 7, 3)
        assert (batch.point_labels is not None) == ordered
    assert batch.point_labels.tolist() == [list(range(7))] * 10


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


def test_jitter_is_gaussian_and_clipped():
    points = torch.randn(50, 200, 3)
    moved = jitter(points, torch.Generator().manual_seed(0)) - points
    assert moved.std().item() == pytest.approx(0.01, rel=0.02)
    assert moved.mean().abs() < 3e-4
    wide = jitter(points, torch.Generator().manual_seed(0), sigma=0.05) - points
    assert wide.abs().max().item() == pytest.approx(0.05, abs=1e-6)
    assert ((wide.abs() - 0.05).abs() < 1e-6).float().mean().item() == pytest.approx(0.317, abs=0.01)  # beyond 1 sigma


def test_dropout_puts_the_first_point_in_place_of_up_to_seven_eighths():
    points = torch.randn(4000, 64, 3)
    index = dropout_indices(points, torch.Generator().manual_seed(0))
    places = torch.arange(64).expand_as(index)
    assert ((index == places) | (index == 0)).all()
    share = (index != places).float().mean(1)
    assert share.mean().item() == pytest.approx(0.875 / 2 * 63 / 64, abs=0.015)
    assert 0.8 < share.max() < 1
    assert share.min() == 0


def test_augmentations_are_applied_in_order_and_labels_stay_with_their_points():
    points = torch.randn(8, 64, 3)
    labelled = Labelled(points, torch.arange(64).expand(8, -1))
    generator = lambda: torch.Generator().manual_seed(3)  # noqa: E731
    both, theirs = generator(), generator()
    out = augment(labelled, ["rotate_up", "scale_shift"], both)
    assert torch.equal(out.points, scale_shift(rotate_up(points, theirs), theirs))
    assert torch.equal(out.point_labels, labelled.point_labels)
    assert torch.equal(both.get_state(), theirs.get_state())
    out = augment(labelled, ["dropout", "jitter"], generator())
    dropped = out.point_labels == 0
    assert dropped[:, 1:].any()
    assert (out.points - points.gather(1, out.point_labels[..., None].expand(-1, -1, 3))).abs().max() <= 0.05 + 1e-6
    assert augment(Labelled(points), ["dropout"], generator()).point_labels is None
    assert augment(labelled, [], generator()) is labelled


def test_batches_with_and_without_point_labels_are_drawn_alike(clouds):
    x = clouds.points[..., 0]
    labelled = replace(clouds, point_labels=(x * 1000).long())
    names = ["dropout", "jitter", "scale_shift", "rotate_up"]
    for plain, with_labels in zip(batches(clouds, augment=names), batches(labelled, augment=names), strict=True):
        assert plain.point_labels is None
        assert torch.equal(plain.points, with_labels.points)
        assert torch.equal(plain.labels, with_labels.labels)
    for points, _, point_labels in batches(labelled, augment=["dropout"]):
        assert torch.equal(point_labels, (points[..., 0] * 1000).long())


def test_the_draws_of_scale_shift_are_those_of_every_recorded_run(clouds):
    """One generator, seeded by the epoch, number and rank, draws first the subset, then scale and shift."""
    loader = TrainLoader(clouds, 4, 16, ["scale_shift"], 7)
    (first, *_) = loader.epoch(2)
    seed = np.random.SeedSequence([7, 2]).generate_state(2, np.uint32)
    order = torch.randperm(23, generator=torch.Generator().manual_seed(int(seed[0]) << 31 | int(seed[1]) >> 1))
    seed = np.random.SeedSequence([7, 2, 0, 0]).generate_state(2, np.uint32)
    generator = torch.Generator().manual_seed(int(seed[0]) << 31 | int(seed[1]) >> 1)
    chosen = torch.rand(4, 19, generator=generator).argsort(1)[:, :16]
    points = clouds.points[order[:4]].gather(1, chosen[..., None].expand(-1, -1, 3))
    scale, shift = torch.rand(2, 4, 1, 3, generator=generator)
    assert torch.equal(first.points, points * (2 / 3 + scale * (3 / 2 - 2 / 3)) + (shift * 0.4 - 0.2))


def test_a_transform_sees_the_pool_and_the_whole_order(clouds):
    data = list(EvalLoader(clouds, 10, 17, lambda points: points[:, ::2] * 2))
    assert torch.equal(torch.cat([points for points, *_ in data]), clouds.points[:, :20:2] * 2)  # 20 of 17
    assert torch.equal(torch.cat([labels for _, labels, *_ in data]), clouds.labels)


def test_what_cannot_be_drawn_is_refused(clouds):
    with pytest.raises(ConfigError, match=r"train\.batch_size: expected 1 to 23, the training objects, found 24"):
        TrainLoader(clouds, 24, 16, [], 0)
    with pytest.raises(
        ConfigError,
        match=r"data\.augment: expected a list of scale_shift, scale_shift_uniform, rotate_up, jitter, dropout, found "
        r"'flip'",
    ):
        TrainLoader(clouds, 4, 16, ["scale_shift", "flip"], 0)

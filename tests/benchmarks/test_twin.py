"""The plain twin computes what our classifier computes, and its step is the published recipe's."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import twin
from pointewa.models import PRESETS, Architecture, PointTransformerClassifier
from pointewa.ops import farthest_point_sample, knn

ARCHITECTURES = {
    "point_mae": Architecture(
        width=24, depth=3, heads=2, num_groups=8, group_size=6, drop_path=0.3, patch_width=6, patch_out=24
    ),
    "point_bert": Architecture(
        width=20, depth=2, heads=5, num_groups=7, group_size=13, drop_path=0.3, patch_width=5, patch_out=11,
        head="point_bert", mlp_ratio=2.5,
    ),
    "whole_cloud_patches": Architecture(
        width=6, depth=4, heads=1, num_groups=3, group_size=64, drop_path=0.3, patch_width=4, patch_out=9
    ),
}  # fmt: skip
NUM_POINTS, NUM_CLASSES = 64, 5


@pytest.fixture
def batch():
    # our operators select by float32 distances: coordinates that float32 can hold
    return torch.randn(6, NUM_POINTS, 3).double(), torch.randint(NUM_CLASSES, (6,))


def without_dropout(*models):
    for module in (module for model in models for module in model.modules()):
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def pair(arch, drop=False):
    """Our classifier and the twin in float64, with weights and statistics that leave nothing at 0 or 1."""
    arch = arch if drop else replace(arch, drop_path=0.0)
    ours = PointTransformerClassifier(arch, NUM_CLASSES).double()
    plain = twin.PlainClassifier(arch, NUM_CLASSES).double()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
        for name, buffer in ours.named_buffers():
            if buffer.is_floating_point():
                buffer.copy_(torch.rand_like(buffer) + (0.5 if name.endswith("var") else -0.5))
    plain.load_state_dict(ours.state_dict())
    if not drop:
        without_dropout(ours, plain)
    return ours, plain


def compare(ours, plain, points, labels, tolerance=1e-9):
    """Logits in evaluation; then loss, every gradient and every running statistic of a training pass."""
    seed = torch.initial_seed()
    torch.testing.assert_close(plain.eval()(points), ours.eval()(points), rtol=0, atol=0.1 * tolerance)
    losses = []
    for model in (ours.train(), plain.train()):
        torch.manual_seed(seed)  # the same draws of dropout and drop path, where there are any
        losses.append(F.cross_entropy(model(points), labels))
        losses[-1].backward()
    torch.testing.assert_close(losses[1], losses[0], rtol=0, atol=tolerance)
    theirs = dict(plain.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(theirs.pop(name).grad, parameter.grad, rtol=0, atol=tolerance, msg=name)
    assert not theirs
    for (name, buffer), other in zip(ours.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(other, buffer, rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("arch", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_the_twin_computes_what_our_classifier_computes(arch, batch):
    compare(*pair(arch), *batch)


@pytest.mark.parametrize("arch", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_dropout_and_drop_path_are_in_the_same_places_at_the_same_rates(arch, batch):
    # our drop path's factor 1 / keep is a float32
    compare(*pair(arch, drop=True), *batch, tolerance=1e-5)


@pytest.mark.parametrize("preset", PRESETS)
def test_names_and_shapes_are_those_of_our_classifier(preset):
    with torch.device("meta"):
        ours = PointTransformerClassifier(PRESETS[preset], 40).state_dict()
        plain = twin.PlainClassifier(PRESETS[preset], 40).state_dict()
    assert [(name, value.shape) for name, value in plain.items()] == [
        (name, value.shape) for name, value in ours.items()
    ]


MUTATIONS = {
    "attention without its scale": lambda model, patch: setattr(model.blocks.blocks[1].attn, "scale", 1.0),
    "another activation": lambda model, patch: setattr(model.blocks.blocks[0].mlp, "act", nn.GELU("tanh")),
    "another momentum": lambda model, patch: setattr(model.encoder.first_conv[1], "momentum", 0.2),
    "halves of the concatenation swapped": lambda model, patch: model.encoder.second_conv.register_forward_pre_hook(
        lambda module, args: (args[0].roll(args[0].shape[1] // 2, 1),)
    ),
    "position before the first block only": lambda model, patch: patch.setattr(
        twin.Encoder, "forward", lambda self, x, position: nn.Sequential(*self.blocks)(x + position)
    ),
    "patches not centred": lambda model, patch: model.encoder.register_forward_pre_hook(
        lambda module, args: (args[0] + 0.01,)
    ),
    "neighbours without the centre": lambda model, patch: patch.setattr(
        twin, "knn", lambda queries, points, k: knn(queries, points, k + 1)[..., 1:]
    ),
    "sampling from the last point": lambda model, patch: patch.setattr(
        twin, "farthest_point_sample", lambda points, k: points.shape[1] - 1 - farthest_point_sample(points.flip(1), k)
    ),
}


@pytest.mark.parametrize("mutate", MUTATIONS.values(), ids=MUTATIONS)
def test_the_comparison_notices(mutate, batch, monkeypatch):
    ours, plain = pair(ARCHITECTURES["point_mae"])
    mutate(plain, monkeypatch)
    with pytest.raises(AssertionError):
        compare(ours, plain, *batch)


def test_sampling_and_neighbours_are_ours():
    points = torch.rand(3, 200, 3)
    picks = farthest_point_sample(points, 200)
    for count in (1, 37, 200):
        assert torch.equal(twin.farthest_point_sample(points, count), picks[:, :count])
    centers = twin.gather(points, picks[:, :9])
    assert torch.equal(centers, points.gather(1, picks[:, :9, None].expand(-1, -1, 3)))
    assert torch.equal(twin.knn(centers, points, 1)[..., 0], picks[:, :9])
    for count in (2, 13, 100):  # the order among equals is not defined
        assert torch.equal(twin.knn(centers, points, count).sort().values, knn(centers, points, count).sort().values)


def test_the_random_subset_takes_the_same_positions_of_every_clouds_farthest_1200():
    points = torch.rand(2, 1300, 3)
    np.random.seed(3)
    subset = twin.random_subset(points, 1024)
    assert subset.shape == (2, 1024, 3)
    pool = twin.gather(points, farthest_point_sample(points, 1200))
    places = [
        [(cloud == point).all(1).nonzero().item() for point in some] for some, cloud in zip(subset, pool, strict=True)
    ]
    assert places[0] == places[1] != sorted(places[0])
    assert len(set(places[0])) == 1024
    assert max(places[0]) > 1150
    assert twin.random_subset(points[:, :1100], 1024).shape == (2, 1024, 3)  # fewer than 1200 are all in the pool


def test_augmentation_draws_scale_and_shift_cloud_by_cloud():
    points = torch.randn(500, 4, 3)
    before = points.clone()
    np.random.seed(3)
    augmented = twin.augment(points)
    assert torch.equal(points, before)
    assert augmented.dtype == torch.float32
    scale = (augmented[:, 1] - augmented[:, 0]) / (points[:, 1] - points[:, 0])
    shift = augmented[:, 0] - scale * points[:, 0]
    for values in (scale, shift):
        assert (values[:, 0] - values[:, 1]).abs().median() > 0.01  # each axis has its own
    usual = (points[:, 1] - points[:, 0]).abs() > 0.1  # where the quotient keeps its digits
    for values, low, high in ((scale[usual], 2 / 3, 3 / 2), (shift[usual], -0.2, 0.2)):
        assert values.min().item() == pytest.approx(low, abs=0.01)
        assert values.max().item() == pytest.approx(high, abs=0.01)
        assert values.mean().item() == pytest.approx((low + high) / 2, abs=0.03)
    np.random.seed(3)
    assert torch.equal(twin.augment(points[:1]), augmented[:1])  # the first cloud's draws come first


def test_weight_decay_is_on_matrices_and_the_class_position():
    model = twin.PlainClassifier(ARCHITECTURES["point_bert"], NUM_CLASSES)
    decay, rest = twin.plain_optimizer(model, lr=1e-3, weight_decay=0.05).param_groups
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert {names[p] for p in rest["params"]} == {name for p, name in names.items() if p.ndim == 1} | {"cls_token"}
    assert {names[p] for p in decay["params"]} == {name for p, name in names.items() if p.ndim > 1} - {"cls_token"}
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.05, 0)
    assert decay["lr"] == rest["lr"] == 1e-3


def test_two_steps_are_those_of_our_classifier_under_the_same_recipe(batch):
    ours, plain = pair(ARCHITECTURES["point_mae"])
    points, labels = batch
    settings = {"lr": 1e-3, "weight_decay": 0.1}
    optimizer, reference = twin.plain_optimizer(plain, **settings), twin.plain_optimizer(ours, **settings)
    ours.train()
    plain.train()
    norms = []
    for _ in range(2):
        np.random.seed(3)
        logits = ours(twin.augment(points))
        np.random.seed(3)
        loss, accuracy = twin.plain_step(plain, optimizer, points, labels, NUM_POINTS)
        expected = F.cross_entropy(logits, labels)
        assert loss == pytest.approx(expected.item(), abs=1e-9)
        assert accuracy == pytest.approx(100 * (logits.argmax(1) == labels).double().mean().item(), abs=1e-4)
        reference.zero_grad()
        expected.backward()
        norms.append(torch.cat([p.grad.flatten() for p in ours.parameters()]).norm().item())
        for parameter in ours.parameters():
            parameter.grad *= min(1, 10 / norms[-1])
        reference.step()
        for (name, parameter), other in zip(ours.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(
                other.grad, parameter.grad, rtol=0, atol=1e-5, msg=name
            )  # clip: g / (norm + 1e-6)
            torch.testing.assert_close(other, parameter, rtol=0, atol=1e-6, msg=name)
    assert min(norms) > 11  # the clip was seen at work


def test_a_step_draws_a_subset_of_larger_clouds(batch):
    plain = twin.PlainClassifier(ARCHITECTURES["point_mae"], NUM_CLASSES).train()
    seen = []
    plain.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    for count in (40, 64, 80):
        twin.plain_step(plain, twin.plain_optimizer(plain), batch[0].float(), batch[1], num_points=count)
    assert seen == [(6, 40, 3), (6, 64, 3), (6, 64, 3)]

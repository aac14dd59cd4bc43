"""The numbers behind the pictures of saliency, against what they mean."""

import pytest
import torch

import pointewa.models.classifier as classifier
from pointewa.models import Architecture, PointTransformerClassifier
from pointewa.models.patch_embed import Patches, make_patches
from pointewa.viz.panels import FOR, NEUTRAL, by_sign, rgb
from pointewa.viz.saliency import gradient_x_input, saliency, saliency_panels, without_each_patch


def build(patch_out=24, groups=6, size=5):
    arch = Architecture(width=24, depth=2, heads=2, num_groups=groups, group_size=size, patch_width=8,
                        patch_out=patch_out, drop_path=0.3)  # fmt: skip
    torch.manual_seed(3)
    model = PointTransformerClassifier(arch, 4)
    for parameter in model.parameters():  # far from its small initial values
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()


def clouds(count=2):
    return torch.rand(count, 40, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_gradient_x_input_is_a_derivative():
    """Against central differences in float64, for every point of a cloud."""
    model, points = build().double(), clouds().double()
    found, step = gradient_x_input(model, points), 1e-6
    assert found.shape == (2, 40)
    assert not found.requires_grad
    with torch.no_grad():
        target = model(points).argmax(1)
        for point in range(40):
            naive = torch.zeros(2, dtype=torch.float64)
            for axis in range(3):
                move = torch.zeros_like(points)
                move[:, point, axis] = step
                rise = (model(points + move) - model(points - move))[torch.arange(2), target] / (2 * step)
                naive += rise * points[:, point, axis]
            torch.testing.assert_close(found[:, point], naive, atol=1e-6, rtol=1e-5)
    assert found.abs().max() > 1e-3
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("patch_out", [24, 16])
def test_leaving_a_patch_out_is_evaluating_without_it(monkeypatch, patch_out):
    model, points = build(patch_out), clouds(1)
    found = without_each_patch(model, make_patches(points, 6, 5), batch_size=4)
    whole = model(points)
    assert found.shape == (6, 4)
    for left_out in range(6):
        rest = [number for number in range(6) if number != left_out]

        def fewer(*args, rest=rest, **kwargs):
            return Patches(*(part[:, rest] for part in make_patches(*args, **kwargs)))

        monkeypatch.setattr(classifier, "make_patches", fewer)
        with torch.no_grad():
            torch.testing.assert_close(found[left_out], model(points)[0], atol=1e-5, rtol=1e-5)
            assert not torch.allclose(found[left_out], whole[0], atol=1e-4)


def test_saliency_of_a_cloud():
    model, points = build(), clouds(1)[0]
    found = saliency(model.train(), points)
    assert not model.training
    with torch.no_grad():
        probabilities = model(points[None])[0].softmax(0)
    torch.testing.assert_close(found.probabilities, probabilities)
    assert found.predicted == int(probabilities.argmax())
    patches = make_patches(points[None], 6, 5)
    drops = probabilities.max() - without_each_patch(model, patches).softmax(1)[:, found.predicted]
    torch.testing.assert_close(found.drops, drops)
    members = patches.members[0]
    for point in range(40):  # the mean over the patches that it is in
        mine = found.drops[(members == point).any(1)]
        expected = mine.mean() if len(mine) else torch.tensor(torch.nan)
        torch.testing.assert_close(found.of_points[point], expected, equal_nan=True)
    assert found.of_points.isnan().any()
    assert not found.of_points.isnan().all()
    panels = saliency_panels(points, found, "mine", "cup")
    assert [panel.points.shape for panel in panels] == [(40, 3)] * 3
    assert f"cup, {100 * probabilities.max():.1f} %" in panels[0].title
    assert f"{100 * drops.max():.1f} percentage points" in panels[2].title
    assert (panels[2].colours[found.of_points.isnan()] == rgb(NEUTRAL)).all()


def test_red_is_for_and_blue_against():
    colours = by_sign(torch.tensor([2.0, -2.0, 0.0, torch.nan]).double().numpy())
    assert (colours[0] == rgb(FOR)).all()
    assert colours[1][2] > colours[1][0]
    assert (colours[2] == rgb(NEUTRAL)).all()
    assert (colours[3] == colours[2]).all()
    assert (by_sign(torch.zeros(3).numpy()) == rgb(NEUTRAL)).all()  # nothing to divide by


def test_one_patch_cannot_be_left_out():
    with pytest.raises(ValueError, match="the only patch"):
        without_each_patch(build(groups=1), make_patches(clouds(1), 1, 5))

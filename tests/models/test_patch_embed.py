"""Cutting clouds into patches, and the mini-PointNet: each shortcut against the plain way."""

import pytest
import torch
from torch import nn

from pointewa.models.patch_embed import PatchEncoder, linear_max, make_patches


def plain_patch_encoder(encoder, patches):
    """The mini-PointNet as published: convolutions on [B G, C, K] and the expanded concatenation."""
    batch, num_groups, group_size, _ = patches.shape
    x = encoder.first_conv(patches.flatten(0, 1).transpose(1, 2))
    x = torch.cat([x.max(2, keepdim=True).values.expand(-1, -1, group_size), x], 1)
    return encoder.second_conv(x).max(2).values.view(batch, num_groups, -1)


@pytest.mark.parametrize("training", [True, False])
def test_patch_encoder_equals_the_published_form(training):
    torch.manual_seed(0)
    cheap = PatchEncoder(8, 20).double().train(training)
    plain = PatchEncoder(8, 20).double().train(training)
    plain.load_state_dict(cheap.state_dict())
    patches = torch.randn(2, 5, 7, 3, dtype=torch.float64)
    out, expected = cheap(patches), plain_patch_encoder(plain, patches)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    for (name, a), b in zip(cheap.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-11, msg=name)
    for a, b in zip(cheap.buffers(), plain.buffers(), strict=True):  # the running statistics of the batch norms
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_the_maximum_of_a_linear_layer_equals_its_plain_form(training):
    """On the path with gradients, where they are gathered, and on the one without. Two rows of a group are equal."""
    x = torch.randn(5 * 7, 6, dtype=torch.float64)
    x[8] = x[11]
    weight, bias = torch.randn(9, 6, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    plain = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
    ours = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
    expected = nn.functional.linear(*plain).view(5, 7, 9).max(1).values
    with torch.set_grad_enabled(training):
        out = linear_max(*ours, 7)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-14)
    if training:
        upstream = torch.randn_like(out)
        out.backward(upstream)
        expected.backward(upstream)
        for a, b in zip(ours, plain, strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-13)


def test_the_maximum_of_a_linear_layer_has_gradients_for_what_needs_them():
    x, weight, bias = torch.randn(12, 3), torch.randn(4, 3), torch.zeros(4)
    linear_max(x, weight.requires_grad_(), bias, 6).sum().backward()
    winners = (x @ weight.detach().T).view(2, 6, 4).argmax(1)
    torch.testing.assert_close(weight.grad, x[winners[0]] + x[6 + winners[1]])
    with torch.autocast("cpu", torch.bfloat16):
        out = linear_max(x, weight, bias, 6)
    torch.testing.assert_close(out.float(), linear_max(x, weight, bias, 6), rtol=0.02, atol=0.02)


def test_patches_are_the_nearest_points_about_their_centres():
    points = torch.rand(2, 50, 3)
    patches, centers, members = make_patches(points, 4, 5)
    assert patches.shape == (2, 4, 5, 3)
    assert torch.equal(patches[:, :, 0], torch.zeros(2, 4, 3))  # the centre is its own nearest point
    distance = (points.unsqueeze(1) - centers.unsqueeze(2)).norm(dim=-1).sort(-1).values[..., :5]
    torch.testing.assert_close(patches.norm(dim=-1), distance)
    for cloud in range(2):  # and they say which points they hold
        assert torch.equal(points[cloud][members[cloud]] - centers[cloud].unsqueeze(1), patches[cloud])

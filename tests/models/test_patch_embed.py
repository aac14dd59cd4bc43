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


@pytest.mark.parametrize(("training", "groups"), [(True, 5), (True, 300), (False, 5)])
def test_the_maximum_of_a_linear_layer_equals_its_plain_form(training, groups):
    """On the path with gradients, where they are gathered, and on the one without. Two rows of a group are equal."""
    x = torch.randn(groups * 7, 6, dtype=torch.float64)
    x[8] = x[11]
    weight, bias = torch.randn(9, 6, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    plain = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
    ours = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
    expected = nn.functional.linear(*plain).view(groups, 7, 9).max(1).values
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


def test_in_bfloat16_the_maximum_of_a_linear_layer_is_that_of_autocast():
    """The same rows win, and the gradients are as near to those in float64 as the plain form's."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(300 * 16, 64).relu(), torch.randn(48, 64), torch.randn(48)
    leaves = {name: [tensor.clone().requires_grad_() for tensor in (x, weight)] for name in ("ours", "plain", "exact")}
    with torch.autocast("cpu", torch.bfloat16):
        ours = linear_max(*leaves["ours"], bias, 16)
        plain, winner = nn.functional.linear(*leaves["plain"]).view(300, 16, 48).max(1)
    assert torch.equal(ours, plain + bias)
    exact = nn.functional.linear(*(one.double() for one in leaves["exact"])).view(300, 16, 48)
    upstream = torch.randn(300, 48)
    for out in (ours, plain, exact.gather(1, winner.unsqueeze(1)).squeeze(1)):
        out.backward(upstream.to(out.dtype))
    for name in (0, 1):
        gradients = {key: pair[name].grad.double() for key, pair in leaves.items()}
        error = {key: (gradients[key] - gradients["exact"]).norm() / gradients["exact"].norm() for key in gradients}
        assert error["ours"] < max(0.004, 1.5 * error["plain"])


def test_patches_are_the_nearest_points_about_their_centres():
    points = torch.rand(2, 50, 3)
    patches, centers, members = make_patches(points, 4, 5)
    assert patches.shape == (2, 4, 5, 3)
    assert torch.equal(patches[:, :, 0], torch.zeros(2, 4, 3))  # the centre is its own nearest point
    distance = (points.unsqueeze(1) - centers.unsqueeze(2)).norm(dim=-1).sort(-1).values[..., :5]
    torch.testing.assert_close(patches.norm(dim=-1), distance)
    for cloud in range(2):  # and they say which points they hold
        assert torch.equal(points[cloud][members[cloud]] - centers[cloud].unsqueeze(1), patches[cloud])


def test_compiled_it_is_the_same():
    x, weight, bias = torch.randn(12 * 6, 8), torch.randn(5, 8), torch.zeros(5)
    upstream, found = torch.randn(12, 5), []
    for run in (linear_max, torch.compile(linear_max, backend="aot_eager")):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        run(*leaves, bias, 6).backward(upstream)
        found.append([one.grad for one in leaves])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)

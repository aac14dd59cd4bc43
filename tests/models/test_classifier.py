"""The classifier: its published sizes, and each shortcut against the plain way."""

import pytest
import torch
from torch import nn

from pointewa.models import PRESETS, Architecture, PointTransformerClassifier
from pointewa.models.layers import Attention, DropPath
from pointewa.models.patch_embed import PatchEncoder, linear_max, make_patches

SMALL = Architecture(width=24, depth=3, heads=2, num_groups=8, group_size=6, patch_width=8, patch_out=24)


@pytest.mark.parametrize(("preset", "count"), [("point_mae", 22_099_752), ("point_bert", 22_065_960)])
def test_parameter_counts_are_the_published_ones(preset, count):
    model = PointTransformerClassifier(PRESETS[preset], 40)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_runs_forward_and_backward(preset):
    model = PointTransformerClassifier(PRESETS[preset], 5)
    model(torch.randn(2, 256, 3)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


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


def test_attention_equals_the_formula():
    attention = Attention(12, 3).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    q, k, v = (part.view(2, 5, 3, 4).transpose(1, 2) for part in attention.qkv(x).chunk(3, -1))
    weights = (q @ k.transpose(-2, -1) / 4**0.5).softmax(-1)
    expected = attention.proj((weights @ v).transpose(1, 2).reshape(2, 5, 12))
    torch.testing.assert_close(attention(x), expected, rtol=0, atol=1e-12)


def test_attention_trains_in_bfloat16_as_in_float32():
    attention = Attention(12, 3)
    x = torch.randn(2, 5, 12)
    exact = torch.autograd.grad(attention(x).square().sum(), list(attention.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        y = attention(x)
    for grad, expected in zip(torch.autograd.grad(y.square().sum(), list(attention.parameters())), exact, strict=True):
        assert (grad - expected).norm() / expected.norm() < 0.02
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(y, attention(x), rtol=0, atol=0.01)  # the fused kernel's


def test_the_forward_pass_is_the_published_one():
    """Position added before every block, the class token and the maximum of the patch tokens pooled."""
    torch.manual_seed(0)
    model = PointTransformerClassifier(SMALL, 5).double().eval()
    points = torch.randn(3, 64, 3, dtype=torch.float64)
    patches, centers = make_patches(points, 8, 6)
    tokens = plain_patch_encoder(model.encoder, patches)
    x = torch.cat([model.cls_token.expand(3, -1, -1), tokens], 1)
    position = torch.cat([model.cls_pos.expand(3, -1, -1), model.pos_embed(centers)], 1)
    for block in model.blocks.blocks:
        x = x + position
        x = x + block.attn(block.norm1(x))
        x = x + block.mlp.fc2(nn.functional.gelu(block.mlp.fc1(block.norm2(x))))
    x = model.norm(x)
    expected = model.cls_head_finetune(torch.cat([x[:, 0], x[:, 1:].max(1).values], -1))
    torch.testing.assert_close(model(points), expected, rtol=0, atol=1e-12)


def test_patches_are_the_nearest_points_about_their_centres():
    points = torch.rand(2, 50, 3)
    patches, centers = make_patches(points, 4, 5)
    assert patches.shape == (2, 4, 5, 3)
    assert torch.equal(patches[:, :, 0], torch.zeros(2, 4, 3))  # the centre is its own nearest point
    distance = (points.unsqueeze(1) - centers.unsqueeze(2)).norm(dim=-1).sort(-1).values[..., :5]
    torch.testing.assert_close(patches.norm(dim=-1), distance)


def test_drop_path_rises_linearly_and_keeps_the_mean():
    model = PointTransformerClassifier(PRESETS["point_mae"], 2)
    rates = [block.drop_path.rate for block in model.blocks.blocks]
    assert rates == pytest.approx([0.1 * i / 11 for i in range(12)])
    torch.manual_seed(0)
    x = torch.ones(20_000, 1, 1)
    dropped = DropPath(0.3)(x)
    assert sorted(dropped.unique().tolist()) == pytest.approx([0, 1 / 0.7])
    assert dropped.mean().item() == pytest.approx(1, abs=4 * (0.3 / 0.7 / 20_000) ** 0.5)
    assert torch.equal(DropPath(0.3).eval()(x), x)


def test_initialisation_is_truncated_normal():
    torch.manual_seed(0)
    model = PointTransformerClassifier(PRESETS["tiny"], 40)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv1d):
            assert module.bias is None or not module.bias.any(), name
            if module.weight.numel() > 5000:
                assert module.weight.std().item() == pytest.approx(0.02, rel=0.05), name
    assert 0.015 < model.cls_token.std().item() < 0.025


def test_the_order_of_the_points_does_not_matter_beyond_the_first():
    """A cloud is a set: only where the sampling starts may show."""
    torch.manual_seed(0)
    model = PointTransformerClassifier(SMALL, 5).double().eval()
    points = torch.randn(2, 64, 3, dtype=torch.float64)
    shuffled = torch.cat([points[:, :1], points[:, 1:][:, torch.randperm(63)]], 1)
    torch.testing.assert_close(model(points), model(shuffled), rtol=0, atol=1e-10)


def test_evaluation_refuses_points_that_are_not_finite():
    model = PointTransformerClassifier(SMALL, 5).eval()
    points = torch.randn(2, 64, 3)
    points[1, 3, 0] = torch.nan
    with pytest.raises(ValueError, match=r"not finite in cloud\(s\) \[1\] of 2"):
        model(points)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"heads": 5}, "width must be a multiple of heads, got 384 and 5"),
        ({"drop_path": 1.0}, r"drop_path must be in \[0, 1\)"),
        ({"head": "mlp"}, 'head must be "point_mae", "point_bert" or "linear", got \'mlp\''),
    ],
)
def test_architectures_out_of_range_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Architecture(**wrong)


def test_bfloat16_autocast_is_close_to_float32():
    torch.manual_seed(0)
    model = PointTransformerClassifier(SMALL, 5).eval()
    points = torch.randn(4, 64, 3)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(points)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), model(points), rtol=0.05, atol=0.02)

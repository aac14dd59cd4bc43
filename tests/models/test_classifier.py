"""The classifier: its published sizes, its forward pass against the published one, its initialisation."""

import pytest
import torch
from torch import nn

from pointewa.models import PRESETS, Architecture, PointTransformerClassifier
from pointewa.models.layers import DropPath
from pointewa.models.patch_embed import make_patches

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


def test_the_forward_pass_is_the_published_one():
    """Position added before every block, the class token and the maximum of the patch tokens pooled."""
    torch.manual_seed(0)
    model = PointTransformerClassifier(SMALL, 5).double().eval()
    points = torch.randn(3, 64, 3, dtype=torch.float64)
    patches, centers, _ = make_patches(points, 8, 6)
    tokens = model.encoder(patches)  # against its published form in test_patch_embed
    x = torch.cat([model.cls_token.expand(3, -1, -1), tokens], 1)
    position = torch.cat([model.cls_pos.expand(3, -1, -1), model.pos_embed(centers)], 1)
    for block in model.blocks.blocks:
        x = x + position
        x = x + block.attn(block.norm1(x))
        x = x + block.mlp.fc2(nn.functional.gelu(block.mlp.fc1(block.norm2(x))))
    x = model.norm(x)
    expected = model.cls_head_finetune(torch.cat([x[:, 0], x[:, 1:].max(1).values], -1))
    torch.testing.assert_close(model(points), expected, rtol=0, atol=1e-12)


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
    with pytest.raises(ValueError, match=r"non-finite values in cloud\(s\) \[1\] of 2"):
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

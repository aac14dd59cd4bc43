"""Inference in bfloat16: close to float32, and float32 where something is decided."""

import copy
import pickle

import pytest
import torch
from torch import nn

import pointewa.ewa as ewa
from pointewa.models import Architecture, Parts, PointTransformerClassifier, PointTransformerSegmenter, in_precision
from pointewa.models.fuse import fuse_batch_norm
from pointewa.models.mixed_precision import MergedPatchEncoder
from pointewa.models.patch_embed import PatchEncoder

ARCH = Architecture(width=24, depth=4, heads=2, num_groups=16, group_size=8, patch_width=8, patch_out=24)
PARTS = Parts(("a", "b", "c", "d"), (0, 0, 1, 1))


def trained(model, *others):
    """With batch norms that have seen some clouds, and weights large enough that clouds are told apart."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for _ in range(5):
            model.train()(torch.randn(16, 64, 3), *others)
    return model.eval()


@torch.no_grad()
def test_the_merged_patch_encoder_is_the_plain_one(monkeypatch):
    """Also where the patches come in several portions, of which the last is smaller."""
    monkeypatch.setattr("pointewa.models.mixed_precision._ROWS", 10 * 8)
    plain = PatchEncoder(8, 24).double()
    for norm in (module for module in plain.modules() if isinstance(module, nn.BatchNorm1d)):
        nn.init.uniform_(norm.weight, -2, 2)
        nn.init.normal_(norm.bias)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    patches = torch.randn(3, 16, 8, 3, dtype=torch.float64)
    expected = plain.eval()(patches)
    found = MergedPatchEncoder(fuse_batch_norm(plain), torch.float64)(patches)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("arch", [ARCH, Architecture(24, 4, 2, 16, 8, patch_width=8, patch_out=16, head="point_bert")])
@torch.no_grad()
def test_a_classifier(arch):
    model = trained(PointTransformerClassifier(arch, 5))
    points = torch.randn(32, 64, 3)
    expected, lowered = model(points), in_precision(model, torch.bfloat16)
    found = lowered(points)
    assert found.dtype == torch.float32
    error = (found - expected).abs().max() / expected.std()
    assert 1e-4 < error < 0.1  # it is another precision, and near
    assert (found.bfloat16().float() != found).any()  # the logits themselves are not rounded to it
    assert in_precision(model, torch.float32) is model
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    casts = {parameter.dtype for parameter in lowered.blocks.blocks[0].mlp.parameters()}
    assert casts == {torch.bfloat16}
    for other in (copy.deepcopy(lowered), pickle.loads(pickle.dumps(lowered))):
        assert torch.equal(other(points), found)
        nn.init.zeros_(other.cls_head_finetune[-1].weight)  # it runs its own weights
        assert other(points).std(0).max() == 0
    assert torch.equal(lowered(points), found)


@pytest.mark.parametrize("decoder", ["point_mae", "light", "point_bert"])
@torch.no_grad()
def test_a_segmenter(decoder):
    labels = torch.arange(16) % 2
    model = trained(PointTransformerSegmenter(ARCH, PARTS, 2, decoder), labels)
    points = torch.randn(16, 64, 3)
    expected, found = model(points, labels), in_precision(model, torch.bfloat16)(points, labels)
    assert found.dtype == torch.float32
    assert 1e-4 < (found - expected).abs().max() / expected.std() < 0.3
    assert (found.bfloat16().float() != found).any()
    assert (found.argmax(-1) == expected.argmax(-1)).float().mean() > 0.97


@torch.no_grad()
def test_gated_experts_are_chosen_by_exact_weights():
    model = trained(ewa.to_moe(PointTransformerClassifier(ARCH, 5), 3, mixture=ewa.TopKMoE))
    lowered, points = in_precision(model, torch.bfloat16), torch.randn(8, 64, 3)
    routers = [module.router for module in lowered.modules() if isinstance(module, ewa.TopKMoE)]
    assert routers
    assert {router.weight.dtype for router in routers} == {torch.float32}
    agree = (lowered(points).argmax(1) == model(points).argmax(1)).sum()
    assert agree >= 7


@torch.no_grad()
def test_a_vit_of_timm():
    pytest.importorskip("timm")
    from pointewa.models.timm_vit import TimmArchitecture, timm_vit

    arch = TimmArchitecture("vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=2, num_heads=2)
    model = timm_vit(arch, 5).eval()
    nn.init.normal_(model.head.weight)
    images = torch.randn(4, 3, 32, 32)
    found, expected = in_precision(model, torch.bfloat16)(images), model(images)
    assert 1e-4 < (found - expected).abs().max() / expected.std() < 0.1
    assert (found.bfloat16().float() != found).any()

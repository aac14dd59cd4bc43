"""Batch norms folded into the layers before them: the same function in evaluation mode."""

import pytest
import torch
from torch import nn

from pointewa.models import (
    Architecture,
    MaskedAutoencoder,
    Parts,
    PointTransformerClassifier,
    PointTransformerSegmenter,
    fuse_batch_norm,
)


@pytest.mark.parametrize("head", ["point_mae", "point_bert"])
def test_the_fused_model_is_the_same_function_without_batch_norms(head):
    arch = Architecture(width=24, depth=2, heads=2, num_groups=8, group_size=6, patch_width=8, patch_out=24, head=head)
    model = PointTransformerClassifier(arch, 5).double()
    for _ in range(3):
        model.train()(3 * torch.randn(16, 64, 3, dtype=torch.float64))  # statistics of their own
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm1d)):
        nn.init.uniform_(norm.weight, -2, 2)
        nn.init.normal_(norm.bias)
    points = torch.randn(4, 64, 3, dtype=torch.float64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fused = fuse_batch_norm(model.eval())
    assert not any(isinstance(module, nn.BatchNorm1d) for module in fused.modules())
    torch.testing.assert_close(fused(points), model(points), rtol=0, atol=1e-12)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    other = torch.randn(4, 64, 3, dtype=torch.float64)
    assert (fused(other) - model(points)).abs().max() > 1e-6


@pytest.mark.parametrize(
    ("decoder", "kept"),
    [
        ("light", {"propagation_0.mlp_bns.0", "propagation_0.mlp_bns.1", "bns1", "bns2"}),
        ("point_bert", {f"propagation_{k}.mlp_bns.{n}" for k in range(3) for n in range(2)} | {"bn1"}),
    ],
)
def test_of_a_segmenter_the_batch_norms_beside_their_convolutions_stay(decoder, kept):
    arch = Architecture(width=24, depth=3, heads=2, num_groups=8, group_size=6, patch_width=8, patch_out=24)
    model = PointTransformerSegmenter(arch, Parts(("a", "b"), (0, 1)), 2, decoder).double()
    points, labels = torch.randn(6, 64, 3, dtype=torch.float64), torch.arange(6) % 2
    for _ in range(3):
        model.train()(3 * points, labels)
    fused = fuse_batch_norm(model.eval())
    assert {name for name, one in fused.named_modules() if isinstance(one, nn.BatchNorm1d)} == kept
    torch.testing.assert_close(fused(points, labels), model(points, labels), rtol=0, atol=1e-12)


def test_a_model_in_training_is_refused():
    model = PointTransformerClassifier(Architecture(width=24, depth=1, heads=2), 5)
    with pytest.raises(ValueError, match=r"call model\.eval\(\) first"):
        fuse_batch_norm(model.train())


@pytest.mark.parametrize("build", [lambda arch: PointTransformerClassifier(arch, 5), MaskedAutoencoder])
def test_a_model_without_batch_norms_works_as_any_other(build):
    """Fused already: it runs, gives features, has gradients, and fusing it again changes nothing."""
    arch = Architecture(width=24, depth=2, heads=2, num_groups=8, group_size=6, patch_width=8, patch_out=24)
    model = fuse_batch_norm(build(arch).eval())
    assert not any(isinstance(module, nn.BatchNorm1d) for module in model.modules())
    points = torch.randn(4, 64, 3)
    again = fuse_batch_norm(model)
    assert again is not model
    assert again.state_dict().keys() == model.state_dict().keys()
    torch.manual_seed(0)
    expected = model(points)
    torch.manual_seed(0)
    assert torch.equal(again(points), expected)
    assert model.features(points).isfinite().all()
    model.train()(points).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())

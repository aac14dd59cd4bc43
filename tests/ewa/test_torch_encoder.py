"""torch.nn.TransformerEncoder: its fused and nested paths are closed for experts, and open again when folded."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pointewa.ewa as ewa

D, TOKENS = 16, 9


def encoder(activation="relu", norm_first=False, num_layers=4):
    layer = nn.TransformerEncoderLayer(D, 2, 32, activation=activation, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, num_layers)
    with torch.no_grad():
        for parameter in model.parameters():  # torch starts all layers alike
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def classes(model):
    return {name: type(module) for name, module in model.named_modules()}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layers", ["all", "every_other"])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu", F.gelu])
def test_torch_fused_inference_with_padding(activation, norm_first, layers):
    """Without gradients torch runs a fused kernel that reads the weights itself, on nested tensors if it can."""
    torch.manual_seed(0)
    dense = encoder(activation, norm_first).double().eval()
    x = torch.randn(3, TOKENS, D, dtype=torch.float64)
    lengths = torch.tensor([TOKENS, 5, 2])
    padding = torch.arange(TOKENS) >= lengths[:, None]
    moe = ewa.to_moe(dense, layers=layers)
    folded = ewa.fold(moe)
    assert folded.use_nested_tensor == dense.use_nested_tensor == (not norm_first)
    assert not any("nested" in name for name in vars(folded).keys() - vars(dense).keys())
    for folded_layer, dense_layer in zip(folded.layers, dense.layers, strict=True):
        assert folded_layer.activation_relu_or_gelu == dense_layer.activation_relu_or_gelu > 0
        assert folded_layer.activation is dense_layer.activation

    with_grad = folded(x, src_key_padding_mask=padding)
    with torch.no_grad():
        expected = moe(x, src_key_padding_mask=padding)
        out = folded(x, src_key_padding_mask=padding)
        dense_out = dense(x, src_key_padding_mask=padding)
    torch.testing.assert_close(out[~padding], expected[~padding], rtol=0, atol=1e-10)
    torch.testing.assert_close(with_grad[~padding], expected[~padding], rtol=0, atol=1e-10)
    # Nested tensors come back with zeros for padding: the folded model takes that path where the dense one does.
    assert (dense_out[padding] == 0).all() == (not norm_first)
    assert (out[padding] == 0).all() == (not norm_first)


def test_a_shared_torch_encoder_layer_stays_shared():
    layer = nn.TransformerEncoderLayer(D, 2, 32, batch_first=True)
    dense = nn.Sequential(layer, nn.LayerNorm(D), layer)
    moe = ewa.to_moe(dense, layers="all")
    folded = ewa.fold(moe)
    assert len(ewa.moe_layers(moe)) == 1
    assert moe[0] is moe[2]
    assert folded[0] is folded[2]
    assert classes(folded) == classes(dense)

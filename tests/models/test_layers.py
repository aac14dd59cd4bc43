"""The transformer's layers against their formulas."""

import torch

from pointewa.models.layers import Attention


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

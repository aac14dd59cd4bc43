"""The transformer's layers against their formulas."""

import pytest
import torch
from torch import nn

from pointewa.models.layers import Attention, at_least_float32, pointwise


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


@pytest.mark.parametrize("bias", [True, False])
def test_a_pointwise_convolution_is_the_convolution_of_each_point(bias):
    conv, x = nn.Conv1d(3, 5, 1, bias=bias).double(), torch.randn(2, 7, 3, dtype=torch.float64)
    torch.testing.assert_close(pointwise(conv, x), conv(x.mT).mT, rtol=0, atol=1e-14)
    torch.testing.assert_close(pointwise(conv, x[:, 0]), conv(x.mT).mT[:, 0], rtol=0, atol=1e-14)


def test_only_what_is_too_coarse_becomes_float32():
    for given, kept in ((torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float32,) * 2,
                        (torch.float64,) * 2):  # fmt: skip
        assert at_least_float32(torch.ones(2, dtype=given)).dtype == kept

"""Attention in few bits: once stored, and with bounded errors however large the scores."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pointewa import compression
from tests.compression.test_hooks import distance


def test_queries_keys_and_values_are_kept_once_in_the_bits_of_attention():
    joint, after = nn.Linear(64, 192, bias=False), nn.Linear(64, 64)
    x = torch.randn(2, 33, 64, requires_grad=True)

    def attention():
        q, k, v = joint(x).view(2, 33, 3, 4, 16).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 33, 64)

    with compression.activations(nn.ModuleList([joint, after]), 4, attention_bits=8) as compressed:
        out = after(attention())
    values = 2 * 33 * 64  # of the input in 4 bits; of queries, keys and values and the output in 8; in blocks of 128
    assert compressed.nbytes == values // 2 + 4 * values + 5 * values // 128 * 4
    out.sum().backward()


def attention_gradients(kind, sharpness, context):
    """Of all parameters, masks among them."""
    torch.manual_seed(0)
    linear, bias = nn.Linear(96, 288), nn.Parameter(torch.randn(3, 40, 40))
    x = torch.randn(8, 40, 96)
    q, k, v = linear(x).view(8, 40, 3, 3, 32).permute(2, 0, 3, 1, 4)
    q, k, causal = sharpness * q, sharpness * k, torch.ones(40, 40).tril().log()
    torch.manual_seed(1)
    with context:
        if kind == "module":
            module = nn.MultiheadAttention(96, 3, batch_first=True)
            out = module(sharpness * x, sharpness * x, linear(x)[..., :96], need_weights=False)[0]
        elif kind == "by name":
            out = F.scaled_dot_product_attention(
                query=q, key=k, value=v, attn_mask=causal.expand(8, 1, 40, 40), scale=0.2
            )
        elif kind == "bias":
            out = F.scaled_dot_product_attention(q, k, v, causal + bias)
        else:
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=0.3 if kind == "dropout" else 0.0)
        loss = out.square().sum()
    found = torch.autograd.grad(loss, [*linear.parameters(), bias], allow_unused=True)
    return [one for one in found if one is not None]


@pytest.mark.parametrize(("sharpness", "errors"), [(1, (0.01, 0.15)), (12, (0.5, 2.0))])
@pytest.mark.parametrize("kind", ["plain", "by name", "bias", "dropout", "module"])
def test_attention_of_large_scores(kind, sharpness, errors):
    plain = attention_gradients(kind, sharpness, nullcontext())
    for bits, most in zip((8, 4), errors, strict=True):
        few = compression.activations(nn.Identity(), bits, attention_bits=bits)
        assert 0 < distance(attention_gradients(kind, sharpness, few), plain) < most

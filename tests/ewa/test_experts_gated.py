"""`TopKMoE`: against a loop over tokens, its balance loss, and what the scheme does with it."""

import copy
from functools import partial

import pytest
import timm
import torch
from timm.layers import Mlp
from torch import nn

import pointewa.ewa as ewa

D = 6


def gated(num_experts=4, top_k=1):
    moe = ewa.TopKMoE(Mlp(D, 8, 5).double(), num_experts, top_k=top_k)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.add_(torch.randn_like(parameter))
    return moe


def loop(moe, x):
    """One token at a time; returns outputs and how many tokens each expert got."""
    dense = Mlp(D, 8, 5).double()
    outputs, counts = [], [0] * moe.num_experts
    for token in x.reshape(-1, D):
        probability = (moe.router.weight @ token).softmax(0)
        chosen = probability.argsort(descending=True)[: moe.top_k].tolist()
        total = sum(probability[i] for i in chosen) if moe.top_k > 1 else 1.0
        output = 0
        for i in chosen:
            counts[i] += 1
            expert = {name: stacked[i] for name, stacked in moe.experts.named_parameters()}
            output = output + probability[i] / total * torch.func.functional_call(dense, expert, (token,))
        outputs.append(output)
    return torch.stack(outputs).reshape(*x.shape[:-1], -1), counts


@pytest.mark.parametrize(("num_experts", "top_k"), [(4, 1), (4, 2), (3, 3), (2, 1)])
@pytest.mark.parametrize("shape", [(12, D), (2, 7, D), (1, D)])
def test_forward_and_gradients_equal_a_loop_over_tokens(num_experts, top_k, shape):
    moe = gated(num_experts, top_k)
    plain = copy.deepcopy(moe)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    out, (expected, _) = moe(x), loop(plain, y)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    weights = torch.randn_like(out)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=0, atol=1e-12)
    for (name, a), b in zip(moe.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(
            a.grad, torch.zeros_like(a) if b.grad is None else b.grad, rtol=0, atol=1e-12, msg=name
        )


def test_evaluation_routes_as_training_does():
    moe, x = gated(), torch.randn(9, D, dtype=torch.float64)
    assert torch.equal(moe.train()(x), moe.eval()(x))


@pytest.mark.parametrize("top_k", [1, 2])
def test_balance_loss_is_that_of_the_switch_transformer(top_k):
    moe, x = gated(4, top_k), torch.randn(50, D, dtype=torch.float64)
    moe(x)
    probability = (x @ moe.router.weight.T).softmax(-1)
    _, counts = loop(moe, x)
    expected = 4 * sum(counts[i] / (50 * top_k) * probability[:, i].mean() for i in range(4))
    torch.testing.assert_close(moe.balance, expected)
    torch.testing.assert_close(ewa.balance_loss(nn.ModuleList([moe, moe, nn.Linear(2, 2)])), expected)  # shared: once


def test_balance_loss_evens_the_experts_out():
    moe, x = gated(), torch.randn(400, D, dtype=torch.float64)
    with torch.no_grad():
        moe.router.weight.mul_(0.1)
        moe.router.weight[0] += 0.5 * x.mean(0).sign()
    x = x + 2 * x.mean(0).sign()
    before = max(loop(moe, x)[1])
    optimizer = torch.optim.SGD(moe.router.parameters(), lr=0.1)
    for _ in range(200):
        moe(x)
        moe.balance.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert before > 250
    assert max(loop(moe, x)[1]) < 150


def test_without_a_forward_pass_there_is_no_balance_loss():
    with pytest.raises(ValueError, match="no gated layers that have had a forward pass in training"):
        ewa.balance_loss(gated())
    with pytest.raises(ValueError, match="no gated layers"):
        ewa.balance_loss(nn.Linear(2, 2))


@pytest.mark.parametrize("top_k", [0, 5])
def test_more_experts_a_token_than_there_are_is_refused(top_k):
    with pytest.raises(ValueError, match=f"top_k must be from 1 to num_experts = 4, got {top_k}"):
        ewa.TopKMoE(Mlp(D, 8, 5), 4, top_k=top_k)


@pytest.mark.parametrize("whose", ["timm", "torch"])
def test_other_peoples_models_take_it_and_averaging_leaves_the_router_alone(whose):
    if whose == "timm":
        model = timm.create_model(
            "vit_tiny_patch16_224", img_size=32, depth=4, embed_dim=24, num_heads=2, num_classes=5
        )
        x = torch.randn(2, 3, 32, 32)
    else:
        layer = nn.TransformerEncoderLayer(24, 2, 48, batch_first=True, dropout=0.0)
        model, x = nn.TransformerEncoder(layer, 4), torch.randn(2, 7, 24)
    moe = ewa.to_moe(model, mixture=partial(ewa.TopKMoE, top_k=2))
    assert len(ewa.moe_layers(moe)) == 2
    assert set(ewa.stacked_parameters(moe)) == {name for name, _ in moe.named_parameters() if ".experts." in name}
    moe(x).sum().backward()
    copy.deepcopy(moe)  # although a forward pass has left its balance loss
    routers = [layer.router.weight.clone() for layer in ewa.moe_layers(moe).values()]
    ewa.ExpertAveraging(moe, 0.75).step()
    assert all(
        torch.equal(layer.router.weight, old) for layer, old in zip(ewa.moe_layers(moe).values(), routers, strict=True)
    )
    assert all((stacked == stacked[:1]).all() for stacked in ewa.stacked_parameters(moe).values())
    with pytest.raises(ValueError, match="experts behind a router stay"):
        ewa.fold(moe)
    with torch.autocast("cpu", torch.bfloat16):
        assert moe(x).isfinite().all()

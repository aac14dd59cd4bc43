"""How far apart the experts are, and what folding would change: against their definitions."""

import copy

import pytest
import torch
from timm.layers import Mlp
from torch import nn

import pointewa.ewa as ewa

D, TOKENS = 16, 9


def encoder():
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(D, 2, 32, batch_first=True), 4)


@pytest.mark.parametrize("num_experts", [2, 4, 6])
def test_disagreement_of_copies_and_of_independent_experts(num_experts):
    torch.manual_seed(0)
    dense = nn.Sequential(*(Mlp(64, 256) for _ in range(4)))
    copies = ewa.disagreement(ewa.to_moe(dense, num_experts, init="copy"))
    assert copies == pytest.approx({"1": 0, "3": 0}, abs=1e-5)
    independent = ewa.disagreement(ewa.to_moe(dense, num_experts))
    expected = num_experts * (num_experts - 1) ** 0.5
    assert independent == pytest.approx({"1": expected, "3": expected}, rel=0.03)  # 33,088 entries a layer


def test_disagreement_against_its_definition():
    torch.manual_seed(0)
    moe = ewa.to_moe(nn.Sequential(Mlp(D, 32)).double(), 3, layers="all", predicate=ewa.is_ffn)
    vectors = torch.cat([p.detach().flatten(1) for p in moe[0].parameters()], dim=1)  # (N, P)
    mean = vectors.mean(0)
    expected = sum((vector - mean).norm() for vector in vectors) / mean.norm()
    assert ewa.disagreement(moe) == pytest.approx({"0": expected.item()})
    ewa.ExpertAveraging(moe, 0.3).step()
    assert ewa.disagreement(moe) == pytest.approx({"0": (1 - 0.3 * 3 / 2) * expected.item()})


def test_fold_gap_against_its_definition():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(D, D), Mlp(D, 32)).double().eval()
    moe, x = ewa.to_moe(dense, 3, layers="all", predicate=ewa.is_ffn), torch.randn(2, TOKENS, D, dtype=torch.float64)
    outputs = []
    for i in range(3):
        expert = copy.deepcopy(dense[1])
        expert.load_state_dict({name: stacked[i] for name, stacked in moe[1].experts.state_dict().items()})
        outputs.append(expert(dense[0](x)))
    folded = ewa.fold(moe)(x)
    expected = ((sum(outputs) / 3 - folded).norm() / folded.norm()).item()
    assert ewa.fold_gap(moe, x) == pytest.approx({"1": expected})


@pytest.mark.parametrize("make_dense", [encoder, lambda: nn.Sequential(*(Mlp(D, 32) for _ in range(4)))])
def test_fold_gap_is_zero_for_copies_positive_otherwise_and_leaves_the_model_as_it_was(make_dense):
    torch.manual_seed(0)
    dense, x = make_dense().double(), torch.randn(3, TOKENS, D, dtype=torch.float64)
    copies = ewa.to_moe(dense, init="copy").train()
    assert max(ewa.fold_gap(copies, x).values()) < 1e-12
    assert all(module.training for module in copies.modules())

    moe = ewa.to_moe(dense).eval()
    before = moe(x)
    gaps = ewa.fold_gap(moe, x)
    assert gaps.keys() == ewa.moe_layers(moe).keys()
    assert min(gaps.values()) > 1e-3
    assert not any(module.training for module in moe.modules())
    assert torch.equal(moe(x), before)


def test_fold_gap_cleans_up_after_an_input_that_the_model_refuses():
    moe = ewa.to_moe(nn.Sequential(Mlp(D, 32), Mlp(D, 32))).train()
    with pytest.raises(RuntimeError):
        ewa.fold_gap(moe, torch.randn(3, TOKENS, D + 1))
    assert moe.training
    assert not any(layer._forward_hooks for layer in ewa.moe_layers(moe).values())


def test_fold_gap_keeps_the_mode_of_every_module():
    model = ewa.to_moe(encoder(), layers="all").train()
    model.layers[0].norm1.eval()
    ewa.fold_gap(model, torch.randn(2, TOKENS, D))
    assert model.training
    assert not model.layers[0].norm1.training

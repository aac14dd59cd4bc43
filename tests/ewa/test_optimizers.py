"""Parameter groups by what a parameter is in the dense model, timm's helpers, and Muon on each expert."""

import copy

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from timm.optim._param_groups import param_groups_layer_decay
from torch import nn

import pointewa.ewa as ewa
from pointewa.ewa.optimizers import dense_names
from tests.ewa.test_wrappers import D, make_model

# Parameter groups


def vit_and_moe():
    dense = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=4, num_classes=7, init_values=0.1)
    return dense, ewa.to_moe(dense, 3)


def by_dense_name(model, groups, value):
    """From each parameter's dense name to what its group says."""
    names = {one: dense_names(model)[name] for name, one in model.named_parameters()}
    return {names[one]: value(group) for group in groups for one in group["params"]}


TIMM = {
    "layer_decay": lambda model: param_groups_layer_decay(
        model, 0.05, no_weight_decay_list=getattr(model, "no_weight_decay", set)()
    ),
    "create_optimizer_v2": lambda model: create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05).param_groups,
    "both": lambda model: create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.7).param_groups,
}


@pytest.mark.parametrize("make_groups", TIMM.values(), ids=TIMM)
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_base_patch14_224"])
def test_timms_groups_of_a_converted_model_are_those_of_the_dense_one(make_groups, name):
    """eva02's FFN has a norm in it, whose stacked weight is no bias by its name."""
    size = {"img_size": 28 if "14" in name else 32, "embed_dim": 48, "num_heads": 3}
    dense = timm.create_model(name, **size, depth=4, num_classes=7)
    moe = ewa.to_moe(dense, 3)
    for value in (lambda group: group["weight_decay"], lambda group: group.get("lr_scale", 1)):
        expected = by_dense_name(dense, make_groups(dense), value)
        assert by_dense_name(moe, make_groups(moe), value) == expected
    assert {0.0, 0.05} == {group["weight_decay"] for group in make_groups(moe)}


def test_fold_gives_back_the_models_own_no_weight_decay():
    dense, moe = vit_and_moe()
    assert moe.no_weight_decay() > dense.no_weight_decay()
    assert copy.deepcopy(moe).no_weight_decay() == moe.no_weight_decay()
    folded = ewa.fold(moe)
    assert folded.no_weight_decay() == dense.no_weight_decay()
    assert "no_weight_decay" not in vars(folded)
    assert "no_weight_decay" in vars(moe)
    plain = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2, enable_nested_tensor=False)
    assert not hasattr(ewa.fold(ewa.to_moe(plain)), "no_weight_decay")
    plain.no_weight_decay = lambda: {"layers.1.linear1.weight"}  # on the instance; a name that conversion changes
    moe = ewa.to_moe(plain)
    assert "layers.1.linear1.experts.linear1.weight" in moe.no_weight_decay()
    assert ewa.fold(moe).no_weight_decay() == {"layers.1.linear1.weight"}


@pytest.mark.parametrize("mixture", [ewa.RandomPartitionMoE, ewa.TopKMoE])
def test_param_groups_go_by_the_dense_parameter(mixture):
    dense = vit_and_moe()[0]
    moe = ewa.to_moe(dense, 3, mixture=mixture)
    seen = {}

    def muon(name, ndim):
        seen[name] = ndim
        return ndim == 2 and name.startswith("blocks.")

    def scale(name):
        return 0.5 if name.startswith("blocks.1.") else 1.0

    groups = ewa.param_groups(moe, 0.05, lr=1e-3, muon=muon, lr_scale=scale)
    shapes = {name: one.ndim for name, one in dense.named_parameters()}
    assert {name: ndim for name, ndim in seen.items() if "router" not in name} == shapes
    decay = by_dense_name(moe, groups, lambda group: group["weight_decay"])
    kind = by_dense_name(moe, groups, lambda group: group["kind"])
    rate = by_dense_name(moe, groups, lambda group: (group["lr_scale"], group["lr"]))
    for name, ndim in shapes.items():
        assert decay[name] == (0.05 if ndim > 1 and name not in dense.no_weight_decay() else 0)
        assert kind[name] == ("muon" if ndim == 2 and "blocks." in name else "adamw")
        assert rate[name] == ((0.5, 5e-4) if name.startswith("blocks.1.") else (1.0, 1e-3))
    assert sum(len(group["params"]) for group in groups) == len(list(moe.parameters()))
    torch.optim.AdamW(groups)


def test_the_dense_names_are_those_of_the_folded_model():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    for dense in (vit_and_moe()[0], nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), layer):
        moe = ewa.to_moe(dense, 2, layers="all")
        assert list(dense_names(moe).values()) == [name for name, _ in ewa.fold(moe).named_parameters()]
    alone = ewa.RandomPartitionMoE(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)), 2)
    assert dense_names(alone) == {f"experts.{name}": name for name in ("0.weight", "0.bias", "1.weight", "1.bias")}
    assert list(ewa.stacked_parameters(alone)) == [name for name, _ in alone.named_parameters()]


# Muon


def is_matrix(name, ndim):
    return ndim == 2 and name.startswith("1.")


def test_muon_steps_each_expert_as_the_matrix_it_is():
    model, lr = make_model().float(), 0.02
    optimizer = ewa.MuonAndAdamW(ewa.param_groups(model, 0.1, muon=is_matrix), lr)
    stacked = {name: one for name, one in ewa.stacked_parameters(model).items() if one.ndim == 3}
    assert len(stacked) == 2
    twins = {name: [nn.Parameter(row.clone()) for row in one.detach()] for name, one in stacked.items()}
    alone = torch.optim.Muon(
        [row for rows in twins.values() for row in rows], lr, 0.1, 0.95, adjust_lr_fn="match_rms_adamw"
    )
    bias = ewa.stacked_parameters(model)["1.experts.0.bias"]
    bias_twin = nn.Parameter(bias.detach().clone())
    adamw = torch.optim.AdamW([bias_twin], lr, weight_decay=0.0)
    for seed in range(3):
        optimizer.zero_grad()
        torch.manual_seed(seed)
        model(torch.randn(10, D)).square().mean().backward()
        for name, one in stacked.items():
            for row, gradient in zip(twins[name], one.grad, strict=True):
                row.grad = gradient.clone()
        bias_twin.grad = bias.grad.clone()
        optimizer.step(), alone.step(), adamw.step()
        for name, one in stacked.items():
            torch.testing.assert_close(one.detach(), torch.stack([row.detach() for row in twins[name]]))
        torch.testing.assert_close(bias, bias_twin, rtol=0, atol=1e-6)


def test_muon_resumes_from_its_state_dict():
    def start():
        model = make_model().float()
        return model, ewa.MuonAndAdamW(ewa.param_groups(model, 0.1, muon=is_matrix), 0.02)

    def run(model, optimizer, seeds):
        for seed in seeds:
            optimizer.zero_grad()
            torch.manual_seed(seed)
            model(torch.randn(10, D)).square().mean().backward()
            optimizer.step()

    whole, first, second = start(), start(), start()
    run(*whole, range(4))
    run(*first, range(2))
    for one, other in zip(second, first, strict=True):
        one.load_state_dict(copy.deepcopy(other.state_dict()))
    run(*second, range(2, 4))
    torch.testing.assert_close(second[0].state_dict(), whole[0].state_dict(), rtol=0, atol=0)


def test_a_muon_that_would_take_stacked_experts_for_a_matrix_is_refused():
    _, model = vit_and_moe()
    averaging = ewa.ExpertAveraging(model, 0.3)
    everything = create_optimizer_v2(model, "muon", lr=1e-3)
    with pytest.raises(ValueError, match=r"Muon would take.*ewa\.MuonAndAdamW.*fallback_list"):
        averaging.attach(everything)
    flat = torch.optim.Muon([one for one in model.parameters() if one.ndim == 2], lr=1e-3)  # it takes biases [N, D]
    with pytest.raises(ValueError, match=r"Muon holds 4 of the experts' 8 parameters"):
        averaging.attach(flat)
    averaging.attach(create_optimizer_v2(model, "muon", lr=1e-3, fallback_list=ewa.stacked_parameters(model)))
    averaging.detach()
    averaging.attach(ewa.MuonAndAdamW(ewa.param_groups(model, 0.05, muon=lambda name, ndim: ndim == 2), 1e-3))

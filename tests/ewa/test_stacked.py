"""N layers as one: against the N layers, what becomes of them, and what is refused."""

import copy

import pytest
import torch
from timm.layers import LayerNorm
from torch import nn

import pointewa.ewa as ewa
from pointewa.ewa.stacked import stack, unstack

D = 6


class OwnLinear(nn.Module):
    """As torch_geometric's: a linear layer that is none of torch's by its class."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(outputs, inputs)), nn.Parameter(torch.randn(outputs))

    def forward(self, x):
        return x @ self.weight.T + self.bias


class Cosine(OwnLinear):
    """It only looks like a linear layer."""

    def forward(self, x):
        return nn.functional.normalize(x, dim=-1) @ nn.functional.normalize(self.weight, dim=-1).T + self.bias


@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.Linear(D, 5),
        lambda: nn.Linear(D, 5, bias=False),
        lambda: nn.LayerNorm(D, eps=1e-2),
        lambda: nn.LayerNorm(D, bias=False),
        lambda: nn.LayerNorm(D, elementwise_affine=False),
        lambda: LayerNorm(D),
        lambda: nn.RMSNorm(D, eps=1e-2),
        lambda: nn.RMSNorm(D),
        lambda: OwnLinear(D, 5),
    ],
)
def test_each_row_is_one_layer_a_single_row_is_their_mean_and_unstacking_gives_it(layer):
    torch.manual_seed(0)
    dense = layer().double().eval()
    stacked = stack(dense, 3)
    assert not stacked.training
    with torch.no_grad():
        for parameter in stacked.parameters():
            parameter.add_(torch.randn_like(parameter))
    x = torch.randn(3, 7, D, dtype=torch.float64)
    out = stacked(x)
    for i in range(3):
        one = copy.deepcopy(dense)
        one.load_state_dict({name: value[i] for name, value in stacked.state_dict().items()})
        torch.testing.assert_close(out[i], one(x[i]), rtol=0, atol=1e-12)
    mean = unstack(stacked)
    assert type(mean) is type(dense)
    assert str(mean) == str(dense)
    torch.testing.assert_close(stacked(x[:1]), mean(x[:1]), rtol=0, atol=1e-12)
    for name, value in mean.state_dict().items():
        torch.testing.assert_close(value, stacked.state_dict()[name].mean(0), rtol=0, atol=1e-15)


class RawParameter(nn.Module):
    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(D))


@pytest.mark.parametrize(
    ("layer", "named"),
    [
        (nn.Conv1d(D, D, 1), r"Conv1d.*weight.*bias"),
        (nn.BatchNorm1d(D), r"BatchNorm1d.*running_mean"),
        (RawParameter(), r"RawParameter.*gamma"),
        (Cosine(D, 5), r"Cosine.*weight.*bias"),
    ],
)
def test_an_ffn_that_cannot_be_stacked_is_refused_by_name(layer, named):
    with pytest.raises(ValueError, match=named):
        ewa.RandomPartitionMoE(nn.Sequential(nn.Linear(D, D), layer), 4)


def test_a_norm_over_more_than_the_last_dimension_is_refused():
    with pytest.raises(ValueError, match=r"last dimension.*\(3, 6\)"):
        ewa.RandomPartitionMoE(nn.LayerNorm((3, D)), 4)


def test_a_layer_used_twice_in_an_ffn_stays_one_layer():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1 = self.fc2 = nn.Linear(D, D)

        def forward(self, x):
            return self.fc2(torch.tanh(self.fc1(x)))

    ffn = Tied().double()
    moe = ewa.RandomPartitionMoE(ffn, 3, init="copy")
    x = torch.randn(7, D, dtype=torch.float64)
    assert moe.experts.fc1 is moe.experts.fc2
    assert moe.experts.fc1.weight.shape == (3, D, D)
    torch.testing.assert_close(moe(x), ffn(x), rtol=0, atol=1e-12)
    dense = moe.fuse()
    assert dense.fc1 is dense.fc2
    assert torch.equal(dense(x), ffn(x))

"""The edge convolution against the published form: a convolution on every edge's own channels."""

import pytest
import torch
from torch import nn

from pointewa.models.edge_conv import EdgeConv
from pointewa.ops import knn


def plain_edge_conv(layers, queries, neighbors, index):
    """Convolution, norm and activation on ``[B, 2 C, Q, k]``, then the maximum."""
    gathered = torch.stack([cloud[rows] for cloud, rows in zip(neighbors, index, strict=True)])  # (B, Q, k, C)
    repeated = queries.unsqueeze(2).expand_as(gathered)
    edges = torch.cat([gathered - repeated, repeated], -1).permute(0, 3, 1, 2)
    return layers(edges).amax(-1).mT


@pytest.mark.parametrize("level", ["own", "coarser"])
def test_an_edge_convolution_equals_its_published_form(level):
    conv = EdgeConv(6, 16).double()
    nn.init.normal_(conv[1].weight)  # of either sign
    nn.init.normal_(conv[1].bias)
    places = torch.randn(2, 10, 3)
    queries = torch.randn(2, 10, 6, dtype=torch.float64, requires_grad=True)
    neighbors, centers = queries, places
    if level == "coarser":
        neighbors, centers = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True), places[:, :5]
    index = knn(places, centers, 4)
    inputs = [queries, *([neighbors] if level == "coarser" else []), *conv.parameters()]
    found, expected = conv(queries, neighbors, index), plain_edge_conv(nn.Sequential(*conv), queries, neighbors, index)
    assert found.shape == (2, 10, 16)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    upstream = torch.randn_like(found)
    for mine, plain in zip(*(torch.autograd.grad(out, inputs, upstream) for out in (found, expected)), strict=True):
        torch.testing.assert_close(mine, plain, rtol=0, atol=1e-11)


def test_its_parameters_have_the_published_names_and_shapes():
    shapes = {name: list(value.shape) for name, value in EdgeConv(384, 512).state_dict().items()}
    assert shapes == {"0.weight": [512, 768, 1, 1], "1.weight": [512], "1.bias": [512]}


def test_channels_that_do_not_go_into_groups_are_refused():
    with pytest.raises(ValueError, match="an edge convolution needs a multiple of 4 channels, got 6"):
        EdgeConv(8, 6)

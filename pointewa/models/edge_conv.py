"""The edge convolution of DGCNN (Wang et al., 2019) on a graph that does not change, as Point-BERT uses it."""

import torch.nn.functional as F
from torch import Tensor, nn

from pointewa.ops import group

NORM_GROUPS = 4


class EdgeConv(nn.Sequential):
    """A 1x1 convolution on edges ``[neighbour - query, query]``, group norm, LeakyReLU, the maximum over neighbours.

    The convolution is linear, so its two halves act on neighbours and queries before these are paired: the first half
    computes once for every point what would be computed again for each edge that it is in.

    Parameters are named as in Point-BERT's code, "0" for the convolution and "1" for the norm.

    Args:
        channels: C of queries and neighbours.
        out: channels of the output.

    Raises:
        ValueError: ``out`` does not go into 4 groups.
    """

    def __init__(self, channels: int, out: int) -> None:
        if out % NORM_GROUPS:
            raise ValueError(f"out must be a multiple of {NORM_GROUPS}, got {out}")
        super().__init__(nn.Conv2d(2 * channels, out, 1, bias=False), nn.GroupNorm(NORM_GROUPS, out), nn.LeakyReLU(0.2))

    def forward(self, queries: Tensor, neighbors: Tensor, index: Tensor) -> Tensor:
        """Features of the points where they are wanted, and of those that they are taken from.

        Args:
            queries: ``[B, Q, C]``.
            neighbors: ``[B, N, C]``; the queries themselves on the graph of one level.
            index: the k neighbours of each query, int64 ``[B, Q, k]``, as from `pointewa.ops.knn`.

        Returns:
            ``[B, Q, out]``.
        """
        conv, norm, act = self
        of_neighbor, of_query = conv.weight.flatten(1).chunk(2, dim=1)  # (out, C) each
        edges = group(F.linear(neighbors, of_neighbor), index)  # (B, Q, k, out)
        edges = edges + F.linear(queries, of_query - of_neighbor).unsqueeze(2)
        # The activation is monotone, so it commutes with the maximum; that of `max` has the faster backward pass.
        return act(norm(edges.permute(0, 3, 1, 2)).max(3).values.mT)

"""The edge convolution of DGCNN (Wang et al., ACM TOG 2019), as Point-BERT has it."""

import torch.nn.functional as F
from torch import Tensor, nn


class EdgeConv(nn.Sequential):
    """Maximum over the edges to a point's neighbours of a 1x1 convolution, group norm and LeakyReLU 0.2.

    An edge is ``[neighbour - query, query]``. The convolution acts on both halves once per point instead of once per
    edge: W_n (n - q) + W_q q = W_n n + (W_q - W_n) q. Parameters are named as in Point-BERT's code, ``0`` the
    convolution and ``1`` the norm.

    Args:
        into: channels of the points.
        out: channels of the output.
        norm_groups: groups of channels that the norm takes together, with all edges of a cloud.

    Raises:
        ValueError: ``out`` is no multiple of ``norm_groups``.
    """

    def __init__(self, into: int, out: int, norm_groups: int = 4) -> None:
        if out % norm_groups:
            raise ValueError(f"an edge convolution needs a multiple of {norm_groups} channels, got {out}")
        super().__init__(
            nn.Conv2d(2 * into, out, 1, bias=False), nn.GroupNorm(norm_groups, out), nn.LeakyReLU(negative_slope=0.2)
        )

    def forward(self, queries: Tensor, points: Tensor, neighbors: Tensor) -> Tensor:
        """Features of queries ``[B, Q, I]`` and of the points that their neighbours are among to ``[B, Q, O]``.

        Args:
            queries: features of the points whose neighbours are looked at.
            points: features ``[B, N, I]`` of those that can be neighbours; the same tensor within one cloud.
            neighbors: int64 ``[B, Q, K]``, indices into the points.
        """
        conv, norm, act = self
        of_neighbor, of_query = conv.weight.flatten(1).chunk(2, dim=1)  # (O, I) each
        # Not `pointewa.ops.group`, whose indices of the batch tracing would make constants.
        picked = neighbors.flatten(1).unsqueeze(2).expand(-1, -1, of_neighbor.shape[0])
        edges = F.linear(points, of_neighbor).gather(1, picked).unflatten(1, neighbors.shape[1:])  # (B, Q, K, O)
        edges = edges + F.linear(queries, of_query - of_neighbor).unsqueeze(2)
        # The activation is monotone, so it commutes with the maximum; that of `max` has the faster backward pass.
        return act(norm(edges.movedim(-1, 1)).max(-1).values.mT)

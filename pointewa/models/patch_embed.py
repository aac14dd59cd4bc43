"""From a cloud to tokens: farthest point sampling, nearest neighbours, and a mini-PointNet on each patch."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pointewa.models.layers import pointwise
from pointewa.ops import farthest_point_sample, group, knn


class Patches(NamedTuple):
    """B clouds cut into G patches of K points each.

    Args:
        patches: ``[B, G, K, 3]``, relative to their centres.
        centers: ``[B, G, 3]``.
        members: which points of its cloud each patch holds, int64 ``[B, G, K]``.
    """

    patches: Tensor
    centers: Tensor
    members: Tensor


@torch.compiler.disable  # the operators are loops and foreign kernels: a graph break is all a compiler could do
def make_patches(points: Tensor, num_groups: int, group_size: int, check_finite: bool = True) -> Patches:
    """Cut clouds into patches.

    Args:
        points: ``[B, N, 3]``.
        num_groups: G patches, around centres by farthest point sampling.
        group_size: K nearest points of each centre.
        check_finite: refuse NaN and infinities.

    Raises:
        ValueError: see `farthest_point_sample` and `knn`.
    """
    centers = group(points, farthest_point_sample(points, num_groups, check_finite=check_finite))
    members = knn(centers, points, group_size, check_finite=False)
    return Patches(group(points, members) - centers.unsqueeze(2), centers, members)


class PatchEncoder(nn.Module):
    """The mini-PointNet that makes a token of each patch.

    As published: two 1x1 convolutions, the maximum over the patch joined to every point, two more convolutions, the
    maximum again. The same function for less arithmetic, without changing the convolutions' names or shapes:

    - The third convolution's input is ``[patch maximum, point]``, whose first half is the same for all points of a
      patch: W_g max is computed once per patch, W_l point once per point.
    - Nothing lies between the second convolution W and W_l, so W_l acts on W's input as the product W_l W.
    - W and the last convolution then only feed a maximum: see `linear_max`.
    """

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.first_conv = nn.Sequential(
            nn.Conv1d(3, width, 1), nn.BatchNorm1d(width), nn.ReLU(inplace=True), nn.Conv1d(width, 2 * width, 1)
        )
        self.second_conv = nn.Sequential(
            nn.Conv1d(4 * width, 4 * width, 1),
            nn.BatchNorm1d(4 * width),
            nn.ReLU(inplace=True),
            nn.Conv1d(4 * width, out, 1),
        )

    def forward(self, patches: Tensor) -> Tensor:
        """``[B, G, K, 3] -> [B, G, out]``."""
        batch, num_groups, group_size, _ = patches.shape
        conv, norm, act, second = self.first_conv
        weight = second.weight.squeeze(-1)
        x = act(norm(pointwise(conv, patches.flatten(0, 2))))  # (BGK, w)
        pooled = linear_max(x, weight, second.bias, group_size)  # (BG, 2w)
        conv, norm, act, last = self.second_conv
        of_patch, of_point = conv.weight.squeeze(-1).chunk(2, dim=1)  # (4w, 2w) each
        x = F.linear(x.unflatten(0, (-1, group_size)), of_point @ weight)  # (BG, K, 4w)
        x += F.linear(pooled, of_patch, conv.bias + of_point @ second.bias).unsqueeze(1)
        x = act(norm(x.flatten(0, 1)))  # (BGK, 4w)
        return linear_max(x, last.weight.squeeze(-1), last.bias, group_size).unflatten(0, (batch, num_groups))


def linear_max(x: Tensor, weight: Tensor, bias: Tensor, group_size: int) -> Tensor:
    """The maximum over each group of rows of ``x @ weight.T + bias``.

    For each channel, its gradient reaches one row of every ``group_size``. On a CPU the backward pass gathers those
    rows instead of multiplying zeros; elsewhere a dense product is faster.

    Args:
        x: ``[G * group_size, I]``, group by group.
        weight: ``[O, I]``.
        bias: ``[O]``.
        group_size: number of rows of a group.

    Returns:
        ``[G, O]``.
    """
    if not torch.is_grad_enabled():
        return F.linear(x, weight).unflatten(0, (-1, group_size)).amax(1) + bias
    if x.device.type == "cpu":
        if torch.is_autocast_enabled("cpu") and x.dtype != torch.float64:  # which autocast leaves alone
            x, weight = (one.to(torch.get_autocast_dtype("cpu")) for one in (x, weight))
        return _LinearMax.apply(x, weight, group_size) + bias
    # `max` keeps indices: its backward pass scatters, where that of `amax` compares and divides everything.
    return F.linear(x, weight).unflatten(0, (-1, group_size)).max(1).values + bias


class _LinearMax(torch.autograd.Function):
    linear_in_saved = True  # for `pointewa.compression`

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, group_size: int) -> Tensor:
        # As `max` along the groups, some ten times as fast: the pooling of an image with its channels last.
        image = F.linear(x, weight).unflatten(0, (1, -1, group_size)).permute(0, 3, 1, 2)  # (1, O, G, group_size)
        values, place = F.max_pool2d(image, (1, group_size), return_indices=True)
        winner = place.squeeze((0, 3)).mT % group_size  # (G, O): which row of its group each channel comes from
        ctx.save_for_backward(x, weight, winner)
        ctx.group_size = group_size
        return values.squeeze((0, 3)).mT

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, winner = ctx.saved_tensors
        of_x = of_weight = None
        if ctx.needs_input_grad[1]:
            # Channel c receives the sum of grad[g, c] x[row] over the rows that won it: over a part of the groups at a
            # time, so that their rows stay in the cache from one channel to the next.
            rows = winner + torch.arange(0, len(x), ctx.group_size).unsqueeze(1)
            parts = [_by_channel(one, min(128, len(rows))) for one in (rows, grad)]
            of_weight = _weighted_sums(x, *parts).unflatten(0, (-1, len(weight))).sum(0)
        del x  # where it was kept in few bits, this is all of it, and as large as its gradient
        if ctx.needs_input_grad[0]:
            # Row r of a group receives the sum of grad[g, c] weight[c] over the channels c that it won.
            count = winner.shape[1]
            keys = (winner * count + torch.arange(count)).to(torch.int32)
            keys.numpy().sort()  # in place; torch's sort takes twenty times as long
            channels = keys.long() % count  # in the order of their winners
            wins = torch.zeros(len(winner), ctx.group_size, dtype=torch.int64)
            wins = wins.scatter_add_(1, winner, torch.ones_like(winner)).flatten()
            of_x = _weighted_sums(weight, channels.flatten(), grad.gather(1, channels).flatten(), wins.cumsum(0) - wins)
        return of_x, of_weight, None


def _by_channel(x: Tensor, groups: int) -> Tensor:
    """``[G, O]`` -> ``[ceil(G / groups) O, groups]``, filled up with zeros."""
    x = F.pad(x, (0, 0, 0, -len(x) % groups)).unflatten(0, (-1, groups))
    return x.mT.flatten(0, 1).contiguous()


def _weighted_sums(rows: Tensor, index: Tensor, weights: Tensor, starts: Tensor | None = None) -> Tensor:
    """Sums of ``weights * rows[index]``: along the last dimension of ``index``, or over runs of it from ``starts``."""
    return F.embedding_bag(index, rows, starts, mode="sum", per_sample_weights=weights)

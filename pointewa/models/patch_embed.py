"""From a cloud to tokens: farthest point sampling, nearest neighbours, and a mini-PointNet on each patch."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pointewa.ops import farthest_point_sample, group, knn


@torch.compiler.disable  # the operators are loops and foreign kernels: a graph break is all a compiler could do
def make_patches(points: Tensor, num_groups: int, group_size: int, check_finite: bool = True) -> tuple[Tensor, Tensor]:
    """Cut clouds into patches.

    Args:
        points: ``[B, N, 3]``.
        num_groups: G patches, around centres by farthest point sampling.
        group_size: K nearest points of each centre.
        check_finite: look for NaN and infinities first.

    Returns:
        patches ``[B, G, K, 3]`` relative to their centres, and centres ``[B, G, 3]``.
    """
    centers = group(points, farthest_point_sample(points, num_groups, check_finite=check_finite))
    patches = group(points, knn(centers, points, group_size, check_finite=False))
    return patches - centers.unsqueeze(2), centers


class PatchEncoder(nn.Module):
    """The mini-PointNet that makes a token of each patch.

    As published: two 1x1 convolutions, the maximum over the patch joined to every point, two more convolutions, the
    maximum again. The third convolution's input is ``[patch maximum, point]``, whose first half is the same for all
    points of a patch, so it is computed as  W_g max (once a patch) + W_l point  (once a point): the same function for
    a quarter less arithmetic. The convolutions keep their published names and shapes and run as matrix products on
    ``[points, channels]``.
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
        conv, norm, act, last = self.first_conv
        x = _conv(last, act(norm(_conv(conv, patches.flatten(0, 2)))))  # (BGK, 2w)
        pooled = _maximum(x.unflatten(0, (-1, group_size)))  # (BG, 2w)
        conv, norm, act, last = self.second_conv
        of_patch, of_point = conv.weight.squeeze(-1).chunk(2, dim=1)  # (4w, 2w) each
        x = F.linear(x, of_point, conv.bias).unflatten(0, (-1, group_size))
        x = (x + F.linear(pooled, of_patch).unsqueeze(1)).flatten(0, 1)  # (BGK, 4w)
        x = _conv(last, act(norm(x)))  # (BGK, out)
        return _maximum(x.unflatten(0, (-1, group_size))).unflatten(0, (batch, num_groups))


def _conv(conv: nn.Conv1d, x: Tensor) -> Tensor:
    return F.linear(x, conv.weight.squeeze(-1), conv.bias)


def _maximum(x: Tensor) -> Tensor:
    """``[BG, K, C] -> [BG, C]``. Its backward pass scatters, where that of `amax` compares and divides all of ``x``."""
    return x.max(1).values

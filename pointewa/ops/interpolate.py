"""Features at points, from those at the nearest centres."""

import torch
import torch.nn.functional as F
from torch import Tensor

from pointewa.ops.group import group
from pointewa.ops.knn import knn

EPSILON = 1e-8  # of a squared distance: a point in the place of a centre takes that centre's features


def interpolate(
    points: Tensor, centers: Tensor, features: Tensor, k: int = 3, *, backend: str | None = None,
    check_finite: bool = True,
) -> Tensor:  # fmt: skip
    """The mean of the features of each point's k nearest centres, weighted by 1 / (squared distance + 1e-8).

    That is PointNet++'s feature propagation (Qi et al., NeurIPS 2017, Eq. 2). Distances and sums are in float32, or in
    the precision of the inputs if that is higher, also inside autocast.

    Args:
        points: ``[B, P, 3]``.
        centers: ``[B, G, 3]``.
        features: ``[B, G, C]``, of the centres.
        k: number of centres; all of them if G is less.
        backend: see `knn`.
        check_finite: refuse NaN and infinities in points and centres; this waits for the device.

    Returns:
        ``[B, P, C]`` of the features' type, differentiable with respect to all three.

    Raises:
        ValueError: see `knn`; another number of features than of centres.
    """
    if features.ndim != 3 or features.shape[:2] != centers.shape[:2]:
        raise ValueError(
            f"features must be of shape [B, G, C] for centers [B, G, 3], got {list(features.shape)} for "
            f"{list(centers.shape)}"
        )
    index = knn(points, centers, min(k, centers.shape[1]), backend=backend, check_finite=check_finite)  # (B, P, k)
    common = torch.promote_types(torch.promote_types(points.dtype, features.dtype), torch.float32)
    weights = points.unsqueeze(2).to(common) - group(centers.to(common), index)
    weights = 1 / (weights.square().sum(-1) + EPSILON)
    weights = weights / weights.sum(-1, keepdim=True)
    batch, num_centers, _ = features.shape
    rows = index + torch.arange(0, batch * num_centers, num_centers, device=index.device).view(-1, 1, 1)
    # An embedding bag is such a weighted sum, and does not hold the k features of each point in memory.
    mean = F.embedding_bag(
        rows.flatten(0, 1), features.to(common).flatten(0, 1), mode="sum", per_sample_weights=weights.flatten(0, 1)
    )
    return mean.unflatten(0, (batch, -1)).to(features.dtype)

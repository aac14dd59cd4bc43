"""Nearest neighbours."""

import torch
from torch import Tensor

from pointewa.ops.backend import check_points, choose

_CHUNK = 2**24  # distances held in memory at a time


@torch.no_grad()
def knn(
    queries: Tensor, points: Tensor, num_neighbors: int, *, backend: str | None = None, check_finite: bool = True
) -> Tensor:
    """The nearest points of each query, the nearest first. The order among equal distances is not defined.

    If ``num_neighbors`` > N, the neighbours start over from the nearest.

    Args:
        queries: ``[B, G, 3]``.
        points: ``[B, N, 3]``.
        num_neighbors: K >= 1.
        backend: "pytorch3d" or "torch"; None for the fastest of those installed.
        check_finite: refuse NaN and infinities; this waits for the device.

    Returns:
        Indices int64 ``[B, G, K]`` into the points.

    Raises:
        ValueError: wrong shapes, an empty cloud, a non-finite value, ``num_neighbors`` < 1.
    """
    check_points("points", points, check_finite)
    check_points("queries", queries, check_finite)
    if len(queries) != len(points):
        raise ValueError(f"queries and points must have the same batch size, got {len(queries)} and {len(points)}")
    if num_neighbors < 1:
        raise ValueError(f"num_neighbors must be at least 1, got {num_neighbors}")
    queries, points = queries.float(), points.float()
    distinct = min(num_neighbors, points.shape[1])
    # pytorch3d's kernel is faster on a GPU only (`make bench ARGS="--only operators"`).
    if choose(backend, torch_is_faster=points.device.type == "cpu") == "pytorch3d":
        from pytorch3d.ops import knn_points

        neighbors = knn_points(queries, points, K=distinct).idx
    else:
        clouds = max(1, _CHUNK // max(1, queries.shape[1] * points.shape[1]))
        parts = zip(queries.split(clouds), points.split(clouds), strict=True)
        neighbors = torch.cat([_torch(*part, distinct) for part in parts])
    if distinct < num_neighbors:
        neighbors = neighbors[..., torch.arange(num_neighbors, device=points.device) % distinct]
    return neighbors


def _torch(queries: Tensor, points: Tensor, num_neighbors: int) -> Tensor:
    # Differences, not the matrix-product form of cdist, which cancels digits for close points.
    distance = torch.cdist(queries, points, compute_mode="donot_use_mm_for_euclid_dist")
    return distance.topk(num_neighbors, largest=False).indices

"""Farthest point sampling."""

import torch
from torch import Tensor

from pointewa.ops.backend import backend as default_backend
from pointewa.ops.backend import check_points


@torch.no_grad()
def farthest_point_sample(
    points: Tensor, num_samples: int, *, backend: str | None = None, check_finite: bool = True
) -> Tensor:
    """Pick points one by one, each the farthest from those picked before (the first index among equals).

    Starts at index 0, so the samples are nested: the first k picks are the sample of size k. No index comes twice
    until every point has been picked, also where points coincide; beyond that (``num_samples`` > N) the picks start
    over in the same order, which leaves max-pooled features unchanged.

    Args:
        points: ``[B, N, 3]``.
        num_samples: K >= 1.
        backend: "pytorch3d" or "torch"; None for the installed one.
        check_finite: look for NaN and infinities first. Costs a wait for the device.

    Returns:
        Indices int64 ``[B, K]`` into the points.

    Raises:
        ValueError: a wrong shape, an empty cloud, a value that is not finite, ``num_samples`` < 1.
    """
    check_points("points", points, check_finite)
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    points = points.float()
    distinct = min(num_samples, points.shape[1])
    if (backend or default_backend()) == "pytorch3d":
        picks = _pytorch3d(points, distinct)
    else:
        picks = _torch(points, distinct)
    if distinct < num_samples:
        picks = picks[:, torch.arange(num_samples, device=picks.device) % distinct]
    return picks


def _torch(points: Tensor, num_samples: int) -> Tensor:
    batch = torch.arange(len(points), device=points.device)
    picks = torch.zeros(len(points), num_samples, dtype=torch.int64, device=points.device)
    distance = torch.full(points.shape[:2], torch.inf, device=points.device)  # squared, to the nearest pick
    x, y, z = points.unbind(-1)  # contiguity pays: this loop is memory-bound
    x, y, z = x.contiguous(), y.contiguous(), z.contiguous()
    for k in range(1, num_samples):
        last = picks[:, k - 1]
        px, py, pz = points[batch, last].unsqueeze(-1).unbind(1)  # (B, 1) each
        distance = torch.minimum(distance, (x - px).square_() + (y - py).square_() + (z - pz).square_())
        distance[batch, last] = -1.0  # below the 0 of a point that coincides with a pick
        picks[:, k] = distance.argmax(1)
    return picks


def _pytorch3d(points: Tensor, num_samples: int) -> Tensor:
    from pytorch3d.ops import sample_farthest_points

    picks = sample_farthest_points(points.contiguous(), K=num_samples)[1]
    # Where all points left coincide with a pick the kernel repeats index 0 (facebookresearch/pytorch3d#1486).
    repeated = (picks.sort(1).values.diff(dim=1) == 0).any(1)
    if repeated.any():
        picks[repeated] = _torch(points[repeated], num_samples)
    return picks

"""Farthest point sampling."""

import torch
from torch import Tensor

from pointewa.ops.backend import check_points, choose


@torch.no_grad()
def farthest_point_sample(
    points: Tensor, num_samples: int, *, backend: str | None = None, check_finite: bool = True
) -> Tensor:
    """Pick points one by one, each the farthest from those picked before (the first index among equals).

    Starts at index 0, so the samples are nested: the first k picks are the sample of size k. No index
    comes twice until every point has been picked, even if points coincide; beyond that (``num_samples`` > N) the picks
    start over in the same order, which leaves max-pooled features unchanged.

    Args:
        points: ``[B, N, 3]``.
        num_samples: K >= 1.
        backend: "pytorch3d" or "torch"; None for the fastest of those installed.
        check_finite: refuse NaN and infinities; this waits for the device.

    Returns:
        Indices int64 ``[B, K]`` into the points.

    Raises:
        ValueError: a wrong shape, an empty cloud, a non-finite value, ``num_samples`` < 1.
    """
    check_points("points", points, check_finite)
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    points = points.float()
    distinct = min(num_samples, points.shape[1])
    # On a CPU pytorch3d's kernel takes one cloud at a time, in one thread; the loop below takes all, and is faster from
    # this size on (`make bench ARGS="--only operators"`).
    on_cpu = points.device.type == "cpu" and points.shape[:2].numel() >= 2**15
    sample = _pytorch3d if choose(backend, torch_is_faster=on_cpu) == "pytorch3d" else _torch
    picks = sample(points, distinct)
    if distinct < num_samples:
        picks = picks[:, torch.arange(num_samples, device=picks.device) % distinct]
    return picks


def _torch(points: Tensor, num_samples: int) -> Tensor:
    batch, num_points, _ = points.shape
    planes = points.transpose(1, 2).contiguous()  # (B, 3, N): this loop is memory-bound, and its buffers are reused
    difference, distance = torch.empty_like(planes), points.new_empty(batch, num_points)
    nearest = torch.full_like(distance, torch.inf)  # squared distance to the nearest pick
    picks = torch.zeros(batch, num_samples, dtype=torch.int64, device=points.device)
    for k in range(1, num_samples):
        last = picks[:, k - 1 : k]
        torch.sub(planes, planes.gather(2, last.unsqueeze(1).expand(-1, 3, -1)), out=difference)
        torch.sum(difference.square_(), 1, out=distance)
        torch.minimum(nearest, distance, out=nearest)
        nearest.scatter_(1, last, -1.0)  # below the 0 of a point that coincides with a pick
        picks[:, k] = nearest.max(1).indices  # faster than argmax, and also the first of equals
    return picks


def _pytorch3d(points: Tensor, num_samples: int) -> Tensor:
    from pytorch3d.ops import sample_farthest_points

    picks = sample_farthest_points(points.contiguous(), K=num_samples)[1]
    # If all remaining points coincide with picks, the kernel repeats itself (facebookresearch/pytorch3d#1486): replace
    # the repetitions by the points not picked yet. Unconditionally: a condition would make the GPU wait.
    position = torch.arange(num_samples, device=points.device).expand_as(picks)
    first = torch.full(points.shape[:2], num_samples, device=points.device)
    first.scatter_reduce_(1, picks, position, "amin")
    repeated = first.gather(1, picks) < position
    unpicked = (first < num_samples).int().argsort(dim=1, stable=True)
    return torch.where(repeated, unpicked.gather(1, (repeated.cumsum(1) - 1).clamp_min(0)), picks)

"""The Chamfer distance."""

import torch
from torch import Tensor

from pointewa.ops.backend import check_points, choose
from pointewa.ops.group import group

_CHUNK = 2**24  # distances held in memory at a time


def chamfer_distance(x: Tensor, y: Tensor, *, backend: str | None = None) -> Tensor:
    """The squared Chamfer distance, as Point-MAE's ``ChamferDistanceL2``.

    The mean over all points of ``x`` of the squared distance to the nearest point of ``y``, plus the same from ``y`` to
    ``x``. The nearest point is chosen by float32 distances, and the gradient flows through the nearest pairs only.

    Args:
        x: ``[B, N, 3]``.
        y: ``[B, M, 3]``.
        backend: "pytorch3d" (works in float32) or "torch"; None for the fastest of those installed.

    Returns:
        A scalar, differentiable with respect to both; float32, or with "torch" float64 if an input is.

    Raises:
        ValueError: wrong shapes, an empty cloud, different batch sizes.
    """
    x, y = _checked(x, y)
    # For many small clouds, such as masked patches, torch takes half of pytorch3d's time on a CPU.
    if choose(backend, torch_is_faster=x.device.type == "cpu") == "pytorch3d":
        from pytorch3d.loss import chamfer_distance as of_pytorch3d

        # Its defaults, the mean over each cloud's points and then over the clouds: all clouds have equally many.
        return of_pytorch3d(x.float(), y.float())[0]
    of_x, of_y = _nearest(x, y)
    return sum((a - group(b, index)).square().sum(-1).mean() for a, b, index in ((x, y, of_x), (y, x, of_y)))


def chamfer_l1(x: Tensor, y: Tensor) -> Tensor:
    """The Chamfer distance without squares of each cloud, as Point-BERT's ``ChamferDistanceL1`` (CD-L1).

    Half of the mean over the points of ``x`` of the Euclidean distance to the nearest point of ``y``, plus half of the
    same from ``y`` to ``x``. The gradient flows through the nearest pairs; that of points that coincide is 0, where the
    square root's would be infinite. Made for many small clouds, such as patches.

    Args:
        x: ``[B, N, 3]``.
        y: ``[B, M, 3]``.

    Returns:
        ``[B]``, differentiable with respect to both; float32, or float64 if an input is. Their mean is the published
        loss.

    Raises:
        ValueError: wrong shapes, an empty cloud, different batch sizes.
    """
    x, y = _checked(x, y)
    of_x, of_y = _nearest(x, y)
    pairs = ((x, y, of_x), (y, x, of_y))
    # The gradient of `vector_norm` at 0 is 0.
    return sum(torch.linalg.vector_norm(a - group(b, index), dim=-1).mean(1) for a, b, index in pairs) / 2


def _checked(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the same precision, at least float32.

    Raises:
        ValueError: wrong shapes, an empty cloud, different batch sizes.
    """
    check_points("x", x, check_finite=False)
    check_points("y", y, check_finite=False)
    if len(x) != len(y):
        raise ValueError(f"x and y must have the same batch size, got {len(x)} and {len(y)}")
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    return x.to(dtype), y.to(dtype)


@torch.no_grad()
def _nearest(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """For each point the nearest of the other cloud, int64 ``[B, N]`` and ``[B, M]``, from one matrix of distances."""
    clouds, found = max(1, _CHUNK // (x.shape[1] * y.shape[1])), []
    for part in zip(x.float().split(clouds), y.float().split(clouds), strict=True):
        # Differences, not the matrix-product form of cdist, which cancels digits for close points.
        distance = torch.cdist(*part, compute_mode="donot_use_mm_for_euclid_dist")
        found.append((distance.min(2).indices, distance.min(1).indices))  # faster than argmin
    of_x, of_y = zip(*found, strict=True)
    return torch.cat(of_x), torch.cat(of_y)

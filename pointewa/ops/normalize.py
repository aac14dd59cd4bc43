"""Position and size of clouds."""

from torch import Tensor


def unit_sphere(points: Tensor) -> Tensor:
    """Centre each cloud ``[..., P, 3]`` at its mean and scale it to largest norm 1."""
    points = points - points.mean(-2, keepdim=True)
    return points / points.norm(dim=-1).amax(-1)[..., None, None].clamp(min=1e-12)

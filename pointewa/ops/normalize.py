"""Position and size of clouds."""

import torch
from torch import Tensor

_FEWEST_STEPS = 100  # of float32 that a cloud must extend over


def unit_sphere(points: Tensor) -> Tensor:
    """Centre each cloud ``[..., P, 3]`` at its mean and scale it to largest norm 1, in the precision that it has."""
    points = points - points.mean(-2, keepdim=True)
    return points / points.norm(dim=-1).amax(-1)[..., None, None].clamp(min=1e-12)


def placed(points: Tensor, normalize: str) -> Tensor:
    """Clouds ``[..., P, 3]`` as a model's description says that its own were normalised, in the precision that they
    have.

    Args:
        points: all points of each cloud.
        normalize: one of `pointewa.runs.description.NORMALIZE`: "center" moves each cloud's mean to the origin and
            keeps its units; "none" changes nothing; otherwise `unit_sphere`.
    """
    if normalize == "none":
        return points
    return points - points.mean(-2, keepdim=True) if normalize == "center" else unit_sphere(points)


def flaw(points: Tensor) -> str:
    """What is wrong with where the points of a cloud are, and what to do; empty if nothing is.

    Either they are all in one place, or they were rounded to float32 so far from the origin that its steps are too
    large for them: what is left of the cloud is a few planes.

    Args:
        points: ``[P, 3]``, finite, of any type of real numbers.
    """
    points = points.double()
    low, high = points.amin(0), points.amax(0)
    extent, largest = (high - low).max(), torch.maximum(low.abs(), high.abs())
    if extent <= 4 * torch.finfo(torch.float64).eps * largest.max():
        return f"all of its {len(points)} points are in one place: remove or repair it"
    steps = torch.finfo(torch.float32).eps * torch.exp2(largest.clamp(min=1e-30).log2().floor())
    axis = int(steps.argmax())
    if steps[axis] * _FEWEST_STEPS <= extent or (points[:, axis].float() != points[:, axis]).any():
        return ""
    values = points[:, axis].unique()
    if len(values) > 1 and values.diff().min() > steps[axis]:  # the cloud itself is as coarse
        return ""
    return (
        f"its {'xyz'[axis]} has {len(values)} distinct values for {len(points)} points: it was rounded to float32 at "
        f"{largest[axis]:.7g}, in steps of {steps[axis]:.2g} where the cloud extends over {extent:.3g}: get it in "
        "double precision, or centred"
    )

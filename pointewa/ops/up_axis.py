"""The axis that points up."""

from torch import Tensor, stack

UP_AXES = ("x", "y", "z")


def turn_up(points: Tensor, up: str) -> Tensor:
    """Turn clouds ``[..., 3]`` whose axis ``up`` points up so that y does.

    It is a quarter turn, about z where x was up, about x where z was: nothing is mirrored, and the third axis stays.

    Raises:
        ValueError: an unknown axis.
    """
    if up not in UP_AXES:
        raise ValueError(f"up must be one of {', '.join(UP_AXES)}, got {up!r}")
    x, y, z = points.unbind(-1)
    return points if up == "y" else stack((-y, x, z) if up == "x" else (x, z, -y), -1)

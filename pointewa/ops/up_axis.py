"""The direction that points up."""

from torch import Tensor, stack

UP_AXES = ("x", "y", "z", "-x", "-y", "-z")  # "-z": z points down
UP_WORDS = {f"{up[-1]}_{'down' if up[0] == '-' else 'up'}": up for up in UP_AXES}  # as variants of data sets name them
_TURNS = {
    "x": lambda x, y, z: (-y, x, z),
    "y": lambda x, y, z: (x, y, z),
    "z": lambda x, y, z: (x, z, -y),
    "-x": lambda x, y, z: (y, -x, z),
    "-y": lambda x, y, z: (x, -y, -z),
    "-z": lambda x, y, z: (x, -z, y),
}


def turn_up(points: Tensor, up: str) -> Tensor:
    """Turn clouds ``[..., 3]`` in which ``up`` points up so that y does.

    It is a quarter turn, about z from x or -x, about x from z or -z, and from -y half a turn about x: nothing is
    mirrored, and the axis that it is about stays.

    Args:
        points: of any type.
        up: one of `UP_AXES`; "-z" where z points down.

    Raises:
        ValueError: an unknown axis.
    """
    if up not in UP_AXES:
        raise ValueError(f"up must be one of {', '.join(UP_AXES)}, got {up!r}")
    return points if up == "y" else stack(_TURNS[up](*points.unbind(-1)), -1)


def up_word(up: str) -> str:
    """The word of `UP_WORDS` for an axis of `UP_AXES`: "z_down" for "-z"."""
    return next(word for word, axis in UP_WORDS.items() if axis == up)

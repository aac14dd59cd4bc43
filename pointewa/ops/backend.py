"""Which implementation the operators use, and the checks they share."""

import functools
import os

import torch
from torch import Tensor

BACKENDS = ("pytorch3d", "torch")


@functools.cache
def backend() -> str:
    """The default backend, chosen at the first call: ``POINTEWA_OPS`` if set, else pytorch3d if it loads, else torch.

    Raises:
        ValueError: ``POINTEWA_OPS`` is set to an unknown name.
    """
    name = os.environ.get("POINTEWA_OPS")
    if name is not None:
        if name not in BACKENDS:
            raise ValueError(f"POINTEWA_OPS must be one of {', '.join(BACKENDS)}, got {name!r}")
        return name
    try:
        import pytorch3d._C  # noqa: F401  fails if the compiled part does not fit the installed torch
    except ImportError:
        return "torch"
    return "pytorch3d"


def choose(asked: str | None, torch_is_faster: bool) -> str:
    """The backend of one call: what it or ``POINTEWA_OPS`` asks for, else the fastest of those installed."""
    if asked is None and torch_is_faster and "POINTEWA_OPS" not in os.environ:
        return "torch"
    return asked or backend()


def check_points(name: str, points: Tensor, check_finite: bool) -> None:
    """Refuse inputs that no operator can take.

    Raises:
        ValueError: not ``[B, N, 3]``, no points, or (with ``check_finite``) a non-finite value.
    """
    if points.ndim != 3 or points.shape[-1] != 3:
        raise ValueError(f"{name} must be of shape [B, N, 3], got {list(points.shape)}")
    if points.shape[1] == 0:
        raise ValueError(f"{name} has no points: shape {list(points.shape)}")
    if check_finite and not torch.isfinite(points).all():
        bad = (~torch.isfinite(points)).flatten(1).any(1).nonzero().flatten().tolist()
        raise ValueError(f"{name} has non-finite values in cloud(s) {bad[:8]} of {len(points)}")

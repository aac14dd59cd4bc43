"""Surfaces that points can be drawn on uniformly, of which procedural objects are put together. The y axis is up."""

from collections.abc import Callable

import numpy as np
from numpy.random import Generator

# A surface: its area, and a function that draws n points on it uniformly, [n, 3]. The y axis is up.
Surface = tuple[float, Callable[[Generator, int], np.ndarray]]


def box(x: float, y: float, z: float) -> Surface:
    """A closed box with the given edges, centred at the origin."""
    size = np.array([x, y, z])
    areas = np.array([y * z, x * z, x * y])

    def draw(rng: Generator, n: int) -> np.ndarray:
        points = rng.uniform(-0.5, 0.5, (n, 3))
        axis = rng.choice(3, n, p=areas / areas.sum())
        points[np.arange(n), axis] = rng.choice([-0.5, 0.5], n)
        return points * size

    return 2 * areas.sum(), draw


def frustum(bottom: float, top: float, height: float) -> Surface:
    """The open side of a truncated cone about the y axis from y = 0 up: a tube, a cone (``top`` 0), a disc
    (``height`` 0, ``bottom`` 0)."""
    slant = np.hypot(height, bottom - top)

    def draw(rng: Generator, n: int) -> np.ndarray:
        along = rng.uniform(0, 1, n)
        if bottom != top:  # the radius is linear along the slant, so its square is uniform
            along = (np.sqrt(bottom**2 + along * (top**2 - bottom**2)) - bottom) / (top - bottom)
        radius = bottom + along * (top - bottom)
        angle = rng.uniform(0, 2 * np.pi, n)
        return np.stack([radius * np.cos(angle), along * height, radius * np.sin(angle)], 1)

    return np.pi * (bottom + top) * slant, draw


def ellipsoid(x: float, y: float, z: float) -> Surface:
    """An ellipsoid with the given half-axes, centred at the origin."""
    axes = np.array([x, y, z])

    def draw(rng: Generator, n: int) -> np.ndarray:
        normal = rng.normal(size=(4 * n + 16, 3))
        normal /= np.linalg.norm(normal, axis=1, keepdims=True)
        stretch = np.linalg.norm(normal / axes, axis=1)  # of the surface element, up to a factor
        return normal[rng.choice(len(normal), n, p=stretch / stretch.sum())] * axes

    # Knud Thomsen's approximation of the area
    p = 1.6075
    pairs = (axes * np.roll(axes, 1)) ** p
    return 4 * np.pi * pairs.mean() ** (1 / p), draw


def torus(ring: float, tube: float, arc: float = 2 * np.pi) -> Surface:
    """An arc, symmetric about the x axis, of a torus in the xy plane."""

    def draw(rng: Generator, n: int) -> np.ndarray:
        around = rng.uniform(0, 2 * np.pi, 4 * n + 16)
        weight = ring + tube * np.cos(around)
        around = rng.choice(around, n, p=weight / weight.sum())
        along = rng.uniform(-arc / 2, arc / 2, n)
        radius = ring + tube * np.cos(around)
        return np.stack([radius * np.cos(along), radius * np.sin(along), tube * np.sin(around)], 1)

    return arc * ring * 2 * np.pi * tube, draw


def at(surface: Surface, x: float = 0, y: float = 0, z: float = 0, turn: float = 0, lean: float = 0) -> Surface:
    """A surface leant about the z axis, turned about the y axis (radians), then moved."""
    area, draw = surface
    matrix = rotation(1, turn) @ rotation(2, lean)
    return area, lambda rng, n: draw(rng, n) @ matrix.T + (x, y, z)


def rotation(axis: int, angle: float) -> np.ndarray:
    """The matrix of a turn about an axis, in radians, ``[3, 3]``."""
    matrix = np.eye(3)
    i, j = (axis + 1) % 3, (axis + 2) % 3
    matrix[i, i] = matrix[j, j] = np.cos(angle)
    matrix[j, i] = np.sin(angle)
    matrix[i, j] = -matrix[j, i]
    return matrix

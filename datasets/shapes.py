"""A procedural set: 17 classes of objects put together from simple surfaces, made on the spot from a seed.

Made to be quick and not too easy: proportions of related classes overlap (table and bench, cup and mug, bottle and
vase), and every cloud is turned about the up axis, tilted, stretched, partly hidden from one side, and noisy.
Nothing needs to be downloaded, and pictures of it may be shown anywhere.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.random import Generator

from pointewa.datasets.source import Cloud, Source
from pointewa.errors import DataError

NUM_POINTS = 1024
PER_CLASS = {"train": 64, "test": 32}

# A part is a surface: its area, and a function that draws n points on it uniformly, [n, 3]. The y axis is up.
Part = tuple[float, Callable[[Generator, int], np.ndarray]]


def box(x: float, y: float, z: float) -> Part:
    """A closed box with the given edges, centred at the origin."""
    size = np.array([x, y, z])
    areas = np.array([y * z, x * z, x * y])

    def draw(rng: Generator, n: int) -> np.ndarray:
        points = rng.uniform(-0.5, 0.5, (n, 3))
        axis = rng.choice(3, n, p=areas / areas.sum())
        points[np.arange(n), axis] = rng.choice([-0.5, 0.5], n)
        return points * size

    return 2 * areas.sum(), draw


def frustum(bottom: float, top: float, height: float) -> Part:
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


def ellipsoid(x: float, y: float, z: float) -> Part:
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


def torus(ring: float, tube: float, arc: float = 2 * np.pi) -> Part:
    """An arc, symmetric about the x axis, of a torus in the xy plane."""

    def draw(rng: Generator, n: int) -> np.ndarray:
        around = rng.uniform(0, 2 * np.pi, 4 * n + 16)
        weight = ring + tube * np.cos(around)
        around = rng.choice(around, n, p=weight / weight.sum())
        along = rng.uniform(-arc / 2, arc / 2, n)
        radius = ring + tube * np.cos(around)
        return np.stack([radius * np.cos(along), radius * np.sin(along), tube * np.sin(around)], 1)

    return arc * ring * 2 * np.pi * tube, draw


def at(part: Part, x: float = 0, y: float = 0, z: float = 0, turn: float = 0, lean: float = 0) -> Part:
    """A part leant about the z axis, turned about the y axis (radians), then moved."""
    area, draw = part
    matrix = _rotation(1, turn) @ _rotation(2, lean)
    return area, lambda rng, n: draw(rng, n) @ matrix.T + (x, y, z)


def _rotation(axis: int, angle: float) -> np.ndarray:
    matrix = np.eye(3)
    i, j = (axis + 1) % 3, (axis + 2) % 3
    matrix[i, i] = matrix[j, j] = np.cos(angle)
    matrix[j, i] = np.sin(angle)
    matrix[i, j] = -matrix[j, i]
    return matrix


def _disc(radius: float) -> Part:
    return frustum(0, radius, 0)


def _legs(rng: Generator, width: float, depth: float, height: float, count: int = 4) -> list[Part]:
    thick = rng.uniform(0.03, 0.08)
    leg = frustum(thick / 2, thick / 2, height) if rng.random() < 0.5 else at(box(thick, height, thick), y=height / 2)
    if count == 4:
        return [at(leg, x, 0, z) for x in (-width / 2, width / 2) for z in (-depth / 2, depth / 2)]
    angles = 2 * np.pi * np.arange(count) / count
    return [at(leg, width / 2 * np.cos(angle), 0, depth / 2 * np.sin(angle)) for angle in angles]


def _airplane(rng: Generator) -> list[Part]:
    span, chord, radius = rng.uniform(1.2, 2.2), rng.uniform(0.2, 0.45), rng.uniform(0.08, 0.16)
    tail = rng.uniform(0.25, 0.45)
    wing, back = rng.uniform(-0.1, 0.2), rng.uniform(0.7, 0.85)
    return [
        ellipsoid(1.0, radius, radius),
        at(box(chord, 0.03, span), -wing, rng.uniform(-0.05, 0.05)),
        at(box(chord * 0.6, 0.03, span * tail), -back, rng.choice([0.0, 0.3])),
        at(box(chord * 0.6, 0.35, 0.03), -back, 0.17),
    ]


def _barbell(rng: Generator) -> list[Part]:
    radius, length = rng.uniform(0.03, 0.07), rng.uniform(1.2, 2.0)
    weight = rng.uniform(0.18, 0.4)
    if rng.random() < 0.5:
        ends = [at(ellipsoid(weight, weight, weight), x) for x in (-length / 2, length / 2)]
    else:
        disc = [_disc(weight), frustum(weight, weight, 0.12), at(_disc(weight), y=0.12)]
        ends = [at(part, x, lean=np.pi / 2) for part in disc for x in (-length / 2 + 0.12, length / 2)]
    return [at(frustum(radius, radius, length), length / 2, lean=np.pi / 2), *ends]


def _bench(rng: Generator) -> list[Part]:
    width, depth, height = rng.uniform(1.1, 1.9), rng.uniform(0.35, 0.6), rng.uniform(0.35, 0.6)
    parts = [at(box(width, 0.06, depth), y=height), *_legs(rng, width * 0.85, depth * 0.8, height)]
    if rng.random() < 0.4:
        parts.append(at(box(width, 0.4, 0.05), y=height + 0.25, z=-depth / 2))
    return parts


def _bottle(rng: Generator) -> list[Part]:
    body, neck = rng.uniform(0.2, 0.4), rng.uniform(0.06, 0.12)
    height, shoulder, mouth = rng.uniform(0.5, 0.9), rng.uniform(0.1, 0.35), rng.uniform(0.15, 0.35)
    return [
        _disc(body),
        frustum(body * rng.uniform(0.85, 1), body, height),
        at(frustum(body, neck, shoulder), y=height),
        at(frustum(neck, neck, mouth), y=height + shoulder),
    ]


def _chair(rng: Generator) -> list[Part]:
    width, depth, height = rng.uniform(0.45, 0.75), rng.uniform(0.45, 0.65), rng.uniform(0.4, 0.65)
    back = rng.uniform(0.35, 0.8)
    parts = [
        at(box(width, 0.06, depth), y=height),
        at(box(width, back, 0.05), y=height + back / 2, z=-depth / 2),
        *_legs(rng, width * 0.85, depth * 0.85, height),
    ]
    if rng.random() < 0.3:
        parts += [at(box(0.05, 0.2, depth), x, height + 0.15) for x in (-width / 2, width / 2)]
    return parts


def _cup(rng: Generator) -> list[Part]:
    bottom, top, height = rng.uniform(0.15, 0.4), rng.uniform(0.3, 0.55), rng.uniform(0.35, 0.9)
    return [_disc(bottom), frustum(bottom, top, height)]


def _goblet(rng: Generator) -> list[Part]:
    stem, bowl, rim = rng.uniform(0.3, 0.6), rng.uniform(0.3, 0.6), rng.uniform(0.22, 0.4)
    waist = rim * rng.uniform(0.7, 1.1)
    return [
        _disc(rng.uniform(0.2, 0.35)),
        frustum(0.04, 0.04, stem),
        at(frustum(0.04, waist, bowl * 0.4), y=stem),
        at(frustum(waist, rim, bowl * 0.6), y=stem + bowl * 0.4),
    ]


def _house(rng: Generator) -> list[Part]:
    width, depth, height = rng.uniform(0.7, 1.2), rng.uniform(0.7, 1.4), rng.uniform(0.4, 0.9)
    slope = rng.uniform(0.4, 0.9)
    side = width / 2 / np.cos(slope) * rng.uniform(1, 1.2)
    roofs = [
        at(
            box(side, 0.04, depth * 1.1),
            x * side / 2 * np.cos(slope),
            height + width / 4 * np.tan(slope),
            lean=-x * slope,
        )
        for x in (-1, 1)
    ]
    return [at(box(width, height, depth), y=height / 2), *roofs]


def _lamp(rng: Generator) -> list[Part]:
    pole, shade = rng.uniform(0.6, 1.3), rng.uniform(0.25, 0.45)
    return [
        _disc(rng.uniform(0.18, 0.35)),
        frustum(0.03, 0.03, pole),
        at(frustum(shade, shade * rng.uniform(0.4, 0.9), rng.uniform(0.2, 0.45)), y=pole - 0.1),
    ]


def _mug(rng: Generator) -> list[Part]:
    radius, height = rng.uniform(0.25, 0.45), rng.uniform(0.45, 0.9)
    handle = rng.uniform(0.12, 0.25)
    return [
        _disc(radius),
        frustum(radius, radius * rng.uniform(0.9, 1.25), height),
        at(torus(handle, 0.035, np.pi), radius, height / 2),
    ]


def _parasol(rng: Generator) -> list[Part]:
    pole, radius, drop = rng.uniform(0.8, 1.4), rng.uniform(0.45, 0.9), rng.uniform(0.15, 0.4)
    base = [_disc(rng.uniform(0.15, 0.3))] if rng.random() < 0.6 else []
    return [*base, frustum(0.03, 0.03, pole), at(frustum(radius, 0.0, drop), y=pole - drop)]


def _rocket(rng: Generator) -> list[Part]:
    radius, height, nose = rng.uniform(0.12, 0.25), rng.uniform(0.7, 1.3), rng.uniform(0.25, 0.6)
    fin, count = rng.uniform(0.15, 0.35), rng.integers(3, 5)
    fins = [at(box(2 * (radius + fin), 0.3, 0.03), y=0.15, turn=np.pi * i / count) for i in range(count)]
    return [frustum(radius, radius, height), at(frustum(radius, 0.0, nose), y=height), *fins]


def _snowman(rng: Generator) -> list[Part]:
    radii = rng.uniform(0.35, 0.5) * np.cumprod([1, rng.uniform(0.65, 0.85), rng.uniform(0.65, 0.85)])
    centres = np.cumsum([radii[0], 0.85 * (radii[0] + radii[1]), 0.85 * (radii[1] + radii[2])])
    return [at(ellipsoid(r, r * rng.uniform(0.85, 1.1), r), y=y) for r, y in zip(radii, centres, strict=True)]


def _stool(rng: Generator) -> list[Part]:
    radius, height = rng.uniform(0.2, 0.4), rng.uniform(0.4, 0.9)
    legs = _legs(rng, 1.4 * radius, 1.4 * radius, height, rng.integers(3, 5))
    seat = [
        at(_disc(radius), y=height),
        at(frustum(radius, radius, 0.07), y=height),
        at(_disc(radius), y=height + 0.07),
    ]
    return seat + legs


def _table(rng: Generator) -> list[Part]:
    width, depth, height = rng.uniform(0.8, 1.6), rng.uniform(0.6, 1.0), rng.uniform(0.45, 0.8)
    if rng.random() < 0.5:
        top = [at(box(width, 0.06, depth), y=height)]
    else:
        top = [at(_disc(width / 2), y=height), at(frustum(width / 2, width / 2, 0.06), y=height)]
        depth = width
    return [*top, *_legs(rng, width * 0.65, depth * 0.65, height)]


def _tree(rng: Generator) -> list[Part]:
    trunk, radius = rng.uniform(0.2, 0.5), rng.uniform(0.3, 0.55)
    parts, y = [frustum(0.07, 0.05, trunk)], trunk
    for _ in range(rng.integers(1, 4)):
        height = rng.uniform(0.35, 0.6)
        parts.append(at(frustum(radius, 0.0, height), y=y))
        y, radius = y + height * 0.6, radius * 0.8
    return parts


def _vase(rng: Generator) -> list[Part]:
    radii = np.array([0.15, rng.uniform(0.2, 0.45), rng.uniform(0.1, 0.35), rng.uniform(0.12, 0.4)])
    heights = rng.uniform(0.2, 0.45, 3)
    levels = np.cumsum([0, *heights])
    sides = [at(frustum(a, b, h), y=y) for a, b, h, y in zip(radii, radii[1:], heights, levels, strict=False)]
    return [_disc(radii[0]), *sides]


CLASSES = {
    "airplane": _airplane,
    "barbell": _barbell,
    "bench": _bench,
    "bottle": _bottle,
    "chair": _chair,
    "cup": _cup,
    "goblet": _goblet,
    "house": _house,
    "lamp": _lamp,
    "mug": _mug,
    "parasol": _parasol,
    "rocket": _rocket,
    "snowman": _snowman,
    "stool": _stool,
    "table": _table,
    "tree": _tree,
    "vase": _vase,
}


def sample(name: str, rng: Generator, num_points: int = NUM_POINTS, scanned: bool = True) -> np.ndarray:
    """One object of a class as points ``[num_points, 3]``, uniform on its surface.

    Args:
        name: one of `CLASSES`.
        rng: of the proportions, the points, and how it was scanned.
        num_points: points to draw.
        scanned: turn, tilt, stretch, hide a side and add noise; else the clean object as it stands.
    """
    parts = CLASSES[name](rng)
    areas = np.array([area for area, _ in parts])

    def surface(n: int) -> np.ndarray:
        counts = rng.multinomial(n, areas / areas.sum())
        points = np.concatenate([draw(rng, count) for (_, draw), count in zip(parts, counts, strict=True)])
        points -= (points.max(0) + points.min(0)) / 2
        return rng.permutation(points / np.linalg.norm(points, axis=1).max())

    if not scanned:
        return surface(num_points)
    hidden = rng.uniform(0, 0.35)
    points = surface(int(num_points / (1 - hidden)) + 1)
    points = points * rng.uniform(0.8, 1.25, 3)
    points = points @ _rotation(0, rng.normal(0, 0.12)).T @ _rotation(1, rng.uniform(0, 2 * np.pi)).T
    direction = rng.normal(size=3)
    points = points[np.argsort(points @ direction)[:num_points]]
    return rng.permutation(points + rng.normal(0, rng.uniform(0.005, 0.03), points.shape))


def source(root: str, split: str, num_points: int, variant: str | None = None) -> Source:
    """A split of the procedural set; ``root`` is not used. The splits draw from different random streams, an object's
    from its own.

    Raises:
        DataError: more points asked for than an object has.
    """
    if num_points > NUM_POINTS:
        raise DataError(f"shapes: an object has {NUM_POINTS} points, data.num_points asks for {num_points}: lower it")
    names = list(CLASSES)
    labels = np.arange(PER_CLASS[split] * len(names)) % len(names)

    def clouds(count: int) -> Iterator[Cloud]:
        for index, label in enumerate(labels):
            rng = np.random.default_rng([0, list(PER_CLASS).index(split), index])
            yield Cloud(sample(names[label], rng).astype(np.float32))

    objects = tuple(f"{names[label]}_{split}_{index // len(names):04}" for index, label in enumerate(labels))
    layout = f"procedural, {PER_CLASS[split]} objects a class"
    return Source(layout, Path("shapes"), (Path(__file__),), tuple(names), objects, labels, NUM_POINTS, clouds)

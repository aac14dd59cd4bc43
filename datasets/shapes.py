"""A procedural set: 17 classes of objects put together from simple surfaces, made on the spot from a seed.

Made to be quick and not too easy: proportions of related classes overlap (table and bench, cup and mug, bottle and
vase), and every cloud is turned about the up axis, tilted, stretched, partly hidden from one side, and noisy.
Nothing needs to be downloaded, and pictures of it may be shown anywhere.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.random import Generator

from pointewa.datasets import surfaces
from pointewa.datasets.source import Cloud, Source, refuse_variant, say_once
from pointewa.datasets.surfaces import Surface, at, box, ellipsoid, frustum, rotation, torus
from pointewa.models.parts import Parts

NUM_POINTS = 1024
_FILES = (Path(__file__), Path(surfaces.__file__))
PER_CLASS = {"train": 64, "test": 32}

# An object: the surfaces of each of its parts, by the names of the parts.
Object = dict[str, list[Surface]]


def _disc(radius: float) -> Surface:
    return frustum(0, radius, 0)


def _legs(rng: Generator, width: float, depth: float, height: float, count: int = 4) -> list[Surface]:
    thick = rng.uniform(0.03, 0.08)
    leg = frustum(thick / 2, thick / 2, height) if rng.random() < 0.5 else at(box(thick, height, thick), y=height / 2)
    if count == 4:
        return [at(leg, x, 0, z) for x in (-width / 2, width / 2) for z in (-depth / 2, depth / 2)]
    angles = 2 * np.pi * np.arange(count) / count
    return [at(leg, width / 2 * np.cos(angle), 0, depth / 2 * np.sin(angle)) for angle in angles]


def _airplane(rng: Generator) -> Object:
    span, chord, radius = rng.uniform(1.2, 2.2), rng.uniform(0.2, 0.45), rng.uniform(0.08, 0.16)
    tail = rng.uniform(0.25, 0.45)
    wing, back = rng.uniform(-0.1, 0.2), rng.uniform(0.7, 0.85)
    return {
        "body": [ellipsoid(1.0, radius, radius)],
        "wing": [at(box(chord, 0.03, span), -wing, rng.uniform(-0.05, 0.05))],
        "tail": [
            at(box(chord * 0.6, 0.03, span * tail), -back, rng.choice([0.0, 0.3])),
            at(box(chord * 0.6, 0.35, 0.03), -back, 0.17),
        ],
    }


def _barbell(rng: Generator) -> Object:
    radius, length = rng.uniform(0.03, 0.07), rng.uniform(1.2, 2.0)
    weight = rng.uniform(0.18, 0.4)
    if rng.random() < 0.5:
        ends = [at(ellipsoid(weight, weight, weight), x) for x in (-length / 2, length / 2)]
    else:
        disc = [_disc(weight), frustum(weight, weight, 0.12), at(_disc(weight), y=0.12)]
        ends = [at(one, x, lean=np.pi / 2) for one in disc for x in (-length / 2 + 0.12, length / 2)]
    return {"bar": [at(frustum(radius, radius, length), length / 2, lean=np.pi / 2)], "weight": ends}


def _bench(rng: Generator) -> Object:
    width, depth, height = rng.uniform(1.1, 1.9), rng.uniform(0.35, 0.6), rng.uniform(0.35, 0.6)
    parts = {"seat": [at(box(width, 0.06, depth), y=height)], "leg": _legs(rng, width * 0.85, depth * 0.8, height)}
    if rng.random() < 0.4:
        parts["back"] = [at(box(width, 0.4, 0.05), y=height + 0.25, z=-depth / 2)]
    return parts


def _bottle(rng: Generator) -> Object:
    body, neck = rng.uniform(0.2, 0.4), rng.uniform(0.06, 0.12)
    height, shoulder, mouth = rng.uniform(0.5, 0.9), rng.uniform(0.1, 0.35), rng.uniform(0.15, 0.35)
    return {
        "body": [_disc(body), frustum(body * rng.uniform(0.85, 1), body, height)],
        "shoulder": [at(frustum(body, neck, shoulder), y=height)],
        "neck": [at(frustum(neck, neck, mouth), y=height + shoulder)],
    }


def _chair(rng: Generator) -> Object:
    width, depth, height = rng.uniform(0.45, 0.75), rng.uniform(0.45, 0.65), rng.uniform(0.4, 0.65)
    back = rng.uniform(0.35, 0.8)
    parts = {
        "seat": [at(box(width, 0.06, depth), y=height)],
        "back": [at(box(width, back, 0.05), y=height + back / 2, z=-depth / 2)],
        "leg": _legs(rng, width * 0.85, depth * 0.85, height),
    }
    if rng.random() < 0.3:
        parts["arm"] = [at(box(0.05, 0.2, depth), x, height + 0.15) for x in (-width / 2, width / 2)]
    return parts


def _cup(rng: Generator) -> Object:
    bottom, top, height = rng.uniform(0.15, 0.4), rng.uniform(0.3, 0.55), rng.uniform(0.35, 0.9)
    return {"bottom": [_disc(bottom)], "side": [frustum(bottom, top, height)]}


def _goblet(rng: Generator) -> Object:
    stem, bowl, rim = rng.uniform(0.3, 0.6), rng.uniform(0.3, 0.6), rng.uniform(0.22, 0.4)
    waist = rim * rng.uniform(0.7, 1.1)
    return {
        "foot": [_disc(rng.uniform(0.2, 0.35))],
        "stem": [frustum(0.04, 0.04, stem)],
        "bowl": [
            at(frustum(0.04, waist, bowl * 0.4), y=stem),
            at(frustum(waist, rim, bowl * 0.6), y=stem + bowl * 0.4),
        ],
    }


def _house(rng: Generator) -> Object:
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
    return {"walls": [at(box(width, height, depth), y=height / 2)], "roof": roofs}


def _lamp(rng: Generator) -> Object:
    pole, shade = rng.uniform(0.6, 1.3), rng.uniform(0.25, 0.45)
    return {
        "base": [_disc(rng.uniform(0.18, 0.35))],
        "pole": [frustum(0.03, 0.03, pole)],
        "shade": [at(frustum(shade, shade * rng.uniform(0.4, 0.9), rng.uniform(0.2, 0.45)), y=pole - 0.1)],
    }


def _mug(rng: Generator) -> Object:
    radius, height = rng.uniform(0.25, 0.45), rng.uniform(0.45, 0.9)
    handle = rng.uniform(0.12, 0.25)
    return {
        "body": [_disc(radius), frustum(radius, radius * rng.uniform(0.9, 1.25), height)],
        "handle": [at(torus(handle, 0.035, np.pi), radius, height / 2)],
    }


def _parasol(rng: Generator) -> Object:
    pole, radius, drop = rng.uniform(0.8, 1.4), rng.uniform(0.45, 0.9), rng.uniform(0.15, 0.4)
    base = {"base": [_disc(rng.uniform(0.15, 0.3))]} if rng.random() < 0.6 else {}
    return base | {"pole": [frustum(0.03, 0.03, pole)], "canopy": [at(frustum(radius, 0.0, drop), y=pole - drop)]}


def _rocket(rng: Generator) -> Object:
    radius, height, nose = rng.uniform(0.12, 0.25), rng.uniform(0.7, 1.3), rng.uniform(0.25, 0.6)
    fin, count = rng.uniform(0.15, 0.35), rng.integers(3, 5)
    fins = [at(box(2 * (radius + fin), 0.3, 0.03), y=0.15, turn=np.pi * i / count) for i in range(count)]
    return {"body": [frustum(radius, radius, height)], "nose": [at(frustum(radius, 0.0, nose), y=height)], "fin": fins}


def _snowman(rng: Generator) -> Object:
    radii = rng.uniform(0.35, 0.5) * np.cumprod([1, rng.uniform(0.65, 0.85), rng.uniform(0.65, 0.85)])
    centres = np.cumsum([radii[0], 0.85 * (radii[0] + radii[1]), 0.85 * (radii[1] + radii[2])])
    balls = [at(ellipsoid(r, r * rng.uniform(0.85, 1.1), r), y=y) for r, y in zip(radii, centres, strict=True)]
    return {"body": balls[:2], "head": balls[2:]}


def _stool(rng: Generator) -> Object:
    radius, height = rng.uniform(0.2, 0.4), rng.uniform(0.4, 0.9)
    legs = _legs(rng, 1.4 * radius, 1.4 * radius, height, rng.integers(3, 5))
    seat = [
        at(_disc(radius), y=height),
        at(frustum(radius, radius, 0.07), y=height),
        at(_disc(radius), y=height + 0.07),
    ]
    return {"seat": seat, "leg": legs}


def _table(rng: Generator) -> Object:
    width, depth, height = rng.uniform(0.8, 1.6), rng.uniform(0.6, 1.0), rng.uniform(0.45, 0.8)
    if rng.random() < 0.5:
        top = [at(box(width, 0.06, depth), y=height)]
    else:
        top = [at(_disc(width / 2), y=height), at(frustum(width / 2, width / 2, 0.06), y=height)]
        depth = width
    return {"top": top, "leg": _legs(rng, width * 0.65, depth * 0.65, height)}


def _tree(rng: Generator) -> Object:
    trunk, radius = rng.uniform(0.2, 0.5), rng.uniform(0.3, 0.55)
    crown, y = [], trunk
    for _ in range(rng.integers(1, 4)):
        height = rng.uniform(0.35, 0.6)
        crown.append(at(frustum(radius, 0.0, height), y=y))
        y, radius = y + height * 0.6, radius * 0.8
    return {"trunk": [frustum(0.07, 0.05, trunk)], "crown": crown}


def _vase(rng: Generator) -> Object:
    radii = np.array([0.15, rng.uniform(0.2, 0.45), rng.uniform(0.1, 0.35), rng.uniform(0.12, 0.4)])
    heights = rng.uniform(0.2, 0.45, 3)
    levels = np.cumsum([0, *heights])
    sides = [at(frustum(a, b, h), y=y) for a, b, h, y in zip(radii, radii[1:], heights, levels, strict=False)]
    return {"bottom": [_disc(radii[0])], "body": sides[:2], "neck": sides[2:]}


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


# Of each class the parts that its objects may have; some objects lack some.
PARTS = {
    "airplane": ("body", "wing", "tail"),
    "barbell": ("bar", "weight"),
    "bench": ("seat", "leg", "back"),
    "bottle": ("body", "shoulder", "neck"),
    "chair": ("seat", "back", "leg", "arm"),
    "cup": ("bottom", "side"),
    "goblet": ("foot", "stem", "bowl"),
    "house": ("walls", "roof"),
    "lamp": ("base", "pole", "shade"),
    "mug": ("body", "handle"),
    "parasol": ("base", "pole", "canopy"),
    "rocket": ("body", "nose", "fin"),
    "snowman": ("body", "head"),
    "stool": ("seat", "leg"),
    "table": ("top", "leg"),
    "tree": ("trunk", "crown"),
    "vase": ("bottom", "body", "neck"),
}


def sample(name: str, rng: Generator, num_points: int = NUM_POINTS, scanned: bool = True) -> np.ndarray:
    """One object of a class as points ``[num_points, 3]``, uniform on its surface; see `labelled_sample`."""
    return labelled_sample(name, rng, num_points, scanned)[0]


def labelled_sample(
    name: str, rng: Generator, num_points: int = NUM_POINTS, scanned: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """One object of a class, and the parts of its points.

    Args:
        name: one of `CLASSES`.
        rng: of the proportions, the points, and how it was scanned.
        num_points: points to draw.
        scanned: turn, tilt, stretch, hide a side and add noise; else the clean object as it stands.

    Returns:
        Points ``[num_points, 3]``, uniform on its surface, and indices int64 ``[num_points]`` into the class's `PARTS`.
    """
    parts = CLASSES[name](rng)
    surfaces = [(PARTS[name].index(part), *one) for part, mine in parts.items() for one in mine]
    areas = np.array([area for _, area, _ in surfaces])

    def surface(n: int) -> tuple[np.ndarray, np.ndarray]:
        counts = rng.multinomial(n, areas / areas.sum())
        points = np.concatenate([draw(rng, count) for (_, _, draw), count in zip(surfaces, counts, strict=True)])
        points -= (points.max(0) + points.min(0)) / 2
        order = _permutation(rng, n)
        labels = np.repeat([part for part, _, _ in surfaces], counts)
        return (points / np.linalg.norm(points, axis=1).max())[order], labels[order]

    if not scanned:
        return surface(num_points)
    hidden = rng.uniform(0, 0.35)
    points, labels = surface(int(num_points / (1 - hidden)) + 1)
    points = points * rng.uniform(0.8, 1.25, 3)
    points = points @ rotation(0, rng.normal(0, 0.12)).T @ rotation(1, rng.uniform(0, 2 * np.pi)).T
    direction = rng.normal(size=3)
    seen = np.argsort(points @ direction)[:num_points]
    noise = rng.normal(0, rng.uniform(0.005, 0.03), (num_points, 3))
    order = _permutation(rng, num_points)
    return (points[seen] + noise)[order], labels[seen][order]


def _permutation(rng: Generator, n: int) -> np.ndarray:
    """In the order in which NumPy puts the rows of an array ``[n, 3]``; that of n numbers is another one."""
    return rng.permutation(np.arange(n)[:, None])[:, 0]


def source(root: str, split: str, num_points: int, variant: str | None = None) -> Source:
    """A split of the procedural set. The splits draw from different random streams, an object's from its own.

    Args:
        root: not read, which a note says of any but "" and the default, "data".
        split: "train" or "test".
        num_points: ignored.
        variant: there are none, so None.

    Raises:
        DataError: a variant.
    """
    found = source_with_parts(root, split, num_points, variant)

    def clouds(count: int) -> Iterator[Cloud]:
        return (Cloud(cloud.points) for cloud in found.clouds(count))

    return replace(found, layout=_layout(split), clouds=clouds, point_labels=False, parts=None)


def source_with_parts(root: str, split: str, num_points: int, variant: str | None = None) -> Source:
    """`source`, with the parts of the points."""
    refuse_variant("shapes", variant)
    if root not in ("", "data"):
        say_once(f"note: {root} is not read: data.name=shapes makes its objects on the spot")
    names = list(CLASSES)
    labels = np.arange(PER_CLASS[split] * len(names)) % len(names)
    parts = [(part, label) for label, name in enumerate(names) for part in PARTS[name]]
    first = [sum(len(PARTS[name]) for name in names[:label]) for label in range(len(names))]

    def clouds(count: int) -> Iterator[Cloud]:
        for index, label in enumerate(labels):
            rng = np.random.default_rng([0, list(PER_CLASS).index(split), index])
            points, point_labels = labelled_sample(names[label], rng)
            yield Cloud(points.astype(np.float32), point_labels + first[label])

    objects = tuple(f"{names[label]}_{split}_{index // len(names):04}" for index, label in enumerate(labels))
    return Source(f"{_layout(split)}, with parts", Path("shapes"), _FILES, tuple(names), objects, labels,
                  NUM_POINTS, clouds, point_labels=True, parts=Parts(*zip(*parts, strict=True)))  # fmt: skip


def _layout(split: str) -> str:
    return f"procedural, {PER_CLASS[split]} objects a class"

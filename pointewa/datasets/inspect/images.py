"""What to know about images before training on them: how many of which size, and which occur twice."""

import hashlib
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from pointewa.datasets.source import Source, progress


def inspect(sources: Mapping[str, Source]) -> dict[str, Any]:
    """What is there, as plain values: of each split where and in which layout, its classes and sizes; images whose
    pixels are equal, within a split and between the two.

    Args:
        sources: the splits by name.

    Raises:
        DataError: a file that cannot be read.
    """
    report: dict[str, Any] = {"splits": {}, "same_pixels": {}}
    found: dict[str, list[bytes]] = {}
    for split, source in sources.items():
        sizes: Counter[tuple[int, int]] = Counter()
        found[split] = []
        for image in progress(source.clouds(0), f"reading {split}", len(source)):
            sizes[image.points.shape[:2]] += 1
            found[split].append(_fingerprint(image.points))
        counts = np.bincount(source.labels, minlength=len(source.class_names)).tolist()
        report["splits"][split] = {
            "path": str(source.path),
            "layout": source.layout,
            "images": len(source),
            "sizes": {f"{width} x {height}": count for (height, width), count in sizes.most_common()},
            "classes": dict(zip(source.class_names, counts, strict=True)),
        }
    for a, b in (("train", "train"), ("test", "test"), ("train", "test")):
        report["same_pixels"][f"{a} and {b}"] = _twice(found[a], found[b], sources[a], sources[b], within=a == b)
    return report


def _fingerprint(pixels: np.ndarray) -> bytes:
    return hashlib.sha256(str(pixels.shape).encode() + pixels.tobytes()).digest()


def _twice(a: list[bytes], b: list[bytes], of_a: Source, of_b: Source, within: bool) -> dict[str, Any]:
    """Images of ``b`` that have the pixels of one of ``a``, of an earlier one ``within`` a split."""
    first: dict[bytes, int] = {}
    for index, one in enumerate(a):
        first.setdefault(one, index)
    pairs = [
        (first[one], index) for index, one in enumerate(b) if one in first and not (within and first[one] == index)
    ]
    return {
        "images": len(pairs),
        "of_two_classes": sum(of_a.labels[i] != of_b.labels[j] for i, j in pairs).item() if pairs else 0,
        "such_as": [of_a.object_names[pairs[0][0]], of_b.object_names[pairs[0][1]]] if pairs else [],
    }

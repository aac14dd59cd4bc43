"""Look at a data set as it lies on disk, check it, pack it into one file, or fetch it.

python -m tools.prepare_data inspect data.name=modelnet40 data.root=/data
python -m tools.prepare_data verify data.name=scanobjectnn data.root=/data data.variant=obj_bg
python -m tools.prepare_data pack data.name=folder data.root=my_meshes --points 4096 --out my_meshes.h5
python -m tools.prepare_data download data.name=modelnet40 data.root=data
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import datasets
from datasets import packed
from datasets.download import ARCHIVES, download
from datasets.download import check as check_archive
from datasets.inspection import degenerate, duplicates, repeated_points, up_axis
from datasets.prepare import prepare, unit_sphere
from datasets.source import Cloud, Source
from pointewa.config import Config
from pointewa.errors import DataError
from tools import cli

SPLITS = ("train", "test")
_LOOK = 1024  # points of an object that are looked at
_MESH_POINTS = 8192  # packed of an object whose source has any number


def sources(config: Config) -> dict[str, Source]:
    """Both splits as they are on disk."""
    data = config.data
    return {split: datasets.open_source(data.name, data.root, split, 1, data.variant) for split in SPLITS}


def read(source: Source, split: str) -> tuple[Tensor, list[int], list[int]]:
    """At most `_LOOK` points of each object ``[N, _LOOK, 3]``, drawn at random; how many points each has; and which
    have coordinates that are not finite (their points are zeros)."""
    console, rng = Console(stderr=True), np.random.default_rng(0)
    clouds = track(source.clouds(_LOOK), f"reading {split}", len(source), console=console, transient=True,
                   disable=not console.is_terminal)  # fmt: skip
    points, sizes, broken = torch.zeros(len(source), _LOOK, 3), [], []
    for index, cloud in enumerate(clouds):
        size = len(cloud.points)
        sizes.append(size)
        if not np.isfinite(cloud.points).all():
            broken.append(index)
        elif size:
            chosen = rng.permutation(size)[np.arange(_LOOK) % size] if size != _LOOK else slice(None)
            points[index] = torch.from_numpy(cloud.points[chosen])
    return points, sizes, broken


def inspect(config: Config) -> dict[str, Any]:
    """What is there: layout, counts, points, what is wrong with clouds, duplicates, which way is up."""
    found, points = sources(config), {}
    report: dict[str, Any] = {"dataset": config.data.name, "splits": {}}
    for split, source in found.items():
        clouds, sizes, broken = read(source, split)
        points[split] = unit_sphere(clouds)
        report["splits"][split] = {
            "path": str(source.path),
            "layout": source.layout,
            "objects": len(source),
            "points": [min(sizes), max(sizes)],
            "classes": dict(zip(source.class_names, np.bincount(source.labels, minlength=len(source.class_names)).tolist(), strict=True)),
            "not_finite": [source.object_names[index] for index in broken],
            "collapsed": [source.object_names[index] for index in collapsed(points[split]).nonzero().flatten().tolist()],
            "with_repeated_points": int((repeated(points[split]) > 0).sum()),
            "largest_norm": round(clouds.norm(dim=-1).max().item(), 4),
        }
    return report


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = cli.parser(*__doc__.split("\n\n", 1))


if __name__ == "__main__":
    cli.run(main)

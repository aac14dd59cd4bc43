"""Inspect a data set as it is on disk, verify it, pack it into one file, or download it.

python -m tools.prepare_data inspect data.name=modelnet40 data.root=/data
python -m tools.prepare_data verify data.name=scanobjectnn data.root=/data data.variant=obj_bg
python -m tools.prepare_data pack data.name=folder data.root=meshes --points 4096 --out meshes.h5
python -m tools.prepare_data download data.name=modelnet40 data.root=data
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pointewa import datasets
from pointewa.config import Config
from pointewa.datasets import packed
from pointewa.datasets.inspect import images, report
from pointewa.datasets.inspect.download import download
from pointewa.datasets.prepare import prepare
from pointewa.datasets.source import Cloud, Source
from pointewa.errors import ConfigError, DataError, counted
from pointewa.tasks import task_class
from pointewa.tools import cli
from pointewa.train.trainer import duration

SECONDS = 120  # of inspect's search for objects that occur twice
_ABOUT = {
    "folder": "your own clouds and meshes, a folder for each class",
    "images": "images in place of clouds, in train/<class> and test/<class>; data.root=gratings makes some",
    "labeled_psb": "meshes of 19 categories whose points are labelled by parts; WHAT=download says more",
    "modelnet40": "CAD models of 40 classes; WHAT=download tries its mirrors",
    "scanobjectnn": "scans of 15 classes; from its authors, WHAT=download says where",
    "shapenet55": "CAD models of 55 classes; from its authors, WHAT=download says where",
    "shapenetpart": "CAD models of 16 categories whose points are labelled by parts; WHAT=download says where",
    "sydney": "LiDAR scans of 14 classes in streets, four folds; from its authors, WHAT=download says where",
    "shapes": "made on the spot: there is nothing to fetch",
}
_MESH_POINTS = 8192  # packed per object if the source can give any number


def sources(config: Config) -> dict[str, Source]:
    """Both splits as they are on disk."""
    data, task = config.data, task_class(config.train.task)
    found = {
        split: datasets.open_source(
            data.name,
            data.root,
            split,
            1,
            data.variant,
            data.background,
            data.normalize,
            task.needs_labels,
            task.point_labels,
        )
        for split in ("train", "test")
    }
    return found


def sources_of_clouds(config: Config) -> dict[str, Source]:
    """Both splits, of clouds."""
    found, name = sources(config), config.data.name
    if found["train"].images:
        raise DataError(f"data.name: {name} has images, which training reads as they are: choose a set of clouds, or "
                        "WHAT=inspect")  # fmt: skip
    return found


def inspect(args: argparse.Namespace, config: Config, console: Console) -> dict[str, Any]:
    """Show what is on disk."""
    there = sources(config)
    if there["train"].images:
        return inspect_images(args, config, console, there)
    seconds = SECONDS if args.seconds is None else args.seconds
    found = report.inspect(there, seconds or math.inf)
    splits = found["splits"]
    table = Table(title=f"{config.data.name} as it is on disk")
    for column in ("", *splits):
        table.add_column(column, justify="right" if column else "left")

    def row(title: str, value: Any) -> None:
        table.add_row(title, *(str(value(split)) for split in splits.values()))

    row("layout", lambda split: split["layout"])
    row("objects", lambda split: split["objects"])
    row(
        "points of an object",
        lambda split: " to ".join(map(str, sorted({split["fewest_points"], split["most_points"]}))),
    )
    if splits["train"]["parts"]:
        row("parts", lambda split: sum(map(len, split["parts"].values())))
    row("largest norm", lambda split: f"{split['largest_norm']:.3f}")
    row("largest offset of a mean", lambda split: f"{math.hypot(*split['largest_offset']['mean']):.3f}")
    row("not finite", lambda split: len(split["not_finite"]))
    row("with points left out", lambda split: len(split["with_points_left_out"]))
    row("points on one line", lambda split: len(split["degenerate"]))
    row(
        "with repeated points",
        lambda split: "-" if split["with_repeated_points"] is None else split["with_repeated_points"],
    )
    table.add_section()
    for name in splits["train"]["classes"]:
        row(name, lambda split, name=name: split["classes"][name])
    console.print(table)
    for split in splits.values():
        for kind in ("not_finite", "with_points_left_out", "degenerate"):
            if split[kind]:
                console.print(
                    f"{kind.replace('_', ' ')}: {', '.join(split[kind][:5])}{', ...' * (len(split[kind]) > 5)}"
                )
    for name, split in splits.items():
        mean = split["largest_offset"]["mean"]
        if math.hypot(*mean) > 1000:
            console.print(
                f"{name}: far from the origin, as {split['largest_offset']['object']} at "
                f"({', '.join(f'{value:.10g}' for value in mean)}): centred in float64 when it is loaded",
                highlight=False, soft_wrap=True, markup=False,
            )  # fmt: skip
        for one, shares in (split["parts"] or {}).items() if name == "train" else ():
            console.print(f"{one}: {', '.join(f'{part} {100 * share:.0f} %' for part, share in shares.items())}",
                          highlight=False, soft_wrap=True, markup=False)  # fmt: skip
        for one, problem in list(split["refused"].items())[:5]:
            console.print(f"{name}: {one}: {problem}", highlight=False, soft_wrap=True, markup=False)
        for kind, files in split["files_left_out"].items():
            console.print(f"{name}: left out, {kind}: {len(files)}, {', '.join(files[:5])}{', ...' * (len(files) > 5)}",
                          highlight=False, soft_wrap=True, markup=False)  # fmt: skip
    for kind, twice in found["in_train_and_test"].items():
        text = f"{counted(twice['pairs'], 'pair')} of a training and a test object ({kind.replace('_', ' ')})"
        if twice["pairs"]:
            text += f": {counted(twice['objects_of_test'], 'test object')}, "
            text += f"{counted(twice['of_two_classes'], 'pair')} under two classes"
            text += f", such as {' and '.join(twice['such_as'])}"
        console.print(text, highlight=False, soft_wrap=True)
    if left_out := found["pairs_not_compared"]:
        console.print(
            f"left out within {seconds:g} s: {counted(left_out, 'pair')} that look less alike; --seconds allows more",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
    up = found["up"]
    agree = f"{100 * up['agreement']:.0f} % of the classes agree"
    console.print(
        f"up: {up['direction'] or 'unclear'}, by the side on which objects can stand ({agree})", highlight=False
    )
    return found


def inspect_images(
    args: argparse.Namespace, config: Config, console: Console, sources: dict[str, Source]
) -> dict[str, Any]:
    """`inspect`, of images."""
    if args.seconds is not None:
        raise ConfigError("--seconds: only clouds are searched for look-alikes: leave it out")
    found = images.inspect(sources)
    splits = found["splits"]
    table = Table(title=f"{config.data.name} as it is on disk")
    for column in ("", *splits):
        table.add_column(column, justify="right" if column else "left")
    table.add_row("layout", *(split["layout"] for split in splits.values()))
    table.add_row("images", *(str(split["images"]) for split in splits.values()))
    for size in list(dict.fromkeys(size for split in splits.values() for size in split["sizes"]))[:5]:
        table.add_row(f"of {size} pixels", *(str(split["sizes"].get(size, 0)) for split in splits.values()))
    if max(len(split["sizes"]) for split in splits.values()) > 5:
        table.add_row("different sizes", *(str(len(split["sizes"])) for split in splits.values()))
    table.add_section()
    for name in splits["train"]["classes"]:
        table.add_row(name, *(str(split["classes"][name]) for split in splits.values()))
    console.print(table)
    for where, twice in found["same_pixels"].items():
        a, b = where.split(" and ")
        text = f"{counted(twice['images'], 'image')} of {b} with the pixels of {'another' if a == b else 'one of ' + a}"
        if twice["images"]:
            text += f": {twice['of_two_classes']} under another class, such as {' and '.join(twice['such_as'])}"
        console.print(text, highlight=False, soft_wrap=True, markup=False)
    return found


def verify(args: argparse.Namespace, config: Config, console: Console) -> dict[str, Any]:
    """Check whether it is the complete official set."""
    good, bad = report.verify(config.data.name, sources_of_clouds(config))
    for line in good:
        console.print(f"ok     {line}", highlight=False, soft_wrap=True, markup=False)
    if bad:
        raise DataError(
            "\n".join(
                [
                    f"{config.data.name}: {counted(len(bad), 'problem')}",
                    *bad,
                    "get the data again, or use them as they are",
                ]
            )
        )
    return {"ok": good}


def pack(args: argparse.Namespace, config: Config, console: Console) -> dict[str, Any]:
    """Write one file, in farthest-point order."""
    found, data = sources_of_clouds(config), config.data
    if args.int16 and not found["train"].normalize:
        raise ConfigError(
            f"--int16: {data.name} is not normalised to the unit sphere, which the grid spans: leave it out"
        )
    available = [one.num_points for one in found.values() if one.num_points]
    points = args.points or (min(available) if available else _MESH_POINTS)
    if available and points > min(available):
        raise DataError(f"--points: {found['train'].path}: an object has {min(available)}, found {points}: lower it")
    variant = f"_{found['train'].variant}" if found["train"].variant else ""
    if data.background == "drop":
        variant = f"_without_background{variant}"  # not the name under which the complete set is found
    if data.normalize != "auto":
        variant = f"_{data.normalize}{variant}"
    root = Path(data.root)
    out = args.out or (root if root.is_dir() else root.parent) / f"{data.name}{variant}_{points}.h5"
    if out.exists():
        raise ConfigError(f"--out: {out} exists: choose another name, or remove it first")
    total, done, started = sum(map(len, found.values())), 0, time.perf_counter()

    def watched(clouds: Iterator[Cloud]) -> Iterator[Cloud]:
        nonlocal done
        for cloud in clouds:
            yield cloud
            done += 1
            if done == min(total, 256):  # by then the first objects have been read, ordered and written
                seconds = (time.perf_counter() - started) / done * total
                console.print(
                    f"{counted(total, 'object')} of {counted(points, 'point')} will take about {duration(seconds)}",
                    highlight=False,
                )

    splits = {
        split: (one, points, watched(prepare(one, points, f"packing {split}", args.int16)))
        for split, one in found.items()
    }
    packed.write(out, splits, args.int16)
    seconds = time.perf_counter() - started
    figures = {
        "out": str(out),
        "objects": total,
        "points": points,
        "seconds": round(seconds, 1),
        "bytes": out.stat().st_size,
    }
    console.print(
        f"{out}: {counted(total, 'object')} of {counted(points, 'point')}, {out.stat().st_size / 2**20:.0f} MiB, "
        f"in {seconds:.0f} s, {total / seconds * 3600:,.0f} objects an hour", highlight=False, soft_wrap=True,
    )  # fmt: skip
    return figures


def fetch(args: argparse.Namespace, config: Config, console: Console) -> dict[str, Any]:
    """Download a set."""
    folder = download(config.data.name, Path(config.data.root))
    console.print(f"{folder} is here; verify it with make data DATASET={config.data.name} WHAT=verify", highlight=False,
                  soft_wrap=True)  # fmt: skip
    return {"folder": str(folder)}


ACTIONS = {"inspect": inspect, "verify": verify, "pack": pack, "download": fetch}


def explain(config: Config, console: Console) -> dict[str, Any]:
    """Say what can be done, and with which sets; looks at no data and fetches none."""
    name, purposes = config.data.name, {action: what.__doc__ for action, what in ACTIONS.items()}
    lines = ["Say what to do with a data set:", ""]
    lines += [f"  make data WHAT={action:<10} {purpose}" for action, purpose in purposes.items()]
    lines += ["", "and with which one, as it is at DATA_ROOT:", ""]
    lines += [f"  DATASET={one:<14} {_ABOUT.get(one, '')}".rstrip() for one in sorted(datasets.NAMES)]
    where = "" if name == "shapes" else " DATA_ROOT=/your/data"
    lines += ["", f"such as: make data WHAT=inspect DATASET={name}{where}"]
    console.print("\n".join(lines), highlight=False, soft_wrap=True, markup=False)
    return {"dataset": name, "what": purposes}


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = cli.parser(*__doc__.split("\n\n", 1))
    parser.add_argument("what", nargs="?", help=f"{', '.join(ACTIONS)}; without it, what these are")
    cli.add_config(parser)
    parser.add_argument("--out", type=Path, help="pack: file to write; default: beside the data")
    cli.add_number(parser, "--points", help="pack: points of an object; default: all that the source has")
    parser.add_argument(
        "--int16", action="store_true", help="pack: coordinates on a grid of 1/32767, in half the space"
    )
    limit = f"inspect: limit for finding objects that occur twice ({SECONDS}; 0: none)"
    cli.add_number(parser, "--seconds", 0, float, help=limit)
    args = parser.parse_intermixed_args(argv)
    if args.what and "=" in args.what:  # a key, and nothing that is to be done
        args.overrides, args.what = [args.what, *args.overrides], None
    if args.what not in (None, *ACTIONS):
        raise ConfigError(f"WHAT: expected one of {', '.join(ACTIONS)}, found {args.what!r}")
    cli.refuse_unused(
        args,
        args.what or "data without WHAT",
        {"out": ["pack"], "points": ["pack"], "int16": ["pack"], "seconds": ["inspect"]},
    )
    console = Console(stderr=args.json)
    config = cli.config_from(args)
    figures = ACTIONS[args.what](args, config, console) if args.what else explain(config, console)
    if args.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    cli.run(main)

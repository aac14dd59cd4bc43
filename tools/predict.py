"""Classify clouds and meshes from disk: ply, pcd, las, txt, npy, off, obj, stl, glb, and their like; or images.

With the model of a part segmentation, write which part each point belongs to, as name-parts.ply for each file.
docs/data.md lists what is read.

python -m tools.predict runs/shapes-tiny-ewa-seed0 chair.ply
python -m tools.predict runs/modelnet40-tiny-ewa-seed0 scans/*.pcd --up z --json
python -m tools.predict runs/modelnet40-tiny-ewa-seed0 scans/*.pcd --precision auto
python -m tools.predict runs/parts chair.ply --class chair --out labelled
"""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import pointewa
from pointewa.datasets.files import read_points
from pointewa.datasets.images import read_image
from pointewa.datasets.source import progress
from pointewa.errors import ConfigError, DataError, counted, first_line
from pointewa.inference.labelled_ply import write_labelled
from pointewa.inference.predict import ImagePredictor, PartPredictor
from pointewa.safe.files import printable, reading
from pointewa.tools import cli
from pointewa.viz.parts import part_colours

TOP = 3


def _points(model: pointewa.Predictor, path: Path) -> np.ndarray:
    """As many on a mesh as in `pointewa.datasets.layouts.folder`."""
    return read_points(path, samples=max(10_000, 2 * model.num_points))


def classify(model: pointewa.Predictor, path: Path, up: str | None) -> dict[str, Any]:
    """The classes and probabilities of one file.

    Raises:
        DataError: it cannot be read, or holds no cloud that a model can take.
    """
    if isinstance(model, ImagePredictor):
        with reading(path, "an image"):
            data = path.read_bytes()
        seen = read_image(path, data)
        size = {"height": seen.shape[0], "width": seen.shape[1]}
    else:
        seen = _points(model, path)
        size = {"points": len(seen)}
    try:
        name, probabilities = model.predict(seen, up=up)
    except ValueError as error:
        raise DataError(f"{path}: {first_line(error)}: remove or repair the file") from error
    ranked = sorted(zip(model.class_names, probabilities.tolist(), strict=True), key=lambda pair: -pair[1])
    return {"file": str(path), **size, "class": name, "probabilities": dict(ranked)}


def segment(model: PartPredictor, path: Path, category: str, up: str | None, out: Path) -> dict[str, Any]:
    """Write the parts of one file's points, of a mesh those of points drawn on it, and count them.

    Raises:
        DataError: it cannot be read, or holds no cloud that a model can take.
    """
    seen = _points(model, path)
    try:
        names, labels = model.predict(seen, category, up=up)
    except ValueError as error:
        raise DataError(f"{path}: {first_line(error)}: remove or repair the file") from error
    write_labelled(out, seen, labels, model.parts.names, part_colours(model.parts))
    counts = Counter(names.tolist())
    return {"file": str(path), "points": len(seen), "class": category, "parts": dict(counts.most_common()),
            "out": str(out)}  # fmt: skip


def written_to(files: list[Path], folder: Path | None) -> list[Path]:
    """For each file the one that its parts are written to: beside it, or in a folder.

    Raises:
        ConfigError: it would be an input, or that of another file too.
    """
    places = [(folder or path.parent) / f"{path.name.removesuffix(path.suffix)}-parts.ply" for path in files]
    inputs, taken = {path.resolve() for path in files}, {}
    for path, place in zip(files, places, strict=True):
        if place.resolve() in inputs:
            raise ConfigError(f"{place}: the parts of {path} would be written over it: name another folder with --out")
        if place.resolve() in taken:
            raise ConfigError(f"{path} and {taken[place.resolve()]}: the parts of both would be written to {place}: "
                              "give them one by one, with --out")  # fmt: skip
        taken[place.resolve()] = path
    return places


def parts_table(predictions: list[dict[str, Any]]) -> Table:
    """A row per file: its parts, and how many of its points each has."""
    table = Table()
    table.add_column("file", overflow="fold")
    table.add_column("parts")
    for one in predictions:
        shares = [f"{name} {100 * count / one['points']:.1f} %" for name, count in one["parts"].items()]
        table.add_row(escape(printable(one["file"])), escape(", ".join(shares)))
    return table


def as_table(predictions: list[dict[str, Any]]) -> Table:
    """A row per file, the most probable classes first."""
    table = Table()
    table.add_column("file", overflow="fold")
    for place in ("class", "second", "third")[:TOP]:
        table.add_column(place)
    for one in predictions:
        best = list(one["probabilities"].items())[:TOP]
        table.add_row(escape(printable(one["file"])), *(f"{escape(name)} {100 * share:.1f} %" for name, share in best))
    return table


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = cli.parser(*__doc__.split("\n\n", 1))
    parser.add_argument("model", help="run folder, .safetensors or .ckpt")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="cloud, mesh or image")
    cli.add_up(parser, "axis of the files that points up (default: as in training)")
    parser.add_argument("--class", dest="category", metavar="NAME", help="of the objects, for a part segmentation")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for the parts (default: beside each file)")
    parser.add_argument("--device", default="auto", help="cpu, cuda; auto: a GPU where there is one")
    cli.add_precision(parser)
    args = parser.parse_args(argv)
    model = pointewa.load(args.model, args.device, args.precision or "float32")
    of_parts = isinstance(model, PartPredictor)
    if of_parts:
        if args.category not in model.class_names:
            found = "nothing" if args.category is None else repr(args.category)
            raise ConfigError(f"--class: the model has to be told what the objects are: expected one of "
                              f"{', '.join(model.class_names)}, found {found}")  # fmt: skip
    else:
        for flag, value in (("--class", args.category), ("--out", args.out)):
            if value is not None:
                raise ConfigError(f"{flag}: for a part segmentation, and {args.model} classifies: leave it out")
    if isinstance(model, ImagePredictor):
        if args.up:
            raise ConfigError(f"--up: for point clouds, and {args.model} classifies images: leave it out")
    elif args.up is None and model.up != "y":
        note = f"note: the files are turned from {model.up} up to y up, as in training; --up names another axis"
        print(note, file=sys.stderr)
    places = written_to(args.files, args.out) if of_parts else args.files
    predictions, failed = [], []
    title = "segmenting" if of_parts else "classifying"
    for path, place in progress(list(zip(args.files, places, strict=True)), title, len(args.files)):
        try:
            if of_parts:
                predictions.append(segment(model, path, args.category, args.up, place))
            else:
                predictions.append(classify(model, path, args.up))
        except DataError as error:
            failed.append({"file": str(path), "error": str(error)})
    if args.json:
        print(json.dumps({"model": args.model, "precision": model.precision, "predictions": predictions,
                          "failed": failed}))  # fmt: skip
    elif predictions:
        Console().print(parts_table(predictions) if of_parts else as_table(predictions))
        for one in predictions if of_parts else ():
            print(f"wrote {one['out']}")
    for one in failed:
        print(one["error"], file=sys.stderr)
    if model.precision != "float32":
        print(f"note: computed in {model.precision}; float32, the default, may differ on a few", file=sys.stderr)
    if failed:
        done = "segmented" if of_parts else "classified"
        raise DataError(f"{len(failed)} of {counted(len(args.files), 'file')} could not be {done}")


if __name__ == "__main__":
    cli.run(main)
